"""Paged K,V: one tensor for all layers, a free list of pages, a block table per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dyndepth.errors import ArgumentError, PagesFullError
from dyndepth.ops import _cpp

_SLOTS = 2**31
#: Sequence or position numbers of rows; bookkeeping is numpy's because a tensor op costs ten times as much for a few numbers.
Indices = NDArray[np.int64]


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """A tensor over `values` on the CPU; a copy elsewhere, from pinned memory on a GPU, so that the host waits for nothing."""
    value = torch.from_numpy(values)
    if device.type == "cuda":
        value = value.pin_memory()  # not reused before the copy is done: torch's host allocator sees to that
    return value.to(device, non_blocking=True)


class Pages:
    """K,V of many sequences in pages of `page_size` positions.

    `kv` is [layers, 2, pages, page_size, kv_heads, head_dim]; a layer's slice is the NHD layout of vLLM and FlashInfer. A
    page holds the same positions for all layers, so there is one block table. Position p of sequence s lives in slot
    `block_table[s, p // page_size] * page_size + p % page_size`. Allocation is bookkeeping on the host and never moves
    data; a released page may hold old values, which no sequence can see.
    """

    def __init__(
        self,
        *,
        layers: int,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        sequences: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        limit: int | None = None,
    ) -> None:
        """Takes memory for `pages` pages now; up to `limit` more than that are taken when they are needed (None: none).

        Growing moves what was written, in steps of half of what there is.
        """
        sizes = {"layers": layers, "page_size": page_size, "kv_heads": kv_heads, "head_dim": head_dim}
        for name, value in sizes.items():
            if value < 1:
                raise ArgumentError(f"Pages: {name} must be at least 1, got {value}")
        if pages < 0 or sequences < 0:
            raise ArgumentError(f"Pages: pages and sequences must be at least 0, got {pages} and {sequences}")
        if pages * page_size >= _SLOTS:
            raise ArgumentError(f"Pages: slots are int32, so pages * page_size must be below 2**31, got {pages * page_size}")
        self.page_size = page_size
        self.limit = pages if limit is None else max(pages, limit)
        self.kv = torch.empty(layers, 2, pages, page_size, kv_heads, head_dim, dtype=dtype, device=device)
        # The table is edited on the host and copied to the device when a page was added: once per page_size tokens.
        # Its columns grow with the longest sequence.
        self._table = np.full((sequences, 1), -1, dtype=np.int32)
        self._device_table: Tensor | None = None
        self._owned: list[list[int]] = [[] for _ in range(sequences)]
        self._length = np.zeros(sequences, dtype=np.int64)
        #: Positions that the pages a sequence owns can hold.
        self._room = np.zeros(sequences, dtype=np.int64)
        self._free = list(range(pages - 1, -1, -1))
        #: Rows are placed in one call of C++: a dozen small steps of numpy cost more than everything else around a pass.
        self._in_cpp = self.kv.device.type == "cpu" and _cpp.missing() is None

    @property
    def sequences(self) -> int:
        """Sequences there are places for."""
        return len(self._owned)

    @property
    def free(self) -> int:
        """Number of pages nobody owns, of those there are now."""
        return len(self._free)

    @property
    def available(self) -> int:
        """Pages that can still be taken, those there is no memory for yet included."""
        return len(self._free) + self.limit - self.total

    def needed(self, sequence: int, length: int) -> int:
        """Pages that `reserve` would take."""
        return max(0, self._pages_for(length) - len(self._owned[sequence]))

    @property
    def total(self) -> int:
        return self.kv.shape[2]

    def length(self, sequence: int) -> int:
        """Positions reserved for a sequence."""
        return int(self._length[sequence])

    def block_table(self, reach: int | None = None) -> Tensor:
        """int32 [sequences, max_pages] on the device of the pages, or its first columns, enough for `reach` positions."""
        if self._device_table is None:
            # A copy: the host's own goes on changing.
            self._device_table = to_device(self._table.copy(), self.kv.device)
        if reach is None:
            return self._device_table
        return self._device_table[:, : self.columns(reach)].contiguous()

    def reserve(self, sequence: int, length: int) -> None:
        """Make positions [0, length) of a sequence writable. Takes nothing if the pages do not suffice."""
        missing = self.needed(sequence, length)
        if missing > self.available:
            raise PagesFullError(
                f"Pages: sequence {sequence} wants {missing} more pages for {length} positions, "
                f"{self.available} of {self.limit} pages of {self.page_size} are free"
            )
        if missing > len(self._free):
            self._grow(missing - len(self._free))
        columns = self._table.shape[1]
        if self._pages_for(length) > columns:
            more = max(columns, self._pages_for(length) - columns)
            self._table = np.pad(self._table, ((0, 0), (0, more)), constant_values=-1)
        for _ in range(missing):
            page = self._free.pop()
            self._table[sequence, len(self._owned[sequence])] = page
            self._owned[sequence].append(page)
        if missing > 0:
            self._device_table = None
            self._room[sequence] = len(self._owned[sequence]) * self.page_size
        self._length[sequence] = max(int(self._length[sequence]), length)

    def reserve_rows(self, sequences: Indices, positions: Indices) -> None:
        """`reserve` for rows [n]: every position given becomes writable. One look where all pages are there already."""
        if sequences.size and not (sequences.min() >= 0 and sequences.max() < len(self._owned) and positions.min() >= 0):
            raise ArgumentError(
                f"Pages: sequences must be in [0, {len(self._owned)}) and positions at least 0, got {sequences.tolist()} and "
                f"{positions.tolist()}"
            )
        fresh = positions >= self._room[sequences]
        if fresh.any():
            for sequence in np.unique(sequences[fresh]).tolist():
                self.reserve(sequence, int(positions[sequences == sequence].max()) + 1)
        np.maximum.at(self._length, sequences, positions + 1)

    def place(self, sequences: Indices, positions: Indices) -> tuple[Tensor, int]:
        """`reserve_rows`; then int32 [3, n] sequences, positions and slots of the rows on the device of the pages, and the
        largest position + 1, at least 1."""
        if self._in_cpp:
            facts = (torch.from_numpy(each) for each in (sequences, positions, self._table, self._room, self._length))
            placed, reach, fits = torch.ops.dyndepth_cpp.place_rows(*facts, self.page_size)
            if fits:
                return placed, reach
        self.reserve_rows(sequences, positions)
        rows = np.stack([sequences, positions, self.slots_of(sequences, positions)]).astype(np.int32)
        return to_device(rows, self.kv.device), int(positions.max()) + 1 if positions.size else 1

    def truncate(self, sequence: int, length: int) -> None:
        """Give back the pages of a sequence that positions [0, length) do not need. Their content stays until overwritten."""
        keep = self._pages_for(length)
        owned = self._owned[sequence]
        if length < 0 or length > self._length[sequence]:
            raise ArgumentError(f"Pages: sequence {sequence} has {self._length[sequence]} positions, got a length of {length}")
        if keep < len(owned):
            self._free.extend(reversed(owned[keep:]))
            self._owned[sequence] = owned[:keep]
            self._table[sequence, keep:] = -1
            self._device_table = None
            self._room[sequence] = keep * self.page_size
        self._length[sequence] = length

    def release(self, sequence: int) -> None:
        """Give all pages of a sequence back. Releasing twice is harmless."""
        self._free.extend(reversed(self._owned[sequence]))
        if self._owned[sequence]:
            self._owned[sequence] = []
            self._table[sequence] = -1
            self._device_table = None
        self._room[sequence] = 0
        self._length[sequence] = 0

    def slots(self, sequences: Sequence[int] | Indices | Tensor, positions: Sequence[int] | Indices | Tensor) -> Tensor:
        """int32 slots of (sequence, position) pairs, on the device of the pages. Positions must be reserved."""
        at, pos = np.asarray(sequences, dtype=np.int64), np.asarray(positions, dtype=np.int64)
        return to_device(self.slots_of(at, pos), self.kv.device)

    def slots_of(self, at: Indices, pos: Indices) -> NDArray[np.int32]:
        """`slots` on the host."""
        if at.size == 0:
            return np.empty(0, dtype=np.int32)
        if pos.min() < 0 or pos.max() >= self._table.shape[1] * self.page_size:
            raise ArgumentError(f"Pages: positions must be in [0, {self._table.shape[1] * self.page_size}), got {pos.tolist()}")
        page = self._table[at, pos // self.page_size]
        if page.min() < 0:
            raise ArgumentError("Pages: slots asked for positions that were not reserved")
        return (page * self.page_size + pos % self.page_size).astype(np.int32)

    def columns(self, reach: int) -> int:
        """Columns of the block table that `reach` positions need, one at least."""
        return max(1, self._pages_for(reach))

    def _grow(self, missing: int) -> None:
        more = min(self.limit - self.total, max(missing, self.total // 2))
        if (self.total + more) * self.page_size >= _SLOTS:
            raise PagesFullError(f"Pages: slots are int32; {self.total + more} pages of {self.page_size} do not fit")
        grown = self.kv.new_empty(*self.kv.shape[:2], self.total + more, *self.kv.shape[3:])
        grown[:, :, : self.total] = self.kv
        self._free = list(range(self.total + more - 1, self.total - 1, -1)) + self._free
        self.kv = grown

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)
