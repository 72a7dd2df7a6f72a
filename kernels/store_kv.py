"""store_kv in Triton: rotary embedding and the page write, one small program per row and head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch


@triton.jit
def rotate_pair(first, second, cos, sin):
    """Half-split rotation of two fp32 tiles that hold channels i and i + rotary."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _store_kv(
    q, k, v, cos, sin, pos, slots, pages, live, out,
    q_row, q_head, k_row, k_head, v_row, v_head, plane, q_rows, kv_rows,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
    HAS_LIVE: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows_with_query = q_rows
    if HAS_LIVE:
        rows_with_query = tl.minimum(tl.load(live), q_rows)
    at = tl.load(pos + row)
    if head < HEADS:
        if row < rows_with_query:
            _rotate_one(q + row * q_row + head * q_head, out + (row * HEADS + head) * DIM, cos, sin, at, DIM, ROTARY, BLOCK)
    else:
        slot = tl.load(slots + row).to(tl.int64)
        if (row < kv_rows) & (slot >= 0):
            kv_head = head - HEADS
            target = pages + (slot * KV_HEADS + kv_head) * DIM
            _rotate_one(k + row * k_row + kv_head * k_head, target, cos, sin, at, DIM, ROTARY, BLOCK)
            channel = tl.arange(0, BLOCK)
            value = tl.load(v + row * v_row + kv_head * v_head + channel, mask=channel < DIM)
            tl.store(target + plane + channel, value, mask=channel < DIM)


@triton.jit
def _rotate_one(source, target, cos, sin, at, DIM: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    if ROTARY > 0:
        pair = channel < ROTARY
        first = tl.load(source + channel, mask=pair).to(tl.float32)
        second = tl.load(source + ROTARY + channel, mask=pair).to(tl.float32)
        angle_cos = tl.load(cos + at * ROTARY + channel, mask=pair)
        angle_sin = tl.load(sin + at * ROTARY + channel, mask=pair)
        first, second = rotate_pair(first, second, angle_cos, angle_sin)
        tl.store(target + channel, first.to(target.dtype.element_ty), mask=pair)
        tl.store(target + ROTARY + channel, second.to(target.dtype.element_ty), mask=pair)
    rest = (channel >= 2 * ROTARY) & (channel < DIM)
    tl.store(target + channel, tl.load(source + channel, mask=rest), mask=rest)


def store_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    pos: Tensor,
    slots: Tensor,
    pages: Tensor,
    live: Tensor | None = None,
) -> Tensor:
    """Host side; arguments as in dyndepth.ops.store_kv, already checked."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = k.shape[0]
    if rows == 0:
        return out
    config = launch.store_kv(rows, q.shape[1], k.shape[1], q.shape[2])
    _store_kv[config.grid](
        q, k, v, cos, sin, pos, slots, pages, live, out,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), pages.stride(0), q.shape[0], rows,
        HEADS=q.shape[1], KV_HEADS=k.shape[1], DIM=q.shape[2], ROTARY=0 if cos is None else cos.shape[1],
        BLOCK=config.block_columns, HAS_LIVE=live is not None, num_warps=config.num_warps,
    )  # fmt: skip
    return out
