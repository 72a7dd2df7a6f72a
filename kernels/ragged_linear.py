"""ragged_linear in Triton: programs that stay, and walk over the tiles of the rows that are live.

How many tiles there are is decided on the device: `live` bounds a loop, so with nobody live no program loads a weight, and a
launch captured in a CUDA graph does the work of the moment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch


# Not specialised on the number of rows: a kernel of its own for 1 or 16 of them would be the same code.
@triton.jit(do_not_specialize=["rows"])
def _ragged_linear(
    x, weight, bias, gate_weight, gate_bias, residual, live, out, rows, outputs, width,
    ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    count = rows
    if live is not None:
        count = tl.minimum(tl.load(live), rows)
    row_tiles, column_tiles = tl.cdiv(count, BLOCK_ROWS), tl.cdiv(outputs, BLOCK_COLUMNS)
    # No loop-invariant motion: what is hoisted out of this loop sits in registers all through the one inside.
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), disable_licm=True):
        first_row, column_tile = 0, tile  # a GROUP of one row tile: the buffer is no longer than that
        if GROUP > 1:
            # Row tiles vary fastest within a group: programs that run together share weights in L2, and rows stay there.
            group = tile // (GROUP * column_tiles)
            within = tile - group * GROUP * column_tiles
            height = tl.minimum(row_tiles - group * GROUP, GROUP)
            first_row = (group * GROUP + within % height) * BLOCK_ROWS
            column_tile = within // height
        first_column = column_tile * BLOCK_COLUMNS
        row, column = first_row + tl.arange(0, BLOCK_ROWS), first_column + tl.arange(0, BLOCK_COLUMNS)
        row_mask, column_mask = row < count, column < outputs
        # 64-bit offsets end at the tile's corner: inside a tile 32 bits are enough.
        row_corner = tl.full((), first_row, tl.int64)
        sums, gates = _products(
            x + row_corner * width, weight, gate_weight, first_column.to(tl.int64) * width,
            row_mask, outputs - first_column, width, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, EVEN, EXACT,
        )  # fmt: skip
        y = _rounded(sums, bias, column, column_mask, x)
        if gate_weight is not None:
            gate = _rounded(gates, gate_bias, column, column_mask, x)
            y = _like(_like(_activated(gate, ACTIVATION), x) * y, x)
        corner = row_corner * outputs + first_column
        place = tl.arange(0, BLOCK_ROWS)[:, None] * outputs + tl.arange(0, BLOCK_COLUMNS)[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        if residual is not None:
            y += tl.load(residual + corner + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + corner + place, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _products(
    x, weight, gate_weight, corner, row_mask, columns, width,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """x times a tile of each weight, transposed: two fp32 tiles [BLOCK_ROWS, BLOCK_COLUMNS]; x is loaded once for both.

    `corner` is where the tile's first weight row begins, `columns` how many there are from it on. With EVEN the width is a
    multiple of BLOCK_INNER.
    """
    inner = tl.arange(0, BLOCK_INNER)
    x_place = tl.arange(0, BLOCK_ROWS)[:, None] * width + inner[None, :]
    # The last weight row stands in for those past the end: no mask. Rows of x past `live` have one: nobody should read them.
    w_place = tl.minimum(tl.arange(0, BLOCK_COLUMNS), columns - 1)[:, None] * width + inner[None, :]
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    gates = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, width, BLOCK_INNER):
        x_mask, w_mask = row_mask[:, None], None
        if not EVEN:
            w_mask = (start + inner < width)[None, :]
            x_mask = x_mask & w_mask
        tile = tl.load(x + start + x_place, mask=x_mask, other=0.0)
        sums = _dot(tile, _weights(weight + corner + start + w_place, w_mask), sums, EXACT)
        if gate_weight is not None:
            gates = _dot(tile, _weights(gate_weight + corner + start + w_place, w_mask), gates, EXACT)
    return sums, gates


@triton.jit
def _weights(place, mask):
    if mask is None:
        tile = tl.load(place)
    else:
        tile = tl.load(place, mask=mask, other=0.0)
    return tile


@triton.jit
def _dot(tile, weight, sums, EXACT: tl.constexpr):
    if EXACT:
        sums = tl.dot(tile, tl.trans(weight), sums, input_precision="ieee")
    else:
        sums = tl.dot(tile, tl.trans(weight), sums)
    return sums


@triton.jit
def _rounded(sums, bias, column, column_mask, x):
    """What a linear module returns: bias added in fp32, one rounding."""
    if bias is not None:
        sums += tl.load(bias + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    return _like(sums, x)


@triton.jit
def _like(y, x):
    """y, rounded to the dtype of x as a module would store it."""
    return y.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _activated(gate, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        opened = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        opened = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # (1 + tanh u) / 2 = sigmoid(2 u), which does not cancel where gates are negative; 2 sqrt(2 / pi) = 1.5957691...
        opened = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    return opened


def ragged_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    activation: str = "silu",
    residual: Tensor | None = None,
    live: Tensor | None = None,
) -> Tensor:
    """Host side; arguments as in dyndepth.ops.ragged_linear, already checked."""
    (rows, width), outputs = x.shape, weight.shape[0]
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    gated = gate_weight is not None
    config = launch.ragged_linear(rows, outputs, width, gated, launch.Device.of(x), x.element_size())
    group = 1 if rows <= config.block_rows else launch.RAGGED_LINEAR_GROUP // config.block_rows
    _ragged_linear[config.grid](
        x, weight, bias, gate_weight, gate_bias, residual, live, out, rows, outputs, width,
        ACTIVATION=activation if gated else "", BLOCK_ROWS=config.block_rows, BLOCK_COLUMNS=config.block_columns,
        BLOCK_INNER=config.block_inner, GROUP=group, EVEN=width % config.block_inner == 0, EXACT=x.dtype == torch.float32,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
