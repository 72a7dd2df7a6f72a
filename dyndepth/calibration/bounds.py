"""p-values and upper confidence bounds for the mean of losses in [0, 1], valid for every sample size.

Losses are independent draws of one distribution: one loss per *request*, never per token, because the tokens of a text are
not independent. A p-value here is for "the mean loss exceeds `risk`": under that hypothesis it is at most u with a chance
of at most u.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from dyndepth.errors import ArgumentError

Losses = NDArray[np.float64]


def losses_of(values: ArrayLike, op: str, dimensions: int) -> Losses:
    """float64 array after checks: `dimensions` axes, not empty, finite, in [0, 1]."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions or array.size == 0:
        raise ArgumentError(
            f"{op}: losses must be a {dimensions}-d array that is not empty, got shape {list(array.shape)}; "
            "an empty calibration split certifies nothing"
        )
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
        raise ArgumentError(f"{op}: losses must be finite and in [0, 1], got {array.min():.4g} to {array.max():.4g}")
    return array


def fraction(value: float, op: str, name: str) -> float:
    """A number strictly between 0 and 1, or ArgumentError."""
    if not 0 < value < 1:
        raise ArgumentError(f"{op}: {name} must be in (0, 1), got {value}")
    return float(value)


def hoeffding(losses: ArrayLike, risk: float) -> float:
    """exp(-2 n (risk - mean)^2), one-sided (Hoeffding 1963); the simple bound that CALM's paper states."""
    values = losses_of(losses, "hoeffding", 1)
    gap = max(0.0, fraction(risk, "hoeffding", "risk") - _mean(values))
    return math.exp(-2 * len(values) * gap**2)


def hoeffding_bentkus(losses: ArrayLike, risk: float) -> float:
    """The smaller of Hoeffding's bound in its entropy form and Bentkus's e P[Bin(n, risk) <= ceil(n mean)] (Bates et al. 2021).

    The minimum needs no correction: it is the inverse of a bound on the same tail event.
    """
    values = losses_of(losses, "hoeffding_bentkus", 1)
    n, mean, limit = len(values), _mean(values), fraction(risk, "hoeffding_bentkus", "risk")
    if mean >= limit:
        return 1.0
    entropy = math.exp(-n * _bernoulli_divergence(mean, limit))
    bentkus = math.e * float(binom.cdf(math.ceil(math.fsum(values)), n, limit))
    return min(1.0, entropy, bentkus)


def betting(losses: ArrayLike, risk: float, error: float = 0.05) -> float:
    """1 / max_i prod_{j <= i} (1 - nu_j (loss_j - risk)): a gambler's wealth against "mean > risk" (Waudby-Smith & Ramdas).

    The stakes nu_j follow the running variance and are tuned for rejection at level `error`, but the p-value is valid at
    every level. It depends on the order of the losses, which must not depend on their values.
    """
    values = losses_of(losses, "betting", 1)
    return _betting(values, fraction(risk, "betting", "risk"), _stakes(values, fraction(error, "betting", "error")))


def betting_bound(losses: ArrayLike, error: float) -> float:
    """The mean is at most this with confidence 1 - error: the largest risk that `betting` does not reject at `error`."""
    values = losses_of(losses, "betting_bound", 1)
    stakes = _stakes(values, fraction(error, "betting_bound", "error"))
    low, high = 0.0, 1.0
    for _ in range(60):  # wealth grows with the risk betted against, so the set of rejected risks is [bound, 1]
        middle = (low + high) / 2
        if _betting(values, middle, stakes) <= error:
            high = middle
        else:
            low = middle
    return high


def _stakes(values: Losses, error: float) -> Losses:
    """nu_j from the losses before j only: mean and variance start at 1/2 and 1/4, each worth one observation."""
    count = np.arange(1, len(values) + 1)
    mean = (0.5 + np.cumsum(values)) / (1 + count)
    variance = (0.25 + np.cumsum((values - mean) ** 2)) / (1 + count)
    before = np.concatenate([[0.25], variance[:-1]])
    return np.minimum(1.0, np.sqrt(2 * math.log(1 / error) / (len(values) * before)))


def _betting(values: Losses, risk: float, stakes: Losses) -> float:
    with np.errstate(divide="ignore"):  # a stake of 1 on a loss of 1 against risk 0 loses everything: log 0
        wealth = np.cumsum(np.log(1 - stakes * (values - risk)))
    return min(1.0, math.exp(-max(0.0, float(wealth.max()))))


def _mean(values: Losses) -> float:
    return math.fsum(values) / len(values)


def _bernoulli_divergence(a: float, b: float) -> float:
    """KL(Bernoulli(a) || Bernoulli(b)) in nats, 0 < b < 1."""
    first = a * math.log(a / b) if a > 0 else 0.0
    second = (1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0
    return first + second


#: By the name that `calibrate` and certificates use.
BOUNDS = ("hoeffding_bentkus", "hoeffding", "betting")


def p_value_of(bound: str, error: float, op: str) -> Callable[[ArrayLike, float], float]:
    """The function (losses, risk) -> p-value of that name; `error` is the level it will be compared with."""
    level = fraction(error, op, "error")
    if bound == "betting":
        return lambda losses, risk: betting(losses, risk, level)
    if bound not in BOUNDS:
        raise ArgumentError(f"{op}: bound must be one of {', '.join(BOUNDS)}, got {bound!r}")
    return hoeffding if bound == "hoeffding" else hoeffding_bentkus
