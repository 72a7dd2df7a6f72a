"""At which price a wanted agreement is met: found on one split, so that another can say what it reaches there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from dyndepth.closed_form.search import pareto

#: Near enough: agreement above the wish that is not worth another pass.
_NEAR = 5e-4
#: A bracket narrower than this share of its upper end is not cut again.
_NARROW = 0.02


def meeting(
    measure: Callable[[float], dict[str, Any]], wanted: float, least: float, guess: float, most: float, tries: int
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """(every point tried, the one that runs fewest layers of those whose agreement is at least `wanted`; None without one).

    `measure(price)` gives {"price", "agreement", "mean_layers", ...} on the split that sets prices. At price `least` nobody
    leaves yet and all agree. From `guess` the price doubles, up to `most`, until the agreement is too low; then the bracket is
    cut where a line between its ends meets the wish. Agreement need not fall evenly with the price: what was measured decides.
    """
    tried: list[dict[str, Any]] = []
    low, high = (least, 1.0), None
    price = min(guess, most)
    for _ in range(tries):
        point = measure(price)
        tried.append(point)
        if point["agreement"] >= wanted:
            low = price, point["agreement"]
            if point["agreement"] - wanted <= _NEAR or price == most:
                break
        else:
            high = price, point["agreement"]
        if high is None:
            price = min(2 * price, most)
            continue
        gap = high[0] - low[0]
        if gap < _NARROW * high[0]:
            break
        cut = gap * (low[1] - wanted) / max(low[1] - high[1], 1e-12)
        price = low[0] + min(max(cut, 0.1 * gap), 0.9 * gap)
    front = [tried[i] for i in pareto([(point["agreement"], point["mean_layers"]) for point in tried])]
    return tried, next((point for point in front if point["agreement"] >= wanted), None)


def widened(mine: dict[str, Any], alone: Sequence[dict[str, Any]], depth: int) -> dict[str, Any]:
    """A frontier of everything that may be taken, where what less found alone ran fewer layers on the tuning split: that.

    Greedy growth may start with a band that a better set does without. `mine` and `alone` are frontiers {"at": {agreement:
    point}}, a point's figures of the tuning split under "tuned" (without them nobody leaves).
    """

    def layers(point: dict[str, Any]) -> float:
        return float(point.get("tuned", {"mean_layers": depth})["mean_layers"])

    at = {share: min([point, *(other["at"][share] for other in alone)], key=layers) for share, point in mine["at"].items()}
    closed = {"agreement": 1.0, "mean_layers": float(depth)}
    return {**mine, "at": at, "between": {share: between([closed, *at.values()], float(share[:-1]) / 100) for share in at}}


def between(points: Sequence[dict[str, Any]], share: float) -> float | None:
    """Mean layers at an agreement, on the line between the two points around it; None where no two lie around it."""
    known = sorted((point["agreement"], point["mean_layers"]) for point in points)
    for (low, fewer), (high, more) in itertools.pairwise(known):
        if low <= share <= high:
            return float(fewer + (more - fewer) * (share - low) / max(high - low, 1e-12))
    return None
