"""Maps of bands that learn by what they do to the rows that see them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_exits
import tiny_models
import torch
from tiny_training import SETTINGS, batches, looks, texts

import dyndepth
import dyndepth.training
from dyndepth.closed_form.measure import Lottery
from dyndepth.errors import ArgumentError
from dyndepth.exits import Band, Exits
from dyndepth.runtime.bind import bind
from dyndepth.runtime.score import score
from dyndepth.training.config import TrainConfig
from dyndepth.training.skip import SkipStudent


@pytest.mark.parametrize("kv_rank", [None, 5])
@pytest.mark.parametrize("resume", [4, 6])
def test_skipping_students_see_what_the_pass_makes_of_their_maps(resume: int, kv_rank: int | None, tmp_path: Path) -> None:
    """With the rows that a lottery sends away, the rows that are judged are those of the pass, back-fill and jump included."""
    model, data = tiny_models.shared("llama"), batches(tmp_path)
    band = tiny_exits.band(model, 2, resume, Lottery(0.4), kv_rank=kv_rank)
    batch = next(data.once())
    parts = texts(40, 20)[: len(batch.lengths)]
    ran = score(model, parts, tiny_exits.exits_of(model, band), start=[3] * len(parts), kv="predict")
    away = ran.judged & (ran.layers_run < 6)
    student = SkipStudent(bind(model), [band], 0.3, 0)
    which = ran.judged if resume == 4 else ran.judged & ~away
    torch.testing.assert_close(student(batch, which, away)[2], ran.ready[which], rtol=1e-4, atol=1e-4)
    judged, drawn = student.rows(batch, 5)
    assert torch.equal(judged, batch.judged if resume == 4 else batch.judged & ~drawn)
    assert not bool((drawn & ~batch.judged).any())
    assert torch.equal(student.rows(batch, 5)[1], drawn)
    assert not torch.equal(student.rows(batch, 6)[1], drawn)


@pytest.mark.parametrize(("spans", "falls_to"), [([(2, 6), (4, 6)], 0.9), ([(1, 3)], 0.98)])
def test_tuned_maps_do_less_harm(spans: list[tuple[int, int]], falls_to: float, tmp_path: Path) -> None:
    model = tiny_models.shared("llama")
    fitted = dyndepth.fit(model, texts(400), candidates=spans, tokens=6000, own=0.0, agreement=0.3, progress=False)
    for band in fitted:  # ridge is nearly the best there is on a random model, so training gets something to find
        assert band.kv is not None
        band.kv.weight.data *= 0.7
    fitted.record["certificate"] = {"thresholds": [band.threshold for band in fitted]}
    config = TrainConfig.of(SETTINGS | {"own": 0.0, "corpus": 6000, "tokens": 20_000, "lr": 3e-3})
    tuned = dyndepth.training.tune_maps(model, fitted, texts(400), output=tmp_path, config=config, progress=False)
    seen = looks(tmp_path)
    for band, other in zip(fitted, tuned, strict=True):
        assert seen[-1][str(band.leave)]["kl"] < falls_to * seen[0][str(band.leave)]["kl"]
        assert band.kv is not None
        assert other.kv is not None
        assert not torch.equal(band.kv.weight, other.kv.weight)
        assert (other.jump is None) == (band.jump is None)
        assert other.head is band.head
    assert fitted.certificate is not None
    assert tuned.certificate is None
    assert tuned.record["tuned_maps"]["share"] == 0.3
    Exits.from_pretrained(tmp_path / "exits")


def test_maps_that_cannot_be_tuned() -> None:
    model = tiny_models.shared("llama")
    top, low = tiny_exits.band(model, 4, 6), tiny_exits.band(model, 1, 3)
    for bands, message in (([top, low], "apart"), ([], "apart"), ([Band(4, 6)], "no K,V maps to start from")):
        with pytest.raises(ArgumentError, match=message):
            SkipStudent(bind(model), bands, 0.3, 0)
    with pytest.raises(ArgumentError, match=r"share must be in \(0, 1\)"):
        SkipStudent(bind(model), [top], 1.0, 0)
