"""Benchmarks that report layers at an agreement: prices are found on one split, figures and intervals come from another."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import band_frontier
import band_heads
import exit_heads
import exit_walk
import numpy as np
import pytest
import tiny_models
import tiny_training
import torch
from band_maps import first, ridge_bands, ridge_readouts
from by_document import interval
from operating import between, meeting, widened

from dyndepth.closed_form.measure import Sample
from dyndepth.closed_form.progress import Progress
from dyndepth.closed_form.search import Candidate
from dyndepth.data import FIT, TEST, TUNE, Piece
from dyndepth.runtime.bind import bind
from dyndepth.training import TrainConfig
from dyndepth.training.run import started

# -- intervals ------------------------------------------------------------------------------------------------------------


def _clustered(documents: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of documents of 20 to 60 rows, each with its own chance to agree around .8; the mean over rows is .8 in the long
    run."""
    sizes = torch.randint(20, 61, (documents,), generator=generator)
    chance = 0.6 + 0.4 * torch.rand(documents, generator=generator)
    document = torch.repeat_interleave(torch.arange(documents), sizes)
    return torch.rand(len(document), generator=generator) < chance[document], document


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    """95 % intervals over 300 draws of 40 documents; rows taken for independent would miss far more often."""
    generator = torch.Generator().manual_seed(0)
    held = naive = 0
    for _ in range(300):
        values, document = _clustered(40, generator)
        low, high = interval(values, document)
        held += low <= 0.8 <= high
        mean = float(values.double().mean())
        half = 1.96 * math.sqrt(mean * (1 - mean) / len(values))
        naive += mean - half <= 0.8 <= mean + half
    assert 0.90 <= held / 300 <= 0.98
    assert naive / 300 < 0.8


def test_interval_is_as_wide_as_the_ratio_estimators_variance_says() -> None:
    """Second witness: Cochran's linearised variance of a ratio of sums (Sampling Techniques, 1977, eq. 6.13)."""
    values, document = _clustered(60, torch.Generator().manual_seed(1))
    sums, sizes = torch.bincount(document, values.double()), torch.bincount(document).double()
    ratio = sums.sum() / sizes.sum()
    variance = ((sums - ratio * sizes).pow(2).sum() / 59 / 60) / sizes.mean() ** 2
    low, high = interval(values, document)
    assert high - low == pytest.approx(2 * 1.96 * float(variance.sqrt()), rel=0.1)
    assert (low, high) == interval(values, document)
    assert (low, high) == interval(values, 7 * document + 3)
    assert interval(torch.ones_like(values), document) == (1.0, 1.0)


def test_interval_refuses_what_shows_nothing() -> None:
    with pytest.raises(ValueError, match="at least 10 documents, got 2"):
        interval(torch.rand(50), torch.arange(50) % 2)
    with pytest.raises(ValueError, match="at least 10 documents, got 0"):
        interval(torch.rand(0), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="of one length"):
        interval(torch.rand(50), torch.arange(49))


# -- prices ---------------------------------------------------------------------------------------------------------------


def _line(price: float) -> dict[str, Any]:
    return {"price": price, "agreement": 1 - max(0.0, price - 0.01), "mean_layers": 30 - 100 * max(0.0, price - 0.01)}


@pytest.mark.parametrize("guess", [0.011, 0.03, 0.06, 0.3])
def test_price_that_meets_a_wish(guess: float) -> None:
    """Where agreement falls on a line, few passes find where it meets the wish, from below and from above."""
    tried, met = meeting(_line, 0.95, 0.01, guess, 0.5, 6)
    assert met is not None
    assert met in tried
    assert len(tried) <= 6
    assert 0.95 <= met["agreement"] <= 0.956
    assert met["mean_layers"] == min(point["mean_layers"] for point in tried if point["agreement"] >= 0.95)


