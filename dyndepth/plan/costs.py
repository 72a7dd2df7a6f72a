"""The cost table that a runtime asks: does judging pay here, does compacting pay now.

BatchCond profiles a table and drops rows where it says so; DREX's ART splits a batch where enough rows leave. This is the
same as arithmetic: expected seconds saved against seconds spent, by boundary, rows and context.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dyndepth.errors import ArgumentError
from dyndepth.plan.machine import Machine
from dyndepth.plan.rates import Exit, check
from dyndepth.plan.shape import Shape
from dyndepth.plan.times import Times, chances

VERSION = 1


@dataclass(frozen=True)
class Boundary:
    """One band: `judge` and `leave` are seconds by rows (0..N), `rate` the share of live rows expected to take it."""

    leave: int
    resume: int
    rate: float
    judge: tuple[float, ...]
    left: tuple[float, ...]


@dataclass(frozen=True)
class CostTable:
    """Seconds by row count, 0..N, for one machine, model and set of exits. Above N the last step goes on as a line.

    Args:
        layer: a layer without K,V reads.
        reach: per layer, tokens it attends to at most; 0 is all.
        read: K,V of one token of one layer.
        partition: a compaction.
        boundaries: ascending.
    """

    layer: tuple[float, ...]
    partition: tuple[float, ...]
    read: float
    reach: tuple[int, ...]
    boundaries: tuple[Boundary, ...]

    def __post_init__(self) -> None:
        size = len(self.layer)
        rows = [self.layer, self.partition, *(s for b in self.boundaries for s in (b.judge, b.left))]
        if size < 2 or any(len(seconds) != size for seconds in rows):
            raise ArgumentError(f"cost table: wanted seconds for the same 0..N rows, got {[len(seconds) for seconds in rows]}")
        numbers = [self.read, *itertools.chain(*rows)]
        if any(not isinstance(x, int | float) or not 0 <= x < math.inf for x in numbers):
            raise ArgumentError("cost table: seconds must be finite and not negative")
        if any(not 1 <= b.leave < b.resume <= len(self.reach) or not 0 <= b.rate <= 1 for b in self.boundaries):
            raise ArgumentError("cost table: wanted 1 <= leave < resume <= layers and a rate in [0, 1]")

    @classmethod
    def of(cls, machine: Machine, shape: Shape, exits: Sequence[Exit], rows: int = 64, heads: str = "B") -> CostTable:
        """The table of a machine; `rows` is N."""
        if rows < 1:
            raise ArgumentError(f"cost table: rows must be at least 1, got {rows}")
        times, counts = Times(machine, shape), range(rows + 1)
        return cls(
            layer=tuple(times.layer(n) for n in counts),
            partition=tuple(times.partition(n) for n in counts),
            read=times.reads(1),
            reach=shape.windows or (0,) * shape.layers,
            boundaries=tuple(
                Boundary(
                    one.leave, one.resume, one.rate, tuple(times.judge(one, heads, n) for n in counts),
                    tuple(times.leave(one, heads, n) for n in counts),
                )
                for one in check(exits, shape.layers)
            ),
        )  # fmt: skip

    def worth_judging(self, boundary: int, live: int, context: int = 0, rate: float | None = None) -> bool:
        """Whether judging `live` rows is expected to save more than it takes.

        `rate` None is the table's; else the share of live rows that leave (what a run has seen). Exits above this one are
        left out of account. An unknown boundary is an ArgumentError.
        """
        return self.judging_saves(boundary, live, context, rate) > 0

    def worth_compacting(self, boundary: int, live: int, leaving: int, context: int = 0) -> bool:
        """Whether letting `leaving` of `live` rows go, rather than running them on, saves time: they were judged already."""
        return self.compacting_saves(boundary, live, leaving, context) > 0

    def judging_saves(self, boundary: int, live: int, context: int = 0, rate: float | None = None) -> float:
        """Expected seconds. Rows beyond N are judged as N are."""
        band = self._band(boundary)
        if live <= 0:
            return 0.0
        rows = min(live, len(self.layer) - 1)
        fixed, per_token = self._expected(band, rows, band.rate if rate is None else rate)
        return fixed + per_token * self._reach(band, context) - band.judge[rows]

    def compacting_saves(self, boundary: int, live: int, leaving: int, context: int = 0) -> float:
        """Seconds: layers and K,V reads without the rows that leave, less moving the others and back-filling."""
        band = self._band(boundary)
        if not 0 <= leaving <= live:
            raise ArgumentError(f"cost table: leaving must be in [0, {live}], got {leaving}")
        return self._saves(band, live, leaving) + leaving * self.read * self._reach(band, context)

    def _saves(self, band: Boundary, live: int, leaving: int) -> float:
        if leaving == 0:
            return 0.0
        layers = band.resume - band.leave
        moved = _at(self.partition, live) if leaving < live else 0.0
        return layers * (_at(self.layer, live) - _at(self.layer, live - leaving)) - moved - _at(band.left, leaving)

    def _expected(self, band: Boundary, rows: int, rate: float) -> tuple[float, float]:
        """(seconds without K,V reads, seconds per token read), kept: a run asks the same again and again."""
        if not 0 <= rate <= 1:
            raise ArgumentError(f"cost table: rate must be in [0, 1], got {rate}")
        key = (band.leave, rows, rate)
        found = self._memory.get(key)
        if found is None:
            weights = chances(rows, rate)
            fixed = sum(float(weights[n]) * self._saves(band, rows, n) for n in range(1, rows + 1))
            found = self._memory[key] = fixed, rows * rate * self.read
        return found

    def _reach(self, band: Boundary, context: int) -> int:
        return sum(min(context, window or context) for window in self.reach[band.leave : band.resume])

    def _band(self, boundary: int) -> Boundary:
        for band in self.boundaries:
            if band.leave == boundary:
                return band
        known = ", ".join(str(band.leave) for band in self.boundaries) or "none"
        raise ArgumentError(f"cost table: no band leaves at boundary {boundary}; boundaries are {known}")

    @cached_property
    def _memory(self) -> dict[tuple[int, int, float], tuple[float, float]]:
        return {}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, entry: Any) -> CostTable:
        """What `to_json` gave; ArgumentError for anything else."""
        try:
            fields = dict(entry)
            version = fields.pop("version")
            if version != VERSION:
                raise ArgumentError(f"cost table: version {version!r}, this dyndepth reads {VERSION}")
            bands = tuple(
                Boundary(**(band | {"judge": tuple(band["judge"]), "left": tuple(band["left"])}))
                for band in fields["boundaries"]
            )
            lists = {name: tuple(fields[name]) for name in ("layer", "partition", "reach")}
            return cls(**(fields | lists | {"boundaries": bands}))
        except ArgumentError:
            raise
        except (TypeError, KeyError, ValueError) as error:
            raise ArgumentError(f"cost table: wanted what CostTable.to_json gives: {error}") from error


def _at(seconds: Sequence[float], rows: int) -> float:
    last = len(seconds) - 1
    return seconds[rows] if rows <= last else seconds[last] + (rows - last) * (seconds[last] - seconds[last - 1])
