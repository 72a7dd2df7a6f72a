"""Layers, the judgements between them, and rows that leave for good, in one call of C++.

Going to Python costs: a step streams a model's weights through the caches, so that after twenty layers the interpreter has
to be fetched anew, a tenth of a millisecond at every boundary. A climb ends where Python has to decide something, and, under
policies that only Python knows, where a row leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.exits import Band
from dyndepth.op import cpp_allowed
from dyndepth.runtime import judge
from dyndepth.runtime.judge import Judge
from dyndepth.runtime.layer import Context
from dyndepth.runtime.pass_plan import Plan
from dyndepth.runtime.rows import Rows
from dyndepth.runtime.stack import Stack

#: K,V policies under which C++ does all that is to do where rows leave, and the ops that it then stands for.
_GOES_ON = ("predict", "propagate")
REPLACED = ("compact_rows", "backfill_kv")

#: Who wants spans apart now, in any thread: timers time the process.
_wishes: list[object] = []


@contextmanager
def apart() -> Iterator[None]:
    """Within, spans of layers and judgements are calls of their own, so that each can be timed. The results are the same."""
    wish = object()
    _wishes.append(wish)
    try:
        yield
    finally:
        _wishes.remove(wish)


@dataclass(frozen=True)
class Climbed:
    """What a climb did."""

    #: The boundary where the rows are that did not leave.
    boundary: int
    #: Bands that rows left by, lowest first, with how many did and their head-ready rows in order. Those rows lie where
    #: `Rows` has them: behind the live ones, the latest first.
    left: list[tuple[Band, int, Tensor]]
    #: States and head-ready rows, as a Judge gives them, where rows want to leave at `boundary` and were not moved.
    decided: tuple[Tensor, Tensor] | None = None
    #: Head-ready rows of everybody in the caller's order, where the climb took all rows from the first layer to the last.
    home: Tensor | None = None


@dataclass(frozen=True)
class Stop:
    """A boundary that is judged inside a climb."""

    boundary: int
    judge: Judge
    #: Its threshold, head and maps may change between passes, and are read in each.
    band: Band
    #: Rotary tables of the layers above it; None where a model has one.
    tables: Tensor | None


@dataclass(frozen=True)
class Climb:
    """What one call takes: layers [begin, end) and the boundaries between them that are judged."""

    begin: int
    end: int
    #: Ascending, all below `end`.
    stops: list[Stop]
    stack: Stack
    weights: list[Tensor]
    #: Gain, style and eps of the final norm, where the climb can end above the last layer and C++ knows the norm.
    final: tuple[Tensor, int, float] | None

    def run(self, rows: Rows, carried: int, context: Context, kv_policy: str) -> Climbed:
        """Rows `[0, live)` go up, rows `[live, carried)` get their K,V.

        Those that leave get theirs and are moved behind the others, which go on, if C++ knows how under `kv_policy`.
        """
        stack, begin, end = self.stack, self.begin, self.end
        hidden = rows.hidden if carried == len(rows) else rows.hidden[:carried]
        shared = (
            hidden, context.pages, context.block_table, rows.seq, rows.pos, rows.slots, context.cos, context.sin, self.weights,
            stack.shape, stack.windows[begin:end], stack.variants[begin:end], stack.numbers, stack.first + begin, rows.live,
        )  # fmt: skip
        final = self.final if begin == 0 and rows.live == len(rows) and not rows.moved else None
        if not self.stops and final is None:
            torch.ops.dyndepth_cpp.decoder_layers(*shared)
            return Climbed(end, [])
        tensors: list[Tensor] = []
        facts: list[int] = []
        numbers: list[float] = []
        goes_on = kv_policy in _GOES_ON and not rows.carried and cpp_allowed(*REPLACED)  # what rows carry, Python moves
        for stop in self.stops:
            band, kv = stop.band, stop.band.kv
            filled = goes_on and kv_policy == "predict"
            maps = (kv.weight, kv.bias, stop.tables, kv.down) if filled and kv is not None else ()
            own_tensors, own_facts, own_numbers = stop.judge.parts(maps)
            tensors += own_tensors
            facts += (stop.boundary - begin, *own_facts)
            numbers += (*own_numbers, float(band.threshold))
        ran, waiting, state, ready, counts, moved, home = torch.ops.dyndepth_cpp.climb_layers(
            *shared, tensors, facts, numbers, rows.may_leave, rows.index, [rows.step], goes_on,
            kv_policy == "propagate", *(final or (None, 0, 0.0)),
        )  # fmt: skip
        if waiting:
            return Climbed(begin + ran, [], (state, ready))
        left, at = [], 0
        for stop, count in zip(self.stops, counts.tolist(), strict=True):
            if count:
                left.append((stop.band, count, ready[at : at + count]))
                at += count
        if left:
            rows.moved_to(rows.live - at, *moved)
        return Climbed(begin + ran, left, home=None if final is None else home)


def allowed(plan: Plan) -> bool:
    """Passes of this plan may climb: nobody wants to see rows between layers, and no other providers were forced."""
    stack = plan.model.stack
    return (
        not isinstance(stack, str)
        and not (plan.voting or plan.observed or plan.previous_wanted)
        and not _wishes
        and stack.usable()
        and judge.usable()
    )


def climb_of(plan: Plan, begin: int, limit: int) -> Climb:
    """From boundary `begin` as high as C++ can take the rows alone, at most to `limit`. Made once per plan."""
    shut = tuple(plan.closed(band) for band in plan.bands.values())
    key = begin, limit, plan.open, plan.depth is None, shut  # plans that differ in these share what they made
    if key not in plan.climbs:
        plan.climbs[key] = _made(plan, begin, limit)
    return plan.climbs[key]


def _made(plan: Plan, begin: int, limit: int) -> Climb:
    stack = plan.model.stack
    assert isinstance(stack, Stack)
    stops: list[Stop] = []
    end = limit
    for stop in plan.stops:
        band = plan.bands.get(stop)
        if not begin < stop < limit or (band is None and stop not in plan.blocks):
            continue
        if stop in plan.blocks:
            end = stop
            break
        assert band is not None
        if not plan.open or plan.closed(band):
            continue
        found = None if plan.depth is not None or band.decay is not None else plan.judge(band)
        if found is None:
            end = stop
            break
        stops.append(Stop(stop, found, band, plan.propagation.variants(band.leave, band.resume)))
    weights = [tensor for layer in stack.weights[begin:end] for tensor in layer]
    final = plan.model.final_rms
    if end < plan.model.depth or (final is not None and final[0].dtype != plan.model.dtype):
        final = None
    return Climb(begin, end, stops, stack, weights, final)