def test_price_goes_no_further_than_allowed() -> None:
    tried, met = meeting(lambda price: {**_line(price), "agreement": 1.0}, 0.95, 0.01, 0.02, 0.1, 9)
    assert [point["price"] for point in tried] == [0.02, 0.04, 0.08, 0.1]
    assert met == tried[-1]
    tried, met = meeting(lambda price: {**_line(price), "agreement": 0.5}, 0.95, 0.01, 0.02, 0.1, 4)
    assert met is None
    prices = [point["price"] for point in tried]
    assert prices == sorted(prices, reverse=True)
    assert min(prices) > 0.01


def test_price_of_an_agreement_that_rises_again() -> None:
    """Of the points that meet the wish the one with fewest layers stays, wherever it lies."""
    found = {0.02: (0.96, 28.0), 0.04: (0.97, 29.0), 0.08: (0.9, 20.0)}

    def measure(price: float) -> dict[str, Any]:
        agreement, layers = found.get(price, (0.951, 28.5))
        return {"price": price, "agreement": agreement, "mean_layers": layers}

    _, met = meeting(measure, 0.95, 0.0, 0.02, 1.0, 4)
    assert met == {"price": 0.02, "agreement": 0.96, "mean_layers": 28.0}


def test_between_reads_a_line() -> None:
    points = [{"agreement": a, "mean_layers": m} for a, m in ((1.0, 30.0), (0.98, 28.0), (0.94, 26.0))]
    assert between(points, 0.99) == pytest.approx(29.0)
    assert between(points, 0.95) == pytest.approx(26.5)
    assert between(points, 0.9) is None


def test_a_wider_choice_is_never_worse_where_it_is_made() -> None:
    """The tuning split decides, whatever the test split says; nobody leaving is 30 layers."""

    def point(tuned: float | None, layers: float) -> dict[str, Any]:
        found = {"agreement": 0.96, "mean_layers": layers}
        return found if tuned is None else {**found, "tuned": {"agreement": 0.95, "mean_layers": tuned}}

    both = {"family": "both", "at": {"99%": point(28.0, 27.0), "95%": point(27.4, 25.0)}}
    exits = {"at": {"99%": point(None, 30.0), "95%": point(27.2, 28.0)}}
    bands = {"at": {"99%": point(28.5, 20.0), "95%": point(27.3, 20.0)}}
    found = widened(both, [exits, bands], 30)
    assert found["family"] == "both"
    assert found["at"] == {"99%": both["at"]["99%"], "95%": exits["at"]["95%"]}
    assert found["between"]["99%"] == pytest.approx(28 + 2 * 0.03 / 0.04)  # from (96 %, 28) to (100 %, 30)
    assert found["between"]["95%"] is None
    assert widened(both, [], 30)["at"] == both["at"]


# -- exit heads: price of one split, figures of another -------------------------------------------------------------------


def test_rows_leave_where_disagreement_per_layer_is_cheap() -> None:
    """By hand: 10 layers, exits 4 and 6, price .05 per layer allows .3 and .2 disagreement."""
    chance = {4: torch.tensor([0.71, 0.69, 0.69, 0.0]), 6: torch.tensor([0.0, 0.81, 0.79, 0.81])}
    split = {4: {"agrees": torch.tensor([True, True, True, True])}, 6: {"agrees": torch.tensor([True, False, False, True])}}
    right, layers = exit_walk.walk(10, chance, split, 0.05)
    assert layers.tolist() == [4, 6, 10, 6]
    assert right.tolist() == [True, False, True, True]


def test_heads_price_is_the_highest_that_meets_the_wish() -> None:
    generator = torch.Generator().manual_seed(0)
    chance = {leave: torch.rand(2000, generator=generator) for leave in (4, 6)}
    split = {leave: {"agrees": torch.rand(2000, generator=generator) < chance[leave]} for leave in (4, 6)}
    price = exit_walk.price_of(10, chance, split, 0.9)

    def agreement(price: float) -> float:
        return float(exit_walk.walk(10, chance, split, price)[0].double().mean())

    assert agreement(price) >= 0.9 > agreement(price + 1e-3)


