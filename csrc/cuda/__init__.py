"""CUDA C++ sources, installed as dyndepth._cuda_sources so that NVRTC finds them (dyndepth/cuda/compiler.py)."""
