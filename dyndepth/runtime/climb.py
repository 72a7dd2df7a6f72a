"""Layers, the judgements between them, and rows that leave for good, in one call of C++.

Going to Python costs: a step streams a model's weights through the caches, so that after twenty layers the interpreter has
to be fetched anew, a tenth of a millisecond at every boundary. A climb ends where Python has to decide something, and, under
policies that only Python knows, where a row leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.exits import Band, JumpMap
from dyndepth.exits.criteria import View
from dyndepth.op import cpp_allowed
from dyndepth.ops import ExitStats
from dyndepth.runtime import judge
from dyndepth.runtime.judge import KNOWN, Judge
from dyndepth.runtime.layer import Context
from dyndepth.runtime.pass_plan import Plan
from dyndepth.runtime.rows import Rows
from dyndepth.runtime.stack import Stack

#: K,V policies under which C++ does all that is to do where rows leave, and the ops that it then stands for.
_GOES_ON = ("predict", "propagate")
REPLACED = ("compact_rows", "backfill_kv")
#: Boundaries that one call judges at most: what is known of a row before the pass is bits of a number.
_BITS = 62

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
    #: Bands that rows left by, lowest first, with how many did and, in order, their head-ready rows or, where they come back,
    #: their places in the caller's order. Those rows lie where `Rows` has them: behind the live ones, the latest first; but
    #: those whose boundary lies below `boundary` have come back, as have those at it, unless that is the end of the call.
    left: list[tuple[Band, int, Tensor]]
    #: States and head-ready rows, as a Judge gives them, where rows want to leave at `boundary` and were not moved.
    decided: tuple[Tensor, Tensor] | None = None
    #: Head-ready rows of everybody in the caller's order, where the climb took all rows from the first layer to the last, or
    #: as high as anybody goes.
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

    def run(self, plan: Plan, rows: Rows, carried: int, context: Context) -> Climbed:
        """Rows `[0, live)` go up, rows `[live, carried)` get their K,V.

        Those that leave get theirs and are moved behind the others, which go on, if C++ knows how under the K,V policy.
        """
        stack, begin, end, kv_policy = self.stack, self.begin, self.end, plan.kv_policy
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
        known = _known(plan, self.stops, rows)
        for number, stop in enumerate(self.stops):
            band, kv, jump = stop.band, stop.band.kv, stop.band.jump
            filled = goes_on and kv_policy == "predict"
            maps = (kv.weight, kv.bias, stop.tables, kv.down) if filled and kv is not None else ()
            linear = (jump.weight, jump.bias) if isinstance(jump, JumpMap) else ()
            own_tensors, own_facts, own_numbers = stop.judge.parts(maps, linear)
            tensors += own_tensors
            resume = 0 if band.resume == plan.model.depth else band.resume - begin
            facts += (stop.boundary - begin, resume, number, *own_facts)
            numbers += (*own_numbers, 0.5 if stop.judge.kind == KNOWN else float(band.threshold))
        ran, waiting, live, state, ready, counts, who, moved, home = torch.ops.dyndepth_cpp.climb_layers(
            *shared, tensors, facts, numbers, rows.may_leave, rows.index,
            [rows.step] if known is None else [rows.step, known], known is not None, goes_on, kv_policy == "propagate",
            *(final or (None, 0, 0.0)),
        )  # fmt: skip
        if waiting:
            return Climbed(begin + ran, [], (state, ready))
        left, at, came = [], 0, 0
        later = False
        for stop, count in zip(self.stops, counts.tolist(), strict=True):
            if count and stop.band.resume == plan.model.depth:
                left.append((stop.band, count, ready[at : at + count]))
                at += count
            elif count:
                left.append((stop.band, count, who[came : came + count]))
                came += count
                later = later or stop.band.resume > begin + ran
        if moved:
            rows.moved_to(live, *moved[:6])
        elif left:  # everybody lies where they lay: those that left were the last
            rows.set_live(live)
        return Climbed(begin + ran, left, home=None if final is None or later else home)


def _known(plan: Plan, stops: Sequence[Stop], rows: Rows) -> Tensor | None:
    """int64 [n]: bit i of a row that leaves at stop i, by criteria that are known before the pass; None where there is none."""
    live, found = rows.live, None
    for number, stop in enumerate(stops):
        if stop.judge.kind != KNOWN:
            continue
        view = View(
            hidden=rows.hidden[:live], seq=rows.seq[:live], step=rows.step[:live], previous=None, stats=_unread,
            depth=plan.depth, leave=stop.boundary, layers=plan.model.depth,
        )  # fmt: skip
        leaves = stop.band.criterion.leaves(view, stop.band.thresholds(view.step))
        bits = plan.named(stop.band, view.seq, leaves) * (1 << number)
        found = bits if found is None else found | bits
    if found is None or live == len(rows):
        return found
    return torch.cat([found, found.new_zeros(len(rows) - live)])


def _unread() -> ExitStats:
    raise AssertionError("a criterion that is known before the pass asked for the exit head")


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
        found = plan.judge_in_climb(band) if len(stops) < _BITS else None
        if found is None:
            end = stop
            break
        stops.append(Stop(stop, found, band, plan.propagation.variants(band.leave, band.resume)))
    weights = [tensor for layer in stack.weights[begin:end] for tensor in layer]
    final = plan.model.final_rms
    if end < plan.model.depth or (final is not None and final[0].dtype != plan.model.dtype):
        final = None
    return Climb(begin, end, stops, stack, weights, final)
