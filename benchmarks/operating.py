"""At which price a wanted agreement is met: found on one split, so that another can say what it reaches there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

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
    good = [point for point in tried if point["agreement"] >= wanted]
    return tried, min(good, key=lambda point: float(point["mean_layers"])) if good else None


def between(points: Sequence[dict[str, Any]], share: float) -> float | None:
    """Mean layers at an agreement, on the line between the two points around it; None where no two lie around it."""
    known = sorted((point["agreement"], point["mean_layers"]) for point in points)
    for (low, fewer), (high, more) in itertools.pairwise(known):
        if low <= share <= high:
            return float(fewer + (more - fewer) * (share - low) / max(high - low, 1e-12))
    return None
