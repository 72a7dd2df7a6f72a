"""project_qkv in Triton: the L-shape. Query tiles past `live` return before they read a weight; K,V tiles cover all rows.

A program owns some rotary pairs of one head (channels i and i + head_dim / 2), so the head norm, the rotation and the page
write happen in its registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .projection import dot_pairs
from .store_kv import rotate_pair, store_kv


@triton.jit
def _project_qkv(
    x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, q_gain, k_gain, eps, cos, sin, pos, slots, pages, live, out,
    rows, plane, q_row, k_row, v_row,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_INNER: tl.constexpr, ROTARY: tl.constexpr,
    HAS_LIVE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) // TILES
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    count = rows
    if head < HEADS:
        if HAS_LIVE:
            count = tl.minimum(tl.load(live), rows)
    if tl.program_id(1) * BLOCK_ROWS >= count:
        return
    DIM: tl.constexpr = 2 * HALF
    pair = (tl.program_id(0) % TILES) * PAIRS + tl.arange(0, PAIRS)
    row_mask, pair_mask = row < count, pair < HALF
    # One product for all three: a branch each would get shared memory of its own and leave a third of it to every one.
    is_q, is_k = head < HEADS, (head >= HEADS) & (head < HEADS + KV_HEADS)
    weight = tl.where(is_q, q_weight, tl.where(is_k, k_weight, v_weight))
    weight_row = tl.where(is_q, q_row, tl.where(is_k, k_row, v_row))
    own = tl.where(is_q, head, (head - HEADS) % KV_HEADS)  # this head among those of its projection
    first, second, _ = dot_pairs(
        x, weight + (own * DIM).to(tl.int64) * weight_row, row_mask, row, pair, pair_mask, WIDTH, weight_row, WIDTH, HALF,
        BLOCK_ROWS, PAIRS, BLOCK_INNER, False, EXACT,
    )  # fmt: skip
    if is_q:
        first, second = _biased_and_normed(first, second, q_bias, q_gain, eps, own, pair, pair_mask, HALF, x)
    elif is_k:
        first, second = _biased_and_normed(first, second, k_bias, k_gain, eps, own, pair, pair_mask, HALF, x)
    else:
        first, second = _biased_and_normed(first, second, v_bias, None, eps, own, pair, pair_mask, HALF, x)
    mask = row_mask[:, None] & pair_mask[None, :]
    if head < HEADS + KV_HEADS:
        if ROTARY:
            angle = tl.load(pos + row, mask=row_mask, other=0)[:, None] * HALF + pair[None, :]
            first, second = rotate_pair(first, second, tl.load(cos + angle, mask=mask), tl.load(sin + angle, mask=mask))
    if head < HEADS:
        target = out + (row[:, None].to(tl.int64) * HEADS + head) * DIM + pair[None, :]
    else:
        slot = tl.load(slots + row, mask=row_mask, other=-1).to(tl.int64)
        mask = mask & (slot >= 0)[:, None]
        target = pages + (slot[:, None] * KV_HEADS + own) * DIM + pair[None, :]
        if head >= HEADS + KV_HEADS:
            target += plane
    tl.store(target, first.to(out.dtype.element_ty), mask=mask)
    tl.store(target + HALF, second.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _biased_and_normed(first, second, bias, gain, eps, own, pair, pair_mask, HALF: tl.constexpr, x):
    """What follows the product of one head: bias, and the norm over the head if there is a gain (pairs then cover it)."""
    base = own * 2 * HALF
    if bias is not None:
        first += tl.load(bias + base + pair, mask=pair_mask, other=0.0).to(tl.float32)[None, :]
        second += tl.load(bias + base + HALF + pair, mask=pair_mask, other=0.0).to(tl.float32)[None, :]
    if gain is not None:
        # Rounded first, as the model's own projection would round before its norm.
        first = first.to(x.dtype.element_ty).to(tl.float32)
        second = second.to(x.dtype.element_ty).to(tl.float32)
        square = tl.sum(first * first + second * second, axis=1) / (2 * HALF)
        scale = 1.0 / tl.sqrt(square + eps)
        first = first * scale[:, None] * tl.load(gain + pair, mask=pair_mask, other=0.0)[None, :]
        second = second * scale[:, None] * tl.load(gain + HALF + pair, mask=pair_mask, other=0.0)[None, :]
    return first, second


def fits(head_dim: int, rotary: int, *weights: Tensor) -> bool:
    """Whether channels pair as (i, i + head_dim / 2), or not at all, and weight rows are dense."""
    return head_dim % 2 == 0 and rotary in (0, head_dim // 2) and all(weight.stride(1) == 1 for weight in weights)


def project_qkv(
    x: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    pos: Tensor,
    slots: Tensor,
    pages: Tensor,
    live: Tensor | None = None,
) -> Tensor:
    """Host side; arguments as in dyndepth.ops.project_qkv, already checked."""
    rows, width = x.shape
    kv_heads, head_dim = pages.shape[3:]
    heads = q_weight.shape[0] // head_dim
    out = torch.empty(rows, heads, head_dim, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    if not fits(head_dim, 0 if cos is None else cos.shape[1], q_weight, k_weight, v_weight):
        return _composed(x, (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias), (q_gain, k_gain, None), eps,
                         cos, sin, pos, slots, pages, live)  # fmt: skip
    half = head_dim // 2
    normed = q_gain is not None or k_gain is not None
    config = launch.projection(rows, width, heads + 2 * kv_heads, half, normed, launch.Device.of(x), x.element_size())
    _project_qkv[config.grid](
        x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, q_gain, k_gain, eps, cos, sin, pos, slots, pages,
        live, out, rows, pages.stride(0), q_weight.stride(0), k_weight.stride(0), v_weight.stride(0),
        WIDTH=width, HEADS=heads, KV_HEADS=kv_heads, HALF=half, TILES=launch.ceil_div(half, config.block_columns),
        BLOCK_ROWS=config.block_rows, PAIRS=config.block_columns, BLOCK_INNER=config.block_inner, ROTARY=cos is not None,
        HAS_LIVE=live is not None, EXACT=x.dtype == torch.float32, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def _composed(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    gains: tuple[Tensor | None, ...],
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    pos: Tensor,
    slots: Tensor,
    pages: Tensor,
    live: Tensor | None,
) -> Tensor:
    """Odd or partial rotary pairs: the library's products, then store_kv's kernel. Queries are computed for all rows."""
    head_dim = pages.shape[4]
    parts = []
    for weight, bias, gain in zip(weights, biases, gains, strict=True):
        y = torch.nn.functional.linear(x, weight, bias).unflatten(-1, (-1, head_dim))
        if gain is not None:
            y = torch.nn.functional.rms_norm(y.float(), (head_dim,), gain, eps).to(y.dtype)
        parts.append(y)
    return store_kv(parts[0], parts[1], parts[2], cos, sin, pos, slots, pages, live)
