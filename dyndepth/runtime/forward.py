"""The pass: rows go up the layers as a live prefix; at boundaries some leave, some resume; one head serves all at the end."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dyndepth.errors import ExitsError
from dyndepth.exits import Band, Exits
from dyndepth.exits.criteria import HOLE_FREE, FixedDepth, Schedule, View
from dyndepth.ops import ExitStats, backfill_kv, exit_stats
from dyndepth.ops.compact_rows import AWAY, RUN
from dyndepth.ops.exit_stats import stats_of_logits
from dyndepth.runtime.bind import Model
from dyndepth.runtime.block import Block
from dyndepth.runtime.judge import Judge, judge_of, usable
from dyndepth.runtime.layer import Context
from dyndepth.runtime.propagate import Propagation
from dyndepth.runtime.rows import Rows

#: How rows that skip layers get K,V there: fitted maps, the skipped layers' own projections of the exit residual (CALM),
#: or nothing (only where no later row reads the holes).
KV_POLICIES = ("predict", "propagate", "none")


@dataclass(frozen=True)
class Plan:
    """Everything a pass needs that does not change between passes."""

    model: Model
    exits: Exits | None
    kv_policy: str
    #: Bound block heads by boundary.
    blocks: dict[int, Block]
    propagation: Propagation
    #: int32 [sequences] on the device, -1 for none: depth asked for per request; None when nobody asked.
    depth: Tensor | None = None
    #: Criteria may decide; False keeps every row to the top (block heads still store their K,V).
    open: bool = True
    #: Rows of the LM head that a band's shortlist names, by boundary; filled on first use.
    shortlists: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    #: Judges by boundary, None where judging goes op by op; filled on first use.
    judges: dict[int, Judge | None] = field(default_factory=dict)
    #: Answers of `closed` by boundary; thresholds do not change while a plan lives.
    shut: dict[int, bool] = field(default_factory=dict)

    @functools.cached_property
    def bands(self) -> dict[int, Band]:
        return {} if self.exits is None else {band.leave: band for band in self.exits}

    @functools.cached_property
    def stops(self) -> list[int]:
        """Where a pass looks up from the layers: its ends, and the boundaries where rows leave or resume."""
        return sorted({0, self.model.depth} | {stop for band in self.bands.values() for stop in (band.leave, band.resume)})

    @functools.cached_property
    def previous_wanted(self) -> bool:
        """A criterion compares residuals with those at the previous boundary."""
        return any(band.criterion.needs_previous for band in self.bands.values())

    def closed(self, band: Band) -> bool:
        """No row can leave here, and judging it would tell later boundaries nothing."""
        if band.leave not in self.shut:
            self.shut[band.leave] = self._closed(band)
        return self.shut[band.leave]

    def _closed(self, band: Band) -> bool:
        shut = band.criterion.kind == "never" or (band.criterion.scored and band.threshold == math.inf)
        waited_for = any(other.criterion.needs_previous or other.criterion.carries for other in self.exits or ())
        return shut and self.depth is None and not waited_for

    def head(self, band: Band) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of the LM head over the band's shortlist; None if it is no plain linear."""
        plain, ids = self.model.plain_head(), band.shortlist
        if plain is None or ids is None:
            return plain
        if band.leave not in self.shortlists:  # gathered once: exit_stats would gather these rows on every call
            self.shortlists[band.leave] = plain[0][ids], None if plain[1] is None else plain[1][ids]
        return self.shortlists[band.leave]

    def stats(self, band: Band, ready: Tensor) -> ExitStats:
        """exit_stats of head-ready rows over the band's shortlist; a head that is no plain linear runs as its module."""
        model, ids, head = self.model, band.shortlist, self.head(band)
        if head is None:
            logits = model.logits(ready)
            found = stats_of_logits(logits if ids is None else logits[:, ids])
        else:
            found = exit_stats(ready.contiguous(), head[0], head_bias=head[1], softcap=model.logit_softcap)
        return found if ids is None else found._replace(argmax=ids[found.argmax])

    def judge(self, band: Band) -> Judge | None:
        """The one call that judges at a boundary; None where criteria see more than residuals and logits."""
        if not usable():
            return None
        if band.leave not in self.judges:
            self.judges[band.leave] = judge_of(self.model, band, self.head(band))
        return self.judges[band.leave]


