"""backfill_kv in Triton: K,V of all skipped layers in one launch. The RMS norm is applied after the product, from a sum taken
on the way, so that the residual is read once per tile and no normalised copy exists."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .project_qkv import fits
from .projection import dot_pairs
from .ragged_linear import ragged_linear
from .store_kv import rotate_pair, store_kv


@triton.jit
def _backfill_kv(
    residual, weight, bias, eps, cos, sin, variant, pos, slots, pages, section,
    rows, layer_stride, plane, table_stride, first_layer,
    WIDTH: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, TILES: tl.constexpr, RMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_INNER: tl.constexpr, ROTARY: tl.constexpr,
    HAS_SECTION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    begin, count = 0, rows
    if HAS_SECTION:  # the part of it that exists
        start = tl.load(section).to(tl.int64)
        end = tl.minimum(start + tl.maximum(tl.load(section + 1), 0), rows)
        begin = tl.maximum(start, 0).to(tl.int32)
        count = tl.maximum(end - begin, 0).to(tl.int32)
    if tl.program_id(1) * BLOCK_ROWS >= count:
        return
    tile, head = tl.program_id(0) % TILES, tl.program_id(0) // TILES % KV_HEADS
    is_value = tl.program_id(0) // (TILES * KV_HEADS) % 2
    layer = tl.program_id(0) // (2 * TILES * KV_HEADS)
    DIM: tl.constexpr = 2 * HALF
    local = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row, row_mask = begin + local, local < count
    pair = tile * PAIRS + tl.arange(0, PAIRS)
    pair_mask = pair < HALF
    base = ((layer * 2 + is_value) * KV_HEADS + head) * DIM
    first, second, square = dot_pairs(
        residual, weight + base.to(tl.int64) * WIDTH, row_mask, row.to(tl.int64), pair, pair_mask, WIDTH, WIDTH, WIDTH,
        HALF, BLOCK_ROWS, PAIRS, BLOCK_INNER, RMS, EXACT,
    )  # fmt: skip
    if RMS:
        scale = 1.0 / tl.sqrt(square / WIDTH + eps)
        first *= scale[:, None]
        second *= scale[:, None]
    if bias is not None:
        first += tl.load(bias + base + pair, mask=pair_mask, other=0.0).to(tl.float32)[None, :]
        second += tl.load(bias + base + HALF + pair, mask=pair_mask, other=0.0).to(tl.float32)[None, :]
    slot = tl.load(slots + row, mask=row_mask, other=-1).to(tl.int64)
    mask = (row_mask & (slot >= 0))[:, None] & pair_mask[None, :]
    if ROTARY:
        if is_value == 0:
            table = 0
            if variant is not None:
                table = tl.load(variant + layer)
            angle = table * table_stride + tl.load(pos + row, mask=row_mask, other=0)[:, None] * HALF + pair[None, :]
            first, second = rotate_pair(
                first, second, tl.load(cos + angle, mask=mask, other=1.0), tl.load(sin + angle, mask=mask, other=0.0)
            )
    target = pages + (first_layer + layer) * layer_stride + is_value * plane
    target += (slot[:, None] * KV_HEADS + head) * DIM + pair[None, :]
    tl.store(target, first.to(pages.dtype.element_ty), mask=mask)
    tl.store(target + HALF, second.to(pages.dtype.element_ty), mask=mask)


def backfill_kv(
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: int,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    variant: Tensor | None,
    pos: Tensor,
    slots: Tensor,
    pages: Tensor,
    first_layer: int,
    section: Tensor | None = None,
    down: Tensor | None = None,
) -> None:
    """Host side; arguments as in dyndepth.ops.backfill_kv, already checked."""
    if down is not None and len(residual) and len(weight):  # of all rows: what a section leaves out costs no weight more
        residual, norm = ragged_linear(_normed(residual, norm, eps), down), 0
    rows, width = residual.shape
    layers, kv_heads, head_dim = weight.shape[0], pages.shape[4], pages.shape[5]
    if rows == 0 or layers == 0:
        return
    if norm == 2:  # subtracting the mean after the product would cancel badly, so it happens before
        residual, norm = _normed(residual, norm, eps), 0
    if not fits(head_dim, 0 if cos is None else cos.shape[2]):
        _composed(residual, weight, bias, norm, eps, cos, sin, variant, pos, slots, pages, first_layer, section)
        return
    half = head_dim // 2
    config = launch.projection(
        rows, width, 2 * layers * kv_heads, half, False, launch.Device.of(residual), residual.element_size()
    )
    _backfill_kv[config.grid](
        residual, weight, bias, eps, cos, sin, variant, pos, slots, pages, section,
        rows, pages.stride(0), pages.stride(1), 0 if cos is None else cos.stride(0), first_layer,
        WIDTH=width, KV_HEADS=kv_heads, HALF=half, TILES=launch.ceil_div(half, config.block_columns), RMS=norm == 1,
        BLOCK_ROWS=config.block_rows, PAIRS=config.block_columns, BLOCK_INNER=config.block_inner, ROTARY=cos is not None,
        HAS_SECTION=section is not None, EXACT=residual.dtype == torch.float32, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


def _normed(residual: Tensor, norm: int, eps: float) -> Tensor:
    """A normalised copy."""
    if norm == 1:
        return torch.nn.functional.rms_norm(residual.float(), residual.shape[1:], None, eps).to(residual.dtype)
    return torch.nn.functional.layer_norm(residual, residual.shape[1:], eps=eps) if norm == 2 else residual


def _composed(
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: int,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    variant: Tensor | None,
    pos: Tensor,
    slots: Tensor,
    pages: Tensor,
    first_layer: int,
    section: Tensor | None,
) -> None:
    """Odd or partial rotary pairs: one library product for all layers, then store_kv's kernel layer by layer."""
    if section is not None:
        row = torch.arange(residual.shape[0], device=residual.device)
        begin, count = section.long().unbind()
        inside = (row >= begin) & (row < begin + count)
        slots, pos = torch.where(inside, slots, -1), torch.where(inside, pos, 0)
    residual = _normed(residual, norm, eps)
    flat = torch.nn.functional.linear(residual, weight.flatten(0, 2), None if bias is None else bias.flatten())
    y = flat.view(residual.shape[0], weight.shape[0], 2, *pages.shape[4:])
    nothing = y[:0, 0, 0]
    for layer in range(weight.shape[0]):
        tables: tuple[Tensor | None, Tensor | None] = (None, None)
        if cos is not None and sin is not None:
            which = (
                torch.zeros(1, dtype=torch.int64, device=cos.device) if variant is None else variant[layer : layer + 1].long()
            )
            tables = cos.index_select(0, which)[0], sin.index_select(0, which)[0]
        store_kv(nothing, y[:, layer, 0], y[:, layer, 1], *tables, pos, slots, pages[first_layer + layer])
