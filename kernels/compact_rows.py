"""compact_rows in Triton: one program partitions (state is one byte per row), then one launch per payload moves rows.

The CUDA C++ provider does both in one launch; this one serves machines without CuPy, AMD included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch


@triton.jit
def _partition(state, order, counts, rows, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    run_total = tl.zeros((), tl.int32)
    leave_total = tl.zeros((), tl.int32)
    for start in range(0, rows, BLOCK):
        s = tl.load(state + start + lane, mask=start + lane < rows, other=2)
        run_total += tl.sum((s == 0).to(tl.int32), axis=0)
        leave_total += tl.sum((s == 1).to(tl.int32), axis=0)
    tl.store(counts, run_total)
    tl.store(counts + 1, leave_total)
    run, leave, away = tl.zeros((), tl.int32), run_total, run_total + leave_total
    for start in range(0, rows, BLOCK):
        row = start + lane
        inside = row < rows
        s = tl.load(state + row, mask=inside, other=2)
        runs = (inside & (s == 0)).to(tl.int32)
        leaves = (inside & (s == 1)).to(tl.int32)
        aways = (inside & (s != 0) & (s != 1)).to(tl.int32)
        place = tl.where(runs > 0, run + tl.cumsum(runs, axis=0), leave + tl.cumsum(leaves, axis=0))
        place = tl.where(aways > 0, away + tl.cumsum(aways, axis=0), place) - 1
        tl.store(order + place, row, mask=inside)
        run += tl.sum(runs, axis=0)
        leave += tl.sum(leaves, axis=0)
        away += tl.sum(aways, axis=0)


@triton.jit
def _move(source, target, order, words, source_row, BLOCK: tl.constexpr):
    row, word = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    old = tl.load(order + row).to(tl.int64)
    value = tl.load(source + old * source_row + word, mask=word < words)
    tl.store(target + row.to(tl.int64) * words + word, value, mask=word < words)


def compact_rows(state: Tensor, payloads: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Host side; arguments as in dyndepth.ops.compact_rows, already checked."""
    rows = state.shape[0]
    order = torch.empty(rows, dtype=torch.int32, device=state.device)
    counts = torch.empty(2, dtype=torch.int32, device=state.device)
    config = launch.compact_rows(rows)
    _partition[config.grid](state.contiguous(), order, counts, rows, BLOCK=config.block_rows, num_warps=config.num_warps)
    return [_moved(payload, order) for payload in payloads], order, counts


def _moved(payload: Tensor, order: Tensor) -> Tensor:
    target = torch.empty(payload.shape, dtype=payload.dtype, device=payload.device)
    rows = payload.shape[0]
    if target.numel() == 0:
        return target
    source = payload if payload[0].is_contiguous() else payload.contiguous()
    row_bytes = target.numel() // rows * target.element_size()
    # Bits move, not numbers: as 4-byte words where rows are whole words and start on one, else as bytes.
    start, stride = source.data_ptr(), source.stride(0) * source.element_size()
    whole = row_bytes % 4 == 0 and stride % 4 == 0 and start % 4 == 0
    unit = torch.int32 if whole else torch.uint8
    words = row_bytes // (4 if whole else 1)
    from_rows = _as(source, unit, rows, words)
    config = launch.move_rows(rows, words)
    _move[config.grid](
        from_rows, target.view(rows, -1).view(unit), order, words, from_rows.stride(0),
        BLOCK=config.block_columns, num_warps=config.num_warps,
    )  # fmt: skip
    return target


def _as(source: Tensor, unit: torch.dtype, rows: int, words: int) -> Tensor:
    """[rows, words] of `unit` over the same memory; rows may lie apart."""
    flat = source.as_strided((rows, source[0].numel()), (source.stride(0), 1), source.storage_offset())
    flat = flat.view(torch.uint8) if flat.dtype == torch.bool else flat
    return flat.view(unit)
