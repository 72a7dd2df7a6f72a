"""Bounds and selections against their promises: by hand, by simulation, on adversarial matrices, on real ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from dyndepth.calibration import (
    BetaMixture,
    Reliability,
    betting,
    betting_bound,
    brier,
    conformal,
    disagreement,
    excess,
    exponential_weights,
    fixed_sequence,
    geometric_shares,
    hoeffding,
    hoeffding_bentkus,
    inconsistency,
    learn_then_test,
    pareto_front,
    pareto_testing,
    thresholds_for,
)
from dyndepth.calibration.bounds import BOUNDS
from dyndepth.errors import ArgumentError

DATA = Path(__file__).parent / "data" / "smollm2_disagreement.npz"


def test_hoeffding_by_hand() -> None:
    assert hoeffding([0.0] * 100, 0.1) == pytest.approx(math.exp(-2 * 100 * 0.01))
    assert hoeffding([0.5, 0.1], 0.2) == 1.0  # mean above the risk


def test_hoeffding_bentkus_by_hand() -> None:
    """Without a loss both parts are powers of 1 - risk; with losses the binomial tail takes over."""
    assert hoeffding_bentkus([0.0] * 59, 0.05) == pytest.approx(0.95**59)
    assert hoeffding_bentkus([0.0] * 59, 0.05) <= 0.05 < hoeffding_bentkus([0.0] * 58, 0.05)
    losses = [1.0] * 3 + [0.0] * 197
    tail = math.e * float(binom.cdf(3, 200, 0.05))
    a, b = 3 / 200, 0.05
    entropy = math.exp(-200 * (a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))))
    assert hoeffding_bentkus(losses, 0.05) == pytest.approx(min(tail, entropy))


def test_betting_by_hand() -> None:
    """One loss of 0: the stake is min(1, sqrt(2 ln(1/error) / (1/4))) = 1, the wealth 1 + risk."""
    assert betting([0.0], 0.3, 0.05) == pytest.approx(1 / 1.3)
    # Losing it all: a loss of 1 against a stake of 1 leaves `risk`; wealth never exceeded 1.
    assert betting([1.0], 0.3, 0.05) == 1.0
    bound = betting_bound([0.0] * 300, 0.05)
    assert betting([0.0] * 300, bound + 1e-9, 0.05) <= 0.05 < betting([0.0] * 300, bound - 1e-9, 0.05)


@pytest.mark.parametrize("bound", BOUNDS)
def test_p_values_fall_with_risk_and_rise_with_losses(bound: str) -> None:
    from dyndepth.calibration.bounds import p_value_of

    p_value = p_value_of(bound, 0.05, "test")
    losses = np.random.default_rng(0).uniform(0, 0.1, 150)
    values = [p_value(losses, risk) for risk in (0.02, 0.05, 0.1, 0.2, 0.4)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.99  # betting may keep the peak of an early win
    assert p_value(losses * 2, 0.12) >= p_value(losses, 0.12)


def test_fixed_sequence_returns_the_last_that_passed() -> None:
    """A published implementation returns the first that fails, and the last of all if none does."""
    assert fixed_sequence([0.01, 0.02, 0.2, 0.001], 0.05).chosen == 1
    assert fixed_sequence([0.01, 0.02, 0.03], 0.05).chosen == 2
    assert fixed_sequence([0.2, 0.01], 0.05).chosen is None
    assert fixed_sequence([], 0.05).chosen is None
    assert fixed_sequence([0.05], 0.05).chosen == 0
    assert fixed_sequence([0.01, 0.2, 0.001], 0.05).p_values == (0.01, 0.2)


def test_fixed_sequence_computes_nothing_after_the_first_failure() -> None:
    def lazily() -> Iterator[float]:
        yield 0.01
        yield 0.5
        raise AssertionError("a configuration past the failing one was measured")

    assert fixed_sequence(lazily(), 0.05).accepted == (0,)


def test_conformal_by_hand() -> None:
    losses = np.array([[0.0, 0.0, 0.0, 0.0], [0.2, 0.0, 0.0, 0.0], [0.0, 0.9, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    # n = 4: mean * 4/5 + 1/5 = 0.2, 0.24, then 0.42 (the running maximum keeps 0.2 of the first request).
    assert conformal(losses, 0.2).chosen == 0
    assert conformal(losses, 0.24 + 1e-12).chosen == 1
    assert conformal(losses, 0.41).chosen == 1
    assert conformal(losses, 0.42 + 1e-12).chosen == 3
    assert conformal(losses, 0.1).chosen is None


def test_pareto_front_by_hand() -> None:
    assert pareto_front([0.1, 0.2, 0.3, 0.05], [5, 3, 4, 9]) == [3, 0, 1]
    assert pareto_front([0.1, 0.1], [2, 2]) == [0]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_pareto_front_is_the_set_nobody_beats(points: list[tuple[int, int]]) -> None:
    front = pareto_front([p[0] for p in points], [p[1] for p in points])

    def beaten(k: int) -> bool:
        return any(o[0] <= points[k][0] and o[1] <= points[k][1] and o != points[k] for o in points)

    assert not any(beaten(k) for k in front)
    assert {points[k] for k in range(len(points)) if not beaten(k)} == {points[k] for k in front}
    assert all(points[a][1] > points[b][1] for a, b in pairwise(front))


def test_certifies_where_it_can() -> None:
    """The bounds are not vacuous: a safe path passes, and tighter bounds go further."""
    losses = np.load(DATA)["losses"].astype(np.float64)
    n = losses.shape[1]
    assert n >= 200
    how_far = {b: len(learn_then_test(losses, 0.1, 0.05, b).accepted) for b in BOUNDS}
    assert how_far["hoeffding_bentkus"] >= how_far["hoeffding"] >= 1
    assert how_far["betting"] >= how_far["hoeffding_bentkus"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hoeffding([], 0.1), "an empty calibration split certifies nothing"),
        (lambda: hoeffding_bentkus([0.1, math.nan], 0.1), "losses must be finite and in [0, 1]"),
        (lambda: betting([1.5], 0.1), "losses must be finite and in [0, 1]"),
        (lambda: hoeffding([0.1], 0.0), "risk must be in (0, 1), got 0.0"),
        (lambda: learn_then_test([[0.1]], 0.1, 1.0), "error must be in (0, 1), got 1.0"),
        (lambda: learn_then_test([[0.1]], 0.1, 0.05, "clt"), "bound must be one of hoeffding_bentkus, hoeffding, betting"),
        (lambda: fixed_sequence([math.nan], 0.05), "p-values must be in [0, 1], got nan"),
        (lambda: conformal([[[0.1]]], 0.1), "losses must be a 2-d array"),
        (lambda: pareto_front([0.1], [1, 2]), "risk and cost must be finite and of one length"),
        (lambda: pareto_testing([[[0.1]]], [[[0.1]]], [1], [0.1, 0.2]), "one entry per objective"),
        (lambda: thresholds_for([[0.1, 0.2]], [0.5, 0.4]), "shares must add up to 1"),
        (lambda: thresholds_for([[math.nan]], [1.0]), "without NaN"),
        (lambda: geometric_shares([1, 2], 3), "budget must be in [1, 2], got 3"),
        (lambda: geometric_shares([2, 1], 1), "costs must be finite and ascending"),
        (lambda: exponential_weights([0.1, 0.2], [1, 2], 1.5, 0.0), "temperature must be positive"),
        (lambda: Reliability.of([0.1], [2]), "agrees must be true or false"),
        (lambda: BetaMixture().update([1.5], [True]), "scores must be in [0, 1]"),
    ],
)
def test_errors(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ArgumentError, match=message.replace("(", r"\(").replace(")", r"\)").replace("[", r"\[")):
        call()


def test_losses_by_hand() -> None:
    assert disagreement([1, 2, 3], [1, 9, 3]) == pytest.approx(1 / 3)
    assert disagreement([1], [1, 2]) == 0.5
    assert disagreement([], []) == 0.0
    # The longest common subsequence of 1 2 3 4 and 2 9 4 is 2 4: F = 2 * 2 / 7.
    assert inconsistency([1, 2, 3, 4], [2, 9, 4]) == pytest.approx(1 - 4 / 7)
    assert inconsistency([], []) == 0.0
    assert inconsistency([1], []) == 1.0
    assert excess(0.7, 0.5) == pytest.approx(0.2)
    assert excess(0.5, 0.7) == 0.0


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.lists(st.sampled_from([0.1, 0.2, 0.5, 0.9]), min_size=3, max_size=3), min_size=1, max_size=40),
    st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(1, 4)),
)
def test_thresholds_never_let_more_leave_than_asked(scores: list[list[float]], parts: tuple[int, int, int]) -> None:
    shares = np.array(parts) / sum(parts)
    thresholds = thresholds_for(scores, shares)
    values, present = np.array(scores), np.ones(len(scores), dtype=bool)
    for k in range(2):
        leaving = present & (values[:, k] >= thresholds[k])
        assert leaving.sum() <= len(scores) * shares[k] + 1e-6
        present &= ~leaving
    assert thresholds[-1] == -math.inf


def test_thresholds_by_hand() -> None:
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    assert thresholds_for(scores, [0.5, 0.5])[0] == 0.8
    assert thresholds_for(scores, [0.0, 1.0])[0] == math.inf


def test_ties_stay_in_the_precision_that_criteria_compare_in() -> None:
    """Above a tie comes the next float32, not the next double, which float32 rounds back; doubles equal in float32 are ties."""
    saturated = np.array([[1.0, 0.0]] * 8 + [[0.5, 0.0]] * 2)
    threshold = thresholds_for(saturated, [0.3, 0.7])[0]
    assert threshold == 1 + 2.0**-23
    assert not (saturated[:, 0].astype(np.float32) >= np.float32(threshold)).any()
    near = np.array([[0.7 + 1e-12, 0.0], [0.7, 0.0], [0.1, 0.0]])
    assert not (near[:, 0].astype(np.float32) >= np.float32(thresholds_for(near, [0.4, 0.6])[0])).any()


@pytest.mark.parametrize("budget", [3.0, 3.01, 10.0, 17.5, 29.9, 30.0])
def test_shares_meet_the_budget(budget: float) -> None:
    costs = np.array([3.0, 15.0, 22.0, 30.0])
    for shares in (geometric_shares(costs, budget), exponential_weights([0.5, 0.3, 0.2, 0.1], costs, budget, 1e-3)):
        assert shares.sum() == pytest.approx(1)
        assert shares @ costs <= budget + 1e-9
    assert geometric_shares(costs, budget) @ costs == pytest.approx(budget, abs=1e-6)


def test_exponential_weights_prefer_the_better_head() -> None:
    """Where the middle head is the best one (overthinking), rows go there, budget or not."""
    shares = exponential_weights([0.4, 0.1, 0.3], [1.0, 2.0, 3.0], 3.0, 0.01)
    assert shares.argmax() == 1
    assert shares[1] > 0.999
    assert geometric_shares([2.0, 2.0], 2.0) == pytest.approx([0.5, 0.5])


def test_reliability_by_hand() -> None:
    scores = np.array([0.1, 0.2, 0.6, 0.7, 0.9, 0.95])
    agrees = np.array([0, 1, 0, 1, 1, 1])
    found = Reliability.of(scores, agrees, bins=3)
    assert found.count.tolist() == [2, 2, 2]
    assert found.agreement.tolist() == [0.5, 0.5, 1.0]
    assert found.threshold(0.9) == pytest.approx(found.edges[2])
    assert found.threshold(0.5) == pytest.approx(0.1)
    assert found.threshold(1.1) == math.inf
    assert found.calibration_error == pytest.approx((abs(0.15 - 0.5) + abs(0.65 - 0.5) + abs(0.925 - 1)) / 3)
    assert brier([0.0, 1.0, 0.5], [0, 1, 1]) == pytest.approx(0.25 / 3)
    # One value only: one bin, nothing divided by zero.
    assert Reliability.of([0.5] * 4, [1, 0, 1, 1]).agreement.tolist() == [0.75]


def test_beta_mixture_separates_two_densities() -> None:
    """Agreeing scores high, disagreeing low: the threshold falls between them; the soft responsibility is not lost."""
    generator = np.random.default_rng(4)
    right, wrong = generator.beta(8, 2, 300), generator.beta(2, 8, 300)
    mixture = BetaMixture(ratio=0.5)
    assert mixture.threshold == 0.9
    scores, labels = np.concatenate([right, wrong]), np.repeat([1, 0], 300)
    for part in np.array_split(generator.permutation(600), 6):
        mixture.update(scores[part], labels[part])
    assert 0.4 < mixture.threshold < 0.6
    hard, soft = BetaMixture(weight=0.0), BetaMixture(weight=0.8)
    hard.update(scores, labels)
    soft.update(scores, labels)
    assert hard.densities != soft.densities
    x = scores[labels == 1].clip(1e-4, 1 - 1e-4)
    common = x.mean() * (1 - x.mean()) / x.var() - 1
    assert hard.densities[1] == pytest.approx((x.mean() * common, (1 - x.mean()) * common))
