"""Layers and the judgements between them in one call of C++, up to the first boundary where a row leaves.

Where nobody leaves there is nothing to do in Python, and going there costs: a step streams a model's weights through the
caches, so that after twenty layers the interpreter has to be fetched anew, a tenth of a millisecond at every boundary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.exits import Band
from dyndepth.runtime import judge
from dyndepth.runtime.judge import Judge
from dyndepth.runtime.layer import Context
from dyndepth.runtime.pass_plan import Plan
from dyndepth.runtime.rows import Rows
from dyndepth.runtime.stack import Stack

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
class Climb:
    """What one call takes: layers [begin, end) and the judges of boundaries between them."""

    begin: int
    end: int
    #: Boundaries that are judged, ascending; all below `end`.
    stops: list[int]
    stack: Stack
    weights: list[Tensor]
    #: Per stop its judge and band: thresholds and heads may change between passes, and are read in each.
    judges: list[tuple[Judge, Band]]

    def run(self, rows: Rows, carried: int, context: Context) -> tuple[int, tuple[Tensor, Tensor] | None]:
        """Rows `[0, live)` go up, rows `[live, carried)` get their K,V.

        Returns the boundary where they are then, and, where rows leave there, states and head-ready rows as a Judge does.
        """
        stack, begin, end = self.stack, self.begin, self.end
        hidden = rows.hidden if carried == len(rows) else rows.hidden[:carried]
        shared = (
            hidden, context.pages, context.block_table, rows.seq, rows.pos, rows.slots, context.cos, context.sin, self.weights,
            stack.shape, stack.windows[begin:end], stack.variants[begin:end], stack.numbers, stack.first + begin, rows.live,
        )  # fmt: skip
        if not self.stops:
            torch.ops.dyndepth_cpp.decoder_layers(*shared)
            return end, None
        tensors: list[Tensor] = []
        facts: list[int] = []
        numbers: list[float] = []
        for stop, (judging, band) in zip(self.stops, self.judges, strict=True):
            own_tensors, own_facts, own_numbers = judging.parts()
            tensors += own_tensors
            facts += (stop - begin, *own_facts)
            numbers += (*own_numbers, float(band.threshold))
        number, state, ready = torch.ops.dyndepth_cpp.climb_layers(*shared, tensors, facts, numbers, rows.may_leave)
        return (end, None) if number < 0 else (self.stops[number], (state, ready))


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
    stops: list[int] = []
    judges: list[tuple[Judge, Band]] = []
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
        stops.append(stop)
        judges.append((found, band))
    weights = [tensor for layer in stack.weights[begin:end] for tensor in layer]
    return Climb(begin, end, stops, stack, weights, judges)
