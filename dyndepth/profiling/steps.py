"""Decode steps out of spans: where each began, and its time by part. Parts add up to the whole exactly."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from dyndepth.profiling.timers import LOOP, PASS, TARGETS, Span

#: Parts in the order of a report; the last two hold what nothing else does.
REST = "Python and the rest of a pass"
SAMPLING = "sampling and loop"
PARTS = (*dict.fromkeys(target.part for target in TARGETS if target.part not in (LOOP, PASS)), SAMPLING, REST)


@dataclass(frozen=True)
class Step:
    """One token of every running row: from the begin of its pass to the begin of the next, or to the end of the loop."""

    begin: int
    #: ns.
    whole: int
    #: ns by part, all of PARTS; their sum is `whole`.
    parts: dict[str, int]
    #: Involuntary context switches of the process since the step before; 0 for the last step of a loop.
    switches: int
    #: (begin, end, live rows, ns) of every span of layers, in order.
    layers: tuple[tuple[int, int, int, int], ...]

    @property
    def rows_by_layer(self) -> dict[int, int]:
        return {layer: live for begin, end, live, _ in self.layers for layer in range(begin, end)}


def steps_of(spans: Sequence[Span]) -> list[Step]:
    """Steps of every loop among the spans. What lies outside of loops (prompts, set-up) is left out."""
    ordered = sorted(spans, key=lambda span: (span.begin, -span.end))
    passes = [span for span in ordered if span.part == PASS]
    begins = [span.begin for span in passes]
    loops = [span for span in ordered if span.part == LOOP]
    ends: list[int] = []
    for at, one in enumerate(passes):
        loop = next(loop for loop in loops if loop.begin <= one.begin and one.end <= loop.end)
        follows = at + 1 < len(passes) and passes[at + 1].begin < loop.end
        ends.append(passes[at + 1].begin if follows else loop.end)
    within: list[list[Span]] = [[] for _ in passes]
    for span in ordered:
        at = bisect.bisect_right(begins, span.begin) - 1
        if span.part not in (LOOP, PASS) and at >= 0 and span.end <= ends[at]:
            within[at].append(span)
    steps = []
    for at, (one, end) in enumerate(zip(passes, ends, strict=True)):
        parts = dict.fromkeys(PARTS, 0)
        for span in within[at]:
            parts[span.part] += span.own
        # The LM head runs behind the pass.
        parts[SAMPLING] = end - one.end - sum(span.own for span in within[at] if span.begin >= one.end)
        parts[REST] = one.own
        follows = at + 1 < len(passes) and end == passes[at + 1].begin
        switches = passes[at + 1].switches - one.switches if follows else 0
        steps.append(Step(one.begin, end - one.begin, parts, switches, _layers(within[at])))
    return steps


def _layers(spans: Sequence[Span]) -> tuple[tuple[int, int, int, int], ...]:
    found = []
    for span in spans:
        where = span.layers
        if where is not None:
            found.append((*where, span.end - span.begin))
    return tuple(found)


def quiet(steps: Sequence[Step]) -> tuple[list[Step], int]:
    """Steps without an involuntary context switch, and how many were dropped; all of them where fewer than half are left."""
    kept = [step for step in steps if step.switches == 0]
    return (kept, len(steps) - len(kept)) if 2 * len(kept) >= len(steps) else (list(steps), 0)
