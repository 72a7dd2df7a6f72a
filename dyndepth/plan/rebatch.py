"""Re-batching: rows that must go deeper wait until k shallow passes have filled a deep one (DREX, arXiv 2512.15705)."""

from __future__ import annotations

from dataclasses import dataclass

from dyndepth.errors import ArgumentError
from dyndepth.plan.machine import Machine
from dyndepth.plan.rates import Exit
from dyndepth.plan.shape import Shape
from dyndepth.plan.times import HEADS, Times, some_but_not_all

#: Shallow passes tried.
MOST_PASSES = 64


def flushed(p: float, k: int, t_full: float, t_shallow: float, t_deep: float) -> float:
    """S(k): speed-up of a fixed pool over full depth, when times do not depend on how many rows a pass has.

    `t_full (1 - p**k) / ((1 - p) (k t_shallow + t_deep))`: a cycle of k shallow passes and one deep one gives
    1 + p + ... + p**(k - 1) tokens per row of the pool (docs/plan.md derives it).
    """
    if not 0 <= p <= 1 or k < 1:
        raise ArgumentError(f"flushed: wanted a share in [0, 1] and k >= 1, got {p}, {k}")
    return t_full * _tokens(p, k) / (k * t_shallow + t_deep)


def best_flush(p: float, t_full: float, t_shallow: float, t_deep: float) -> tuple[int, float]:
    """(k, S(k)) with the largest S."""
    return max(
        ((k, flushed(p, k, t_full, t_shallow, t_deep)) for k in range(1, MOST_PASSES + 1)), key=lambda pair: (pair[1], -pair[0])
    )


def art(t_full: float, t_shallow: float, t_deep: float) -> float:
    """DREX's adaptive rule: splitting a batch pays when more than this share of its rows leaves, if deep batches are full."""
    return (t_shallow + t_deep - t_full) / t_deep


def _tokens(p: float, k: int) -> float:
    return float(sum(p**j for j in range(k)))


@dataclass(frozen=True)
class Rebatched:
    """Best cycle found: k shallow passes, and the seconds in which it gives as many tokens as the pool has rows."""

    passes: int
    seconds: float


def rebatch(
    machine: Machine, shape: Shape, one: Exit, rows: int, context: int, heads: str = "B", passes: int | None = None
) -> Rebatched:
    """A pool of `rows` rows with one early exit, times by row count; `passes` None takes the best k.

    Pass j starts the rows that do not wait yet, Bin(rows, p**(j - 1)) of them. After pass k the waiting rows,
    Bin(rows, 1 - p**k), run the deep layers, and the pool starts anew: cycles are independent, so tokens per second are the
    expected tokens of a cycle over its expected seconds (renewal reward). k = 1 is compaction.
    """
    return cycle(Times(machine, shape), one, rows, context, heads, passes)


def cycle(times: Times, one: Exit, rows: int, context: int, heads: str, passes: int | None = None) -> Rebatched:
    """`rebatch` with parts computed before."""
    shape, p = times.shape, one.rate
    if heads not in HEADS:
        raise ArgumentError(f"plan: heads must be one of {', '.join(HEADS)}, got {heads!r}")
    if one.resume != shape.layers:
        raise ArgumentError(f"re-batching: wanted an early exit, got band [{one.leave}, {one.resume})")
    low, high = shape.reach(context, 0, one.leave), shape.reach(context, one.leave)
    best, spent = None, 0.0
    for k in range(1, (passes or MOST_PASSES) + 1):
        started, leaving, waiting = p ** (k - 1), p**k, 1 - p**k
        spent += one.leave * times.mean_layer(rows, started) + times.reads(rows * started * low)
        spent += times.mean_judge(one, heads, rows, started) + times.mean_leave(one, heads, rows, leaving)
        spent += some_but_not_all(rows, leaving, started - leaving) * times.partition(rows)
        total = spent + (shape.layers - one.leave) * times.mean_layer(rows, waiting) + times.reads(rows * waiting * high)
        if heads == "B":
            # The deep rows share the LM head with those that leave in the last pass: together they are all rows.
            total += times.head(rows)
            spent += times.mean_head(rows, leaving)
        else:
            total += times.mean_head(rows, waiting)
        found = Rebatched(k, total / _tokens(p, k))
        if passes == k or (passes is None and (best is None or found.seconds < best.seconds * (1 - 1e-9))):
            best = found
    assert best is not None
    return best