def test_heads_frontier_says_how_sure_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small model: figures of the test split lie in their intervals over its documents."""
    monkeypatch.setattr(exit_heads, "EXITS", (2, 4))
    monkeypatch.setattr(exit_heads, "SHARES", (0.9, 0.6))
    model, batches = bind(tiny_models.shared("llama")), tiny_training.batches(tmp_path / "cache")
    student = started(model, batches, TrainConfig.of({"exits": (2, 4), "head": "translator"}))
    found = exit_heads._frontier(model, student, dict.fromkeys((FIT, TUNE, TEST), batches))
    assert list(found) == ["top-1 probability", "margin", "router, 1024 words"]
    for scores in found.values():
        for share, point in scores.items():
            assert (point["rows"], point["documents"]) == (40 * 17, 40)
            assert point["agreement"] >= float(share.rstrip("%")) / 100 - 1e-9  # tested on what the price was set on
            for name in ("agreement", "mean_layers"):
                low, high = point[f"{name}_95"]
                assert low <= point[name] <= high
        assert scores["60%"]["mean_layers"] <= scores["90%"]["mean_layers"] < model.depth


# -- the frontier of bands ------------------------------------------------------------------------------------------------


def _sample(model: Any, documents: int, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(3, tiny_models.VOCABULARY, (20,), generator=generator) for _ in range(documents)]
    return Sample.of(model, tokens, [3] * documents)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> band_frontier.Bench:
    monkeypatch.setattr(band_frontier, "EXITS", (3, 5))
    monkeypatch.setattr(band_frontier, "BANDS", ((1, 3), (2, 4)))
    monkeypatch.setattr(band_frontier, "SHARES", (0.97, 0.85))
    monkeypatch.setattr(band_frontier, "_WORDS", 40)
    monkeypatch.setattr(band_frontier, "_PRICE", 1.0)
    monkeypatch.setattr(band_frontier, "_TRIES", 3)
    causal_lm = tiny_models.shared("llama")
    model, report = bind(causal_lm), Progress(False)
    fit, tune, test = (_sample(causal_lm, count, seed) for seed, count in enumerate((40, 20, 15)))
    spans = [(1, 3), (2, 4), (3, 6), (5, 6)]
    (tmp_path / "bands").mkdir()
    bands = ridge_bands(tmp_path / "ridge", model, spans, [Piece(t, 3, str(i)) for i, t in enumerate(fit.tokens)], report)
    readouts = ridge_readouts(tmp_path / "readouts.pt", model, [1, 2], fit.tokens, report)
    corpus = type("Corpus", (), {"digest": "0"})
    return band_frontier.Bench(tmp_path, model, report, corpus, bands, readouts, fit, tune, test, [])


def _chosen(bench: band_frontier.Bench, confidences: tuple[str, ...]) -> Any:
    """What a run over these confidences wrote."""
    bench.run(confidences)
    found = json.loads((bench.folder / "band_frontier.json").read_text())["frontier"]
    families = ("exits", "bands", "bands and exits")
    assert [(row["family"], row["confidence"]) for row in found] == [(f, c) for c in confidences for f in families]
    return found


def test_the_test_split_chooses_nothing(bench: band_frontier.Bench) -> None:
    """Sets, prices and thresholds are the same whatever the test split says; its figures are not."""
    confidences = ("router",)
    bench.run(confidences, ["bands"])  # heads of exits make no difference to it, so it may come first
    alone = json.loads((bench.folder / "band_frontier.json").read_text())["frontier"]
    found = _chosen(bench, confidences)
    assert alone == [row for row in found if row["family"] == "bands"]
    for path in (bench.folder / "bands").glob("frontier-*"):
        path.unlink()
    flipped = replace(bench.test, answers=(bench.test.answers + 1) % tiny_models.VOCABULARY)
    other = replace(bench, test=flipped, passed={}, residual={}, chances={})
    again = _chosen(other, confidences)
    assert [row["tuned"] for row in again] == [row["tuned"] for row in found]
    seen = 0
    for mine, theirs in zip(found, again, strict=True):
        for share, point in mine["at"].items():
            other_point = theirs["at"][share]
            assert [other_point.get(key) for key in ("spans", "price", "thresholds", "tuned", "mean_layers")] == [
                point.get(key) for key in ("spans", "price", "thresholds", "tuned", "mean_layers")
            ]
            if point["spans"]:
                assert other_point["agreement"] < 0.5
                seen += 1
    assert seen > 1


def test_figures_are_those_of_real_passes(bench: band_frontier.Bench) -> None:
    """Tested on the tuning split, every operating point gives the figures it was chosen for; each is in its own interval."""
    alike = replace(bench, test=bench.tune)
    opened = 0
    for row in _chosen(alike, ("router",)):
        for share, point in row["at"].items():
            if not point["spans"]:
                assert (point["agreement"], point["mean_layers"]) == (1.0, 6.0)
                continue
            opened += 1
            assert {key: point[key] for key in ("agreement", "mean_layers")} == point["tuned"]
            assert point["agreement"] >= float(share.rstrip("%")) / 100
            for name in ("agreement", "mean_layers"):
                low, high = point[f"{name}_95"]
                assert low <= point[name] <= high
            saved = [resume - leave for leave, resume in point["spans"]]
            counted = 6 - sum(taken * layers for taken, layers in zip(point["taken"], saved, strict=True))
            assert point["mean_layers"] == pytest.approx(counted)
            met = [p for p in row["tuned"] if p["wanted"] == float(share.rstrip("%")) / 100 <= p["agreement"]]
            assert point["mean_layers"] == min(p["mean_layers"] for p in met)
    assert opened > 1


def test_scores_that_are_kept_are_those_of_the_heads(bench: band_frontier.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Second witness: transformers' hidden states, softmax of the whole vocabulary."""
    monkeypatch.setattr(band_heads, "_KEPT_ROWS", 100)
    candidates = [Candidate(bench.bands[span], {}) for span in ((1, 3), (3, 6), (5, 6))]
    band_heads.keep_scores(bench.folder / "scores.npz", bench.model, candidates, bench.test)
    kept = np.load(bench.folder / "scores.npz")
    assert kept["exits"].tolist() == [3, 5]
    assert kept["top1"].shape == (100, 2)
    causal_lm, model = tiny_models.shared("llama"), bench.model
    for place, leave in enumerate((3, 5)):
        head = bench.bands[leave, 6].head
        rows = [causal_lm(tokens[None], output_hidden_states=True).hidden_states[leave][0, 3:] for tokens in bench.test.tokens]
        chance = causal_lm.lm_head(head(torch.cat(rows)[:100], model.finish)).softmax(-1)  # type: ignore[misc]
        top = chance.topk(2).values
        answers = bench.test.answers[bench.test.judged][:100]
        assert kept["agrees"][:, place].tolist() == (chance.argmax(-1) == answers).tolist()
        assert np.abs(kept["top1"][:, place] - top[:, 0].numpy()).max() < 1e-3
        assert np.abs(kept["margin"][:, place] - (top[:, 0] - top[:, 1]).numpy()).max() < 1e-3


def test_pieces_of_two_parts_are_never_the_same() -> None:
    """What fits maps is not what fits routers, though pieces are taken whole."""
    pieces = [Piece(torch.zeros(10, dtype=torch.int64), 4, str(i)) for i in range(6)]
    assert [p.document for p in first(pieces, 7)] == ["0", "1"]
    assert [p.document for p in first(pieces, 13, 7)] == ["2", "3"]
