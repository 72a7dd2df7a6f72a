"""The profile: timers that leave no trace, parts that add up, rows x layers, the trace file, the command line."""

from __future__ import annotations

import importlib
import itertools
import json
import time
import types
from pathlib import Path
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
import transformers
from typer.testing import CliRunner

import dyndepth.cli.profile
from dyndepth.cli.common import ERRORS, app
from dyndepth.errors import ArgumentError
from dyndepth.exits.criteria import Always, Criterion, Saturation, TopProbability
from dyndepth.profiling import Profile, Target, profile, tables, timing, trace
from dyndepth.profiling.prompts import prompts
from dyndepth.profiling.run import parts
from dyndepth.profiling.steps import PARTS, REST, SAMPLING, Step, quiet, steps_of
from dyndepth.profiling.timers import MARKS, TARGETS, Span

NEW, BATCH = 5, 3


def rows(batch: int = BATCH, length: int = 7) -> list[torch.Tensor]:
    return list(torch.randint(3, tiny_models.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1)))


def profiled(name: str = "llama", dynamic: bool = True, **options: Any) -> Profile:
    model = tiny_models.shared(name)
    exits = tiny_exits.mixed(model) if dynamic else None
    return profile(model, rows(), exits, new_tokens=NEW, repetitions=2, rounds=1, roof_bytes=1 << 16, **options)


def originals() -> list[Any]:
    """What the runtime has in the places that are timed."""
    found = []
    for target in TARGETS:
        module, _, name = target.owner.partition(":")
        owner = importlib.import_module(module)
        found.append(vars(getattr(owner, name) if name else owner)[target.name])
    return found


def test_the_runtime_has_everything_that_is_timed() -> None:
    """A function that was renamed would count for "the rest" without a word in this test."""
    with timing() as recorder:
        during = originals()
    assert recorder.missing == []
    assert not set(map(id, during)) & set(map(id, originals()))


def test_timers_are_taken_out_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    before = originals()
    with pytest.raises(KeyboardInterrupt), timing(), timing(MARKS):  # noqa: PT012
        assert originals() != before
        raise KeyboardInterrupt
    assert all(one is other for one, other in zip(originals(), before, strict=True))
    bad = (*TARGETS, Target("dyndepth.runtime.forward", "nobody", "layers"), Target("dyndepth.nowhere", "x", "layers"))
    with timing(bad) as recorder:
        pass
    assert recorder.missing == ["dyndepth.runtime.forward.nobody", "dyndepth.nowhere.x"]
    monkeypatch.delattr("dyndepth.runtime.generate._Loop._pass")
    with pytest.raises(RuntimeError, match=r"the runtime has no dyndepth.runtime.generate:_Loop._pass"), timing():
        pass
    monkeypatch.undo()
    assert all(one is other for one, other in zip(originals(), before, strict=True))


