"""backfill_kv: K and V of every layer a row skipped, from one residual, in one product."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndepth import check
from dyndepth.op import Op
from dyndepth.ops import _cpp, _paged, _triton
from dyndepth.ops._math import rms_normalise, wide

#: How the residual is normalised before the maps. Gains and biases of a norm are folded into the maps.
NORMS = {"none": 0, "rms": 1, "layer": 2}


def backfill_kv(
    residual: Tensor,
    weight: Tensor,
    pos: Tensor,
    slots: Tensor,
    pages: Tensor,
    first_layer: int,
    *,
    bias: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    variant: Tensor | None = None,
    section: Tensor | None = None,
    down: Tensor | None = None,
) -> None:
    """Write K,V of layers `[first_layer, first_layer + layers)` for rows that skip those layers.

    `k, v = split(weight[layer] @ x + bias[layer])`, k rotated, with `x = normalise(residual)`, or `down @ normalise(residual)`
    where the maps are of low rank; all layers in one product, because the residual, its norm and its rotary angles are the
    same for all of them.

    Args:
        residual: float32, bfloat16 or float16 [n, d], contiguous: what the rows carried when they left.
        weight: same dtype [layers, 2, kv_heads * head_dim, rank], contiguous; rank is d without `down`. Fitted maps
            (`predict`) or the skipped layers' own W_k, W_v with their norm gains folded in (`propagate`, CALM's state
            propagation).
        bias: same dtype [layers, 2, kv_heads * head_dim].
        norm, eps: `rms` (x / rms(x)), `layer` ((x - mean) / deviation) or `none`; without gain or bias.
        cos, sin: float32 [variants, positions, rotary], contiguous. None: no rotation.
        variant: int32 [layers], which table a layer uses (Gemma 3: local and global layers differ). None: table 0.
        pos, slots: int32 [n] as in `store_kv`; slot -1 is skipped.
        pages: [all layers, 2, pages, page_size, kv_heads, head_dim], contiguous, same dtype; **written in place**.
        section: int32 [2] = (begin, count) on the device: only rows `[begin, begin + count)` are written, as many of them as
            there are (out of range is cut off, not an error), e.g. the counts of compact_rows. None: all rows.
        down: same dtype [rank, d], contiguous: what the maps of all layers read of the normalised residual, rounded to the
            dtype. Bytes and operations of the maps become `(layers * 2 * kv_heads * head_dim + d) * rank` instead of
            `layers * 2 * kv_heads * head_dim * d`. None: all of it.

    Not differentiable.
    """
    if norm not in NORMS:
        check.fail("backfill_kv", "norm", f"one of {', '.join(NORMS)}", repr(norm))
    op(residual, weight, bias, NORMS[norm], eps, cos, sin, variant, pos, slots, pages, first_layer, section, down)


def _check(
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
    name, device, floats = "backfill_kv", residual.device, (residual.dtype,)
    check.tensor(name, "residual", residual, [None, None], check.FLOATS, device, "n, d")
    check.contiguous(name, "residual", residual)
    rows, width = residual.shape
    _paged.check_pages(name, pages, device, residual.dtype, layers=True)
    kv = pages.shape[4] * pages.shape[5]
    axes = "layers, K|V, kv_heads * head_dim, d"
    if down is not None:
        check.tensor(name, "down", down, [None, width], floats, device, "rank, d")
        check.contiguous(name, "down", down)
        width, axes = down.shape[0], "layers, K|V, kv_heads * head_dim, rank"
    check.tensor(name, "weight", weight, [None, 2, kv, width], floats, device, axes)
    check.contiguous(name, "weight", weight)
    layers = weight.shape[0]
    if bias is not None:
        check.tensor(name, "bias", bias, [layers, 2, kv], floats, device, "layers, K|V, kv_heads * head_dim")
        check.contiguous(name, "bias", bias)
    if norm not in NORMS.values():
        check.fail(name, "norm", f"one of {NORMS}", norm)
    if first_layer < 0 or first_layer + layers > pages.shape[0]:
        check.fail(name, "first_layer", f"in [0, {pages.shape[0] - layers}] (pages hold {pages.shape[0]} layers)", first_layer)
    _paged.check_rotary(name, cos, sin, pages.shape[5], device, axes=3)
    if variant is not None:
        check.tensor(name, "variant", variant, [layers], check.INT32, device, "layers")
        check.contiguous(name, "variant", variant)
    _paged.check_rows(name, rows, device, pos=pos, slots=slots)
    check.live(name, section, device, "section", 2)


def _reference(
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
    if section is not None:
        row = torch.arange(residual.shape[0], device=residual.device)
        begin, count = section.long().unbind()
        inside = (row >= begin) & (row < begin + count)
        slots, pos = torch.where(inside, slots, -1), torch.where(inside, pos, 0)
    if cos is not None and variant is not None:
        check.in_range("backfill_kv", "variant", variant, 0, cos.shape[0])
    positions = None if cos is None else cos.shape[1]
    _paged.check_indices("backfill_kv", pos, slots, pages.shape[2] * pages.shape[3], positions)
    x = wide(residual)
    if norm == NORMS["layer"]:
        x = x - x.mean(-1, keepdim=True)
    if norm != NORMS["none"]:
        x = rms_normalise(x, eps)
    x = x.to(residual.dtype)
    if down is not None:
        x = torch.nn.functional.linear(x, down)
    for layer in range(weight.shape[0]):
        layer_bias = (None, None) if bias is None else (bias[layer, 0], bias[layer, 1])
        key = torch.nn.functional.linear(x, weight[layer, 0], layer_bias[0]).unflatten(-1, pages.shape[4:])
        value = torch.nn.functional.linear(x, weight[layer, 1], layer_bias[1]).unflatten(-1, pages.shape[4:])
        tables: tuple[Tensor | None, Tensor | None] = (None, None)
        if cos is not None and sin is not None:
            at = torch.zeros((), dtype=torch.int64, device=cos.device) if variant is None else variant[layer].long()
            tables = (cos.index_select(0, at[None])[0], sin.index_select(0, at[None])[0])
        _paged.scatter(pages[first_layer + layer], _paged.rotate(key, *tables, pos), value, slots)


def _fake(*_args: object, **_kwargs: object) -> None:
    return None


op = Op(
    "backfill_kv",
    "(Tensor residual, Tensor weight, Tensor? bias, int norm, float eps, Tensor? cos, Tensor? sin, Tensor? variant, "
    "Tensor pos, Tensor slots, Tensor(a!) pages, int first_layer, Tensor? section=None, Tensor? down=None) -> ()",
    reference=_reference,
    fake=_fake,
    check=_check,
)

op.provider_in("triton", "dyndepth.kernels.backfill_kv", missing=_triton.missing, declines=_triton.declines)


@op.provider("cpp", missing=_cpp.missing, declines=_cpp.declines)
def _cpp_provider(
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
    torch.ops.dyndepth_cpp.backfill_kv(
        residual, weight, bias, norm, eps, cos, sin, variant, pos, slots, pages, first_layer, section, down
    )
