"""Seconds of one decode step: no exit, all-out, compaction; three ways to judge. Rows leave independently of each other.

docs/plan.md has the formulas. A row is at a place with the chance that `rates.occupancy` gives, so of B rows Bin(B, share)
are; terms that are linear in the rows (K,V reads) need the mean only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dyndepth.errors import ArgumentError
from dyndepth.plan.machine import Machine
from dyndepth.plan.rates import Exit, check, occupancy
from dyndepth.plan.shape import Shape
from dyndepth.plan.times import HEADS, Times, any_of, some_but_not_all

POLICIES = ("all-out", "compaction")


@dataclass(frozen=True)
class Step:
    """Expected seconds, by part, of one step that gives every row of the batch one token."""

    layers: float
    reads: float
    head: float
    judging: float = 0.0
    moving: float = 0.0
    backfill: float = 0.0

    @property
    def seconds(self) -> float:
        return self.layers + self.reads + self.head + self.judging + self.moving + self.backfill


def full_depth(machine: Machine, shape: Shape, rows: int, context: int) -> Step:
    """No exit: every row runs every layer."""
    _sizes(rows, context)
    times = Times(machine, shape)
    return Step(shape.layers * times.layer(rows), times.reads(rows * shape.reach(context)), times.head(rows))


def predict(
    machine: Machine,
    shape: Shape,
    exits: Sequence[Exit],
    rows: int,
    context: int,
    policy: str = "compaction",
    heads: str = "B",
) -> Step:
    """Expected step with exits inside a pass.

    Policies: `compaction` runs a layer on the rows that are there; `all-out` runs it on the whole batch unless nobody is.
    `heads`: who judges, dyndepth.plan.times.HEADS.
    """
    return step(Times(machine, shape), exits, rows, context, policy, heads)


def step(times: Times, exits: Sequence[Exit], rows: int, context: int, policy: str, heads: str) -> Step:
    """`predict` with parts computed before."""
    _sizes(rows, context)
    if policy not in POLICIES:
        raise ArgumentError(f"plan: policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    if heads not in HEADS:
        raise ArgumentError(f"plan: heads must be one of {', '.join(HEADS)}, got {heads!r}")
    shape = times.shape
    ordered = check(exits, shape.layers)
    present, live = occupancy(ordered, shape.layers)
    return (_all_out if policy == "all-out" else _compaction)(times, ordered, present, live, rows, context, heads)


def _compaction(
    times: Times, exits: Sequence[Exit], present: list[float], live: list[float], rows: int, context: int, heads: str
) -> Step:
    shape = times.shape
    by_share = {share: times.mean_layer(rows, share) for share in set(present)}
    tokens = sum(share * rows * shape.reach(context, at, at + 1) for at, share in enumerate(present))
    judging = moving = backfill = gone = 0.0
    for one, share in zip(exits, live, strict=True):
        leaving = share * one.rate
        gone += leaving if one.resume == shape.layers else 0.0
        judging += times.mean_judge(one, heads, rows, share)
        backfill += times.mean_leave(one, heads, rows, leaving)
        moving += some_but_not_all(rows, leaving, share - leaving) * times.partition(rows)
    head = times.head(rows) if heads == "B" or not exits else times.mean_head(rows, 1 - gone)
    return Step(sum(by_share[share] for share in present), times.reads(tokens), head, judging, moving, backfill)


def _all_out(
    times: Times, exits: Sequence[Exit], present: list[float], live: list[float], rows: int, context: int, heads: str
) -> Step:
    shape = times.shape
    layers = sum(any_of(rows, share) for share in present) * times.layer(rows)
    tokens = sum(any_of(rows, share) * rows * shape.reach(context, at, at + 1) for at, share in enumerate(present))
    judging = backfill = gone = 0.0
    for one, share in zip(exits, live, strict=True):
        leaving = share * one.rate
        gone += leaving if one.resume == shape.layers else 0.0
        judging += any_of(rows, share) * times.judge(one, heads, rows)
        # Rows carried along write their own K,V: a back-fill is due, for everybody, when the last row leaves.
        backfill += (any_of(rows, share) - any_of(rows, share - leaving)) * times.leave(one, heads, rows)
    head = times.head(rows) * (1.0 if heads == "B" or not exits else any_of(rows, 1 - gone))
    return Step(layers, times.reads(tokens), head, judging, 0.0, backfill)


def _sizes(rows: int, context: int) -> None:
    if rows < 1 or context < 0:
        raise ArgumentError(f"plan: wanted at least one row and a context of at least 0, got {rows}, {context}")
