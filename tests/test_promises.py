"""Invariant 7: over many random draws of calibration requests, what a method promises fails no oftener than it says.

Of every method with a bound: on real losses of SmolLM2, on its real scores at two exits, and on matrices made to break it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dyndepth.calibration import betting_bound, conformal, learn_then_test, pareto_testing
from dyndepth.calibration.bounds import BOUNDS

Array = NDArray[np.float64]
FOLDER = Path(__file__).parent / "data"


def real() -> Array:
    """[points of a path, requests]: share of a request's tokens that differ, in generation with predicted K,V
    (make calibrate-demo)."""
    return np.load(FOLDER / "smollm2_disagreement.npz")["losses"].astype(np.float64)


def at_thresholds(scores: Array, wrong: Array, vectors: Array) -> tuple[Array, Array]:
    """(losses [configurations, rows], mean layers [configurations]) of rows that leave at the first exit whose score reaches
    its threshold, of 30 layers 10 and 5 early; full depth is never wrong."""
    losses, layers = [], []
    for vector in vectors:
        first, second = scores[:, 0] >= vector[0], scores[:, 1] >= vector[1]
        losses.append(np.where(first, wrong[:, 0], np.where(second, wrong[:, 1], 0.0)))
        layers.append(np.where(first, 20, np.where(second, 25, 30)).mean())
    return np.stack(losses), np.array(layers)


LEVELS = (0.999, 0.99, 0.97, 0.9, 0.75, 0.5, 0.3)
#: Thresholds of two exits, a path from strict to free and a grid; fixed before any score is seen.
PATH = np.array([(level, level) for level in LEVELS])
GRID = np.array([(first, second) for first in LEVELS for second in LEVELS])


def scores(which: str) -> tuple[Array, Array]:
    """(scores, wrong), each [rows, 2]: what SmolLM2 says at exits 20 and 25 of 30 on unseen answers, translators as heads
    (make exit-heads)."""
    found = np.load(FOLDER / "smollm2_exit_scores.npz")
    return found[which].astype(np.float64), (~found["agrees"]).astype(np.float64)


def adversaries() -> dict[str, Array]:
    """Matrices [configurations, requests] whose true risks sit just above 0.1 where it hurts."""
    generator = np.random.default_rng(1)
    size = 4000

    def bernoulli(*means: float) -> Array:
        return np.stack([(np.arange(size) < round(m * size)).astype(float)[generator.permutation(size)] for m in means])

    return {
        "all losses equal": np.full((5, size), 0.1001),
        "just above, all or nothing": bernoulli(0.101, 0.101, 0.101),
        "non-monotone": bernoulli(0.02, 0.101, 0.02, 0.3, 0.0),
        "many at the border": bernoulli(*[0.101] * 40),
        "rare disasters": np.where(generator.uniform(size=(3, size)) < 0.106, 1.0, 0.0),
        "one shared request decides": np.tile(bernoulli(0.101), (20, 1)),
        **{name: at_thresholds(*scored, PATH)[0] for name, scored in scored_adversaries(size).items()},
    }


def scored_adversaries(size: int) -> dict[str, tuple[Array, Array]]:
    """(scores, wrong), each [rows, 2 exits], of which thresholds cannot make anything safe."""
    generator = np.random.default_rng(2)
    wrong = (generator.uniform(size=(size, 2)) < 0.11).astype(float)
    tied = generator.choice([0.5, 0.95], (size, 2))
    return {
        "constant scores": (np.full((size, 2), 0.98), wrong),
        "ties": (tied, wrong),
        "sure where wrong": (np.clip(0.5 + 0.6 * wrong - 0.2 * generator.uniform(size=(size, 2)), 0, 1), wrong),
    }


NAMES = [
    "all losses equal", "just above, all or nothing", "non-monotone", "many at the border", "rare disasters",
    "one shared request decides", "constant scores", "ties", "sure where wrong",
]  # fmt: skip


def wrong_share(population: Array, choose: Callable[[Array], tuple[int, ...]], risk: float, n: int, rounds: int) -> float:
    """How often a configuration that truly loses more than `risk` is accepted, `n` requests being drawn anew each time.
    population [configurations, requests]; its means are the truth."""
    truth = population.mean(axis=1)
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(rounds):
        drawn = population[:, generator.integers(0, population.shape[1], n)]
        wrong += any(truth[k] > risk for k in choose(drawn))
    return wrong / rounds


# -- Learn-then-Test ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(("risk", "error"), [(0.05, 0.1), (0.03, 0.05), (0.04, 0.2)])
def test_invariant_7_on_real_losses(bound: str, risk: float, error: float) -> None:
    """SmolLM2's disagreements per request along a path of thresholds, drawn anew a thousand times: the promise holds."""
    losses = real()
    assert losses.mean(axis=1).min() < risk < losses.mean(axis=1).max()
    assert wrong_share(losses, lambda drawn: learn_then_test(drawn, risk, error, bound).accepted, risk, 150, 1000) <= error


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("n", [1, 30, 200])
@pytest.mark.parametrize("name", NAMES)
def test_invariant_7_on_adversarial_matrices(name: str, n: int, bound: str) -> None:
    population = adversaries()[name]
    assert population.mean(axis=1).max() > 0.1
    assert wrong_share(population, lambda drawn: learn_then_test(drawn, 0.1, 0.1, bound).accepted, 0.1, n, 1000) <= 0.1


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("which", ["top1", "margin"])
@pytest.mark.parametrize(("risk", "error"), [(0.04, 0.1), (0.05, 0.05)])
def test_invariant_7_on_random_splits_of_real_scores(which: str, bound: str, risk: float, error: float) -> None:
    """Scores of SmolLM2's tokens at two exits, split at random five hundred times: of the rows that were held out, accepted
    thresholds lose more than the risk in at most `error` of the splits. And something is accepted."""
    losses, _ = at_thresholds(*scores(which), PATH)
    assert losses.mean(axis=1).min() < risk < losses.mean(axis=1).max()
    generator, n = np.random.default_rng(0), 1000
    wrong = accepted = 0
    for _ in range(500):
        order = generator.permutation(losses.shape[1])
        found = learn_then_test(losses[:, order[:n]], risk, error, bound).accepted
        held_out = losses[:, order[n:]].mean(axis=1)
        wrong += any(held_out[k] > risk for k in found)
        accepted += bool(found)
    assert wrong / 500 <= error
    assert accepted > 250


