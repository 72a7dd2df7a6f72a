"""Pages: allocation is bookkeeping that must never leak, alias or half-take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dyndepth.errors import ArgumentError, PagesFullError
from dyndepth.runtime.pages import Pages

SEQUENCES = 4


def make(pages: int = 6, page_size: int = 4, **options: int) -> Pages:
    return Pages(layers=2, pages=pages, page_size=page_size, kv_heads=1, head_dim=2, sequences=SEQUENCES, **options)


class Allocation(RuleBasedStateMachine):
    """Random reservations and releases against a dictionary."""

    @initialize(pages=st.integers(0, 6), page_size=st.integers(1, 5), more=st.integers(0, 6))
    def start(self, pages: int, page_size: int, more: int) -> None:
        self.pages = make(pages, page_size, limit=pages + more)
        self.total, self.size = pages + more, page_size
        self.lengths = dict.fromkeys(range(SEQUENCES), 0)

    def _held(self, sequence: int) -> int:
        return -(-self.lengths[sequence] // self.size)

    @rule(sequence=st.integers(0, SEQUENCES - 1), length=st.integers(0, 30))
    def reserve(self, sequence: int, length: int) -> None:
        wanted = max(-(-length // self.size), self._held(sequence))
        others = sum(self._held(s) for s in range(SEQUENCES) if s != sequence)
        before = self.pages.block_table().clone()
        if wanted + others > self.total:
            with pytest.raises(PagesFullError):
                self.pages.reserve(sequence, length)
            assert torch.equal(self.pages.block_table(), before)
        else:
            self.pages.reserve(sequence, length)
            new = range(self.lengths[sequence], length)
            self.lengths[sequence] = max(self.lengths[sequence], length)
            for slot, position in zip(self.pages.slots([sequence] * len(new), list(new)).tolist(), new, strict=True):
                self._flat()[slot] = 100 * sequence + position

    def _flat(self) -> torch.Tensor:
        """One number per slot: the last element of the last layer's V."""
        return self.pages.kv[-1, -1].flatten(0, 1)[:, 0, -1]

    @rule(sequence=st.integers(0, SEQUENCES - 1))
    def release(self, sequence: int) -> None:
        self.pages.release(sequence)
        self.lengths[sequence] = 0

    @invariant()
    def nothing_leaks_or_aliases(self) -> None:
        if not hasattr(self, "pages"):
            return
        assert self.pages.total <= self.total
        assert self.pages.free == self.pages.total - sum(self._held(s) for s in range(SEQUENCES))
        owned = [page for page in self.pages.block_table().flatten().tolist() if page >= 0]
        assert len(owned) == len(set(owned)) == sum(self._held(s) for s in range(SEQUENCES))
        pairs = [(s, p) for s in range(SEQUENCES) for p in range(self.lengths[s])]
        slots = self.pages.slots([s for s, _ in pairs], [p for _, p in pairs]).tolist()
        assert len(slots) == len(set(slots))
        assert all(0 <= slot < self.pages.total * self.size for slot in slots)
        # Growing moved what was written.
        assert self._flat()[slots].tolist() == [100 * s + p for s, p in pairs]


Allocation.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestAllocation = Allocation.TestCase


def test_slots_by_hand() -> None:
    pages = make(pages=3, page_size=4)
    pages.reserve(2, 5)  # takes pages 0 and 1, in that order
    assert pages.block_table()[2].tolist() == [0, 1]
    assert pages.slots([2, 2, 2], [0, 3, 4]).tolist() == [0, 3, 4]
    pages.reserve(0, 1)
    assert pages.slots([0], [0]).tolist() == [8]
    pages.release(2)
    pages.reserve(1, 9 - 1)
    assert sorted(pages.block_table()[1].tolist()) == [0, 1]
    assert pages.length(1) == 8


def test_block_table_is_cut_to_the_reach() -> None:
    pages = make(pages=6, page_size=4)
    pages.reserve(0, 9)
    assert pages.block_table(9).shape == (SEQUENCES, 3)
    assert pages.block_table(4).shape == (SEQUENCES, 1)
    assert pages.block_table(0).shape == (SEQUENCES, 1)
    assert pages.block_table(9).is_contiguous()


def test_errors_say_what_is_missing() -> None:
    pages = make(pages=2, page_size=4)
    with pytest.raises(PagesFullError, match=r"sequence 1 wants 3 more pages for 9 positions, 2 of 2 pages of 4 are free"):
        pages.reserve(1, 9)
    pages.reserve(0, 5)
    with pytest.raises(PagesFullError, match=r"sequence 1 wants 1 more pages for 3 positions, 0 of 2 pages of 4 are free"):
        pages.reserve(1, 3)
    with pytest.raises(ArgumentError, match="not reserved"):
        pages.slots([1], [0])
    with pytest.raises(ArgumentError, match=r"positions must be in \[0, 8\)"):
        pages.slots([0], [8])


@pytest.mark.parametrize("change", [{"page_size": 0}, {"layers": 0}, {"pages": -1}, {"pages": 2**28, "page_size": 16}])
def test_wrong_geometry(change: dict[str, int]) -> None:
    arguments = {"layers": 1, "pages": 1, "page_size": 4, "kv_heads": 1, "head_dim": 2, "sequences": 1, **change}
    with pytest.raises(ArgumentError, match="Pages:"):
        Pages(**arguments)
