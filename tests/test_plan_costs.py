"""The cost table that a runtime asks: by hand, against predicted steps, through files."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import H100, LLAMA, SIX, SMALL, TOY, exits_strategy

from dyndepth.errors import ArgumentError
from dyndepth.plan import CostTable, Exit, full_depth, predict


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.integers(1, 5), st.integers(1, 12), st.integers(0, 90), st.sampled_from([0, 3]))
def test_judging_saves_what_predict_says(rate: float, leave: int, rows: int, context: int, words: int) -> None:
    """One exit: full depth less compaction, by another way of counting."""
    machine = dataclasses.replace(TOY, op_s=1e-5, sync_s=1e-4)
    one = Exit(leave, 6, rate, head=50, words=words)
    shape = dataclasses.replace(SIX, windows=(0, 30, 0, 30, 0, 30))
    table = CostTable.of(machine, shape, [one], rows=12)
    change = full_depth(machine, shape, rows, context).seconds - predict(machine, shape, [one], rows, context).seconds
    # A compaction here moves the rows that are live, which at the only exit are all.
    assert table.judging_saves(leave, rows, context) == pytest.approx(change, abs=1e-9)
    assert table.worth_judging(leave, rows, context) == (table.judging_saves(leave, rows, context) > 0)


def test_compacting_by_hand() -> None:
    """Exit at 2 of 4. Of 8 rows, bound by compute, 4 leave: two layers of 2 ms become 1; 2000 weights of back-fill take 2 ms,
    8 x 200 numbers 3.2 ms to move. A token read saves 4 rows x 2 layers x 10 us."""
    table = CostTable.of(TOY, SMALL, [Exit(2, 4, 0.5)], rows=8)
    assert table.compacting_saves(2, 8, 4) * 1e3 == pytest.approx(2 * 2 - 2 * 1 - 2 - 3.2)
    assert table.compacting_saves(2, 8, 4, context=100) * 1e3 == pytest.approx(-3.2 + 100 * 0.08)
    assert table.compacting_saves(2, 8, 8) * 1e3 == pytest.approx(2 * 2 - 4)  # nobody stays: nothing moves
    assert table.compacting_saves(2, 8, 0) == table.compacting_saves(2, 0, 0) == table.judging_saves(2, 0) == 0
    assert not table.worth_compacting(2, 8, 4)
    assert table.worth_compacting(2, 8, 4, context=100)


def test_what_a_runtime_asks() -> None:
    """An 8B model on an H100: alone skipping pays; among 16 rows nothing does, until contexts are long or nobody is left."""
    table = CostTable.of(H100, LLAMA, [Exit(16, 32, 0.5)])
    assert table.worth_judging(16, 1)
    assert not table.worth_judging(16, 16, 256)
    assert table.worth_judging(16, 16, 16384)
    assert not table.worth_judging(16, 1, rate=0.0)
    assert not table.worth_compacting(16, 16, 8)
    assert table.worth_compacting(16, 16, 16)
    assert table.worth_compacting(16, 16, 8, 16384)
    assert not table.worth_compacting(16, 16, 0, 16384)


def test_beyond_the_table_goes_on_as_a_line() -> None:
    small, large = (CostTable.of(TOY, SMALL, [Exit(2, 4, 0.5)], rows=rows) for rows in (9, 40))
    assert small.compacting_saves(2, 40, 7, 3) == pytest.approx(large.compacting_saves(2, 40, 7, 3))
    assert small.judging_saves(2, 40, 3) == small.judging_saves(2, 9, 3) == large.judging_saves(2, 9, 3)


@settings(max_examples=20, deadline=None)
@given(exits_strategy())
def test_tables_survive_files(exits: list[Exit]) -> None:
    table = CostTable.of(TOY, SIX, exits, rows=3)
    table.judging_saves(exits[0].leave, 2) if exits else None
    for back in (CostTable.from_json(json.loads(json.dumps(table.to_json()))), pickle.loads(pickle.dumps(table))):
        assert back == table
        assert hash(back) == hash(table)


TABLE = CostTable.of(TOY, SMALL, [Exit(2, 4, 0.5)], rows=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TABLE.worth_judging(3, 1), "cost table: no band leaves at boundary 3; boundaries are 2"),
        (lambda: CostTable.of(TOY, SMALL, [], 2).worth_judging(3, 1), "no band leaves at boundary 3; boundaries are none"),
        (lambda: TABLE.worth_judging(2, 1, rate=2), r"cost table: rate must be in \[0, 1\], got 2"),
        (lambda: TABLE.worth_compacting(2, 3, 4), r"cost table: leaving must be in \[0, 3\], got 4"),
        (lambda: CostTable.of(TOY, SMALL, [], rows=0), "cost table: rows must be at least 1, got 0"),
        (
            lambda: dataclasses.replace(TABLE, partition=(0.0,)),
            r"cost table: wanted seconds for the same 0..N rows, got \[4, 1,",
        ),
        (lambda: dataclasses.replace(TABLE, read=-1.0), "cost table: seconds must be finite and not negative"),
        (lambda: dataclasses.replace(TABLE, reach=(0,)), "cost table: wanted 1 <= leave < resume <= layers"),
        (lambda: CostTable.from_json({}), "cost table: wanted what CostTable.to_json gives: 'version'"),
        (lambda: CostTable.from_json({"version": 7}), "cost table: version 7, this dyndepth reads 1"),
    ],
)
def test_errors_of_tables(call: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()