# -- Pareto testing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(("risk", "error"), [(0.04, 0.1), (0.05, 0.05)])
def test_pareto_testing_on_random_splits_of_real_scores(bound: str, risk: float, error: float) -> None:
    """Forty-nine vectors of two thresholds; the front comes from one part, the certificate from another, the truth from the
    rows that are left."""
    losses, layers = at_thresholds(*scores("top1"), GRID)
    generator, n = np.random.default_rng(0), 1000
    wrong = chosen = 0
    for _ in range(500):
        search, test, rest = np.split(generator.permutation(losses.shape[1]), [n, 2 * n])
        found = pareto_testing([losses[:, search]], [losses[:, test]], layers, [risk], error, bound)
        held_out = losses[:, rest].mean(axis=1)
        wrong += any(held_out[k] > risk for k in found.accepted)
        chosen += found.chosen is not None
    assert wrong / 500 <= error
    assert chosen > 250


@pytest.mark.parametrize("n", [1, 30, 200])
@pytest.mark.parametrize("name", NAMES)
def test_pareto_testing_on_adversarial_matrices(name: str, n: int) -> None:
    """The more a configuration loses the cheaper it is said to be, so the front runs straight into what breaks the limit."""
    population = adversaries()[name]
    cost = -population.mean(axis=1)

    def choose(drawn: Array) -> tuple[int, ...]:
        return pareto_testing([drawn[:, :n]], [drawn[:, n:]], cost, [0.1], 0.1).accepted

    assert wrong_share(population, choose, 0.1, 2 * n, 500) <= 0.1


def test_pareto_testing_promises_both_risks() -> None:
    """Two objectives, thirty configurations of two thresholds: accepted ones break a limit in at most `error` of draws."""
    generator = np.random.default_rng(3)
    means = generator.uniform(0.02, 0.25, (2, 30))
    cost = 10 - 20 * means.sum(axis=0) + generator.uniform(0, 1, 30)
    limits = (0.1, 0.12)
    wrong = chosen = 0
    for _ in range(500):
        search, test = ([(generator.uniform(size=(30, 200)) < m[:, None]).astype(float) for m in means] for _ in range(2))
        found = pareto_testing(search, test, cost, limits, 0.1)
        wrong += any(means[0][k] > limits[0] or means[1][k] > limits[1] for k in found.accepted)
        chosen += found.chosen is not None
        if found.chosen is not None:
            assert cost[found.chosen] == min(cost[k] for k in found.accepted)
    assert wrong / 500 <= 0.1
    assert chosen > 250, "a procedure that never certifies anything proves nothing"


# -- conformal risk control: on average over calibration sets -------------------------------------------------------------


def _lost(population: Array, risk: float, n: int, rounds: int) -> Array:
    """What the configuration chosen from each drawn calibration set truly loses; closed exits lose nothing."""
    generator = np.random.default_rng(2)
    lost = []
    for _ in range(rounds):
        chosen = conformal(population[:, generator.integers(0, population.shape[1], n)], risk).chosen
        lost.append(0.0 if chosen is None else float(population[chosen].mean()))
    return np.array(lost)


def test_conformal_holds_on_average() -> None:
    """E[loss of a new request] <= risk over calibration sets, also where the true losses are not monotone."""
    on_path, _ = at_thresholds(*scores("margin"), PATH)
    for population, risk in [(real(), 0.04), (on_path, 0.03), (adversaries()["non-monotone"], 0.1)]:
        assert 0 < _lost(population, risk, 100, 600).mean() <= risk


@pytest.mark.parametrize("n", [1, 30, 200])
@pytest.mark.parametrize("name", NAMES)
def test_conformal_on_adversarial_matrices(name: str, n: int) -> None:
    lost = _lost(adversaries()[name], 0.1, n, 600)
    assert lost.mean() <= 0.1 + 3 * lost.std() / 600**0.5


# -- betting: an upper bound of a mean ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [0.05, 0.2])
def test_betting_bound_is_above_the_mean_as_often_as_it_says(error: float) -> None:
    """On real losses, real scores and adversaries: too low in at most `error` of 500 draws, with three standard errors of
    slack; and near enough to be of use."""
    on_path, _ = at_thresholds(*scores("top1"), PATH)
    rows = [*real()[[0, 5, 10]], *on_path[[1, 3, 6]], *(matrix[-1] for matrix in adversaries().values())]
    generator = np.random.default_rng(4)
    for row in rows:
        bounds = np.array([betting_bound(row[generator.integers(0, len(row), 150)], error) for _ in range(500)])
        assert (bounds < row.mean()).mean() <= error + 3 * (error * (1 - error) / 500) ** 0.5
        assert np.median(bounds) < row.mean() + 0.15


@pytest.mark.parametrize("error", [0.1, 0.3])
def test_betting_bound_of_one_request(error: float) -> None:
    """Counted, not drawn: one request can lose only what is in the matrix."""
    for name, population in adversaries().items():
        losses, count = np.unique(population[0], return_counts=True)
        low = [betting_bound([loss], error) < population[0].mean() for loss in losses]
        assert count @ low / count.sum() <= error, name
