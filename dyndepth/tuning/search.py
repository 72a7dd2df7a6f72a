"""A search over tile sizes: from what the rules say, one size up or down at a time, as long as it gets better."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

#: Smallest and largest of each size that a search may change.
_LIMITS = {"block_columns": (16, 256), "block_inner": (16, 256), "num_warps": (1, 8), "num_stages": (1, 6)}
#: Sizes that an op's kernel takes as the problem's, not as a choice.
_FIXED = {"ragged_attention": ("block_inner",), "project_qkv": ("block_columns",), "backfill_kv": ()}


@dataclass(frozen=True)
class Found:
    """What a search ended with, and what it cost there and at the start; `tried` counts tiles that were tried."""

    tiles: Any
    cost: float
    start: float | None
    tried: int


def neighbours(op: str, tiles: Any) -> Iterator[Any]:
    """Tiles that differ in one size: half or twice of it, one stage more or less."""
    for name, (least, most) in _LIMITS.items():
        if name in _FIXED.get(op, ()):
            continue
        value = getattr(tiles, name)
        for other in (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2):
            if least <= other <= most:
                yield replace(tiles, **{name: other})


def search(op: str, start: Any, cost: Callable[[Any], float | None], *, gain: float = 0.02, most: int = 60) -> Found | None:
    """The best tiles that were met; None if nothing could be run.

    Args:
        cost: of tiles, less is better (seconds, say); None for tiles that cannot run. Asked once for each.
        gain: a neighbour must be better by this share: differences below are noise.
        most: tiles to try.
    """
    known: dict[Any, float | None] = {}

    def of(tiles: Any) -> float | None:
        if tiles not in known and len(known) < most:
            known[tiles] = cost(tiles)
        return known.get(tiles)

    best, least = start, of(start)
    while True:
        costs = [(found, tiles) for tiles in neighbours(op, best) if (found := of(tiles)) is not None]
        found, tiles = min(costs, key=lambda pair: pair[0], default=(None, best))
        if found is None or (least is not None and found >= least * (1 - gain)):
            break
        best, least = tiles, found
    return None if least is None else Found(best, least, known[start], len(known))
