"""EERO: budgets are met on the samples thresholds come from, and on others within the bound that is proved for them."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny_text
import torch

import dyndepth
from dyndepth.encoders import LinearHead
from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.exits import TopProbability
from dyndepth.exits.criteria import View
from dyndepth.recipes import deebert, eero
from dyndepth.recipes.sample_heads import confidences
from dyndepth.training.encoder_trainer import EncoderConfig

COSTS = np.array([1.0, 2.0, 4.0])


def world(count: int, seed: int) -> tuple[eero.Array, eero.Array]:
    """Scores and errors of three exits whose confidence says something about their errors; the middle one is best."""
    generator = np.random.default_rng(seed)
    hard = generator.random((count, 1))
    scores = np.clip(1 - hard * np.array([0.9, 0.5, 0.6]) + 0.1 * generator.standard_normal((count, 3)), 0, 1)
    wrong = (generator.random((count, 3)) > scores).astype(float)
    return scores, wrong


@pytest.mark.parametrize("budget", [1.0, 1.5, 2.5, 3.5, 4.0])
def test_the_budget_on_the_fitting_half(budget: float) -> None:
    """Wanted shares cost at most the budget; whole samples and ties let at most one per exit stay longer."""
    scores, wrong = world(400, 0)
    found = eero.budgeted(scores, wrong, COSTS, budget, temperature=0.5)
    assert found.shares @ COSTS <= budget + 1e-9
    assert found.shares.sum() == pytest.approx(1)
    assert found.fitted <= budget + 2 * (COSTS[-1] - COSTS[0]) / 200
    if found.shares @ COSTS > budget - 1e-6:  # the budget binds
        assert found.fitted == pytest.approx(budget, abs=0.05)


def test_the_bound_holds_for_requests_to_come() -> None:
    """Over three hundred draws, the true mean cost (of 20 000 fresh samples) is above the bound in at most 5 %, with
    three standard errors of slack; and the bound is near the budget, not vacuous."""
    fresh, _ = world(20_000, 999)
    misses, far = 0, 0.0
    for seed in range(300):
        scores, wrong = world(300, seed)
        found = eero.budgeted(scores, wrong, COSTS, 2.0, temperature=0.5, seed=seed)
        true = COSTS[eero.leaving(fresh, found.thresholds)].mean()
        misses += true > found.bound
        far = max(far, found.bound - 2.0)
    assert misses <= 300 * 0.05 + 3 * math.sqrt(300 * 0.05 * 0.95)
    assert far < 0.9


def test_shares_by_hand() -> None:
    """pi_k ~ exp(-risk_k / beta - gamma cost_k): without a binding budget gamma is 0; where the middle exit is best and
    beta small nearly all leave there."""
    scores, _ = world(50, 0)
    wrong = np.repeat(np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), 5, 0)  # errors 1/2, 0, 1/2
    found = eero.budgeted(scores, wrong, COSTS, 4.0, temperature=0.5)
    wanted = np.exp([-1.0, 0.0, -1.0])
    assert found.shares == pytest.approx(wanted / wanted.sum())
    assert eero.budgeted(scores, wrong, COSTS, 4.0, temperature=0.01).shares[1] > 0.999
    assert eero.budgeted(scores, wrong, COSTS, 1.0).shares[0] > 0.999


def test_thresholds_are_quantiles_of_those_still_there() -> None:
    scores = np.array([[0.9, 0.1, 0], [0.8, 0.9, 0], [0.7, 0.2, 0], [0.6, 0.8, 0], [0.5, 0.7, 0], [0.4, 0.6, 0]] * 2)
    wrong = np.zeros((4, 3))
    found = eero.budgeted(scores, wrong, COSTS, 4.0, temperature=1.0)
    fit = scores[np.random.default_rng(0).permutation(12)[:6]]
    first = fit[:, 0] >= found.thresholds[0]
    assert first.sum() <= 2, "a third, floored, ties stay"
    assert ((fit[:, 1] >= found.thresholds[1]) & ~first).sum() <= 2
    assert found.thresholds[2] == -math.inf


def exits_of(model: Any) -> Any:
    inputs, labels = tiny_text.task(300)
    torch.manual_seed(0)
    return deebert.train(
        model, deebert.exits(model, tiny_text.CLASSES), inputs, labels, first=EncoderConfig(updates=40, lr=5e-3, base_lr=2e-3),
        second=EncoderConfig(updates=60, lr=1e-2),
    )  # fmt: skip


def test_budgets_of_a_model() -> None:
    """On held-out samples the layers that really run stay within the bound that `fit` proved on others."""
    model = tiny_text.bert()
    trained = exits_of(model)
    known, held = tiny_text.task(400, 11), tiny_text.task(600, 12)
    unlabelled, _ = tiny_text.task(400, 13)
    layers = []
    for budget in (1.5, 2.5, 3.5):
        exits = eero.fit(model, trained, *known, budget, unlabelled=unlabelled, temperature=1.0)
        assert all(isinstance(point.criterion, TopProbability) for point in exits)
        about = exits.record["eero"]
        out = dyndepth.DynamicEncoder(model, exits)(**held[0])
        layers.append(out.work.run / 600)
        wanted = np.dot(about["shares"], [1, 2, 3, 4])
        assert wanted <= budget + 1e-9
        assert about["layers_fitted"] == pytest.approx(wanted, abs=0.05)
        assert layers[-1] <= about["layers_bound"]
        assert about["samples"] == 400
    assert layers == sorted(layers)


@pytest.mark.parametrize("sure", [1.0, 40.0])
def test_layers_of_the_record_are_those_that_the_encoder_runs(sure: float) -> None:
    """Heads 40 times as sure score 1 in float32 for most samples: ties stay, in the record as in the encoder, which says so."""
    model = tiny_text.bert()
    trained = copy.deepcopy(exits_of(model))
    for point in trained:
        assert isinstance(point.head, LinearHead)
        point.head.out.weight.data *= sure
    inputs, labels = tiny_text.task(400, 11)
    exits = eero.fit(model, trained, inputs, labels, 2.5, temperature=1.0)
    about = exits.record["eero"]
    scores = confidences(model, trained, inputs).double().numpy()
    assert (scores[:, :-1] == 1).mean() > 0.3 or sure == 1.0
    thresholds = np.array([*(point.threshold for point in exits), -math.inf])
    layers = dyndepth.DynamicEncoder(model, exits)(**inputs).exit_layers
    # A threshold is the score of a sample, which may come out an ulp lower in another batch: one sample an exit.
    assert (layers.numpy() != eero.leaving(scores, thresholds) + 1).sum() <= 3
    recorded = (about["layers_fitted"] + about["layers_checked"]) / 2
    assert float(layers.float().mean()) == pytest.approx(recorded, abs=3 * 3 / 400)
    assert about["budget_met"] == (sure == 1.0)
    assert about["budget_met"] == (about["layers_fitted"] < 2.5 + 9 / 200)


def test_scores_are_the_criterions_own() -> None:
    """The bits that TopProbability sees in an encoder, not those of another formula."""
    model = tiny_text.bert()
    trained = exits_of(model).with_criterion(_Noted(), math.inf)
    inputs, _ = tiny_text.task(32, 4)
    _Noted.seen.clear()
    dyndepth.DynamicEncoder(model, trained)(**inputs)
    found = confidences(model, trained, inputs)
    for k, (ids, scores) in enumerate(_Noted.seen):
        assert torch.equal(found[ids, k], scores)
    assert len(_Noted.seen) == 3


class _Noted(TopProbability):
    seen: ClassVar[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def score(self, view: View) -> torch.Tensor:
        self.seen.append((view.seq.long(), super().score(view)))
        return self.seen[-1][1]


def test_errors() -> None:
    scores, wrong = world(10, 0)
    with pytest.raises(ArgumentError, match=r"as many exits, got \[10, 3\], \[10, 2\] and 3"):
        eero.budgeted(scores, wrong[:, :2], COSTS, 2.0)
    with pytest.raises(NotEnoughDataError, match="at least 2 scored samples and a labelled one, got 1"):
        eero.budgeted(scores[:1], wrong, COSTS, 2.0)
    with pytest.raises(ArgumentError, match=r"budget must be in \[1, 4\], got 9"):
        eero.budgeted(scores, wrong, COSTS, 9.0)
