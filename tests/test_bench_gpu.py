"""What `make bench-gpu` writes, by the same function on the CPU: keys, figures, and refusal of wrong answers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dyndepth import ops  # noqa: F401  (registers the ops)
from dyndepth.op import REGISTRY, Provider
from dyndepth.plan.of_call import of_call
from dyndepth.testing import CASES

SCHEMA = {
    "op": str, "case": str, "dtype": str, "provider": str, "median_us": float, "p90_us": float, "bytes": int,
    "flops": (int, type(None)), "bytes_per_s": float, "flops_per_s": (float, type(None)), "share_of_copy_roof": float,
}  # fmt: skip
CALLS = {
    "ragged_linear": "smol16_gated", "ragged_attention": "smol16_256", "store_kv": "smol16", "router_score": "smol16",
    "compact_rows": "decode16", "project_qkv": "smol16_half_live", "backfill_kv": "smol1_15", "exit_stats": "smol16_short",
    "accept_drafts": "greedy16",
}  # fmt: skip


def _timed(call: Callable[[], Any]) -> list[float]:
    call()
    return [2.0, 4.0, 8.0]


def _rows(calls: dict[str, str]) -> list[dict[str, Any]]:
    gpu_ops: Any = importlib.import_module("gpu_ops")
    return list(gpu_ops.measure("cpu", _timed, 1e9, lambda op, case: calls.get(op) == case.name))


def test_every_op_has_an_entry_with_bytes_and_flops() -> None:
    assert set(CALLS) == set(REGISTRY)
    rows = _rows(CALLS)
    assert {row["op"]: row["case"] for row in rows if row["provider"] == "torch"} == CALLS
    for row in rows:
        assert {name: isinstance(row[name], kind) for name, kind in SCHEMA.items()} == dict.fromkeys(SCHEMA, True)
        assert set(row) == set(SCHEMA)
        assert (row["flops"] is None) == (row["op"] == "accept_drafts")
        assert (row["median_us"], row["p90_us"]) == (4.0, 8.0)
        assert row["bytes_per_s"] == pytest.approx(row["bytes"] / 4e-6)
        assert row["share_of_copy_roof"] == pytest.approx(row["bytes_per_s"] / 1e9)


def test_figures_by_hand() -> None:
    """16 rows from 576 to 1536 channels through two weights in bf16; 8 of 16 rows with queries."""
    gated, half = (_rows({op: CALLS[op]})[0] for op in ("ragged_linear", "project_qkv"))
    assert gated["flops"] == 2 * 2 * 16 * 576 * 1536
    assert gated["flops_per_s"] == pytest.approx(gated["flops"] / 4e-6)
    assert gated["bytes"] == 2 * (2 * 576 * 1536 + 16 * (576 + 1536))
    assert half["flops"] == 2 * 576 * (8 * 576 + 16 * 2 * 192)


@pytest.mark.parametrize("op", sorted(set(CALLS) - {"accept_drafts"}))
def test_bytes_are_the_planner_s_as_flops_are(op: str) -> None:
    case = next(case for case in CASES[op] if case.name == CALLS[op])
    moved = of_call(op, case.build(torch.bfloat16))
    assert {(row["bytes"], row["flops"]) for row in _rows({op: CALLS[op]})} == {(moved.bytes, moved.flops)}


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    op = REGISTRY["router_score"]
    wrong = Provider("cuda", lambda hidden, *_: torch.full((len(hidden),), 2.0), lambda: None, lambda *_, **__: None)
    monkeypatch.setattr(op, "providers", {"cuda": wrong, **op.providers})
    with pytest.raises(AssertionError, match="not close"):
        _rows({"router_score": "smol16"})


def test_cases_are_there() -> None:
    assert all(any(case.name == name and case.bench for case in CASES[op]) for op, name in CALLS.items())
