"""When rows that wait at an exit point go deeper: DREX's question (Liu et al. 2025, arXiv:2512.15705)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dyndepth.errors import ArgumentError
from dyndepth.plan.machine import Machine
from dyndepth.plan.rates import Exit
from dyndepth.plan.rebatch import rebatch
from dyndepth.plan.shape import Shape


@dataclass(frozen=True)
class Waiting:
    """Rows that wait at one exit point, before a pass."""

    boundary: int
    rows: int
    #: How long the first of them has waited, in passes and in seconds.
    passes: int
    seconds: float


@dataclass(frozen=True)
class Moment:
    """What a rule may look at besides the rows that wait."""

    #: Rows that begin in this pass.
    fresh: int
    #: Requests that are running, waiting ones included.
    running: int
    #: Positions per running request, on average.
    context: int
    #: Share of the rows judged so far that left, per boundary.
    rates: dict[int, float] = field(default_factory=dict)


class Rule(Protocol):
    """Says at which boundaries rows go on in this pass, those that come there in it included."""

    def __call__(self, waiting: Sequence[Waiting], moment: Moment) -> frozenset[int]: ...


@dataclass(frozen=True)
class Immediate:
    """Nobody waits: ordinary compaction."""

    def __call__(self, waiting: Sequence[Waiting], moment: Moment) -> frozenset[int]:
        return frozenset(each.boundary for each in waiting)


@dataclass(frozen=True)
class Filled:
    """Rows go on when `rows` of them wait, or the first has waited for `passes` passes or `seconds` seconds (an SLA)."""

    rows: int
    passes: int = 16
    seconds: float = float("inf")

    def __post_init__(self) -> None:
        if self.rows < 1 or self.passes < 1 or not self.seconds > 0:
            raise ArgumentError(
                f"Filled: wanted rows, passes >= 1 and seconds > 0, got {self.rows}, {self.passes}, {self.seconds}"
            )

    def __call__(self, waiting: Sequence[Waiting], moment: Moment) -> frozenset[int]:
        return frozenset(
            each.boundary
            for each in waiting
            if each.rows and (each.rows >= self.rows or each.passes >= self.passes or each.seconds >= self.seconds)
        )


class Planned:
    """Rows go on after as many passes as the planner finds best for this machine, model and share of rows that leave.

    The planner's cost table gives the seconds of a shallow and of a deep part at every row count; the best number of shallow
    passes per deep one is looked up per boundary as the measured rate and the number of requests change (one means that
    waiting does not pay, and nobody waits). DREX's adaptive rule answers the same question from three measured times.
    """

    def __init__(self, machine: Machine, shape: Shape, exits: Sequence[Exit] = (), heads: str = "B") -> None:
        self.machine, self.shape, self.heads = machine, shape, heads
        #: What judging and heads read, by boundary; their rates are replaced by those seen.
        self._exits = {one.leave: one for one in exits}
        self._best: dict[tuple[int, float, int, int], int] = {}

    def __call__(self, waiting: Sequence[Waiting], moment: Moment) -> frozenset[int]:
        return frozenset(
            each.boundary
            for each in waiting
            if each.passes + 1 >= self.passes(each.boundary, moment.rates.get(each.boundary, 0.0), moment)
        )

    def passes(self, boundary: int, rate: float, moment: Moment) -> int:
        """Shallow passes per deep one; 1 when nobody should wait."""
        # Coarse keys: the answer hardly moves within them, and a lookup costs a search.
        rows, context = max(1, moment.running), 64 * round(moment.context / 64)
        key = boundary, round(20 * rate) / 20, rows, context
        if key not in self._best:
            one = dataclasses.replace(self._exits.get(boundary, Exit(boundary, self.shape.layers, 0.0)), rate=key[1])
            self._best[key] = rebatch(self.machine, self.shape, one, rows, max(context, 1), self.heads).passes
        return self._best[key]
