"""store_kv: rotate q and k, write k and v of every row to its page slot. The epilogue after any projection modules."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndepth import check
from dyndepth.op import Op
from dyndepth.ops import _cpp, _cuda, _paged, _triton


def store_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    slots: Tensor,
    pages: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    live: Tensor | None = None,
) -> Tensor:
    """Rotary embedding of q and k; k and v go to the pages, the rotated q is returned.

    Args:
        q: float32, bfloat16 or float16 [m, heads, head_dim], m <= n: the first m rows have queries. Rows and heads may have
            any strides (a view into a fused projection), channels must be dense. The same holds for k and v.
        k, v: [n, kv_heads, head_dim], dtype of q.
        pos: int32 [n], position of each row in its sequence.
        slots: int32 [n], page * page_size + offset; -1 writes nothing. Slots must be distinct: where two rows share one, what
            it holds afterwards is unspecified.
        pages: [2, pages, page_size, kv_heads, head_dim] (keys, values; the NHD layout of vLLM and FlashInfer), contiguous
            and dtype of q; **written in place**. Must not share memory with q, k, v.
        cos, sin: float32 [positions, rotary], contiguous; channels i and i + rotary are a pair (half-split style), channels
            past 2 * rotary pass through. None: no rotation.
        live: int32 with one element: only queries `[0, live)` are rotated, K and V are stored for all n rows. None: all m.

    Returns the rotated queries [m, heads, head_dim], contiguous; rows at or past `live` are unspecified. Not
    differentiable. On the CPU a slot or position out of range raises before anything is written.
    """
    return op(q, k, v, cos, sin, pos, slots, pages, live)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    pos: Tensor,
    slots: Tensor,
    pages: Tensor,
    live: Tensor | None = None,
) -> None:
    name, device = "store_kv", q.device
    check.tensor(name, "q", q, [None, None, None], check.FLOATS, device, "m, heads, head_dim")
    rows, head_dim = k.shape[0] if k.dim() else 0, q.shape[2]
    _paged.check_pages(name, pages, device, q.dtype, head_dim=head_dim)
    for argument, value in (("k", k), ("v", v)):
        check.tensor(name, argument, value, [rows, pages.shape[3], head_dim], (q.dtype,), device, "n, kv_heads, head_dim")
    if q.shape[0] > rows:
        check.fail(name, "q", f"at most {rows} rows (those of k)", q)
    for argument, value in (("q", q), ("k", k), ("v", v)):
        if value.stride(2) != 1 and head_dim > 1:
            check.fail(name, argument, "dense in its last axis", f"strides {list(value.stride())}")
    _paged.check_rotary(name, cos, sin, head_dim, device, axes=2)
    _paged.check_rows(name, rows, device, pos=pos, slots=slots)
    check.live(name, live, device)


def _reference(
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
    _paged.check_indices("store_kv", pos, slots, pages.shape[1] * pages.shape[2], None if cos is None else cos.shape[0])
    _paged.scatter(pages, _paged.rotate(k, cos, sin, pos), v, slots)
    return _paged.rotate(q, cos, sin, pos[: q.shape[0]]).contiguous()


def _fake(q: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return q.new_empty(q.shape)


op = Op(
    "store_kv",
    "(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor pos, Tensor slots, Tensor(a!) pages, "
    "Tensor? live=None) -> Tensor",
    reference=_reference,
    fake=_fake,
    check=_check,
)

op.provider_in("cuda", "dyndepth.cuda.store_kv", missing=_cuda.missing, declines=_cuda.declines)
op.provider_in("triton", "dyndepth.kernels.store_kv", missing=_triton.missing, declines=_triton.declines)


@op.provider("cpp", missing=_cpp.missing, declines=_cpp.declines)
def _cpp_provider(
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
    return torch.ops.dyndepth_cpp.store_kv(q, k, v, cos, sin, pos, slots, pages, live)
