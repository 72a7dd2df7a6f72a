"""Products of the parts that exits are made of: heads, jumps, readouts."""

from __future__ import annotations

from torch import Tensor, nn

from dyndepth.ops import ragged_linear
from dyndepth.ops.ragged_linear import pays


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """torch's linear, or ops.ragged_linear where that pays: faster, and a row's bits do not depend on the rows beside it."""
    if pays(x, weight) and (residual is None or residual.is_contiguous()):
        return ragged_linear(x, weight, bias=bias, residual=residual)
    y = nn.functional.linear(x, weight, bias)
    return y if residual is None else residual + y
