"""Which configuration of thresholds may be used: procedures that turn losses into a choice with a guarantee.

A configuration is one vector of thresholds. `losses[k][i]` is what configuration k loses on calibration request i, in
[0, 1]; no model is in the loop. Configurations and their order must be fixed before the calibration losses are seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dyndepth.calibration.bounds import fraction, losses_of, p_value_of
from dyndepth.errors import ArgumentError


@dataclass(frozen=True)
class Selection:
    """What a procedure allows.

    `chosen` is None when nothing can be certified: then exits stay closed. `accepted` are all configurations that hold the
    bound *at the same time* with the confidence asked for; `p_values` are those of the configurations tested, in the order
    of testing, the one that stopped it included.
    """

    chosen: int | None
    accepted: tuple[int, ...]
    p_values: tuple[float, ...] = ()


def fixed_sequence(p_values: Iterable[float], error: float) -> Selection:
    """Test hypotheses in order until the first p-value above `error`; all before it are rejected (accepted here).

    The chance that anything accepted is wrong is at most `error`, whatever the number of tests. The first *failing* index is
    not accepted (a published implementation returns it). `p_values` may be lazy: nothing after the first failure is computed.
    """
    fraction(error, "fixed_sequence", "error")
    seen: list[float] = []
    for p in p_values:
        if not 0 <= p <= 1:
            raise ArgumentError(f"fixed_sequence: p-values must be in [0, 1], got {p}")
        seen.append(float(p))
        if p > error:
            break
    passed = len(seen) - (1 if seen and seen[-1] > error else 0)
    return Selection(passed - 1 if passed else None, tuple(range(passed)), tuple(seen))


def learn_then_test(
    losses: Iterable[ArrayLike], risk: float, error: float = 0.05, bound: str = "hoeffding_bentkus"
) -> Selection:
    """Learn-then-Test with fixed-sequence testing (Angelopoulos et al. 2021; CALM's calibration).

    `losses` yields one [n] array per configuration, safest first; it may be a generator that measures. With confidence
    1 - error every accepted configuration has an expected loss of at most `risk`; the last accepted one is chosen.
    `bound`: hoeffding_bentkus, hoeffding or betting. No monotonicity is assumed.
    """
    p_value = p_value_of(bound, error, "learn_then_test")
    fraction(risk, "learn_then_test", "risk")
    return fixed_sequence((p_value(row, risk) for row in losses), error)


def conformal(losses: ArrayLike, risk: float, most: float = 1.0) -> Selection:
    """Conformal risk control (Angelopoulos et al. 2022): the expected loss of a *new* request is at most `risk`.

    losses [configurations, n], safest first. The guarantee is for the average over calibration sets, not for this one with a
    confidence, and needs losses that grow along the configurations: each request's loss is replaced by the largest up to
    that configuration, which bounds it and makes it so. Chosen is the last configuration with
    n / (n + 1) mean + most / (n + 1) <= risk.
    """
    values = np.maximum.accumulate(losses_of(losses, "conformal", 2), axis=0)
    fraction(risk, "conformal", "risk")
    n = values.shape[1]
    holds = n / (n + 1) * values.mean(axis=1) + most / (n + 1) <= risk
    passed = len(holds) if holds.all() else int(np.argmin(holds))
    return Selection(passed - 1 if passed else None, tuple(range(passed)))


def pareto_front(risk: ArrayLike, cost: ArrayLike) -> list[int]:
    """Configurations that no other beats in both mean risk and cost, cheapest last; of equals the first."""
    risks, costs = np.asarray(risk, dtype=np.float64), np.asarray(cost, dtype=np.float64)
    if risks.ndim != 1 or risks.shape != costs.shape or not np.isfinite(risks).all() or not np.isfinite(costs).all():
        raise ArgumentError(
            f"pareto_front: risk and cost must be finite and of one length, got {list(risks.shape)}, {list(costs.shape)}"
        )
    front: list[int] = []
    best = np.inf
    for k in sorted(range(len(risks)), key=lambda k: (costs[k], risks[k], k)):
        if risks[k] < best:
            front.append(k)
            best = risks[k]
    return front[::-1]


def pareto_testing(
    search: Sequence[ArrayLike],
    test: Sequence[ArrayLike],
    cost: ArrayLike,
    risks: Sequence[float],
    error: float = 0.05,
    bound: str = "hoeffding_bentkus",
) -> Selection:
    """Pareto testing (Laufer-Goldshtein et al. 2022): vectors of thresholds, several risks, two independent splits.

    `search[m]` and `test[m]` are losses [configurations, n] of objective m on the two splits, `risks[m]` its limit,
    `cost` [configurations] what is to be small (rows x layers). The front of (largest p-value, cost) on `search`, most
    certain first, is tested on `test` as a fixed sequence with p = the largest over objectives. Chosen is the cheapest
    accepted; `accepted` are configuration indices in order of testing.
    """
    p_value = p_value_of(bound, error, "pareto_testing")
    costs = np.asarray(cost, dtype=np.float64)
    first, second = ([losses_of(m, "pareto_testing", 2) for m in split] for split in (search, test))
    if not 1 <= len(first) == len(second) == len(risks):
        raise ArgumentError(
            f"pareto_testing: search, test and risks must have one entry per objective, got {len(first)}, {len(second)}, "
            f"{len(risks)}"
        )
    if any(m.shape[0] != costs.shape[0] for m in (*first, *second)):
        raise ArgumentError(f"pareto_testing: every loss array must have {costs.shape[0]} configurations, as cost has")

    def largest(split: list[np.ndarray], k: int) -> float:
        return max(p_value(m[k], risk) for m, risk in zip(split, risks, strict=True))

    certainty = [largest(first, k) for k in range(len(costs))]
    front = sorted(pareto_front(certainty, costs), key=lambda k: (certainty[k], -costs[k]))
    tested = fixed_sequence((largest(second, k) for k in front), error)
    accepted = tuple(front[i] for i in tested.accepted)
    chosen = min(accepted, key=lambda k: (costs[k], certainty[k]), default=None)
    return Selection(chosen, accepted, tested.p_values)
