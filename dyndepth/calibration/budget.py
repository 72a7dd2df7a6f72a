"""Thresholds for a compute budget instead of a risk: quantiles of scores, from unlabelled requests.

`scores` [rows, exits] are what the exits' criteria say (higher is safer to leave), the last exit being the full model.
No guarantee on risk comes with these: they fix how many rows leave where.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dyndepth.errors import ArgumentError

Array = NDArray[np.float64]


def thresholds_for(scores: ArrayLike, shares: ArrayLike) -> Array:
    """Thresholds [exits] by which the share `shares[k]` of all rows leaves at exit k (MSDNet, Dyn-Perceiver).

    At every exit the floor(rows * share) surest rows of those still there leave. Rows tied with the last of them would leave
    as well, so the threshold then lies just above the tie: fewer leave, never more. The last threshold is -inf.

    Criteria compare in float32, so scores that are equal there are ties, and "just above" is the next float32: a threshold
    that is rounded to float32 parts the same rows.
    """
    values = np.asarray(scores, dtype=np.float64)
    wanted = np.asarray(shares, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] == 0 or np.isnan(values).any():
        raise ArgumentError(f"thresholds_for: scores must be [rows, exits] without NaN, got shape {list(values.shape)}")
    if wanted.shape != (values.shape[1],) or not np.isfinite(wanted).all() or wanted.min() < 0:
        raise ArgumentError(f"thresholds_for: shares must be {values.shape[1]} numbers from 0 up, got {wanted.tolist()}")
    if not math.isclose(wanted.sum(), 1, abs_tol=1e-9):
        raise ArgumentError(f"thresholds_for: shares must add up to 1, got {wanted.sum():.6g}")
    rows, compared = values.shape[0], values.astype(np.float32)
    present = np.ones(rows, dtype=bool)
    thresholds = np.full(values.shape[1], math.inf)
    for k in range(values.shape[1] - 1):
        left = np.sort(values[present, k])[::-1]
        count = min(len(left), math.floor(rows * wanted[k] + 1e-9))
        if count == 0:
            continue
        threshold = left[count - 1]
        if count < len(left) and np.float32(left[count]) == np.float32(threshold):
            threshold = np.nextafter(np.float32(threshold), np.float32(math.inf))
        thresholds[k] = threshold
        present &= compared[:, k] < np.float32(threshold)
    thresholds[-1] = -math.inf
    return thresholds


def geometric_shares(costs: ArrayLike, budget: float) -> Array:
    """Shares q_k ~ p^k whose mean cost is `budget` (MSDNet's family); p by bisection.

    costs [exits] ascending (layers run, say). Raises when the budget lies outside [costs[0], costs[-1]].
    """
    values = _costs(costs, budget, "geometric_shares")
    return _bisected(lambda logarithm: _softmax(logarithm * np.arange(len(values), dtype=np.float64)), values, budget)


def exponential_weights(risks: ArrayLike, costs: ArrayLike, budget: float, temperature: float) -> Array:
    """Shares pi_k ~ exp(-risk_k / temperature - gamma cost_k), gamma >= 0 the smallest that meets `budget` (EERO).

    Minimises sum pi_k risk_k + temperature KL(pi || uniform) under the budget: where a deep head is worse than a middle one,
    rows go to the middle one. `temperature` > 0; gamma is 0 when the budget does not bind.
    """
    values = _costs(costs, budget, "exponential_weights")
    errors = np.asarray(risks, dtype=np.float64)
    if errors.shape != values.shape or not np.isfinite(errors).all():
        raise ArgumentError(f"exponential_weights: risks must be {len(values)} finite numbers, got {errors.tolist()}")
    if not temperature > 0:
        raise ArgumentError(f"exponential_weights: temperature must be positive, got {temperature}")

    def shares(gamma: float) -> Array:
        return _softmax(-errors / temperature - gamma * values)

    free = shares(0.0)
    if float(free @ values) <= budget:
        return free
    return _bisected(lambda negative: shares(-negative), values, budget)


def _costs(costs: ArrayLike, budget: float, op: str) -> Array:
    values = np.asarray(costs, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all() or (np.diff(values) < 0).any():
        raise ArgumentError(f"{op}: costs must be finite and ascending, got {values.tolist()}")
    if not values[0] <= budget <= values[-1]:
        raise ArgumentError(f"{op}: budget must be in [{values[0]:.6g}, {values[-1]:.6g}], got {budget}")
    return values


def _softmax(exponent: Array) -> Array:
    weights = np.exp(exponent - exponent.max())
    found: Array = weights / weights.sum()
    return found


def _bisected(shares: Callable[[float], Array], costs: Array, budget: float) -> Array:
    """shares(x) has a mean cost that grows with x: the largest x that keeps the budget."""
    if costs[0] == costs[-1]:
        return shares(0.0)
    low, high = -1.0, 1.0
    while float(shares(low) @ costs) > budget and low > -1e300:
        low *= 2
    while float(shares(high) @ costs) <= budget and high < 1e300:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if float(shares(middle) @ costs) <= budget:
            low = middle
        else:
            high = middle
    return shares(low)
