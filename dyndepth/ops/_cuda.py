"""When CUDA C++ providers can run: on an NVIDIA GPU, with CuPy to compile and launch them."""

from __future__ import annotations

from torch import Tensor


def missing() -> str | None:
    """Why no CUDA C++ provider can run on this machine, or None. Does not import CuPy."""
    from dyndepth.cuda import compiler

    return compiler.missing()


def declines(first: Tensor, *_args: object, **_kwargs: object) -> str | None:
    """CUDA C++ providers take GPU tensors; all arguments share the first one's device."""
    return None if first.device.type == "cuda" else f"tensors are on {first.device}, cuda runs on a GPU"
