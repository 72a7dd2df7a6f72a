"""A run of the comparison on tiny models: what is measured and written, resuming, failing, peers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_exits
import torch
from compare import economize_peer, results, vllm_peer
from compare import run as runner
from compare.generated import Generated, SelfSpeculation, full_depth
from compare.journal import Journal
from compare.measure import Effort, Reference, reference_of
from compare.system import Cell, Output, System
from tiny_compare import BATCH, KEY, NEW, named, ours, shared, subject_of

import dyndepth
from dyndepth.demo import measure as demo
from dyndepth.exits import Always

# -- what is measured ---------------------------------------------------------------------------------------------------


def test_agreement_ends_where_full_depth_ends() -> None:
    text = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    said = torch.tensor([[5, 2, 7, 8], [5, 6, 7, 8]])  # the first answer would end at its second token
    reference = Reference(text, said, [2])
    assert reference.teacher(torch.tensor([[5, 6, 0, 0], [5, 6, 7, 0]])) == pytest.approx(4 / 6)
    assert reference.teacher(said) == 1.0
    assert reference.teacher(said[:1]) == 1.0, "of the first row alone"
    assert reference.free(torch.tensor([[5, 0, 0, 0], [5, 6, 0, 0]])) == pytest.approx(3 / 5)
    assert Reference(text[:1], torch.full((1, 4), 2), [2]).free(text[:1]) == 1.0


def settings(systems: list[System], **changes: Any) -> dict[str, Any]:
    return {"new_tokens": NEW, "systems": [system.name for system in systems]} | changes


def ran(
    folder: Path, systems: list[System], *, cells: Any = (KEY,), repetitions: int = 2, **options: Any
) -> list[dict[str, Any]]:
    said = options.pop("said", [])
    effort = Effort(repetitions, options.pop("seconds", 100.0))
    chosen = settings(systems, **options.pop("settings", {}))
    return runner.compare(folder, list(cells), subject_of, systems, chosen, effort, say=said.append, **options)


class Scripted(Generated):
    """Full depth that counts its calls, and may fail in one of them."""

    def __init__(self, mode: str, fails_at: int = -1, error: type[BaseException] = RuntimeError) -> None:
        super().__init__("scripted", mode, lambda cell: {})
        self.calls, self.fails_at, self.error = 0, fails_at, error

    def generate(self, cell: Cell, new_tokens: int, forced: Any = None) -> Output:
        self.calls += 1
        if self.calls == self.fails_at:
            raise self.error("no\nmemory")
        return super().generate(cell, new_tokens, forced)


def test_files_say_the_same_and_parse_back(tmp_path: Path) -> None:
    rows = ran(tmp_path, [full_depth(), named("dynamic"), SelfSpeculation()])
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["rows"] == rows
    assert [row["mode"] for row in rows] == ["full depth", "dynamic"]
    first = demo.as_json([demo.Row("a", "b", "c", 1, 2, 3.0, 4.0, 5.0, 0.6, 0.7, 0.8)])[0]
    assert list(rows[0])[: len(first)] == list(first), "the demo's schema, then more"
    assert found["machine"]["packages"]["torch"] == torch.__version__
    (reason,) = found["not_run"]
    assert reason["system"] == "transformers"
    assert "works for one prompt, got 3" in reason["reason"]
    with (tmp_path / "compare.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [line["mode"] for line in table] == ["full depth", "dynamic", "self-speculation"]
    assert float(table[1]["rows_x_layers"]) == rows[1]["rows_x_layers"]
    assert table[2]["reason"] == reason["reason"]
    with (tmp_path / "compare_raw.csv").open() as file:
        raw = list(csv.DictReader(file))
    assert [(line["name"], line["repetition"]) for line in raw] == [
        ("dyndepth, full depth", "0"), ("dyndepth, dynamic", "0"), ("dyndepth, full depth", "1"), ("dyndepth, dynamic", "1"),
    ], "in turn"  # fmt: skip
    whole = sorted(NEW * BATCH / float(line["whole_s"]) for line in raw if line["name"] == "dyndepth, dynamic")
    assert rows[1]["repetitions"] + rows[1]["preempted"] >= 2
    if rows[1]["preempted"] == 0:
        assert rows[1]["tokens_per_s_median"] == pytest.approx(sum(whole) / 2)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*tmp")), "no temporary is left"


def test_prefill_and_decode_are_apart(tmp_path: Path) -> None:
    """From raw seconds worked out by hand; a preempted repetition is left out, but not when most were."""
    system = full_depth()
    journal = Journal(tmp_path / "j", {})
    journal.add(KEY, system.name, "judged", teacher=1.0, share=None)

    def block(first: float, whole: float, preempted: bool) -> None:
        facts = {"first_token_preempted": False, "whole_preempted": preempted, "free": 1.0}
        journal.add(KEY, system.name, "block", first_token_s=first, whole_s=whole, **facts)

    block(1.0, 3.0, False)
    block(2.0, 6.0, False)
    block(9.0, 99.0, True)
    row = results.compared(journal, KEY, system, 5, 30)
    assert row is not None
    assert row.row.tokens_per_s_median == pytest.approx((15 / 3 + 15 / 6) / 2)
    assert row.prefill_tokens_per_s_median == pytest.approx((30 + 15) / 2)
    assert row.decode_tokens_per_s_median == pytest.approx((12 / 2 + 12 / 4) / 2)
    assert (row.repetitions, row.preempted) == (2, 1)
    assert row.flat()["rows_x_layers"] is None
    block(9.0, 99.0, True)
    block(5.0, 4.0, True)
    row = results.compared(journal, KEY, system, 5, 30)
    assert row is not None
    assert (row.repetitions, row.preempted) == (5, 3)
    assert row.flat()["decode_tokens_per_s_median"] is None, "a whole call faster than its prompt says nothing"


def test_a_failing_system_is_written_down_and_the_others_go_on(tmp_path: Path) -> None:
    systems = [Scripted("in judging", 1), full_depth(), Scripted("in a repetition", 4)]
    rows = ran(tmp_path, systems)
    found = {row["mode"]: row for row in rows}
    assert found["full depth"]["repetitions"] + found["full depth"]["preempted"] >= 2
    assert "in judging" not in found
    not_run = {line["mode"]: line["reason"] for line in json.loads((tmp_path / "compare.json").read_text())["not_run"]}
    assert not_run == {"in judging": "RuntimeError: no memory", "in a repetition": "RuntimeError: no memory"}
    assert systems[0].calls == 1, "it is not asked again"


class Short(Generated):
    """Gives one token too few, when it is judged or when it is timed."""

    def generate(self, cell: Cell, new_tokens: int, forced: Any = None) -> Output:
        short = (self.mode == "judged") == (forced is not None)
        return super().generate(cell, max(new_tokens - short, 1), forced)


@pytest.mark.parametrize("when", ["judged", "timed"])
def test_the_wrong_number_of_tokens_is_no_result(tmp_path: Path, when: str) -> None:
    assert ran(tmp_path, [Short("short", when, lambda cell: {})]) == []
    (line,) = json.loads((tmp_path / "compare.json").read_text())["not_run"]
    assert line["reason"] == "ValueError: wanted tokens [3, 5], got [3, 4]"


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    other = ("float32", 2, 18)
    systems = [Scripted("a"), Scripted("b", fails_at=5, error=KeyboardInterrupt)]  # in its second repetition
    with pytest.raises(KeyboardInterrupt):
        ran(tmp_path, systems, cells=(KEY, other))
    journal = tmp_path / "compare_journal.jsonl"
    with journal.open("a") as file:
        file.write('{"cell": ["float32", 3, 18], "na')  # half a line
    again = [Scripted("a"), Scripted("b")]
    rows = ran(tmp_path, again, cells=(KEY, other))
    assert [(row["batch"], row["mode"]) for row in rows] == [(3, "a"), (3, "b"), (2, "a"), (2, "b")]
    assert (again[0].calls, again[1].calls) == (5, 2 + 5), "what was known is not measured again"
    assert len(json.loads((tmp_path / "compare.json").read_text())["rows"]) == 4
    finished = [Scripted("a"), Scripted("b")]
    assert ran(tmp_path, finished, cells=(KEY, other)) == rows
    assert finished[0].calls == finished[1].calls == 0


def test_other_settings_are_refused(tmp_path: Path) -> None:
    ran(tmp_path, [full_depth()], repetitions=1, settings={"threads": 1})
    with pytest.raises(SystemExit, match="measured with threads 1, wanted 2"):
        ran(tmp_path, [full_depth()], repetitions=1, settings={"threads": 2})
    ran(tmp_path, [full_depth()], repetitions=1, settings={"threads": 2}, fresh=True)


def test_a_system_that_kills_the_process_twice_is_left_out(tmp_path: Path) -> None:
    systems: list[System] = [Scripted("killer"), full_depth()]
    journal = Journal(tmp_path / "compare_journal.jsonl", settings(systems))
    journal.add(KEY, systems[0].name, "begun")
    assert not journal.died(KEY, systems[0].name)
    journal.add(KEY, systems[0].name, "begun")
    rows = ran(tmp_path, systems, repetitions=1)
    assert [row["mode"] for row in rows] == ["full depth"]
    assert "died twice" in json.loads((tmp_path / "compare.json").read_text())["not_run"][0]["reason"]
    assert systems[0].calls == 0


def test_no_repetition_starts_after_its_time(tmp_path: Path) -> None:
    rows = ran(tmp_path, [full_depth()], repetitions=50, seconds=0.0)
    assert rows[0]["repetitions"] == 1


def test_systems_are_chosen_by_name() -> None:
    every = ours()
    assert len(runner.chosen(every, None)) == len(every)
    assert [s.mode for s in runner.chosen(every, ["dynamic", "naive PyTorch"])] == ["dynamic", "all rows agree", "mask only"]
    known = [(system.system, system.mode) for system in every]
    runner.check_names(["dynamic", "naive PyTorch", "self-speculation"], known)
    with pytest.raises(SystemExit, match="got 'dynamite'"):
        runner.check_names(["dynamite"], known)


# -- peers --------------------------------------------------------------------------------------------------------------


def test_peers_that_are_not_installed_say_so(tmp_path: Path) -> None:
    peers = [economize_peer.Economize(tmp_path / "a", exits=True), vllm_peer.Vllm(tmp_path / "b", tmp_path, 18, 3)]
    assert ran(tmp_path, peers, repetitions=1) == []
    reasons = [line["reason"] for line in json.loads((tmp_path / "compare.json").read_text())["not_run"]]
    assert reasons == ["not installed: run with --with-economize", "not installed: run with --with-vllm"]


def test_vllms_process_is_asked_in_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for vllm: the worker, its answers and its errors come back; libraries may print what they like."""
    import sys

    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / ".installed").touch()
    (tmp_path / "vllm.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    system = vllm_peer.Vllm(tmp_path, tmp_path / "model", 18, 3)
    cell = shared()
    assert system.missing() is None
    assert system.generate(cell, 2).tokens.tolist() == [[len(prompt), 7] for prompt in cell.prompts]
    assert system.process is not None
    assert system.switches() >= 0
    forced = torch.full((BATCH, NEW), 9)
    assert system.generate(cell, NEW, forced).tokens.tolist() == [[9] * NEW] * BATCH
    with pytest.raises(RuntimeError, match="ValueError: thirteen"):
        system.generate(cell, 13)
    system.process.kill()
    with pytest.raises(RuntimeError, match="gave no answer to 'generate'"):
        system.generate(cell, 2)
    assert system.process is None


STAND_IN = """
from types import SimpleNamespace as Record
__version__ = "0"
print("a library prints")
def SamplingParams(**options): return Record(**options)
class LLM:
    def __init__(self, **options): assert options["dtype"] == "float32" and options["enable_prefix_caching"] is False
    def generate(self, prompts, how, use_tqdm):
        print("more prints")
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        if how.max_tokens == 13: raise ValueError("thirteen")
        if how.max_tokens == 1:
            return [Record(prompt_logprobs=[None] + [{t: Record(rank=1), 5: Record(rank=2)} for t in row[1:]]) for row in ids]
        assert how.min_tokens == how.max_tokens and how.temperature == 0.0
        return [Record(outputs=[Record(token_ids=(len(row), 7))]) for row in ids]
"""


def economize_folder() -> Path:
    folder = Path(__file__).resolve().parent.parent / "build" / "compare-economize"
    if not (folder / "economize").is_dir():
        pytest.skip("economize is not installed (compare.run --with-economize)")
    return folder


@pytest.mark.parametrize("exits", [True, False])
def test_economize_runs_the_same_model(exits: bool) -> None:
    system = economize_peer.Economize(economize_folder(), exits)
    cell = shared()
    assert system.refuses(cell) is None
    out = system.generate(cell, NEW)
    assert out.tokens.shape == (BATCH, NEW)
    closed = Cell(cell.model, cell.inputs, NEW, 18, cell.exits.with_thresholds(2.0), cell.shortlisted)
    reference = reference_of(full_depth(), closed)
    said = system.generate(closed, NEW, reference.text)
    assert said.tokens.shape == (BATCH, NEW)
    if exits:
        assert reference.teacher(said.tokens) == said.share == 1.0
        assert torch.equal(system.generate(closed, NEW).tokens, reference.text), "the end of sequence is suppressed"


def test_economize_leaves_where_dyndepth_leaves() -> None:
    """Its first new token runs every layer; from then on decisions and tokens are dyndepth's under propagate."""
    system = economize_peer.Economize(economize_folder(), exits=True)
    cell = shared()
    always = tiny_exits.exits_of(cell.model, tiny_exits.band(cell.model, 3, 6, Always()))
    cell = Cell(cell.model, cell.inputs, NEW, 18, always, always)
    text = full_depth().generate(cell, NEW).tokens
    said = system.generate(cell, NEW, text)
    options = {"custom_generate": dyndepth.generate, "exits": always, "kv": "propagate"}
    mine = Generated("dyndepth", "propagate", lambda cell: options).generate(cell, NEW, text)
    assert torch.equal(said.tokens[:, 1:], mine.tokens[:, 1:])
    assert torch.equal(said.tokens[:, 0], full_depth().generate(cell, NEW, text).tokens[:, 0])
    assert said.share == pytest.approx((1 + (NEW - 1) / 2) / NEW)
