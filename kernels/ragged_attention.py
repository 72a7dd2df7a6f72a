"""ragged_attention in Triton: paged decode attention, the context split over programs (flash decoding, Dao et al. 2023).

A program serves the query heads of one K,V head (grouped-query attention reads each key once), for one row and one split of
its context. Positions and lengths are read on the device; splits past a row's context write an empty result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .numerics import tanh


@triton.jit
def _attend(
    q, pages, table, seq, pos, live, partial, out, scale, softcap, window, rows, max_pages, plane,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr, HAS_LIVE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = rows
    if HAS_LIVE:
        count = tl.minimum(tl.load(live), rows)
    if row >= count:
        return
    last = tl.load(pos + row)
    first = 0
    if window > 0:
        first = tl.maximum(0, last - window + 1)
    # Splits are whole blocks of keys, aligned to the row's first visible position.
    share = tl.cdiv(tl.cdiv(last + 1 - first, BLOCK_KEYS), SPLITS) * BLOCK_KEYS
    begin = first + split * share
    end = tl.minimum(begin + share, last + 1)
    table += tl.load(seq + row).to(tl.int64) * max_pages
    member, channel = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_DIM)
    heads = (row.to(tl.int64) * KV_HEADS + kv_head) * GROUP + member
    mask = (member < GROUP)[:, None] & (channel < DIM)[None, :]
    query = tl.load(q + heads[:, None] * DIM + channel[None, :], mask=mask, other=0.0)
    peak = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_GROUP,), tl.float32)
    total = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
    for start in range(begin, end, BLOCK_KEYS):
        position = start + tl.arange(0, BLOCK_KEYS)
        visible = position < end
        page = tl.load(table + position // PAGE, mask=visible, other=0).to(tl.int64)
        slot = page * PAGE + position % PAGE
        entry = (slot[:, None] * KV_HEADS + kv_head) * DIM + channel[None, :]
        inside = visible[:, None] & (channel < DIM)[None, :]
        key = tl.load(pages + entry, mask=inside, other=0.0)
        value = tl.load(pages + plane + entry, mask=inside, other=0.0)
        if EXACT:
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        else:
            score = tl.dot(query, tl.trans(key)) * scale
        if softcap > 0:
            score = softcap * tanh(score / softcap)
        score = tl.where(visible[None, :], score, float("-inf"))
        best = tl.maximum(peak, tl.max(score, axis=1))
        base = tl.where(best == float("-inf"), 0.0, best)  # -inf - -inf is NaN: keys that score -inf only weigh nothing
        shrink = tl.exp(peak - base)
        weight = tl.exp(score - base[:, None])
        mass = mass * shrink + tl.sum(weight, axis=1)
        total = total * shrink[:, None]
        if EXACT:
            total = tl.dot(weight, value, total, input_precision="ieee")
        else:
            total = tl.dot(weight.to(value.dtype), value, total)
        peak = best
    if SPLITS == 1:
        tl.store(out + heads[:, None] * DIM + channel[None, :], (total / mass[:, None]).to(out.dtype.element_ty), mask=mask)
    else:
        # [rows, heads, splits, DIM + 2]: the weighted sum, then peak and mass.
        place = partial + (heads * SPLITS + split) * (DIM + 2)
        tl.store(place[:, None] + channel[None, :], total, mask=mask)
        tl.store(place + DIM, peak, mask=member < GROUP)
        tl.store(place + DIM + 1, mass, mask=member < GROUP)


@triton.jit
def _combine(
    partial, live, out, rows,
    HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_DIM: tl.constexpr,
    HAS_LIVE: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    count = rows
    if HAS_LIVE:
        count = tl.minimum(tl.load(live), rows)
    if row >= count:
        return
    split, channel = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_DIM)
    at = row.to(tl.int64) * HEADS + head
    place = partial + (at * SPLITS + split) * (DIM + 2)
    peak = tl.load(place + DIM, mask=split < SPLITS, other=float("-inf"))
    mass = tl.load(place + DIM + 1, mask=split < SPLITS, other=0.0)
    weight = tl.exp(peak - tl.max(peak, axis=0))
    mask = (split < SPLITS)[:, None] & (channel < DIM)[None, :]
    total = tl.load(place[:, None] + channel[None, :], mask=mask, other=0.0)
    result = tl.sum(total * weight[:, None], axis=0) / tl.sum(mass * weight, axis=0)
    tl.store(out + at * DIM + channel, result.to(out.dtype.element_ty), mask=channel < DIM)


def ragged_attention(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq: Tensor,
    pos: Tensor,
    live: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Host side; arguments as in dyndepth.ops.ragged_attention, already checked."""
    rows, heads, dim = q.shape
    out = torch.empty_like(q)
    if rows == 0:
        return out
    page_size, kv_heads = pages.shape[2:4]
    reach = block_table.shape[1] * page_size
    reach = min(reach, window) if window else reach
    config = launch.ragged_attention(rows, kv_heads, heads // kv_heads, dim, reach, launch.Device.of(q), q.element_size())
    splits = config.splits
    partial = None
    if splits > 1:
        partial = torch.empty(rows, heads, splits, dim + 2, dtype=torch.float32, device=q.device)
    _attend[config.grid](
        q, pages, block_table, seq, pos, live, partial, out, scale, softcap, window, rows, block_table.shape[1],
        pages.stride(0),
        GROUP=heads // kv_heads, KV_HEADS=kv_heads, DIM=dim, PAGE=page_size, SPLITS=splits, BLOCK_GROUP=config.block_rows,
        BLOCK_KEYS=config.block_columns, BLOCK_DIM=config.block_inner, HAS_LIVE=live is not None,
        EXACT=q.dtype == torch.float32, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        _combine[(rows, heads)](
            partial, live, out, rows,
            HEADS=heads, DIM=dim, SPLITS=splits, BLOCK_SPLITS=launch.power_of_two(splits), BLOCK_DIM=config.block_inner,
            HAS_LIVE=live is not None, num_warps=4,
        )  # fmt: skip
    return out
