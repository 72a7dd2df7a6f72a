"""dyndepth.report: its numbers are those of independent computations."""

from __future__ import annotations

import html
import importlib.util
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
from tiny_reports import SMALL, Words, every_score, one, prompts

from dyndepth.calibration import default_path
from dyndepth.closed_form.heads import exit_argmax
from dyndepth.closed_form.trace import trace
from dyndepth.data import document
from dyndepth.errors import ArgumentError, ExitsError, UnsupportedModelError
from dyndepth.exits import Always, Band, Exits, FixedDepth, Never, Patience, Saturation, Schedule, TopProbability
from dyndepth.report import KINDS, kind, report
from dyndepth.report.measure import CLOSED, GIVEN
from dyndepth.runtime.bind import bind
from dyndepth.runtime.score import score


@pytest.fixture(scope="module")
def model() -> Any:
    """Some of its answers end early."""
    model = tiny_models.tiny("llama")
    model.generation_config.eos_token_id = int(model.generate(prompts(1)[0][None], max_new_tokens=3, do_sample=False)[0, -1])
    return model


@pytest.fixture(scope="module")
def exits(model: Any) -> Exits:
    return every_score(model)


@pytest.fixture(scope="module")
def made(model: Any, exits: Exits, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("report")
    facts = report(model, exits, prompts(13), Words(), folder, **SMALL)
    return facts, folder


@pytest.fixture(scope="module")
def answered(model: Any) -> tuple[list[torch.Tensor], list[int]]:
    """Texts of the full model by transformers' own generate, without the last token, and where judging starts."""
    texts, starts = [], []
    for prompt in prompts(13):
        out = model.generate(prompt[None], max_new_tokens=6, do_sample=False)[0]
        texts.append(out[:-1])  # the last token's row produces nothing
        starts.append(len(prompt) - 1)
    assert len({len(text) - start for text, start in zip(texts, starts, strict=True)}) > 1, "ragged answers"
    return texts, starts


def forced(model: Any, texts: list[torch.Tensor], starts: list[int], exits: Exits | None) -> list[tuple[Any, Any]]:
    """Per text, alone: arg max and layers run of its judged rows."""
    found = []
    for text, start in zip(texts, starts, strict=True):
        scored = score(model, [text], exits, start=[start])
        found.append((scored.argmax()[start:], scored.layers_run[start:]))
    return found


def test_frontier_is_what_forced_passes_say(model: Any, exits: Exits, made: Any, answered: Any) -> None:
    frontier = made[0]["frontier"]
    whole = [tokens for tokens, _ in forced(model, *answered, None)]
    names = [point["name"] for point in frontier["points"]]
    assert names == [CLOSED, *map(str, range(1, 8)), GIVEN, "9", "10", "11"]
    paths = [[math.inf] * 5, *default_path(exits)]
    for point, vector in zip(frontier["points"], paths, strict=True):
        thresholds = [float(value) for value in point["thresholds"]]
        assert thresholds == pytest.approx(vector)
        mine = forced(model, *answered, exits.with_thresholds(thresholds))
        losses = torch.tensor([float((a != b).double().mean()) for (a, _), b in zip(mine, whole, strict=True)]).double()
        assert point["disagreement"] == pytest.approx(float(losses.mean()))
        assert point["standard_error"] == pytest.approx(float(losses.std()) / math.sqrt(13))
        layers = torch.cat([ran for _, ran in mine])
        assert point["rows_x_layers"] == pytest.approx(float(layers.double().mean()) / 6)
    assert len({point["disagreement"] for point in frontier["points"]}) > 3, "the path must lead somewhere"
    given = frontier["points"][names.index(GIVEN)]
    assert [float(value) for value in given["thresholds"]] == [band.threshold for band in exits]
    assert frontier["rounding_floor"] == 0.0, "fp32"
    assert frontier["timed_prompts"] == 5
    for rates in (frontier["full_depth"], *(point["tokens_per_s"] for point in frontier["points"])):
        assert 0 < rates["p10"] <= rates["median"] <= rates["p90"]


def test_closed_exits_lose_and_save_nothing(made: Any) -> None:
    closed = made[0]["frontier"]["points"][0]
    assert closed["disagreement"] == 0.0
    assert closed["rows_x_layers"] == 1.0


def test_timed_calls_do_the_same_work(
    model: Any, exits: Exits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered: Any
) -> None:
    """Every point and full depth: one call that does not count and `repetitions` more, same prompts, same number of tokens."""
    calls: list[dict[str, Any]] = []
    original = type(model).generate

    def listening(self: Any, **options: Any) -> Any:
        out = original(self, **options)
        if "min_new_tokens" in options:
            calls.append({**options, "made": out[:, options["input_ids"].shape[1] :]})
        return out

    monkeypatch.setattr(type(model), "generate", listening)
    report(model, exits, prompts(13), Words(), tmp_path, **(SMALL | {"repetitions": 2, "kv": "propagate"}))
    assert len(calls) == 13 * 3
    assert {call["made"].shape for call in calls} == {(5, 6)}
    assert not any(bool((call["made"] == model.generation_config.eos_token_id).any()) for call in calls), "nothing ends early"
    for call in calls:
        real = [row[mask.bool()] for row, mask in zip(call["input_ids"], call["attention_mask"], strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(real, prompts(5), strict=True))
        assert len(real) == 5
    depth = [None if call["exits"] is None else [band.threshold for band in call["exits"]] for call in calls]
    assert depth[:13] == depth[13:26] == depth[26:], "in turn"
    assert depth[0] is None
    assert all((call["kv"] == "propagate") == (call["exits"] is not None) for call in calls)


def test_reliability_is_what_traced_residuals_say(model: Any, exits: Exits, made: Any, answered: Any) -> None:
    """A second way to the same numbers: residuals of a full-depth trace through heads and criteria."""
    texts, starts = answered
    bound = bind(model)
    judged = torch.cat([torch.arange(len(text)) >= start for text, start in zip(texts, starts, strict=True)])
    step = torch.cat([torch.arange(len(text)) - start for text, start in zip(texts, starts, strict=True)])[judged]
    chunks = list(trace(bound, texts, [2, 3, 5], ()))
    residual = {leave: torch.cat([chunk.residual[leave] for chunk in chunks])[judged] for leave in (2, 3, 5)}
    whole = bound.argmax(torch.cat([chunk.ready for chunk in chunks])[judged])
    bands = {band.leave: band for band in exits}
    found = {band["leave"]: band for band in made[0]["reliability"]}
    count = int(judged.sum())
    assert made[0]["prompts"]["judged_rows"] == count

    def logits(leave: int) -> torch.Tensor:
        return bound.logits(bands[leave].head_or_norm()(residual[leave], bound.finish))

    probability = logits(3)[:, bands[3].shortlist].softmax(-1).max(-1).values
    spread = logits(5).softmax(-1)
    entropy = (spread * spread.log()).sum(-1)
    for leave, scores in ((3, probability), (5, entropy)):
        agrees = exit_argmax(bound, bands[leave], residual[leave]) == whole
        entry = found[leave]
        assert (entry["rows"], entry["silent"]) == (count, 0)
        assert sum(each["rows"] for each in entry["bins"]) == count
        assert entry["agreement"] == pytest.approx(float(agrees.double().mean()))
        mean = sum(each["score"] * each["rows"] for each in entry["bins"]) / count
        assert mean == pytest.approx(float(scores.double().mean()), abs=1e-5)
        share = sum(each["agreement"] * each["rows"] for each in entry["bins"]) / count
        assert share == pytest.approx(entry["agreement"])
        over = scores >= bands[leave].thresholds(step)
        assert entry["reaching"] == pytest.approx(float(over.double().mean()))
        assert bool(over.any())
        assert entry["agreement_reaching"] == pytest.approx(float(agrees[over].double().mean()))
    assert found[3]["brier"] == pytest.approx(
        float((probability - (exit_argmax(bound, bands[3], residual[3]) == whole).float()).square().mean()), abs=1e-5
    )
    assert found[5]["brier"] is found[5]["calibration_error"] is None, "an entropy is no probability"
    router = bands[2].router
    assert router is not None
    mean = sum(each["score"] * each["rows"] for each in found[2]["bins"]) / count
    assert mean == pytest.approx(float(router(residual[2]).double().mean()), abs=1e-5)
    assert found[2]["calibration_error"] is not None


def test_reliability_of_a_block_head(model: Any, exits: Exits, made: Any, answered: Any) -> None:
    """Requests that name this exit for their depth emit what it says."""
    texts, starts = answered
    block = Exits([Band(4, 6, FixedDepth(), head=exits.bands[3].head)], exits.model)
    right = []
    for text, start in zip(texts, starts, strict=True):
        left = score(model, [text], block, start=[start], depth=[4], kv="none").argmax()
        right += (left == score(model, [text]).argmax())[start:].tolist()
    entry = made[0]["reliability"][3]
    assert entry["leave"] == 4
    assert entry["rows"] == len(right) == made[0]["prompts"]["judged_rows"]
    assert entry["agreement"] == pytest.approx(sum(right) / len(right))
    assert "Every judged row leaves here" in entry["note"]


def test_reliability_of_a_band_that_resumes(model: Any, exits: Exits, made: Any, answered: Any) -> None:
    """Every judged row takes the band once. A band whose jump is wild never agrees by more than chance; one that skips
    nothing of importance always does."""
    entry = made[0]["reliability"][1]
    assert (entry["leave"], entry["resume"]) == (2, 5)
    assert sum(each["rows"] for each in entry["bins"]) == entry["rows"] == made[0]["prompts"]["judged_rows"]
    assert entry["agreement"] < 0.5
    assert "by lot, one in 4 at a time, each once" in entry["note"]


def test_a_band_that_changes_nothing_agrees_on_every_row(tmp_path: Path) -> None:
    """A layer that adds nothing to the residual can be skipped by everybody: lots must reach every row, and count once."""
    model = tiny_models.tiny("llama")
    layer = model.model.layers[3]
    layer.self_attn.o_proj.weight.data.zero_()
    layer.mlp.down_proj.weight.data.zero_()
    plain = tiny_exits.band(model, 3, 4)
    idle = tiny_exits.exits_of(model, Band(3, 4, plain.criterion, threshold=math.inf, kv=plain.kv))
    facts = report(model, idle, prompts(9), Words(), tmp_path, **SMALL)
    entry = facts["reliability"][0]
    assert entry["agreement"] == 1.0
    assert entry["reaching"] == 0.0
    assert entry["agreement_reaching"] is None
    assert entry["rows"] == facts["prompts"]["judged_rows"]


def test_a_silent_criterion_says_so(made: Any) -> None:
    entry = made[0]["reliability"][0]
    assert entry["criterion"] == "saturation"
    assert entry["rows"] == entry["silent"] == made[0]["prompts"]["judged_rows"]
    assert entry["bins"] == []
    assert "has no score here" in entry["note"]


def test_saturation_looks_back_at_every_band(model: Any, tmp_path: Path, answered: Any) -> None:
    """Also at one without a score, which must not let rows go while scores are heard."""
    texts, starts = answered
    bands = tiny_exits.band(model, 2, 3, Always()), tiny_exits.band(model, 4, 6, Saturation(), threshold=math.inf)
    facts = report(model, tiny_exits.exits_of(model, *bands), prompts(13), Words(), tmp_path, **SMALL)
    residual = next(iter(trace(bind(model), texts, [2, 4], ()))).residual
    judged = torch.cat([torch.arange(len(text)) >= start for text, start in zip(texts, starts, strict=True)])
    cosine = torch.nn.functional.cosine_similarity(residual[4], residual[2])[judged]
    entry = facts["reliability"][1]
    assert entry["silent"] == 0
    mean = sum(each["score"] * each["rows"] for each in entry["bins"]) / entry["rows"]
    assert mean == pytest.approx(float(cosine.double().mean()), abs=1e-5)


def test_histogram_is_what_forced_passes_say(model: Any, exits: Exits, made: Any, answered: Any) -> None:
    histogram = made[0]["histogram"]
    assert sum(map(sum, histogram["rows"].values())) == made[0]["prompts"]["judged_rows"]
    assert list(histogram["rows"]) == list(KINDS)
    counts: Counter[tuple[str, int]] = Counter()
    for tokens, layers in forced(model, *answered, exits):
        for token, ran in zip(tokens.tolist(), layers.tolist(), strict=True):
            counts[kind(Words().decode([token]), token in Words.all_special_ids), ran] += 1
    for name, rows in histogram["rows"].items():
        assert rows == [counts[name, layers] for layers in histogram["layers"]]
    assert len(histogram["layers"]) > 1


@pytest.mark.parametrize(
    ("criterion", "threshold", "names", "why"),
    [
        (TopProbability(), math.inf, [CLOSED], "The exits are closed"),
        (Never(), 0.5, [CLOSED], "The exits are closed"),
        (Patience(), 1.0, [CLOSED, GIVEN], "band [3, 6) has criterion patience with threshold 1"),
        (TopProbability(), -math.inf, [CLOSED, GIVEN], "has criterion top_probability with threshold -inf"),
        (Always(), 0.5, [CLOSED, GIVEN], "No band has a score that a threshold could be compared with (criteria: always)"),
        (Schedule(first=6, last=3, length=4), 0.5, [CLOSED, GIVEN], "(criteria: schedule)"),
        (FixedDepth(), 0.5, [CLOSED, GIVEN], "(criteria: fixed_depth)"),
        (TopProbability(), 1.0, [CLOSED, GIVEN], None),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_without_a_path(
    model: Any, tmp_path: Path, criterion: Any, threshold: float, names: list[str], why: str | None
) -> None:
    """One point, or two, the reason, and a whole report all the same."""
    facts = report(model, one(model, threshold, criterion), prompts(6), Words(), tmp_path, **SMALL)
    frontier = facts["frontier"]
    assert [point["name"] for point in frontier["points"]] == names
    assert frontier["note"] is None if why is None else why in frontier["note"]
    text = html.unescape((tmp_path / "report.html").read_text())
    if why is not None:
        assert frontier["note"] in text
    entry = facts["reliability"][0]
    if criterion.scored:
        assert entry["rows"] == facts["prompts"]["judged_rows"] > 0, "scores are heard whether or not rows may leave"
        assert sum(each["rows"] for each in entry["bins"]) == entry["rows"]
    else:
        assert entry["rows"] == 0
        assert "decides without a score" in entry["note"]
    if names == [CLOSED]:
        assert facts["histogram"]["layers"] == [6]
        assert "No row leaves" in text
    if threshold == -math.inf or criterion.kind == "always":
        assert facts["histogram"]["layers"] == [3]


def test_what_fit_has_seen_is_counted(model: Any, exits: Exits, tmp_path: Path) -> None:
    given = prompts(4)
    learned = Exits(exits.bands, exits.model, {"documents": [document(given[1]), document(given[2]), "else"]})
    facts = report(model, learned, [*given, given[0]], Words(), tmp_path, **SMALL)
    assert facts["prompts"]["seen_by_fit"] == 2
    assert facts["prompts"]["count"] == 4
    assert facts["notes"] == [
        "1 prompts came twice and count once.",
        "2 of 4 prompts were seen by fit: for them the numbers are too good.",
    ]
    assert "documents" not in facts["exits"]["record"]
    text = html.unescape((tmp_path / "report.html").read_text())
    assert all(note in text for note in facts["notes"])


def test_refusals(model: Any, exits: Exits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work: nothing is decoded, nothing is written."""
    monkeypatch.setattr("dyndepth.report.Requests", lambda *_, **__: pytest.fail("work was begun"))

    def call(given: Any = None, folder: Path = tmp_path / "out", its: Any = exits, of: Any = model, **options: Any) -> None:
        report(of, its, prompts(3) if given is None else given, Words(), folder, **(SMALL | options))

    with pytest.raises(ArgumentError, match="report: prompts must hold at least one prompt, got none"):
        call([])
    with pytest.raises(ArgumentError, match=r"report: prompts must be a sequence of strings .* got one str"):
        call("hello")
    with pytest.raises(ArgumentError, match=r"report: prompts\[1\] is empty"):
        call([*prompts(1), torch.empty(0, dtype=torch.int64)])
    with pytest.raises(ArgumentError, match=r"report: prompts\[0\] must hold token ids in \[0, 203\), got 3 to 203"):
        call([torch.tensor([3, 203])])
    for name in ("new_tokens", "batch", "repetitions"):
        with pytest.raises(ArgumentError, match=f"report: {name} must be at least 1, got 0"):
            call(**{name: 0})
    with pytest.raises(ArgumentError, match=r"report: exits must be dyndepth.Exits, got str"):
        call(its="exits/")
    other = tiny_models.tiny("llama", num_hidden_layers=5)
    with pytest.raises(ExitsError, match="exits were made for another model: layers must be 6, got 5"):
        call(of=other)
    with pytest.raises(ExitsError, match="kv must be one of predict, propagate, copy, recompute, release, none, got 'clone'"):
        call(kv="clone")
    with pytest.raises(ExitsError, match="kv='none' leaves holes"):
        call(kv="none")
    with pytest.raises(UnsupportedModelError):
        call(of=object())
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="File exists"):
        call(folder=tmp_path / "file")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    with pytest.raises(ModuleNotFoundError, match=r"report: the figures need matplotlib: pip install 'dyndepth\[demo\]'"):
        call()


def test_one_prompt_of_one_token_is_enough(model: Any, exits: Exits, tmp_path: Path) -> None:
    facts = report(model, exits, [torch.tensor([5])], Words(), tmp_path, **(SMALL | {"new_tokens": 1}))
    assert facts["prompts"]["judged_rows"] == 1
    assert facts["frontier"]["points"][1]["standard_error"] is None
    assert [entry["rows"] for entry in facts["reliability"]] == [1] * 5
