"""A whole fit on a small model, what it records, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch

import dyndepth
from dyndepth.closed_form.heads import exit_argmax, exit_statistics
from dyndepth.closed_form.measure import Sample
from dyndepth.closed_form.progress import Progress
from dyndepth.closed_form.search import Candidate, set_price
from dyndepth.closed_form.trace import trace
from dyndepth.data import (
    TEST,
    TUNE,
    collect,
)
from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.exits import Band, Exits, Saturation, TopProbability
from dyndepth.runtime.bind import bind
from dyndepth.runtime.forward import _Pass
from dyndepth.runtime.score import score


@pytest.fixture(scope="module")
def fitted() -> tuple[Any, Exits]:
    model = tiny_models.tiny("llama")
    return model, _fit(model)


def _texts(count: int = 24, length: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator) for _ in range(count)]


def _fit(model: Any, **options: Any) -> Exits:
    settings = {"agreement": 0.8, "tokens": 2400, "own": 0.4, "new_tokens": 24, "batch": 8, "progress": False} | options
    return dyndepth.fit(model, _texts(), **settings)


def test_fit_meets_its_wish_on_the_tuning_split(fitted: tuple[Any, Exits]) -> None:
    model, exits = fitted
    assert len(exits) >= 1
    assert exits.record["tune"]["agreement"] >= 0.8
    assert exits.record["tune"]["rows_x_layers"] < 1
    assert exits.record["test"]["rows"] > 50
    assert all(band.kv is not None for band in exits)
    out = model.generate(
        **tiny_models.prompts(5),
        custom_generate=dyndepth.generate,
        exits=exits,
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert out.kv == "predict"


def test_recorded_numbers_are_reproducible(fitted: tuple[Any, Exits], tmp_path: Any) -> None:
    """The test split's agreement and work, measured again from the saved exits by other code."""
    model, exits = fitted
    exits.save_pretrained(tmp_path)
    loaded = Exits.from_pretrained(tmp_path)
    data = collect(model, _texts(), None, tokens=2400, own=0.4, new_tokens=24, batch=8, seed=0, width=48, context=1 << 20)
    tokens, start = data.part(TEST)
    full, found = (score(model, tokens, e, start=start, kv="predict" if e else None) for e in (None, loaded))
    agree = float((full.argmax() == found.argmax())[full.judged].float().mean())
    assert agree == pytest.approx(exits.record["test"]["agreement"], abs=1e-9)
    assert found.work.fraction == pytest.approx(exits.record["test"]["rows_x_layers"], abs=1e-9)


def test_fit_is_deterministic(fitted: tuple[Any, Exits]) -> None:
    again = _fit(tiny_models.tiny("llama"))
    assert [(b.leave, b.resume, b.threshold) for b in again] == [(b.leave, b.resume, b.threshold) for b in fitted[1]]
    for one, other in zip(again, fitted[1], strict=True):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "opt_post_norm", "gpt_neox"])
def test_fit_serves_other_families(family: str) -> None:
    """Rows really leave, and the recorded agreement is what a fresh measurement of the returned exits gives."""
    model = tiny_models.tiny(family)
    exits = _fit(model, candidates=[(2, 4), (4, 6)], agreement=0.5)
    assert exits.record["tune"]["agreement"] >= 0.5
    assert exits.record["tune"]["rows_x_layers"] < 1
    limit = bind(model).positions_limit or 1 << 20
    data = collect(model, _texts(), None, tokens=2400, own=0.4, new_tokens=24, batch=8, seed=0, width=48, context=limit)
    measured = Sample.of(model, *data.part(TUNE)).run(exits, "predict")
    assert measured.agreement == pytest.approx(exits.record["tune"]["agreement"], abs=1e-9)


def test_unreachable_agreement_closes_the_bands(capsys: pytest.CaptureFixture[str]) -> None:
    """A head of noise disagrees wherever a row leaves: no price but zero is perfect, and the user is told."""
    model = tiny_models.shared("llama")
    band = tiny_exits.band(model, 1, 6)
    sample = Sample.of(model, [torch.randint(3, tiny_models.VOCABULARY, (40,)) for _ in range(4)], [4, 0, 9, 30])
    exits = tiny_exits.exits_of(model, band)
    assert sample.run(exits.with_thresholds(-1.0), "predict").agreement < 0.2
    closed, measured = set_price([Candidate(band, {}, harm=0.0)], exits, sample, 1.0, 7, lambda: None)
    assert [b.threshold for b in closed] == [math.inf]
    assert (measured.agreement, measured.rows_x_layers) == (1.0, 1.0)
    closed.record = {"wanted_agreement": 1.0, "test": {"agreement": 1.0, "rows_x_layers": 1.0}}
    Progress(True).result(closed)
    assert "the exits are closed" in capsys.readouterr().err


def test_closed_bands_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A band without a reachable threshold costs nothing, unless something later waits for what it would have seen."""
    model = tiny_models.shared("llama")
    asked: list[int] = []
    decide = _Pass._decide
    monkeypatch.setattr(_Pass, "_decide", lambda self, band, block: asked.append(band.leave) or decide(self, band, block))
    tokens = [torch.randint(3, 90, (6,))]
    plain = [Band(leave, 6, TopProbability(), threshold=math.inf) for leave in (2, 4)]
    score(model, tokens, tiny_exits.exits_of(model, *plain), kv="propagate")
    assert asked == []
    score(model, tokens, tiny_exits.exits_of(model, plain[0], Band(5, 6, Saturation(), threshold=0.9)), kv="propagate")
    assert asked == [2, 5]


def test_exit_answers_are_the_runtime_s() -> None:
    """Labels of exits come from kept residuals; a pass in which everybody takes that exit gives the same tokens."""
    model = tiny_models.shared("llama")
    bound = bind(model)
    band = tiny_exits.band(model, 4, 6, threshold=-1.0, shortlist=torch.tensor([3, 50, 99, 120]))
    tokens = torch.randint(3, tiny_models.VOCABULARY, (30,))
    residual = next(trace(bound, [tokens], [4], [])).residual[4]
    scored = score(model, [tokens], tiny_exits.exits_of(model, band))
    assert torch.equal(exit_argmax(bound, band, residual), scored.argmax())
    logits = bound.logits(scored.ready)[:, [3, 50, 99, 120]]
    torch.testing.assert_close(exit_statistics(bound, band, residual).logsumexp, logits.logsumexp(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"agreement": 0.0}, ArgumentError, r"agreement must be in \(0, 1\], got 0.0"),
        ({"own": 1.5}, ArgumentError, r"own must be in \[0, 1\]"),
        ({"bands": 0}, ArgumentError, "must be at least 1"),
        ({"candidates": []}, ArgumentError, "no candidate bands"),
        ({"candidates": [(3, 9)]}, ArgumentError, r"spans 1 <= leave < resume <= 6, got \(3, 9\)"),
        ({"tokens": 100}, NotEnoughDataError, "wanted at least 256 tokens to judge in the fit split"),
    ],
)
def test_wrong_wishes(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _fit(tiny_models.shared("llama"), **options)


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(ArgumentError, match=r"texts\[0\] is a string, so a tokenizer is needed"):
        dyndepth.fit(tiny_models.shared("llama"), ["hello"], progress=False)
    with pytest.raises(ArgumentError, match=r"texts\[0\] must be a string or int64 \[t\]"):
        dyndepth.fit(tiny_models.shared("llama"), [torch.zeros(3, 3)], progress=False)
