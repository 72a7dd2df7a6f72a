"""A machine as the planner sees it: how long products, reads and small ops take.

Seconds of a product with `parameters` weights on n rows are `max(weight bytes / bandwidth, 2 parameters n / flops)`, the
roofline (Williams et al. 2009), or what a measured table says. No rows take no time: nothing is read for them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dyndepth.errors import ArgumentError

#: Bytes of one number.
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Timing:
    """One product `[rows, columns] x [columns, outputs]`, weights not in any cache: median seconds."""

    outputs: int
    columns: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class Machine:
    """Figures of one machine for one dtype.

    Args:
        bandwidth: bytes/s at which weights and K,V are read.
        flops: FLOP/s of a large product; idle where there is a table.
        copy: bytes/s moved by a copy, each byte counted once; 0 takes half of `bandwidth`.
        op_s: seconds that every op costs beside its bytes and FLOPs (launch or dispatch).
        sync_s: seconds of a boundary that reads how many rows leave; 0 on a CPU, where reading is free.
        table: measured products. Per row count the time is fitted as `a + b parameters`, interpolated between row counts;
            beyond the last one b grows with the rows.
        source: where the figures come from, for people.
    """

    name: str
    dtype: str
    bandwidth: float
    flops: float
    copy: float = 0.0
    op_s: float = 0.0
    sync_s: float = 0.0
    table: tuple[Timing, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in ITEM:
            raise ArgumentError(f"machine: dtype must be one of {', '.join(ITEM)}, got {self.dtype!r}")
        for name, least in (("bandwidth", 1.0), ("flops", 1.0), ("copy", 0.0), ("op_s", 0.0), ("sync_s", 0.0)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < least:
                raise ArgumentError(f"machine: {name} must be finite and at least {least:g}, got {value!r}")
        for timing in self.table:
            sizes = (timing.outputs, timing.columns, timing.rows)
            good = all(type(size) is int and size > 0 for size in sizes) and isinstance(timing.seconds, int | float)
            if not good or not 0 < timing.seconds < math.inf:
                raise ArgumentError(f"machine: a timing must have positive sizes and seconds, got {timing}")

    @classmethod
    def measure(cls, dtype: str = "bfloat16", *, again: bool = False) -> Machine:
        """This machine's CPU with torch's threads, from the cache folder or measured now (seconds); `again` measures anew."""
        from dyndepth.plan.measure import here

        return here(dtype, again=again)

    @classmethod
    def named(cls, name: str, dtype: str = "bfloat16") -> Machine:
        """A GPU by its data sheet (dyndepth.plan.sheets)."""
        from dyndepth.plan.sheets import sheet

        return sheet(name, dtype)

    @property
    def item(self) -> int:
        """Bytes of one number."""
        return ITEM[self.dtype]

    def product(self, parameters: int, rows: int, count: int = 1) -> float:
        """Seconds of `count` products on `rows` rows, with `parameters` weights in all."""
        if rows <= 0 or parameters <= 0:
            return 0.0
        if self._fitted:
            per_call, per_weight = self._at(rows)
            return count * per_call + parameters * per_weight
        return count * self.op_s + max(parameters * self.item / self.bandwidth, 2 * parameters * rows / self.flops)

    def read(self, numbers: float) -> float:
        """Seconds to read so many numbers of this dtype once."""
        return numbers * self.item / self.bandwidth

    def move(self, numbers: float) -> float:
        """Seconds to copy so many numbers of this dtype."""
        return numbers * self.item / (self.copy or self.bandwidth / 2)

    def crossover(self) -> float:
        """Rows at which a product takes twice as long as on one row: where compute starts to decide."""
        if not self._fitted:
            return self.item * self.flops / self.bandwidth  # twice the roofline's corner
        first = self._fitted[0][2]
        for rows, following in itertools.pairwise(self._fitted):
            if following[2] >= 2 * first:
                share = (2 * first - rows[2]) / (following[2] - rows[2])
                return rows[0] + share * (following[0] - rows[0])
        return self._fitted[-1][0] * 2 * first / self._fitted[-1][2]

    @cached_property
    def _fitted(self) -> list[tuple[int, float, float]]:
        """(rows, a, b) in ascending rows. Neither a nor b falls with the rows: where it seems to, it is noise."""
        counts = sorted({timing.rows for timing in self.table})
        fits = [_line([timing for timing in self.table if timing.rows == rows]) for rows in counts]
        calls, weights = (_rising(column) for column in zip(*fits, strict=True)) if fits else ((), ())
        return list(zip(counts, calls, weights, strict=True))

    def _at(self, rows: int) -> tuple[float, float]:
        table = self._fitted
        if rows >= table[-1][0]:
            return table[-1][1], table[-1][2] * rows / table[-1][0]
        if rows <= table[0][0]:
            return table[0][1], table[0][2]
        for low, high in itertools.pairwise(table):
            if rows <= high[0]:
                share = (rows - low[0]) / (high[0] - low[0])
                return low[1] + share * (high[1] - low[1]), low[2] + share * (high[2] - low[2])
        raise AssertionError("unreachable")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, entry: Any) -> Machine:
        """What `to_json` gave; ArgumentError for anything else."""
        try:
            fields = dict(entry)
            fields["table"] = tuple(Timing(**timing) for timing in fields["table"])
            return cls(**fields)
        except (TypeError, KeyError, ValueError) as error:
            raise ArgumentError(f"machine: wanted what Machine.to_json gives: {error}") from error


def _line(timings: Sequence[Timing]) -> tuple[float, float]:
    """Least squares of seconds = a + b weights, relative errors, a >= 0 and b > 0."""
    # Divided by the seconds: every product counts alike, whatever its size.
    x = [timing.outputs * timing.columns for timing in timings]
    w = [1 / timing.seconds**2 for timing in timings]
    y = [timing.seconds for timing in timings]
    total = sum(w)
    mean_x, mean_y = (sum(a * b for a, b in zip(w, v, strict=True)) / total for v in (x, y))
    spread = sum(c * (a - mean_x) ** 2 for a, c in zip(x, w, strict=True))
    if spread > 0:
        slope = sum(c * (a - mean_x) * (b - mean_y) for a, b, c in zip(x, y, w, strict=True)) / spread
        if slope > 0 and mean_y - slope * mean_x >= 0:
            return mean_y - slope * mean_x, slope
    return 0.0, sum(c * a * b for a, b, c in zip(x, y, w, strict=True)) / sum(c * a * a for a, c in zip(x, w, strict=True))


def _rising(values: Iterable[float]) -> list[float]:
    """The nearest sequence that never falls (isotonic regression by pooling neighbours that do)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (left, m), (right, n) = pools[-2:]
            pools[-2:] = [((left * m + right * n) / (m + n), m + n)]
    return [value for value, count in pools for _ in range(count)]
