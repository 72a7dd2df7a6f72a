"""The comparison's requests over slots: who is complete when, what is written, resuming."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from compare import completion
from compare import run as runner
from compare.completion import Load, Plan, Serving, serving_systems
from compare.journal import Journal
from compare.measure import Effort
from tiny_compare import subject_of

import dyndepth

NEW = 4


def load(slots: int, requests: int = 5) -> Load:
    subject = subject_of()
    prompts = subject.cell(requests, 18, NEW).prompts
    return Load.of(subject.model, subject.exits, prompts, slots, NEW)


def test_requests_want_different_numbers_of_tokens() -> None:
    assert load(2).tokens == [2, 4, 6, 2, 4]


CASES = [(system, slots) for system in serving_systems() for slots in (1, 2) if slots == 1 or not system.alone]


@pytest.mark.parametrize(("system", "slots"), CASES, ids=[f"{system.name}-{slots}" for system, slots in CASES])
def test_every_system_answers_every_request(system: Serving, slots: int) -> None:
    asked = load(slots)
    found = system.run(asked)
    assert len(found["ends"]) == 5
    assert min(found["ends"]) > 0
    if slots == 1:
        assert found["ends"] == sorted(found["ends"]), "one after the other, in the order of arrival"
    elif system.mode == "dynamic cache":
        assert found["ends"][0] == found["ends"][1] < found["ends"][2] == found["ends"][3] < found["ends"][4]
    if "lossless" in system.mode:
        assert 0 <= found["accepted"] <= found["drafted"]
    if system.mode == "full depth":
        assert found["rows_x_layers"] == 1.0


def test_the_engine_is_asked_for_what_the_load_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, policy, mode and thresholds of every system reach the engine."""
    seen: list[tuple[Any, ...]] = []

    class Recorder(dyndepth.Engine):
        def __init__(self, model: Any, exits: Any = None, **options: Any) -> None:
            self.about = (None if exits is None else [band.threshold for band in exits], options["kv"], options["slots"])
            super().__init__(model, exits, **options)

        def add_request(self, request: dyndepth.Request) -> dyndepth.Request:
            seen.append((*self.about, request.mode, request.max_new_tokens))
            return super().add_request(request)

    monkeypatch.setattr(completion, "Engine", Recorder)
    asked = load(2)
    shipped = [band.threshold for band in asked.exits]
    wanted = {
        "full depth": (None, None, "dynamic"), "dynamic": (shipped, None, "dynamic"),
        "propagate": (shipped, "propagate", "dynamic"), "recompute": (shipped, "recompute", "dynamic"),
        "lossless": (shipped, "recompute", "lossless"), "lossless at 0.4": ([0.4, 0.4], "recompute", "lossless"),
    }  # fmt: skip
    for system in serving_systems():
        if system.system != "dyndepth":
            continue
        seen.clear()
        system.run(asked)
        thresholds, kv, mode = wanted.pop(system.mode)
        assert seen == [(thresholds, kv, 2, mode, tokens) for tokens in (2, 4, 6, 2, 4)]
    assert not wanted


def test_the_figures_by_hand(tmp_path: Path) -> None:
    system = Serving("a", "b", lambda load: {})
    plan = Plan("float32", 18, (2,), 3, [system])
    journal = Journal(tmp_path / "j", {})

    def ran(ends: list[float], preempted: bool = False) -> None:
        journal.add(("float32", 2, 18), system.name, "served", preempted=preempted, tokens=[4, 8], ends=ends)

    assert completion.rows(journal, plan) == []
    ran([1.0, 2.0])
    ran([1.5, 4.0])
    ran([50.0, 90.0], preempted=True)
    (row,) = completion.rows(journal, plan)
    assert row["tokens_per_s"] == pytest.approx(12 / 3.0), "of the median of 2 and 4 seconds"
    assert (row["p50_s"], row["p99_s"]) == (1.5, 4.0), "of 1, 1.5, 2 and 4"
    assert (row["repetitions"], row["preempted"], row["requests"], row["lengths"]) == (2, 1, 2, [4, 8])
    ran([60.0, 90.0], preempted=True)
    ran([70.0, 95.0], preempted=True)
    (row,) = completion.rows(journal, plan)
    assert (row["repetitions"], row["preempted"]) == (5, 3), "where most were preempted all count"
    assert completion.quantile([1.0, 2.0, 3.0], 0.99) == 3.0
    assert completion.quantile([7.0], 0.5) == 7.0


def serving(folder: Path, *systems: Serving, slots: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    """A comparison that is nothing but requests over slots; what it wrote."""
    plan = Plan("float32", 18, slots, 2, list(systems))
    runner.compare(folder, [], subject_of, [], {"new_tokens": NEW}, Effort(1, 1.0), serving=plan, say=lambda text: None)
    found: dict[str, Any] = json.loads((folder / "compare.json").read_text())
    return found


def scripted(name: str, calls: dict[str, int], fails_at: int, error: type[BaseException]) -> Serving:
    def run(load: Load) -> dict[str, Any]:
        calls[name] += 1
        if calls[name] == fails_at:
            raise error("no\nmemory")
        return {"ends": [float(number + 1) for number in range(len(load.tokens))]}

    return Serving("x", name, run)


def test_a_run_holds_them_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    calls = {"a": 0, "b": 0}

    def whole(fails_at: int) -> dict[str, Any]:
        calls.update(a=0, b=0)
        return serving(tmp_path, scripted("a", calls, 0, ValueError), scripted("b", calls, fails_at, KeyboardInterrupt))

    with pytest.raises(KeyboardInterrupt):
        whole(3)  # a call to be warm, one repetition, and the next one stops
    found = whole(0)
    assert calls == {"a": 3, "b": 5}, "one slot: b is warmed and has one to go; two slots: both are warmed and run twice"
    assert [(row["slots"], row["mode"], row["requests"], row["new_tokens"]) for row in found["served"]] == [
        (1, "a", 6, 24), (1, "b", 6, 24), (2, "a", 6, 24), (2, "b", 6, 24),
    ]  # fmt: skip
    assert whole(0) == found
    assert calls == {"a": 0, "b": 0}


def test_who_fails_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    calls = {"a": 0, "b": 0}
    found = serving(tmp_path, scripted("a", calls, 2, RuntimeError), scripted("b", calls, 0, ValueError), slots=(1,))
    assert [(row["mode"], row["repetitions"] + row["preempted"] > 0) for row in found["served"]] == [("b", True)]
    assert calls == {"a": 2, "b": 3}
    (line,) = found["not_run"]
    assert (line["mode"], line["batch"], line["reason"]) == ("a, over slots", 1, "RuntimeError: no memory")


def test_fewer_tokens_than_wanted_are_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(dyndepth.Engine):
        def add_request(self, request: dyndepth.Request) -> dyndepth.Request:
            request.max_new_tokens = min(request.max_new_tokens, 3)
            return super().add_request(request)

    monkeypatch.setattr(completion, "Engine", Short)
    with pytest.raises(ValueError, match=r"wanted \[2, 4, 6, 2, 4\] new tokens, got \[2, 3, 3, 2, 3\]"):
        serving_systems()[0].run(load(2))


def test_cells_as_written_on_the_command_line() -> None:
    assert runner._cells("bfloat16:1024:1,4") == [("bfloat16", 1, 1024), ("bfloat16", 4, 1024)]
    for wrong in ("bfloat16:1024", "bfloat16:long:1", "foo"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"wanted DTYPE:CONTEXT:BATCHES .* got '{wrong}'"):
            runner._cells(wrong)
