"""CUDA sources to loaded kernels: NVRTC through CuPy, cubins cached on disk by source and architecture.

An installed wheel needs no nvcc. Kernels are launched on torch's current stream and device; nothing synchronises.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import importlib.util
from typing import Any

import torch

from dyndepth import env
from dyndepth.files import replacing


@functools.cache
def missing() -> str | None:
    """Why no CUDA C++ provider can run on this machine, or None."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed (pip install cupy-cuda13x)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return "this is AMD hardware; the sources are CUDA"
    return None


def source(name: str) -> str:
    """The CUDA source `<name>.cu`."""
    return (importlib.resources.files("dyndepth._cuda_sources") / f"{name}.cu").read_text()


def compile_cubin(name: str, architecture: str) -> bytes:
    """Compile `<name>.cu` for an architecture such as `sm_90`; needs NVRTC but no GPU. Raises with the compiler's log."""
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(source(name), f"{name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"--gpu-architecture={architecture}", "--std=c++17"))
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{name}.cu for {architecture}: {error}\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def cubin(name: str, architecture: str) -> bytes:
    """compile_cubin with a cache on disk, keyed by the source, the architecture and NVRTC's version."""
    from cupy_backends.cuda.libs import nvrtc

    text = f"{source(name)}\0{architecture}\0{nvrtc.getVersion()}"
    path = env.cache_folder() / "cubin" / f"{name}-{architecture}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.cubin"
    if not path.exists():
        compiled = compile_cubin(name, architecture)
        with replacing(path) as temporary:
            temporary.write_bytes(compiled)
    return path.read_bytes()


@functools.cache
def kernel(name: str, function: str, device: int) -> Any:
    """A loaded kernel of `<name>.cu` for a device; call it as kernel(grid, block, arguments, stream=...)."""
    import cupy

    major, minor = torch.cuda.get_device_capability(device)
    with cupy.cuda.Device(device):
        return _module(name, f"sm_{major}{minor}", device).get_function(function)


@functools.cache
def _module(name: str, architecture: str, device: int) -> Any:
    import cupy

    module = cupy.cuda.function.Module()
    module.load(cubin(name, architecture))
    return module


def launch(name: str, function: str, device: int, grid: int, block: int, arguments: tuple[Any, ...]) -> None:
    """Launch on torch's current stream of `device`."""
    import cupy

    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device)
    with cupy.cuda.Device(device):
        kernel(name, function, device)((grid,), (block,), arguments, stream=stream)
