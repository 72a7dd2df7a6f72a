"""The tile that project_qkv and backfill_kv share: rows times the weight rows of some rotary pairs, both halves at once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot_pairs(
    x, weight, row_mask, rows, pairs, pair_mask, x_row, weight_row, WIDTH, HALF,
    BLOCK_ROWS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_INNER: tl.constexpr, SQUARE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """x [rows, WIDTH] times weight rows `pairs` and `HALF + pairs`, transposed: two fp32 tiles [BLOCK_ROWS, PAIRS].

    With SQUARE also the sum of x^2 per row, which an RMS norm in front of the product needs afterwards (x is read once).
    """
    inner = tl.arange(0, BLOCK_INNER)
    first = tl.zeros((BLOCK_ROWS, PAIRS), tl.float32)
    second = tl.zeros((BLOCK_ROWS, PAIRS), tl.float32)
    square = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, WIDTH, BLOCK_INNER):
        column = start + inner
        inside = column < WIDTH
        tile = tl.load(x + rows[:, None] * x_row + column[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0)
        mask = pair_mask[:, None] & inside[None, :]
        one = tl.load(weight + pairs[:, None].to(tl.int64) * weight_row + column[None, :], mask=mask, other=0.0)
        two = tl.load(weight + (HALF + pairs[:, None]).to(tl.int64) * weight_row + column[None, :], mask=mask, other=0.0)
        if EXACT:
            first = tl.dot(tile, tl.trans(one), first, input_precision="ieee")
            second = tl.dot(tile, tl.trans(two), second, input_precision="ieee")
        else:
            first = tl.dot(tile, tl.trans(one), first)
            second = tl.dot(tile, tl.trans(two), second)
        if SQUARE:
            wide = tile.to(tl.float32)
            square += tl.sum(wide * wide, axis=1)
    return first, second, square
