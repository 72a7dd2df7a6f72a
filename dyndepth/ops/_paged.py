"""What the ops on paged K,V share: checks of pages, rotary tables and slots, and their reference arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndepth import check
from dyndepth.ops._math import wide


def check_pages(
    name: str, pages: Tensor, device: torch.device, dtype: torch.dtype, *, head_dim: int | None = None, layers: bool = False
) -> None:
    """[2, pages, page_size, kv_heads, head_dim], or the same for all layers; there may be no pages, but none are empty."""
    lead: list[int | None] = [None, 2] if layers else [2]
    layout = f"{'layers, ' if layers else ''}K|V, pages, page_size, kv_heads, head_dim"
    check.tensor(name, "pages", pages, [*lead, None, None, None, head_dim], (dtype,), device, layout)
    check.contiguous(name, "pages", pages)
    if 0 in pages.shape[-3:]:
        check.fail(name, "pages", "of at least one slot, head and channel per page", pages)


def check_rows(name: str, rows: int, device: torch.device, **indices: Tensor) -> None:
    for argument, value in indices.items():
        check.tensor(name, argument, value, [rows], check.INT32, device, "n")
        check.contiguous(name, argument, value)


def check_rotary(name: str, cos: Tensor | None, sin: Tensor | None, head_dim: int, device: torch.device, axes: int) -> None:
    """Tables [positions, rotary] (`axes` 2) or [variants, positions, rotary] (`axes` 3); both or none."""
    if (cos is None) != (sin is None):
        check.fail(name, "cos and sin", "given together", f"cos {cos is not None}, sin {sin is not None}")
    if cos is None or sin is None:
        return
    layout = "positions, rotary" if axes == 2 else "variants, positions, rotary"
    check.tensor(name, "cos", cos, [None] * axes, check.FLOAT32, device, layout)
    check.tensor(name, "sin", sin, list(cos.shape), check.FLOAT32, device, layout)
    check.contiguous(name, "cos", cos)
    check.contiguous(name, "sin", sin)
    if cos.shape[-2] == 0 or cos.shape[0] == 0:
        check.fail(name, "cos", "at least one position long", cos)
    if 2 * cos.shape[-1] > head_dim:
        check.fail(name, "cos", f"at most {head_dim // 2} channels wide (half of head_dim {head_dim})", cos)


def check_indices(name: str, pos: Tensor, slots: Tensor, slot_count: int, positions: int | None) -> None:
    """Range checks of the reference."""
    check.in_range(name, "slots", slots, -1, slot_count)
    if positions is not None:
        check.in_range(name, "pos", pos, 0, positions, " (the rotary table's reach)")


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, pos: Tensor) -> Tensor:
    """Half-split rotary embedding of x [n, heads, head_dim] in fp32, rounded to the dtype of x."""
    if cos is None or sin is None:
        return x.clone()
    half = cos.shape[-1]
    angles_cos, angles_sin = cos[pos.long()][:, None, :], sin[pos.long()][:, None, :]
    first, second, rest = wide(x[..., :half]), wide(x[..., half : 2 * half]), x[..., 2 * half :]
    turned = (first * angles_cos - second * angles_sin, second * angles_cos + first * angles_sin)
    return torch.cat([turned[0].to(x.dtype), turned[1].to(x.dtype), rest], dim=-1)


def scatter(pages: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Write key, value [n, kv_heads, head_dim] to pages [2, pages, page_size, kv_heads, head_dim]; slot -1 is skipped.

    Skipped rows rewrite slot 0 with its own content, so that no shape depends on the data.
    """
    flat = pages.view(2, -1, *pages.shape[3:])
    if flat.shape[1] == 0 or slots.numel() == 0:
        return
    kept = (slots >= 0)[:, None, None]
    # Padding rows must not race with a real row that writes slot 0: they repeat what the first real row of slot 0 writes.
    owner = (slots == 0).to(torch.int8).argmax()
    zero_is_written = (slots == 0).any()
    target = slots.clamp_min(0).long()
    for plane, rows in ((flat[0], key), (flat[1], value)):
        filler = torch.where(zero_is_written, rows[owner], plane[0])
        plane.index_copy_(0, target, torch.where(kept, rows, filler[None]))
