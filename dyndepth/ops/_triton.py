"""When Triton providers can run: on a GPU, or anywhere under Triton's interpreter (TRITON_INTERPRET=1, for tests)."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from dyndepth import env


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def missing() -> str | None:
    """Why no Triton provider can run on this machine, or None. Does not import Triton."""
    if not _installed():
        return "Triton is not installed"
    if not env.triton_interpret() and not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def declines(first: Tensor, *_args: object, **_kwargs: object) -> str | None:
    """Triton providers take GPU tensors, or CPU tensors under the interpreter; all arguments share the first one's device."""
    if first.device.type == "cuda" or (env.triton_interpret() and first.device.type == "cpu"):
        return None
    return f"tensors are on {first.device}, triton runs on a GPU"
