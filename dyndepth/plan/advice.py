"""Which exit points and policy to take, or why to take none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dyndepth.errors import ArgumentError
from dyndepth.plan.machine import Machine
from dyndepth.plan.predict import POLICIES, Step, full_depth, step
from dyndepth.plan.rates import Exit, check, subset
from dyndepth.plan.rebatch import cycle
from dyndepth.plan.shape import Shape
from dyndepth.plan.times import HEADS, Times, any_of

#: Less than this is not worth exits: predictions are not better than that.
MARGIN = 0.02
REBATCHING = "re-batching"
#: Up to so many exits every set of them is tried; above, single ones, pairs and all.
_ALL_SETS = 6


@dataclass(frozen=True)
class Option:
    """One way to run a step: `seconds` for as many tokens as the batch has rows; `passes` is k of re-batching."""

    policy: str
    heads: str
    boundaries: tuple[int, ...]
    seconds: float
    passes: int = 0

    @property
    def label(self) -> str:
        """`compaction B at 20, 23`."""
        return f"{self.policy} {self.heads} at {', '.join(str(boundary) for boundary in self.boundaries)}"


@dataclass(frozen=True)
class Advice:
    """What to do at one batch size.

    Args:
        full: the step without exits.
        options: the best exit points of each policy and way to judge.
        choice: the option that beats `full` by the margin, inside a pass and without changing the vocabulary; None is
            "don't".
        reason: one line: what is gained, or why nothing is and by how much the best option loses.
    """

    rows: int
    context: int
    full: Step
    options: tuple[Option, ...]
    choice: Option | None
    reason: str

    def gain(self, option: Option) -> float:
        """Tokens per second over those without exits, less 1."""
        return self.full.seconds / option.seconds - 1

    def best(self, policy: str, heads: Sequence[str] = HEADS) -> Option | None:
        """The fastest option of a policy; None if it was not tried."""
        found = [option for option in self.options if option.policy == policy and option.heads in heads]
        return min(found, key=lambda option: option.seconds, default=None)


def advise(
    machine: Machine,
    shape: Shape,
    exits: Sequence[Exit],
    rows: int,
    context: int,
    *,
    heads: Sequence[str] = ("A", "B"),
    margin: float = MARGIN,
) -> Advice:
    """Search sets of the exits, policies and ways to judge; C is always predicted, and chosen only if `heads` names it.

    Exits of a set that is not all of them leave at the rates that `rates.subset` gives. Shares that leave are taken as they
    come: what they cost in quality is calibration's question, and the same for every policy.
    """
    if not heads or set(heads) - set(HEADS):
        raise ArgumentError(f"plan: heads must be some of {', '.join(HEADS)}, got {', '.join(heads) or 'none'}")
    if not 0 <= margin < 1:
        raise ArgumentError(f"plan: margin must be in [0, 1), got {margin}")
    ordered = check(exits, shape.layers)
    if not ordered:
        raise ArgumentError("plan: there are no exits to judge")
    times, full = Times(machine, shape), full_depth(machine, shape, rows, context)
    best: dict[tuple[str, str], Option] = {}
    for boundaries in _sets([one.leave for one in ordered]):
        chosen = subset(ordered, boundaries, shape.layers)
        for judge in HEADS:
            found = [
                Option(policy, judge, boundaries, step(times, chosen, rows, context, policy, judge).seconds)
                for policy in POLICIES
            ]
            if len(chosen) == 1 and chosen[0].resume == shape.layers:
                flush = cycle(times, chosen[0], rows, context, judge)
                found.append(Option(REBATCHING, judge, boundaries, flush.seconds, flush.passes))
            for option in found:
                held = best.get((option.policy, judge))
                if held is None or option.seconds < held.seconds:
                    best[option.policy, judge] = option
    options = tuple(best.values())
    allowed = [option for option in options if option.policy in POLICIES and option.heads in heads]
    first = min(allowed, key=_order)
    gain = full.seconds / first.seconds - 1
    if gain >= margin:
        reason = f"{first.label} gains {gain:.1%}"
        return Advice(rows, context, full, options, first, reason)
    reason = _why_not(times, ordered, full, first, rows, context, margin)
    return Advice(rows, context, full, options, None, reason)


def _order(option: Option) -> tuple[float, bool]:
    """Fastest first; where both cost the same (one row) compaction, which is what the runtime does."""
    return float(f"{option.seconds:.9e}"), option.policy != "compaction"


def _sets(boundaries: Sequence[int]) -> Iterator[tuple[int, ...]]:
    sizes = range(1, len(boundaries) + 1) if len(boundaries) <= _ALL_SETS else (1, 2, len(boundaries))
    for size in sizes:
        yield from itertools.combinations(boundaries, size)


def _why_not(times: Times, exits: Sequence[Exit], full: Step, option: Option, rows: int, context: int, margin: float) -> str:
    chosen = subset(exits, option.boundaries, times.shape.layers)
    with_exits = step(times, chosen, rows, context, option.policy, option.heads)
    saved = full.layers + full.reads + full.head - with_exits.layers - with_exits.reads - with_exits.head
    paid = with_exits.judging + with_exits.moving + with_exits.backfill
    change = with_exits.seconds / full.seconds - 1
    result = f"takes {change:.1%} longer" if change > 0 else f"saves {-change:.1%}, less than the margin of {margin:.0%}"
    text = (
        f"the best, {option.label}, {result}: exits save {max(0.0, saved) / full.seconds:.1%} of a step and "
        f"cost {paid / full.seconds:.1%}"
    )
    bound = _floor(times, full)
    staying = 1.0
    for one in chosen:
        staying *= 1 - one.rate if one.resume == times.shape.layers else 1.0
    if rows > 1 and bound > 0.5 and any_of(rows, staying) > 0.5:
        text += (
            f"; {bound:.0%} of a step goes to reading weights and starting ops, which only an empty layer saves, and some row "
            f"is left in {any_of(rows, staying):.0%} of the steps"
        )
    return text


def _floor(times: Times, full: Step) -> float:
    """Share of a full step that one row alone would wait for too: what rows that leave cannot save while one is left."""
    one = times.shape.layers * times.layer(1) + times.head(1)
    return min(1.0, one / full.seconds)
