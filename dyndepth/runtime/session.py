"""A session: sequences with their pages, and passes over their rows. Generation, scoring and fitting all stand on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.exits import Exits, PromptRouter
from dyndepth.exits.heads import StoredBlock
from dyndepth.runtime.bind import Model
from dyndepth.runtime.block import Block, bind_block, restored
from dyndepth.runtime.fingerprint import check_exits
from dyndepth.runtime.forward import forward
from dyndepth.runtime.graph import GraphResult, forward_graph
from dyndepth.runtime.graph_pool import GraphPool, pool_of
from dyndepth.runtime.layer import Context
from dyndepth.runtime.pages import Indices, Pages
from dyndepth.runtime.parked import Parked
from dyndepth.runtime.pass_plan import Plan
from dyndepth.runtime.policies import check_policy
from dyndepth.runtime.propagate import Propagation
from dyndepth.runtime.result import Result
from dyndepth.runtime.rows import Rows

DEFAULT_PAGE_SIZE = 16
#: Rows per pass of a prefill: enough to be compute-bound, few enough that a long prompt's activations stay small.
DEFAULT_CHUNK = 512
#: Tokens of a sequence that may be parked under `recompute` before its next one runs to the top with all of them.
DEFAULT_PENDING = 16


@dataclass
class Work:
    """Rows x layers really run. `layers[i]` rows ran layer i, out of `rows` that could have."""

    layers: list[int]
    rows: int = 0
    #: Rows that ran an exit block, by boundary; not part of `layers`.
    blocks: dict[int, int] = field(default_factory=dict)

    @property
    def run(self) -> int:
        return sum(self.layers)

    @property
    def possible(self) -> int:
        return self.rows * len(self.layers)

    @property
    def fraction(self) -> float:
        """Share of rows x layers that was run; NaN before anything ran."""
        return self.run / self.possible if self.possible else math.nan

    def __add__(self, other: Work) -> Work:
        """Work of two calls of one model."""
        blocks = dict(self.blocks)
        for boundary, count in other.blocks.items():
            blocks[boundary] = blocks.get(boundary, 0) + count
        return Work([a + b for a, b in zip(self.layers, other.layers, strict=True)], self.rows + other.rows, blocks)

    def add(self, result: Result, rows: int, full: int = 0) -> None:
        """Count a pass of `rows` rows, leaving out `full` of them that ran every layer (prompt rows of a scoring pass)."""
        self.layers = [a + b - full for a, b in zip(self.layers, result.work, strict=True)]
        self.rows += rows - full
        for boundary, count in result.block_work.items():
            self.blocks[boundary] = self.blocks.get(boundary, 0) + count


class Session:
    """Pages, rotary tables and the plan for a fixed set of sequences.

    Args:
        model: a bound model.
        capacity: positions that each sequence can grow to; one entry per sequence.
        exits: bands to use, None for full depth.
        kv: K,V policy (dyndepth.runtime.policies.KV_POLICIES); None takes `predict` where every open band has maps, else
            `propagate`.
        depth: per sequence, the exit point its tokens leave at (number of layers for the top, None for "let criteria
            decide"); None for all.
        page_size, pages: geometry of the K,V pages; with `pages` there are that many and no more, by default there can be as
            many as all sequences need at capacity.
        chunk: rows per pass of a prefill.
        first: positions per sequence that memory is taken for now (default: the capacity); more is taken when needed.
        pending: under `recompute`, tokens of a sequence that may be parked before its next one runs to the top.
        observed: let rows carry what exits make of them (dyndepth.runtime.observe).
        graphs: replay captured graphs for passes that start at the bottom, on CUDA devices (dyndepth.runtime.graph_pool).
            True raises where that cannot be, "auto" goes without.
    """

    def __init__(
        self,
        model: Model,
        capacity: Sequence[int],
        exits: Exits | None = None,
        *,
        kv: str | None = None,
        depth: Sequence[int | None] | None = None,
        page_size: int = DEFAULT_PAGE_SIZE,
        pages: int | None = None,
        chunk: int = DEFAULT_CHUNK,
        first: Sequence[int] | None = None,
        pending: int = DEFAULT_PENDING,
        observed: bool = False,
        graphs: bool | str = False,
    ) -> None:
        for name, value in (("chunk", chunk), ("pending", pending)):
            if value < 1:
                raise ArgumentError(f"{name} must be at least 1, got {value}")
        self.model = model
        self.chunk = chunk
        self.pending = pending
        exits = None if exits is None else self._fitting(exits)
        self.kv_policy = default_policy(exits) if kv is None else kv
        check_policy(exits, self.kv_policy)
        blocks = self._blocks(exits)
        first = capacity if first is None else first
        most, now = (
            sum(-(-positions // page_size) for positions in each) if page_size > 0 else 0 for each in (capacity, first)
        )
        self.pages = Pages(
            layers=model.depth + len(blocks),
            pages=now if pages is None else pages,
            limit=most if pages is None else pages,
            page_size=page_size,
            kv_heads=model.layers[0].kv_heads,
            head_dim=model.layers[0].head_dim,
            sequences=len(capacity),
            dtype=model.dtype,
            device=model.device,
        )
        model.check_rotary_reach(max([*capacity, 1]))
        # Positions there are tables for; learned positions end where the model ends, and raise when a row gets there.
        self.reach = min(max([*first, 1]), model.positions_limit or max([*first, 1]))
        self.cos, self.sin = model.rotary_tables(self.reach)
        asked = _depths(depth, exits, model.depth, len(capacity))
        self.plan = Plan(
            model=model,
            exits=exits,
            kv_policy=self.kv_policy,
            blocks=blocks,
            propagation=Propagation(model),
            depth=None if asked is None else asked.to(model.device),
            observed=observed,
        )
        for band in exits or ():
            if isinstance(band.criterion, PromptRouter):
                self.plan.votes[band.leave] = torch.zeros(len(capacity), 2, dtype=torch.float64, device=model.device)
        self._graphs, self._sequences = graphs, len(capacity)
        self._follow()

    def name_depths(self, depth: Tensor) -> None:
        """From now on passes look at `depth` (int32 [sequences], -1 for none), which the caller may change between passes."""
        self.plan = dataclasses.replace(self.plan, depth=depth, shut={})
        self._follow()

    def _follow(self) -> None:
        """Make what depends on the plan."""
        self._closed = dataclasses.replace(self.plan, open=False)
        #: Graphs of passes, None where passes run in slices.
        self.graphs: GraphPool | None = pool_of(self._graphs, self.plan, self._sequences)

    def work(self) -> Work:
        """A fresh counter for this model."""
        return Work([0] * self.model.depth)

    def run(
        self,
        seq: Sequence[int] | Tensor,
        pos: Sequence[int] | Tensor,
        *,
        tokens: Tensor | None = None,
        embeds: Tensor | None = None,
        step: Sequence[int] | Tensor | None = None,
        may_leave: Tensor | bool = True,
        parked: Parked | None = None,
        hold: frozenset[int] = frozenset(),
        keep: int | None = None,
        vote: bool = False,
    ) -> Result:
        """One pass. Rows of a sequence must be consecutive and ascending, and earlier positions must have been run.

        Args:
            seq, pos: per row, its sequence and position; positions must fit the capacity.
            tokens: int64 [n] ids, or `embeds` [n, d] token embeddings.
            step: per row, tokens generated before it (0 by default).
            may_leave: bool [n] or one bool for all rows; rows taken up may be left out, they may leave.
            parked: rows of earlier passes to take up (`left` makes them); they come after the others in the result.
            hold: boundaries where rows that do not leave stop, to be taken up later.
            keep: boundary whose residuals the result has (`kept`), the lowest where a row may leave.
            vote: these are rows of prompts, which bands that prompts decide (PromptRouter) ask.
        """
        closed = isinstance(may_leave, bool) and not may_leave
        fresh = tokens is not None and not hold and keep is None and not vote and (parked is None or not len(parked))
        if self.graphs is not None and tokens is not None and fresh and not closed and 0 < len(tokens) <= self.graphs.most:
            return self._replayed(self.graphs, _host(seq), _host(pos), tokens, step, may_leave)
        rows, context = self.rows(seq, pos, tokens=tokens, embeds=embeds, step=step, may_leave=may_leave, parked=parked)
        plan = self._closed if closed else self.plan
        return forward(dataclasses.replace(plan, voting=True) if vote else plan, rows, context, hold, keep)

    def run_graph(
        self,
        seq: Sequence[int] | Tensor,
        pos: Sequence[int] | Tensor,
        *,
        tokens: Tensor,
        step: Sequence[int] | Tensor | None = None,
        may_leave: Tensor | bool = True,
        count: Tensor | None = None,
    ) -> GraphResult:
        """`run` in graph style (dyndepth/runtime/graph.py): fixed shapes, results on the device. Arguments as for `run`."""
        rows, context = self.rows(seq, pos, tokens=tokens, step=step, may_leave=may_leave)
        return forward_graph(self.plan, rows, context, count)

    def _replayed(
        self,
        graphs: GraphPool,
        seq: Indices,
        pos: Indices,
        tokens: Tensor,
        step: Sequence[int] | Tensor | None,
        may_leave: Tensor | bool,
    ) -> Result:
        """`run` by a captured graph. The one look at the device comes after the pass: rows that ran each layer."""
        self.pages.reserve_rows(seq, pos)
        self._reach(int(pos.max()) + 1)
        steps = np.zeros_like(seq) if step is None else _host(step)
        may = np.full_like(seq, may_leave) if isinstance(may_leave, bool) else _host(may_leave)
        found = graphs.run(tokens, seq, pos, steps, may, self.pages, self.reach, self.cos, self.sin)
        counts = torch.cat([found.work, found.block_work]).tolist()
        blocks = dict(zip(self.plan.blocks, counts[self.model.depth :], strict=True))
        return Result(found.ready, found.exit_layer, found.layers_run, found.bands_taken, counts[: self.model.depth], blocks)

    def _reach(self, reach: int) -> None:
        """Rotary tables for so many positions."""
        if reach > self.reach:
            grown = self.reach + self.reach // 2
            self.reach = max(reach, min(grown, self.model.positions_limit or grown))
            self.cos, self.sin = self.model.rotary_tables(self.reach)

    def left(
        self,
        result: Result,
        seq: Sequence[int] | Indices | Tensor,
        pos: Sequence[int] | Indices | Tensor,
        step: Sequence[int] | Indices | Tensor,
        parked: Parked | None = None,
    ) -> Parked:
        """What a pass over these rows left between layers: rows held and, under `recompute`, rows that left early.

        `seq`, `pos`, `step` of its fresh rows, and the rows it had taken up.
        """
        assert result.hidden is not None, "nothing can be left in a pass that holds nothing and recomputes nothing"
        at = result.exit_layer.cpu().numpy().astype(np.int64)
        held = np.zeros(len(at), dtype=np.bool_) if result.held is None else result.held.numpy()
        kept = at < self.model.depth if self.kv_policy == "recompute" else held
        if not kept.any():
            return Parked.nothing(result.hidden)
        which = np.flatnonzero(kept)
        index = torch.from_numpy(which).to(result.hidden.device)
        facts = [
            np.concatenate([_host(fresh), np.empty(0, np.int64) if parked is None else getattr(parked, name)])[which]
            for name, fresh in (("seq", seq), ("pos", pos), ("step", step))
        ]
        carried = {name: value[index] for name, value in result.carried.items()}
        return Parked.of(result.hidden[index], *facts, at[which], held[which], carried=carried)

    def rows(
        self,
        seq: Sequence[int] | Tensor,
        pos: Sequence[int] | Tensor,
        *,
        tokens: Tensor | None = None,
        embeds: Tensor | None = None,
        step: Sequence[int] | Tensor | None = None,
        may_leave: Tensor | bool = True,
        parked: Parked | None = None,
    ) -> tuple[Rows, Context]:
        """Embedded rows with their pages reserved: what a pass starts from. Arguments as for `run`."""
        own, at = _host(seq), _host(pos)
        device = self.model.device
        fresh_count = own.shape[0]
        if parked is not None and len(parked):
            own, at = np.concatenate([own, parked.seq]), np.concatenate([at, parked.pos])
            steps = _host([0] * fresh_count if step is None else step)
            step = torch.from_numpy(np.concatenate([steps, parked.step]))
        count = own.shape[0]
        placed, reach = self.pages.place(own, at)
        self._reach(reach)
        sequences, positions, slots = placed.unbind()
        fresh = positions[:fresh_count]
        if embeds is None:
            assert tokens is not None
            hidden = self.model.embed(tokens.to(device), fresh)
        else:
            hidden = self.model.embed_positions(embeds.to(device), fresh)
        if parked is not None and len(parked):
            hidden = torch.cat([hidden, parked.hidden])
        rows = Rows(
            hidden=hidden.contiguous(),
            seq=sequences,
            pos=positions,
            slots=slots,
            step=torch.zeros_like(positions) if step is None else _whole(step, device),
            may_leave=torch.full((count,), may_leave, device=device)
            if isinstance(may_leave, bool)
            else torch.cat([may_leave.to(device), may_leave.new_ones(count - may_leave.shape[0], device=device)]),
            joins=() if parked is None else parked.groups(),
        )
        if parked is not None:
            for name, value in parked.carried.items():
                rows.carry(name, torch.cat([Rows.nothing(value, fresh_count), value]))
        return rows, Context(self.pages.kv, self.pages.block_table(reach), self.cos, self.sin)

    def prefill(
        self, prompts: Sequence[Tensor], work: Work, *, embeds: bool = False, may_leave: bool = False, first: int = 0
    ) -> None:
        """Run prompt rows (token ids [t], or embeddings [t, d] if `embeds`) of sequences `first`, `first` + 1, ... in chunks.

        At full depth unless `may_leave`; nothing is returned, the K,V are in the pages. Bands that prompts decide are decided
        by these rows.
        """
        for result, _ in self._prompt_passes(prompts, embeds, may_leave, first):
            work.add(result, result.ready.shape[0])

    def open(self, prompts: Sequence[Tensor], prompt_work: Work, work: Work, *, embeds: bool = False) -> Tensor:
        """Run whole prompts at full depth, their last rows among them; returns those, head-ready, [sequences, ready].

        For sessions in which no row may leave: one pass less than `prefill` of all but the last rows and a pass of these, and
        the same bits. Last rows count as `work`, the others as `prompt_work`.
        """
        ready = []
        for result, last in self._prompt_passes(prompts, embeds, False, 0):
            count, made = result.ready.shape[0], int(last.sum())
            prompt_work.add(result, count, full=made)
            work.add(result, count, full=count - made)
            ready.append(result.ready[last.to(result.ready.device)])
        return torch.cat(ready)

    def _prompt_passes(
        self, prompts: Sequence[Tensor], embeds: bool, may_leave: bool, first: int
    ) -> Iterator[tuple[Result, Tensor]]:
        """Results of chunks of prompt rows, and bool [rows]: which of them are their prompts' last."""
        lengths = torch.tensor([prompt.shape[0] for prompt in prompts])
        if not len(prompts) or not bool(lengths.any()):
            return
        seq = torch.repeat_interleave(torch.arange(first, first + len(prompts)), lengths)
        pos = torch.cat([torch.arange(length) for length in lengths.tolist()])
        last = pos == lengths[seq - first] - 1
        content = torch.cat(list(prompts))
        for begin in range(0, seq.shape[0], self.chunk):
            part = slice(begin, begin + self.chunk)
            source: dict[str, Any] = {"embeds": content[part]} if embeds else {"tokens": content[part]}
            yield self.run(seq[part], pos[part], may_leave=may_leave, vote=bool(self.plan.votes), **source), last[part]

    def _fitting(self, exits: Exits) -> Exits:
        """The exits in the model's dtype and device, block heads built from its modules."""
        if not isinstance(exits, Exits):
            raise ArgumentError(
                f"exits must be dyndepth.Exits (dyndepth.Exits.from_pretrained reads a folder), got {type(exits).__name__}"
            )
        check_exits(exits, self.model)
        prepared = exits.prepared(self.model.device, self.model.dtype)
        for band in prepared:
            if isinstance(band.head, StoredBlock):
                band.head = restored(band.head, self.model, band.leave)
        return prepared

    def _blocks(self, exits: Exits | None) -> dict[int, Block]:
        bands = [band for band in exits or () if band.has_block]
        return {band.leave: bind_block(band, self.model, self.model.depth + at) for at, band in enumerate(bands)}


def default_policy(exits: Exits | None) -> str:
    """`predict` if every band that can open has K,V maps, else `propagate`."""
    open_bands = [band for band in exits or () if band.criterion.kind != "never"]
    return "predict" if all(band.kv is not None for band in open_bands) else "propagate"


def _host(values: Sequence[int] | Indices | Tensor) -> Indices:
    return np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=np.int64)


def _whole(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """int32 on the device, contiguous."""
    return torch.as_tensor(values).to(device=device, dtype=torch.int32).contiguous()


def _depths(depth: Sequence[int | None] | None, exits: Exits | None, layers: int, sequences: int) -> Tensor | None:
    if depth is None:
        return None
    values = list(depth)
    if len(values) != sequences:
        raise ArgumentError(f"depth must have one entry per sequence ({sequences}), got {len(values)}")
    points = [band.leave for band in exits or () if band.resume == layers]
    for value in values:
        if value is not None and value != layers and value not in points:
            raise ExitsError(f"depth must name an exit point {points} or the top ({layers}), got {value}")
    return torch.tensor([-1 if value is None else value for value in values], dtype=torch.int32)
