"""Captured passes: one graph per bucket of row counts, replayed for every decode pass that fits.

A graph records kernels with the addresses they read and write. So a bucket owns buffers for its inputs, a pass copies what it
is about into them (one transfer of pinned memory, tokens from wherever they are), pads with rows of slot -1 past the count on
the device, replays, and copies the real rows of the results out. What a graph reads besides, the pages and the rotary tables,
must stay where it is: when they grow, graphs are captured anew. Who captures is a parameter, so that tests run the same code
where there is no GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.runtime.graph import GraphResult, When, forward_graph, why_not
from dyndepth.runtime.layer import Context
from dyndepth.runtime.norms import has_hooks
from dyndepth.runtime.pages import Indices, Pages, to_device
from dyndepth.runtime.pass_plan import Plan
from dyndepth.runtime.rows import Rows

#: Passes of more rows run in slices: there launches cost little beside what they start.
MOST_ROWS = 256
#: Modules that are known to do nothing on the host when called.
_KNOWN = ("torch.nn.", "transformers.models.", "transformers.activations", "transformers.pytorch_utils", "dyndepth.")
#: Numbers that a row brings: sequence, position, slot, step, whether it may leave; what a padding row has instead.
_FACTS, _PADDING = 5, (0, 0, -1, 0, 0)


class Capture(Protocol):
    """Records what `run` does, once. Returns its result, whose tensors every replay writes, and the replay.

    `run` is given the capture's way to record conditions, None where it has none. Recording does not have to run it: a replay
    always follows.
    """

    def __call__(self, run: Callable[[When | None], GraphResult]) -> tuple[GraphResult, Callable[[], None]]: ...


def row_bucket(rows: int, most: int) -> int:
    """Rows of the smallest bucket that holds so many: powers of two, and `most` itself at the end."""
    return min(most, 1 << max(0, rows - 1).bit_length())


@dataclass
class _Bucket:
    """Input buffers of one size and the graph that reads them."""

    rows: int
    tokens: Tensor  # int64 [rows]
    numbers: Tensor  # int32 [facts x rows + 1]: by fact, then how many rows are real
    result: GraphResult | None = None
    replay: Callable[[], None] | None = None


@dataclass
class GraphPool:
    """Graphs of one session's passes.

    Args:
        plan: what passes do; it must have a graph style (dyndepth.runtime.graph.why_not).
        capture: makes a fresh Capture; asked for another when all graphs are dropped.
        most: rows of the largest bucket.
    """

    plan: Plan
    capture: Callable[[], Capture]
    most: int = MOST_ROWS
    #: Graphs captured so far, those dropped included.
    captured: int = 0
    _buckets: dict[int, _Bucket] = field(default_factory=dict)
    _capture: Capture | None = None
    _context: Context | None = None
    #: The block table that was copied last.
    _table: Tensor | None = None

    @property
    def buckets(self) -> list[int]:
        """Row counts that graphs are there for."""
        return sorted(self._buckets)

    def run(
        self, tokens: Tensor, seq: Indices, pos: Indices, step: Indices, may_leave: Indices, pages: Pages, reach: int,
        cos: Tensor | None, sin: Tensor | None,
    ) -> GraphResult:  # fmt: skip
        """One pass over up to `most` rows whose pages are reserved. Nothing in it waits for the device.

        Args:
            tokens: int64 [n] on any device; the others [n] on the host, one entry per row.
            reach: positions that the rotary tables are for: no row is past it.
        """
        count = tokens.shape[0]
        context = self._ready(pages, reach, cos, sin)
        bucket = self._bucket(row_bucket(count, self.most))
        numbers = np.empty(bucket.numbers.shape[0], dtype=np.int32)
        facts = numbers[:-1].reshape(_FACTS, bucket.rows)
        given: tuple[Indices | NDArray[np.int32], ...] = (seq, pos, pages.slots_of(seq, pos), step, may_leave)
        for place, (values, padding) in enumerate(zip(given, _PADDING, strict=True)):
            facts[place, :count], facts[place, count:] = values, padding
        numbers[-1] = count
        bucket.numbers.copy_(to_device(numbers, bucket.numbers.device))
        if tokens.device.type == "cpu":
            tokens = to_device(tokens.numpy(), bucket.tokens.device)
        bucket.tokens[:count].copy_(tokens)
        if bucket.replay is None or bucket.result is None:
            assert self._capture is not None
            bucket.result, bucket.replay = self._capture(functools.partial(self._pass, bucket, context))
            self.captured += 1
        bucket.replay()
        return _real(bucket.result, count)

    def _ready(self, pages: Pages, reach: int, cos: Tensor | None, sin: Tensor | None) -> Context:
        """Where graphs find pages and tables. Drops all graphs if these have moved."""
        old, table = self._context, pages.block_table()
        if old is None or old.pages is not pages.kv or old.cos is not cos or old.block_table.shape[1] != pages.columns(reach):
            self._buckets.clear()
            self._capture, self._table = self.capture(), None
            room = torch.full((pages.sequences, pages.columns(reach)), -1, dtype=torch.int32, device=pages.kv.device)
            self._context = Context(pages.kv, room, cos, sin)
        assert self._context is not None
        if self._table is not table:
            columns = min(table.shape[1], self._context.block_table.shape[1])
            self._context.block_table[:, :columns] = table[:, :columns]
            self._table = table
        return self._context

    def _bucket(self, rows: int) -> _Bucket:
        if rows not in self._buckets:
            device = self.plan.model.device
            self._buckets[rows] = _Bucket(
                rows,
                torch.zeros(rows, dtype=torch.int64, device=device),
                torch.zeros(_FACTS * rows + 1, dtype=torch.int32, device=device),
            )
        return self._buckets[rows]

    @torch.no_grad()
    def _pass(self, bucket: _Bucket, context: Context, when: When | None) -> GraphResult:
        """What is recorded: from tokens to head-ready rows."""
        seq, pos, slots, step, may_leave = bucket.numbers[:-1].view(_FACTS, bucket.rows).unbind()
        with torch.autocast(bucket.tokens.device.type, enabled=False):
            hidden = self.plan.model.embed(bucket.tokens, pos).contiguous()
        rows = Rows(hidden=hidden, seq=seq, pos=pos, slots=slots, step=step, may_leave=may_leave != 0)
        return forward_graph(self.plan, rows, context, bucket.numbers[-1:], when)


def _real(result: GraphResult, count: int) -> GraphResult:
    """Copies of the rows that are real: the next replay writes over the result."""
    by_row = ("ready", "exit_layer", "layers_run", "bands_taken")
    values = {each.name: getattr(result, each.name) for each in fields(result)}
    return GraphResult(**{name: (value[:count] if name in by_row else value).clone() for name, value in values.items()})


def pool_of(graphs: bool | str, plan: Plan, sequences: int) -> GraphPool | None:
    """The pool that `graphs` asks for: True (or raise with the reason why not), False, or "auto", where it is known to do."""
    if graphs not in (True, False, "auto"):
        raise ArgumentError(f"graphs must be True, False or 'auto', got {graphs!r}")
    if graphs is False:
        return None
    reason = no_pool(plan) or (unknown_module(plan) if graphs == "auto" else None)
    if reason is None:
        from dyndepth.runtime.cuda_graphs import CudaCapture

        device = plan.model.device
        return GraphPool(plan, lambda: CudaCapture(device), min(MOST_ROWS, max(1, sequences)))
    if graphs is True:
        raise ArgumentError(f"graphs=True: {reason}; graphs='auto' goes without")
    return None


def no_pool(plan: Plan) -> str | None:
    """Why passes of a plan cannot be captured, or None."""
    device = plan.model.device
    return why_not(plan) if device.type == "cuda" else f"graphs are captured on CUDA devices, the model is on {device}"


def unknown_module(plan: Plan) -> str | None:
    """The first module of the model that may do something on the host, which a graph would not repeat; or None."""
    for name, module in plan.model.causal_lm.named_modules():
        kind = type(module)
        if name and (has_hooks(module) or not f"{kind.__module__}.".startswith(_KNOWN)):
            return f"module {name} ({kind.__module__}.{kind.__name__}) is not PyTorch's or transformers' own, or carries hooks"
    return None
