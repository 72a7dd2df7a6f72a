"""ragged_attention: every row is one query of its own sequence at its own position, over paged K,V."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndepth import check
from dyndepth.op import Op
from dyndepth.ops import _cpp, _paged, _triton
from dyndepth.ops._math import wide

# Rows gathered at once by the reference: bounds its copy of K,V to a few hundred MB at a 2k context.
_REFERENCE_ROWS = 64


def ragged_attention(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq: Tensor,
    pos: Tensor,
    *,
    scale: float,
    live: Tensor | None = None,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Causal attention of single rows: row i sees keys `max(0, pos[i] - window + 1) .. pos[i]` of sequence `seq[i]`.

    Args:
        q: float32, bfloat16 or float16 [n, heads, head_dim], contiguous. heads is a multiple of kv_heads: query head h reads
            K,V head h // (heads / kv_heads) (grouped-query attention).
        pages: [2, pages, page_size, kv_heads, head_dim], contiguous, dtype of q: one layer's keys and values.
        block_table: int32 [sequences, max_pages], contiguous; the page of positions `[j * page_size, (j + 1) * page_size)` is
            entry j. Entries that no row sees (past its position, before its window) are never used (-1 by habit).
        seq, pos: int32 [n]. Several rows may belong to one sequence; consecutive rows of one sequence share a walk.
        scale: factor on q . k.
            On the CPU, values of seq, pos or block_table out of range raise.
        live: int32 with one element: only rows `[0, live)` are computed. None: all.
        softcap: scores become `softcap * tanh(scores / softcap)` before the mask (Gemma 2); 0 for none.
        window: sliding window in positions, the row's own included; 0 for the whole context.

    Returns [n, heads, head_dim] in the dtype of q, accumulated in fp32; rows at or past `live` are unspecified. The cpp
    provider gives a row the same bits alone and in any batch, but for the payload of a NaN; where it multiplies bfloat16 (AMX
    or AVX512_BF16, head sizes of whole 32 channels) subnormal inputs count as 0. Not differentiable.
    """
    return op(q, pages, block_table, seq, pos, live, scale, softcap, window)


def _check(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq: Tensor,
    pos: Tensor,
    live: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> None:
    name, device = "ragged_attention", q.device
    check.tensor(name, "q", q, [None, None, None], check.FLOATS, device, "n, heads, head_dim")
    check.contiguous(name, "q", q)
    rows, heads, head_dim = q.shape
    _paged.check_pages(name, pages, device, q.dtype, head_dim=head_dim)
    if heads % pages.shape[3]:
        check.fail(name, "q", f"a multiple of {pages.shape[3]} kv_heads in heads", q)
    check.tensor(name, "block_table", block_table, [None, None], check.INT32, device, "sequences, max_pages")
    check.contiguous(name, "block_table", block_table)
    for argument, value in (("seq", seq), ("pos", pos)):
        check.tensor(name, argument, value, [rows], check.INT32, device, "n")
        check.contiguous(name, argument, value)
    if not softcap >= 0:
        check.fail(name, "softcap", "at least 0 (0 for none)", softcap)
    if window < 0:
        check.fail(name, "window", "at least 0 (0 for the whole context)", window)
    check.live(name, live, device)


def _check_reach(pages: Tensor, block_table: Tensor, seq: Tensor, pos: Tensor) -> None:
    check.in_range("ragged_attention", "seq", seq, 0, block_table.shape[0])
    reach = block_table.shape[1] * pages.shape[2]
    check.in_range("ragged_attention", "pos", pos, 0, reach, " (the block table's reach)")


def _reference(
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
    if live is not None and q.device.type == "cpu":
        count = min(max(int(live), 0), q.shape[0])
        done = _reference(q[:count], pages, block_table, seq[:count], pos[:count], None, scale, softcap, window)
        return torch.cat([done, q.new_zeros(q.shape[0] - count, *q.shape[1:])])
    _check_reach(pages, block_table, seq, pos)
    if q.shape[0] == 0:
        return torch.empty_like(q)
    parts = [
        _attend(q[i : i + _REFERENCE_ROWS], pages, block_table, seq[i : i + _REFERENCE_ROWS], pos[i : i + _REFERENCE_ROWS],
                scale, softcap, window)
        for i in range(0, q.shape[0], _REFERENCE_ROWS)
    ]  # fmt: skip
    return torch.cat(parts)


def _attend(
    q: Tensor, pages: Tensor, block_table: Tensor, seq: Tensor, pos: Tensor, scale: float, softcap: float, window: int
) -> Tensor:
    group = q.shape[1] // pages.shape[3]
    table, pos = block_table[seq.long()].long(), pos.long()
    position = torch.arange(table.shape[1] * pages.shape[2], device=q.device)
    visible = position <= pos[:, None]
    if window > 0:
        visible &= position > pos[:, None] - window
    table = torch.where(visible.unflatten(1, (-1, pages.shape[2])).any(-1), table, 0)  # unseen entries mean nothing
    check.in_range("ragged_attention", "block_table", table, 0, pages.shape[1], " for visible positions")
    keys, values = (plane[table].flatten(1, 2).movedim(2, 1) for plane in pages)
    # What lies behind the mask may be memory nobody wrote; 0 * NaN would leak into the sum.
    seen = visible[:, None, :, None]
    keys = torch.where(seen, keys, 0).repeat_interleave(group, dim=1)
    values = torch.where(seen, values, 0).repeat_interleave(group, dim=1)
    mask = visible[:, None, None, :]
    if softcap == 0:
        out = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], keys, values, mask, scale=scale)
        return out[:, :, 0]
    scores = softcap * torch.tanh((wide(q[:, :, None]) @ wide(keys).mT) * scale / softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ wide(values))[:, :, 0].to(q.dtype)


def _fake(q: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return torch.empty_like(q)


op = Op(
    "ragged_attention",
    "(Tensor q, Tensor pages, Tensor block_table, Tensor seq, Tensor pos, Tensor? live, float scale, float softcap=0.0, "
    "int window=0) -> Tensor",
    reference=_reference,
    fake=_fake,
    check=_check,
)

op.provider_in("triton", "dyndepth.kernels.ragged_attention", missing=_triton.missing, declines=_triton.declines)


@op.provider("cpp", missing=_cpp.missing, declines=_cpp.declines)
def _cpp_provider(
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
    return torch.ops.dyndepth_cpp.ragged_attention(q, pages, block_table, seq, pos, live, scale, softcap, window)
