"""Host side of the CUDA C++ providers (sources: csrc/cuda). Needs CuPy; compiles through NVRTC at first use."""
