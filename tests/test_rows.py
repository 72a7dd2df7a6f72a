"""Rows: whatever leaves and resumes in whatever order, every buffer follows the index back to the caller's order."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndepth.runtime.rows import Rows


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 40), st.lists(st.integers(0, 2**31 - 1), max_size=6))
def test_index_leads_home_after_any_partitions(count: int, seeds: list[int]) -> None:
    """Against the stable three-way partition of a Python list, step by step."""
    home = torch.arange(count)
    rows = Rows(
        hidden=home[:, None] * torch.ones(1, 3), seq=home.int(), pos=home.int() + 100, slots=home.int() + 200,
        step=home.int() + 300, may_leave=home % 2 == 0,
    )  # fmt: skip
    expected = list(range(count))
    for seed in seeds:
        state = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
        rows.carry("home", rows.seq[: rows.live].float())
        live, left = rows.partition(state)
        kinds = state.tolist()
        expected = [row for kind in range(3) for row, own in zip(expected, kinds, strict=True) if own == kind]
        assert (live, left) == (kinds.count(0), kinds.count(1))
        assert rows.live == live
        assert (rows.counter is None) == (live == count)
        assert rows.index.tolist() == expected
        assert rows.hidden[:, 2].tolist() == expected
        assert (rows.slots - 200).tolist() == (rows.pos - 100).tolist() == (rows.step - 300).tolist() == expected
        assert rows.may_leave.tolist() == [row % 2 == 0 for row in expected]
        carried = rows.carried["home"]
        assert carried[~carried.isnan()].tolist() == [float(r) for r, c in zip(expected, carried, strict=True) if not c.isnan()]
