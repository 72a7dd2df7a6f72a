"""What the planner says beside the rows of a comparison, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from compare import planned
from compare import run as runner
from compare.generated import full_depth
from compare.measure import Effort
from tiny_compare import KEY, NEW, exits_of, named, shared, subject_of

from dyndepth.plan import Machine, Shape
from dyndepth.plan import exits_of as exits_of_plan

#: A weight takes 1 us to read and 0.25 us a row to compute, so four rows are free; a number of K or V takes 1 us; to read at
#: a boundary how many leave, 1 ms.
TOY = Machine("toy", "bfloat16", bandwidth=2e6, flops=8e6, sync_s=1e-3)
#: A layer takes 1 ms, the head 2 ms, K,V of a token and layer 10 us; K,V of a skipped layer are 100 x 10 weights, 1 ms.
SMALL = Shape("small", layers=6, width=100, layer=1000, products=1, kv=10, head=2000, ready=100, vocab=20)


def _planner() -> planned.Planner:
    exits = exits_of(shared().model)
    return planned.Planner(TOY, SMALL, exits, exits)


def _row(mode: str, **changes: Any) -> dict[str, Any]:
    row = {"system": "dyndepth", "mode": mode, "dtype": "float32", "batch": 1, "context": 18, "new_tokens": 4}
    row |= {"rows_x_layers": 1.0, "decode_tokens_per_s_median": 100.0} | changes
    return {"prompt_tokens": 14 * int(row["batch"])} | row


def test_full_depth_by_hand() -> None:
    """Six layers of 1 ms and 16 tokens' K,V of 10 us, and the head."""
    assert _planner().step(_row("full depth")) == pytest.approx(6 * (1e-3 + 16 * 10e-6) + 2e-3)
    # Eight rows take twice what four do.
    assert _planner().step(_row("full depth", batch=8)) == pytest.approx(2 * (6e-3 + 2e-3) + 6 * 8 * 160e-6)


def test_fixed_depth_leaves_layers_out_and_writes_their_keys() -> None:
    planner = _planner()
    head = exits_of_plan(planner.exits, {3: 1.0})[0].head
    assert planner.step(_row("fixed depth 3")) == pytest.approx(3 * (1e-3 + 160e-6) + 2e-3 + 3 * 1e-3 + 1e-3 + head * 1e-6)


def test_dynamic_runs_the_work_that_was_measured() -> None:
    """Nobody leaves: full depth and judging. More leave: less time, by no more than layers take."""
    shape = dataclasses.replace(SMALL, kv=1)  # or back-fill costs what layers do
    planner = dataclasses.replace(_planner(), shape=shape)
    full = planner.step(_row("full depth"))
    nobody, some, all_ = (planner.step(_row("dynamic", rows_x_layers=share)) for share in (1.0, 0.8, 0.5))
    assert full is not None
    assert nobody is not None
    assert some is not None
    assert all_ is not None
    assert nobody >= full + 2 * 1e-3, "two boundaries are read"
    assert planner.step(_row("shortlist")) == nobody
    assert nobody > some > nobody - 0.2 * 6 * (1e-3 + 16e-6)
    assert some > all_ > nobody - 0.5 * 6 * (1e-3 + 16e-6)


@pytest.mark.parametrize(
    "row",
    [
        _row("recompute"), _row("lossless"), _row("schedule"), _row("dynamic cache", system="transformers"),
        _row("full depth", decode_tokens_per_s_median=None), _row("dynamic", rows_x_layers=None),
    ],
    ids=lambda row: row["mode"],
)  # fmt: skip
def test_no_formula_no_prediction(row: dict[str, Any]) -> None:
    assert _planner().step(row) is None
    assert planned.beside([row], lambda _: _planner())[0][planned.KEY] is None
    assert planned.error([row | {planned.KEY: None}, row]) is None


def test_error_is_of_seconds_per_step() -> None:
    """Twice the tokens/s predicted: half the seconds. Half of them: twice the seconds."""
    rows = [_row("a") | {planned.KEY: 200.0}, _row("b") | {planned.KEY: 50.0}, _row("c") | {planned.KEY: None}]
    found = planned.error(rows)
    assert found is not None
    assert found == pytest.approx({"rows": 2, "mean_absolute": 0.75, "largest": 1.0, "mean": 0.25})


def test_a_run_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned.Machine, "measure", lambda dtype, again: TOY)
    rows = runner.compare(
        tmp_path, [KEY], subject_of, [full_depth(), named("dynamic"), named("dynamic cache")],
        {"new_tokens": NEW, "systems": []}, Effort(2, 100.0), plan=True, say=lambda _: None,
    )  # fmt: skip
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["rows"] == rows
    predicted = {row["mode"]: row[planned.KEY] for row in rows}
    assert predicted["dynamic cache"] is None
    measured = [row for row in rows if row["decode_tokens_per_s_median"] is not None and row["system"] == "dyndepth"]
    assert all(predicted[row["mode"]] > 0 for row in measured)
    assert found["planner"] == planned.error(rows)
