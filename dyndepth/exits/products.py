"""Products of the parts that exits are made of: heads, jumps, readouts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dyndepth.ops import ragged_linear
from dyndepth.ops._math import rms_normalise
from dyndepth.ops.ragged_linear import pays

#: Epsilon of the gain-free RMSNorm in front of every fitted map.
EPS = 1e-6


def normed(hidden: Tensor) -> Tensor:
    """`hidden / rms(hidden)` in its dtype, what fitted maps read; in one call, with a row's bits its own, where that pays."""
    if pays(hidden, hidden):
        return torch.ops.dyndepth_cpp.rms_norm(hidden, None, 0, EPS)
    return rms_normalise(hidden, EPS).to(hidden.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """torch's linear, or ops.ragged_linear where that pays: faster, and a row's bits do not depend on the rows beside it."""
    if pays(x, weight) and (residual is None or residual.is_contiguous()):
        return ragged_linear(x, weight, bias=bias, residual=residual)
    y = nn.functional.linear(x, weight, bias)
    return y if residual is None else residual + y
