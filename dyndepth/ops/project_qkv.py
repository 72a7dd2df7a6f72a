"""project_qkv: the L-shaped projection. Q for live rows, K and V for all rows, straight into the pages."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndepth import check
from dyndepth.op import Op
from dyndepth.ops import _cpp, _paged, _triton
from dyndepth.ops._math import rms_normalise
from dyndepth.ops.store_kv import op as store_kv_op


def project_qkv(
    x: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    pos: Tensor,
    slots: Tensor,
    pages: Tensor,
    *,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    q_gain: Tensor | None = None,
    k_gain: Tensor | None = None,
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    live: Tensor | None = None,
) -> Tensor:
    """Queries of rows `[0, live)`; keys and values of all n rows, rotated and stored at their page slots.

    Rows that left a layer's attention but ride along for their K,V (`propagate`) cost two thin products of weights that
    are being read anyway; their queries are never computed. That is the L: q_weight x live rows, k/v_weight x n rows.

    Args:
        x: float32, bfloat16 or float16 [n, d], contiguous, already normalised.
        q_weight, k_weight, v_weight: [heads * head_dim, d], [kv_heads * head_dim, d] twice, dtype of x; rows dense (views
            into a fused projection work). Biases q_bias, k_bias, v_bias accordingly, contiguous.
        q_gain, k_gain: float32 [head_dim], RMSNorm over each head before the rotation (Qwen3, Gemma 3); eps inside its root.
        cos, sin, pos, slots, pages, live: as in `store_kv`; pages [2, pages, page_size, kv_heads, head_dim] is **written**.

    Returns the rotated queries [n, heads, head_dim]; rows at or past `live` are unspecified. Not differentiable.
    """
    return op(
        x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, q_gain, k_gain, eps, cos, sin, pos, slots, pages, live
    )  # fmt: skip


def _check(
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
) -> None:
    name, device, floats = "project_qkv", x.device, (x.dtype,)
    check.tensor(name, "x", x, [None, None], check.FLOATS, device, "n, d")
    check.contiguous(name, "x", x)
    rows, width = x.shape
    _paged.check_pages(name, pages, device, x.dtype)
    kv_heads, head_dim = pages.shape[3:]
    check.tensor(name, "q_weight", q_weight, [None, width], floats, device, "heads * head_dim, d")
    if q_weight.shape[0] % (head_dim * kv_heads):
        check.fail(name, "q_weight", f"a multiple of {kv_heads} kv_heads x {head_dim} head_dim in rows", q_weight)
    for argument, value in (("k_weight", k_weight), ("v_weight", v_weight)):
        check.tensor(name, argument, value, [kv_heads * head_dim, width], floats, device, "kv_heads * head_dim, d")
    for argument, bias, size in (
        ("q_bias", q_bias, q_weight.shape[0]),
        ("k_bias", k_bias, kv_heads * head_dim),
        ("v_bias", v_bias, kv_heads * head_dim),
    ):
        if bias is not None:
            check.tensor(name, argument, bias, [size], floats, device)
            check.contiguous(name, argument, bias)
    for argument, gain in (("q_gain", q_gain), ("k_gain", k_gain)):
        if gain is not None:
            check.tensor(name, argument, gain, [head_dim], check.FLOAT32, device, "head_dim")
            check.contiguous(name, argument, gain)
    _paged.check_rotary(name, cos, sin, head_dim, device, axes=2)
    _paged.check_rows(name, rows, device, pos=pos, slots=slots)
    check.live(name, live, device)


def _reference(
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
    head_dim = pages.shape[4]

    def heads(weight: Tensor, bias: Tensor | None, gain: Tensor | None) -> Tensor:
        y = torch.nn.functional.linear(x, weight, bias).unflatten(-1, (-1, head_dim))
        return y if gain is None else rms_normalise(y, eps, gain).to(y.dtype)

    q, k, v = heads(q_weight, q_bias, q_gain), heads(k_weight, k_bias, k_gain), heads(v_weight, v_bias, None)
    return store_kv_op.reference(q, k, v, cos, sin, pos, slots, pages, live)


def _fake(
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
    head_dim = pages.shape[4]
    return x.new_empty(x.shape[0], q_weight.shape[0] // head_dim, head_dim)


op = Op(
    "project_qkv",
    "(Tensor x, Tensor q_weight, Tensor k_weight, Tensor v_weight, Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, "
    "Tensor? q_gain, Tensor? k_gain, float eps, Tensor? cos, Tensor? sin, Tensor pos, Tensor slots, "
    "Tensor(a!) pages, Tensor? live=None) -> Tensor",
    reference=_reference,
    fake=_fake,
    check=_check,
)

op.provider_in("triton", "dyndepth.kernels.project_qkv", missing=_triton.missing, declines=_triton.declines)


@op.provider("cpp", missing=_cpp.missing, declines=_cpp.declines)
def _cpp_provider(
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
    return torch.ops.dyndepth_cpp.project_qkv(
        x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, q_gain, k_gain, eps, cos, sin, pos, slots, pages, live
    )  # fmt: skip
