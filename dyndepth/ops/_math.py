"""Arithmetic shared by the references. float64 stays float64, so every reference is also its own oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in at least float32, the precision statistics and norms are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def rms_normalise(x: Tensor, eps: float, gain: Tensor | None = None) -> Tensor:
    """x / rms(x) over the last axis, times gain; in wide(x)'s precision."""
    x = wide(x)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x if gain is None else x * gain
