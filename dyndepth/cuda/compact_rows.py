"""compact_rows on a GPU: host side of csrc/cuda/compact_rows.cu."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dyndepth.cuda import compiler

_BLOCK = 1024
_MAX_PAYLOADS = 16
#: struct Payload and struct Payloads of the source, padding included.
_PAYLOAD = np.dtype([("source", "u8"), ("target", "u8"), ("stride", "i8"), ("row_bytes", "i4"), ("unit", "i4")], align=True)
_PAYLOADS = np.dtype([("item", _PAYLOAD, (_MAX_PAYLOADS,)), ("count", "i4")], align=True)


def compact_rows(state: Tensor, payloads: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Arguments as in dyndepth.ops.compact_rows, already checked."""
    rows, device = state.shape[0], state.device
    order = torch.empty(rows, dtype=torch.int32, device=device)
    moved = [torch.empty(payload.shape, dtype=payload.dtype, device=device) for payload in payloads]
    if rows == 0:
        return moved, order, torch.zeros(2, dtype=torch.int32, device=device)
    counts = torch.empty(2, dtype=torch.int32, device=device)
    state = state.contiguous()
    # Kept until the launch is queued: torch's allocator reuses memory in stream order, so that is long enough.
    sources = [payload if _dense(payload) else payload.contiguous() for payload in payloads]
    number = torch.cuda.current_device() if device.index is None else device.index
    blocks = -(-rows // _BLOCK)
    block_counts = torch.empty(2 * blocks, dtype=torch.int32, device=device) if blocks > 1 else None
    if block_counts is not None:
        _launch("compact_rows_count", number, blocks, (state.data_ptr(), np.int32(rows), block_counts.data_ptr()))
    for first in range(0, max(len(sources), 1), _MAX_PAYLOADS):
        part = slice(first, first + _MAX_PAYLOADS)
        described = describe(sources[part], moved[part])
        tail = (described, order.data_ptr(), counts.data_ptr())
        if block_counts is None:
            # A block per row up to the machine's width: more only repeat the partition.
            _launch("compact_rows_once", number, min(rows, 128), (state.data_ptr(), np.int32(rows), *tail))
        else:
            _launch("compact_rows_move", number, blocks, (state.data_ptr(), np.int32(rows), block_counts.data_ptr(), *tail))
    return moved, order, counts


def describe(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> np.ndarray:
    """struct Payloads: addresses, strides and the widest word each payload allows. Empty rows are left out."""
    table = np.zeros((), dtype=_PAYLOADS)
    used = 0
    for source, target in zip(sources, targets, strict=True):
        if target.numel() == 0:
            continue
        row_bytes = target.numel() // target.shape[0] * target.element_size()
        stride = source.stride(0) * source.element_size()
        together = source.data_ptr() | target.data_ptr() | stride | row_bytes
        unit = next(size for size in (16, 4, 1) if together % size == 0)
        table["item"][used] = (source.data_ptr(), target.data_ptr(), stride, row_bytes, unit)
        used += 1
    table["count"] = used
    return table


def _dense(payload: Tensor) -> bool:
    """Whether every row is contiguous in itself (rows may lie apart)."""
    return payload.shape[0] == 0 or payload[0].is_contiguous()


def _launch(function: str, device: int, grid: int, arguments: tuple[object, ...]) -> None:
    compiler.launch("compact_rows", function, device, grid, _BLOCK, arguments)