@dataclass
class Result:
    """What a pass produced, in the caller's row order."""

    #: Head-ready rows [n, ready].
    ready: Tensor
    #: int32 [n]: boundary where a row left for good, the number of layers if it reached the top.
    exit_layer: Tensor
    #: int32 [n]: layers that the row ran.
    layers_run: Tensor
    #: int64 [n]: bit i is set if the row took the i-th band of the exits.
    bands_taken: Tensor
    #: Rows that ran each layer.
    work: list[int]
    #: Rows that ran an exit block (one layer each), by boundary.
    block_work: dict[int, int]


@dataclass
class _Away:
    """Rows that left together: consecutive in the buffers, behind the live prefix, latest group first."""

    band: Band
    count: int
    #: Head-ready rows of those that left for good, in buffer order.
    ready: Tensor | None = None


def check_policy(exits: Exits | None, kv_policy: str) -> None:
    """Raise unless every band can run under this policy."""
    if kv_policy not in KV_POLICIES:
        raise ExitsError(f"kv must be one of {', '.join(KV_POLICIES)}, got {kv_policy!r}")
    for band in exits or ():
        name = f"band [{band.leave}, {band.resume})"
        if kv_policy == "predict" and band.kv is None and band.criterion.kind != "never":
            raise ExitsError(f"{name} has no K,V maps for kv='predict'; fit them or use kv='propagate'")
        if kv_policy == "none" and band.criterion.kind not in HOLE_FREE:
            raise ExitsError(
                f"kv='none' leaves holes that later rows of a sequence would read under criterion {band.criterion.kind} of "
                f"{name}; it works with {', '.join(HOLE_FREE)}"
            )
    if kv_policy == "none" and exits is not None:
        _check_holes(exits)


def _check_holes(exits: Exits) -> None:
    """Under `none`, no step may run a layer that an earlier step of the sequence left out.

    Each criterion of HOLE_FREE alone never does that, but a schedule can keep rows from another band's boundary.
    """
    steps = torch.arange(1 + max((b.criterion.length for b in exits if isinstance(b.criterion, Schedule)), default=0))
    zeros = torch.zeros_like(steps)
    resumes, ran = zeros, torch.ones(exits.model.layers, len(steps), dtype=torch.bool)
    for band in exits:
        if isinstance(band.criterion, FixedDepth):
            continue  # a request that names its depth is not judged by anything else, and the same at every step
        view = View(
            hidden=zeros, seq=zeros, step=steps, previous=None, stats=_no_stats, depth=None, leave=band.leave,
            layers=exits.model.layers,
        )  # fmt: skip
        leaves = (resumes <= band.leave) & band.criterion.leaves(view, band.thresholds(steps))
        ran[band.leave : band.resume] &= ~leaves
        resumes = torch.where(leaves, band.resume, resumes)
    if bool((ran[:, 1:] & ~ran[:, :-1]).any()):
        raise ExitsError(
            "kv='none' leaves holes that later rows of a sequence would read: with these bands a later step runs a layer that "
            "an earlier one skipped"
        )


def _no_stats() -> ExitStats:
    raise ExitsError("kv='none' works with criteria that read no logits")


@torch.no_grad()
def forward(plan: Plan, rows: Rows, context: Context) -> Result:
    """Run one pass over `rows` (their buffers are consumed). It computes in the model's own dtype, autocast or not."""
    with torch.autocast(rows.hidden.device.type, enabled=False):
        return _Pass(plan, rows, context).run()