def test_a_call_that_raises_closes_its_spans() -> None:
    model = tiny_models.shared("llama")
    exits = tiny_exits.mixed(model)

    class Broken(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise ValueError("broken")

    before = originals()
    with timing() as recorder, pytest.raises(ValueError, match="broken"):
        model.generate(
            **tiny_models.prompts(2), custom_generate=dyndepth.generate, exits=exits, max_new_tokens=2,
            logits_processor=[Broken()],
        )  # fmt: skip
    assert {span.part for span in recorder.spans} >= {"loop", "pass", "layers", "LM head"}
    assert recorder._open == []
    assert all(one is other for one, other in zip(originals(), before, strict=True))


def test_time_is_exclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks once a reading: outer 0..7 holds two inners of 1 each and an opaque one of 1 whose inner is not
    recorded."""
    place = types.SimpleNamespace()
    module = types.ModuleType("profiled_place")
    monkeypatch.setitem(__import__("sys").modules, "profiled_place", module)
    module.inner = lambda number: number  # type: ignore[attr-defined]
    module.opaque = lambda: module.inner(5)  # type: ignore[attr-defined]
    module.outer = lambda: (module.inner(3), module.inner(number=4), module.opaque())  # type: ignore[attr-defined]
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(ticks))
    targets = [
        Target("profiled_place", "outer", "a"), Target("profiled_place", "inner", "b", facts=("number",)),
        Target("profiled_place", "opaque", "c", opaque=True),
    ]  # fmt: skip
    with timing(targets) as recorder:
        place.found = module.outer()  # type: ignore[attr-defined]
    assert place.found == (3, 4, 5)
    seen = [(span.name, span.begin, span.end, span.own, span.depth, span.facts) for span in recorder.spans]
    assert seen == [
        ("inner", 1, 2, 1, 1, (3,)), ("inner", 3, 4, 1, 1, (4,)), ("opaque", 5, 6, 1, 1, ()), ("outer", 0, 7, 4, 0, ()),
    ]  # fmt: skip


def span(part: str, begin: int, end: int, own: int, *facts: int, switches: int = 0) -> Span:
    return Span(part, part, begin, end, own, 0, facts, switches)


def test_steps_by_hand() -> None:
    """Two steps of one loop; a prompt before it and a second loop do not get in the way."""
    spans = [
        span("layers", 0, 5, 5, 0, 6, 9),  # a prompt
        span("loop", 10, 100, 20),
        span("pass", 12, 40, 8, switches=3), span("layers", 15, 25, 10, 0, 4, 2), span("LM head", 26, 36, 10),
        span("pass", 50, 90, 25, switches=5), span("layers", 60, 75, 15, 5, 1),
        span("loop", 200, 230, 10), span("pass", 205, 225, 20, switches=9),
    ]  # fmt: skip
    first, second, third = steps_of(spans)
    assert (first.whole, second.whole, third.whole) == (38, 50, 25)
    assert first.parts == dict.fromkeys(PARTS, 0) | {"layers": 10, "LM head": 10, SAMPLING: 10, REST: 8}
    assert second.parts == dict.fromkeys(PARTS, 0) | {"layers": 15, SAMPLING: 10, REST: 25}
    assert third.parts == dict.fromkeys(PARTS, 0) | {SAMPLING: 5, REST: 20}
    assert (first.switches, second.switches, third.switches) == (2, 0, 0)
    assert first.rows_by_layer == dict.fromkeys(range(4), 2)
    assert second.layers == ((5, 6, 1, 15),)


def step(whole: int, switches: int = 0, **given: int) -> Step:
    inside = {"layers": given.get("layers", 0), "LM head": given.get("head", 0)}
    own = dict.fromkeys(PARTS, 0) | inside
    own[REST] = whole - sum(own.values())
    return Step(0, whole, own, switches, ())


def test_parts_add_up() -> None:
    found = parts([step(10, layers=6, head=1), step(20, layers=9, head=4), step(30, layers=21, head=2)])
    by_name = {part["part"]: part for part in found}
    assert by_name["layers"]["median_s"] == pytest.approx(9e-9)
    assert by_name["layers"]["mean_s"] == pytest.approx(12e-9)
    assert by_name["LM head"]["share"] == pytest.approx((7 / 3) / 20)
    assert by_name[REST]["median_s"] == pytest.approx((20 - 9 - 2) * 1e-9)
    assert sum(part["median_s"] for part in found) == pytest.approx(20e-9)
    assert sum(part["share"] for part in found) == pytest.approx(1)


def test_preempted_steps_are_dropped_while_enough_are_left() -> None:
    good, bad = step(1), step(2, switches=1)
    assert quiet([good, bad, good]) == ([good, good], 1)
    assert quiet([bad, good, bad]) == ([bad, good, bad], 0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_profile(name: str) -> None:
    """One call of C++ per span (llama) and layers through their modules (gpt2): sums and work are exact either way."""
    found = profiled(name)
    facts = json.loads(json.dumps(found.facts, allow_nan=False))
    steps = steps_of(found.spans)
    assert len(steps) == NEW
    assert all(sum(one.parts.values()) == one.whole for one in steps)
    # At full depth to the first boundary; then what the spans say is what the runtime counted.
    ran = [0] * tiny_models.LAYERS
    for one in steps:
        for begin, end, live, _ in one.layers:
            for layer in range(begin, end):
                ran[layer] += live
    work = facts["work"]
    assert ran == work["by_layer"]
    assert sum(ran) == work["rows_x_layers"] < work["of"] == BATCH * NEW * tiny_models.LAYERS
    assert work["share"] == pytest.approx(sum(ran) / work["of"])
    assert sum(part["median_s"] for part in facts["parts"]) == pytest.approx(facts["step"]["with_timers_median_s"])
    assert sum(part["share"] for part in facts["parts"]) == pytest.approx(1)
    assert facts["step"]["tokens_per_s"] == pytest.approx(BATCH / facts["step"]["median_s"])
    assert facts["untimed"] == []
    by_name = {part["part"]: part["mean_s"] for part in facts["parts"]}
    for part in ("layers", "LM head", "boundaries: judging", "boundaries: compaction", "boundaries: back-fill", SAMPLING, REST):
        assert by_name[part] > 0, part
    assert len(facts["alone"]["layers_s"]) == tiny_models.LAYERS
    assert {op["name"] for op in facts["alone"]["ops"]} >= {"ragged_attention", "compact_rows", "router_score", "backfill_kv"}
    assert all(list(tables.render(facts)))


@pytest.mark.parametrize("criterion", [TopProbability(), Saturation(), Always()], ids=lambda one: one.kind)
def test_every_boundary_is_judged_under_a_timer(criterion: Criterion) -> None:
    """In one call of C++, through Python, or without a look: one span of judging a step, none of it in the rest."""
    model = tiny_models.shared("llama")
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 3, 6, criterion, threshold=0.4))
    found = profile(model, rows(), exits, new_tokens=NEW, repetitions=1, rounds=1, roof_bytes=1 << 16)
    judged = [span for span in found.spans if span.part == "boundaries: judging"]
    assert len(judged) == NEW
    assert not any(span.depth for span in found.spans if span.part == "loop")
    assert "judge_rows" not in [op["name"] for op in found.facts["alone"]["ops"]] or criterion.needs_logits


def test_weights_of_full_depth() -> None:
    """Every layer once and the head, whatever the batch is."""
    model = tiny_models.shared("llama")
    facts = profiled(dynamic=False).facts
    layers = sum(p.numel() * 4 for p in model.model.layers.parameters())
    head = model.lm_head.weight.numel() * 4
    weights = facts["weights"]
    assert (weights["layers_bytes"], weights["head_bytes"]) == (layers, head)
    assert weights["bytes_per_step"] == layers + head
    assert weights["share_of_roof"] == pytest.approx(weights["bytes_per_s"] / weights["read_roof_bytes_per_s"])
    assert [(one["begin"], one["end"], one["rows"], one["runs_per_step"]) for one in facts["spans"]] == [(0, 6, BATCH, 1)]
    assert facts["work"]["share"] == 1
    assert facts["setting"]["bands"] == []


def test_the_trace_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = profiled()
    path = tmp_path / "trace.json"
    trace.write(path, found.spans, {"model": "tiny"})
    written = json.loads(path.read_text())
    events = written["traceEvents"]
    assert len(events) == len(found.spans)
    assert {event["ph"] for event in events} == {"X"}
    assert events[0]["ts"] == 0
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)
    loop = next(event for event in events if event["cat"] == "loop")
    passes = [event for event in events if event["cat"] == "pass"]
    assert len(passes) == NEW
    assert all(loop["ts"] <= one["ts"] and one["ts"] + one["dur"] <= loop["ts"] + loop["dur"] + 1e-3 for one in passes)
    layers = [event for event in events if event["cat"] == "layers"]
    assert layers[-1]["name"] == f"layers [{layers[-1]['args']['begin']}, {layers[-1]['args']['end']})"
    inner = Path.write_text

    def full_disk(self: Path, text: str) -> None:
        inner(self, text[:100])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space left"):
        trace.write(path, found.spans, {"model": "other"})
    assert json.loads(path.read_text()) == written
    assert list(tmp_path.iterdir()) == [path]
    assert trace.events([]) == []


def words(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
    assert not add_special_tokens
    return {"input_ids": [int(word) for word in text.split()]}


def test_prompts_of_exactly_so_many_tokens() -> None:
    found = prompts(words, ["1 2 3", "4 5"], ["7 8", "9"], 3, 6)
    assert [row.tolist() for row in found] == [[7, 8, 9, 1, 2, 3], [9, 7, 8, 9, 4, 5], [7, 8, 9, 1, 2, 3]]
    assert [row.tolist() for row in prompts(words, ["1 2 3"], ["7"], 1, 2)] == [[2, 3]]
    with pytest.raises(ArgumentError, match="makes no tokens"):
        prompts(words, ["1"], [""], 1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tokens": 0}, "new_tokens must be at least 1, got 0"),
        ({"repetitions": 0}, "repetitions"),
        ({"rounds": 0}, "rounds"),
    ],
)
def test_arguments(options: dict[str, int], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        profile(tiny_models.shared("llama"), rows(), **options)
    with pytest.raises(ArgumentError, match=r"at least 2 tokens, got \[1\]"):
        profile(tiny_models.shared("llama"), [torch.tensor([5])])


# -- the command line -------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["profile", *arguments])
    if done.exception is not None:
        raise done.exception
    assert done.exit_code == 0
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with exits and a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    model = tiny_models.tiny("llama", vocab_size=260)
    model.save_pretrained(folder)
    tiny_exits.mixed(model).save_pretrained(folder / "exits")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: at for at, piece in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


QUICK = ("--dtype", "float32", "--batch", "2", "--context", "12", "--new-tokens", "3", "--repetitions", "1")


def test_the_command(checkpoint: Path, tmp_path: Path) -> None:
    """JSON with all that the table shows, a trace beside it."""
    given = ("--model", str(checkpoint), "--exits", str(checkpoint / "exits"), *QUICK)
    facts = json.loads(run(*given, "--json", "--trace", str(tmp_path / "new" / "trace.json")))
    assert set(facts) == {"about", "setting", "step", "parts", "spans", "work", "weights", "alone", "untimed"}
    assert facts["setting"]["prompt_tokens"] == [12, 12]
    assert facts["setting"]["bands"] == [[1, 3], [2, 5], [3, 6], [5, 6]]
    assert facts["work"]["of"] == 2 * 3 * tiny_models.LAYERS
    assert [part["part"] for part in facts["parts"]] == list(PARTS)
    assert json.loads((tmp_path / "new" / "trace.json").read_text())["otherData"]["batch"] == 2
    out = run(*given[:2], *QUICK)
    for wanted in ("a decode step takes", "Python and the rest", "36 of 36 rows x layers (100.0%)", "measured apart", "GB/s"):
        assert wanted in out


def test_prompts_from_a_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("one prompt\n")
    (tmp_path / "none.txt").write_text("\n")
    given = ("--model", str(checkpoint), *QUICK)
    assert json.loads(run(*given, "--json", "--prompts", str(tmp_path / "some.txt")))["setting"]["batch"] == 2
    with pytest.raises(ERRORS, match=r"none.txt has no prompts"):
        run(*given, "--prompts", str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "int8"), "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (("--model", "/nowhere"), "model: there is no folder /nowhere"),
        (("--exits", "/nowhere"), "exits: /nowhere/exits.json does not exist"),
        (("--trace", "{here}"), "--trace: wanted a file, got the folder"),
        (("--model", "{model}", "--exits", "demo", *QUICK), "exits"),
        (("--model", "{model}", "--exits", "{model}/exits", "--kv", "some", *QUICK), "kv must be one of"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str, checkpoint: Path, tmp_path: Path) -> None:
    before = originals()
    with pytest.raises(ERRORS, match=message) as caught:
        run(*(argument.format(here=tmp_path, model=checkpoint) for argument in arguments))
    assert "\n" not in str(caught.value)
    assert all(one is other for one, other in zip(originals(), before, strict=True))