@dataclass
class _Pass:
    plan: Plan
    rows: Rows
    context: Context
    away: list[_Away] = field(default_factory=list)

    def run(self) -> Result:
        model, rows = self.plan.model, self.rows
        #: Rows that skipped a band and resumed, in the caller's numbers.
        self.skips: list[tuple[Tensor, Band]] = []
        self.work = [0] * model.depth
        self.block_work: dict[int, int] = {}
        bands = self.plan.bands
        propagate = self.plan.kv_policy == "propagate"
        idle_until = 0
        for number, end in itertools.pairwise(self.plan.stops):
            self._resume(number)
            if number in bands:
                self._boundary(bands[number])
            if rows.live == 0:
                # Nobody reads the weights of the next layers: the away rows get their K,V there all at once.
                if propagate and number >= idle_until:
                    idle_until = min((group.band.resume for group in self.away), default=model.depth)
                    self.plan.propagation.store(rows.hidden, rows.pos, rows.slots, number, idle_until, self.context)
                continue
            self._layers(number, end, len(rows) if propagate else rows.live)
            self.work[number:end] = [rows.live] * (end - number)
        return self._result()

    def _layers(self, begin: int, end: int, carried: int) -> None:
        """Rows `[0, live)` run layers [begin, end); rows `[live, carried)` only get their K,V."""
        model, rows, context = self.plan.model, self.rows, self.context
        if not isinstance(model.stack, str) and model.stack.usable():
            model.stack.run(begin, end, rows.hidden[:carried], rows.live, rows.seq, rows.pos, rows.slots, context)
            return
        counter = rows.counter if carried > rows.live else None
        for layer in model.layers[begin:end]:
            layer.run(rows.hidden, rows.live, carried, rows.seq, rows.pos, rows.slots, context, counter)

    # -- boundaries -----------------------------------------------------------------------------------------------------

    def _resume(self, boundary: int) -> None:
        """Rows whose band ends here become runners again, with the residual their jump map gives them."""
        returning = [group.band.resume == boundary and boundary < self.plan.model.depth for group in self.away]
        if not any(returning):
            return
        rows, before = self.rows, self.rows.live
        if returning != sorted(returning, reverse=True):  # otherwise they already lie right behind the live prefix
            state = torch.zeros(len(rows), dtype=torch.int8)
            at = before
            for group, back in zip(self.away, returning, strict=True):
                state[at : at + group.count] = RUN if back else AWAY
                at += group.count
            rows.partition(state.to(rows.hidden.device))
        groups = [group for group, back in zip(self.away, returning, strict=True) if back]
        self.away = [group for group, back in zip(self.away, returning, strict=True) if not back]
        rows.set_live(before + sum(group.count for group in groups))
        at = before
        for group in groups:
            if group.band.jump is not None:
                stream = rows.hidden[at : at + group.count]
                stream.copy_(group.band.jump(stream))
            at += group.count

    def _boundary(self, band: Band) -> None:
        """Judge the live rows; those that leave go behind the live prefix and get their K,V and, if for good, their head."""
        rows, plan = self.rows, self.plan
        block = plan.blocks.get(band.leave)
        if block is not None:
            block.store(rows, self.context)
        if not plan.open or rows.live == 0 or plan.closed(band):
            return
        decided = self._decide(band, block)
        if decided is None:
            return
        state, ready = decided
        live, left = rows.partition(state)
        leaving = slice(live, live + left)
        for_good = band.resume == plan.model.depth
        if not for_good:
            self.skips.append((rows.index[leaving], band))
        elif ready is None:
            ready = self._head(band, block, leaving)
        self.away.insert(0, _Away(band, left, ready if for_good else None))
        if plan.kv_policy == "predict" and band.kv is not None:
            backfill_kv(
                rows.hidden[leaving], band.kv.weight, rows.pos[leaving], rows.slots[leaving], self.context.pages, band.leave,
                bias=band.kv.bias, cos=self.context.cos, sin=self.context.sin,
                variant=plan.propagation.variants(band.leave, band.resume),
            )  # fmt: skip

    def _decide(self, band: Band, block: Block | None) -> tuple[Tensor, Tensor | None] | None:
        """int8 [n] states for the partition and, where judging had to make them, the leavers' head-ready rows in order.

        None when nobody leaves.
        """
        rows, plan, live = self.rows, self.plan, self.rows.live
        judge = None if block is not None else plan.judge(band)
        if judge is not None:
            hidden = rows.hidden[:live]
            threshold: float | Tensor = band.threshold if band.decay is None else band.thresholds(rows.step[:live])
            if plan.depth is not None:
                # A request that names its depth is not judged by anything else; the others are judged as they always are.
                asked = plan.depth[rows.seq[:live].long()]
                here = (asked == band.leave) & (band.resume == plan.model.depth)
                named = torch.where(here, -math.inf, math.inf)
                threshold = torch.where(asked >= 0, named, band.thresholds(rows.step[:live]))
            _, state, ready = judge(hidden, threshold, rows.may_leave[:live], len(rows))
            if plan.previous_wanted:
                rows.carry("previous", hidden)
            return (state, ready) if ready.shape[0] else None
        leaves, heads = self._judge(band, block)
        if not bool(leaves.any()):
            return None
        state = torch.full((len(rows),), AWAY, dtype=torch.int8, device=leaves.device)
        state[:live] = leaves  # True is LEAVING, False is RUN
        # The partition is stable: the leavers will lie in this order.
        return state, None if heads is None or band.resume != plan.model.depth else heads[leaves]

    def _judge(self, band: Band, block: Block | None) -> tuple[Tensor, Tensor | None]:
        """bool [live] and, when the criterion had to read the exit head of every live row, their head-ready rows."""
        rows, plan, live = self.rows, self.plan, self.rows.live
        hidden = rows.hidden[:live]
        heads: list[Tensor] = []

        @functools.cache
        def stats() -> ExitStats:
            heads.append(self._head(band, block, slice(0, live)))
            return plan.stats(band, heads[0])

        carried = {name: value[:live] for name, value in rows.carried.items()}
        previous = carried.pop("previous", None)
        view = View(
            hidden=hidden, seq=rows.seq[:live], step=rows.step[:live], previous=previous, stats=stats, depth=plan.depth,
            leave=band.leave, layers=plan.model.depth, carried=carried,
        )  # fmt: skip
        leaves = band.criterion.leaves(view, band.thresholds(view.step))
        if plan.depth is not None:
            # A request that names its depth is not judged by anything else.
            asked = plan.depth[view.seq.long()]
            leaves = torch.where(asked >= 0, (asked == band.leave) & (band.resume == plan.model.depth), leaves)
        leaves = leaves & rows.may_leave[:live]
        for name, value in view.carried.items():
            rows.carry(name, value)
        if plan.previous_wanted:
            rows.carry("previous", hidden)
        return leaves, heads[0] if heads else None

    def _result(self) -> Result:
        """What the rows made, brought to the caller's order: those that left for good wait behind the live ones, by group."""
        rows, model = self.rows, self.plan.model
        parts = [model.finish(rows.hidden[: rows.live])] if rows.live else []
        parts += [group.ready for group in self.away if group.ready is not None]
        ready = rows.hidden.new_empty(0, model.ready_size) if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)
        total, device = len(rows), rows.hidden.device
        facts = torch.tensor([[model.depth], [model.depth], [0]]).repeat(1, total)  # exit layer, layers run, bands taken
        if rows.moved:
            numbers = {leave: number for number, leave in enumerate(self.plan.bands)}
            index = rows.index.long()
            ready = torch.empty_like(ready).index_copy_(0, index, ready)
            home = index.cpu()
            at = rows.live
            for group in self.away:
                gone = home[at : at + group.count]
                facts[0, gone] = group.band.leave
                facts[1, gone] -= model.depth - group.band.leave
                facts[2, gone] |= 1 << numbers[group.band.leave]
                at += group.count
            for skipped, band in self.skips:
                gone = skipped.cpu().long()
                facts[1, gone] -= band.resume - band.leave
                facts[2, gone] |= 1 << numbers[band.leave]
        exit_layer, layers_run, bands_taken = facts.to(device).unbind()
        return Result(ready, exit_layer.int(), layers_run.int(), bands_taken, self.work, self.block_work)

    def _head(self, band: Band, block: Block | None, which: slice) -> Tensor:
        """Head-ready rows of a slice of the buffers."""
        rows = self.rows
        if block is not None:
            count = which.stop - which.start
            self.block_work[band.leave] = self.block_work.get(band.leave, 0) + count
            return block.ready(rows.hidden[which], rows, which.start, which.stop, self.context)
        return band.head_or_norm()(rows.hidden[which], self.plan.model.finish)
