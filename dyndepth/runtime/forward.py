"""The pass: rows go up the layers as a live prefix; at boundaries some leave, some resume; one head serves all at the end."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dyndepth.exits import Band
from dyndepth.exits.criteria import View
from dyndepth.ops import ExitStats, backfill_kv
from dyndepth.ops.compact_rows import AWAY, LEAVING, RUN
from dyndepth.runtime import climb
from dyndepth.runtime.block import Block
from dyndepth.runtime.layer import Context
from dyndepth.runtime.observe import names
from dyndepth.runtime.pass_plan import Plan
from dyndepth.runtime.policies import EXACT, copy_last
from dyndepth.runtime.result import Result
from dyndepth.runtime.rows import Rows

#: Under which name a row carries the bands that it skipped so far (bits, as in Result.bands_taken).
TAKEN = "taken"


@dataclass
class _Away:
    """Rows that are away together: consecutive in the buffers, behind the live prefix, latest group first."""

    count: int
    #: The boundary that they are at, and the one where they go on (the number of layers: not in this pass).
    leave: int
    resume: int
    #: The band that they took; None for rows that wait, from an earlier pass (they join at `leave`) or held in this one.
    band: Band | None = None
    #: Head-ready rows of the first ones in buffer order: those that left for good with a token.
    ready: Tensor | None = None
    #: Waiting rows: they go on when a row of their sequence does (True), or in any case.
    follow: bool = False
    held: bool = False


@torch.no_grad()
def forward(plan: Plan, rows: Rows, context: Context, hold: frozenset[int] = frozenset(), keep: int | None = None) -> Result:
    """Run one pass over `rows` (their buffers are consumed). It computes in the model's own dtype, autocast or not.

    Rows that reach a boundary of `hold` and do not leave there stop: a later pass takes them up (`Rows.joins`). So it may with
    rows that skip layers, from `keep`, the lowest boundary where any of them may: the result has their residuals there.
    """
    with torch.autocast(rows.hidden.device.type, enabled=False):
        return _Pass(plan, rows, context, hold, keep).run()


@dataclass
class _Pass:
    plan: Plan
    rows: Rows
    context: Context
    hold: frozenset[int] = frozenset()
    keep: int | None = None
    away: list[_Away] = field(default_factory=list)

    def run(self) -> Result:
        model, rows = self.plan.model, self.rows
        #: The first so many live rows make a token; live rows behind them follow one of these (`recompute`).
        self.lead = rows.live
        self.away = [_Away(count, at, model.depth, follow=follow) for at, follow, count in rows.joins]
        #: Rows that skipped a band and resumed, in the caller's numbers.
        self.skips: list[tuple[Tensor, Band]] = []
        #: Rows whose token was released at a band while they go on, in the caller's numbers, with their head-ready rows.
        self.released: list[tuple[Tensor, Band, Tensor]] = []
        if self.plan.history_wanted:
            known = rows.carried.get(TAKEN)  # of rows that waited; -1 for the others
            rows.carried[TAKEN] = torch.zeros_like(rows.seq, dtype=torch.int64) if known is None else known.clamp_min(0)
        self.work = [0] * model.depth
        self.block_work: dict[int, int] = {}
        kept: Tensor | None = None
        bands = self.plan.bands
        propagate = self.plan.kv_policy == "propagate"
        idle_until = reached = 0
        #: What a climb brought back from the boundary where it ended.
        self.decided: tuple[Tensor, Tensor] | None = None
        #: Head-ready rows in the caller's order, where a climb made all of them.
        self.home: Tensor | None = None
        self.climbs = not rows.joins and not self.hold and self.keep is None and climb.allowed(self.plan)
        for number, end in itertools.pairwise(self.plan.stops):
            if number < reached:
                continue
            self._resume(number)
            if number == self.keep:  # nobody has left or joined below it: rows lie as they came
                kept = rows.hidden[: rows.live].clone()
            if number in bands:
                self._boundary(bands[number])
            if number in self.hold and rows.live:
                self._hold(number)
            self._join(number)
            if rows.live == 0:
                # Nobody reads the weights of the next layers: the away rows get their K,V there all at once.
                if propagate and number >= idle_until:
                    idle_until = min((group.resume for group in self.away), default=model.depth)
                    count = self._carried()
                    hidden, pos, slots = rows.hidden[:count], rows.pos[:count], rows.slots[:count]
                    if count:
                        self.plan.propagation.store(hidden, pos, slots, number, idle_until, self.context)
                continue
            idle_until = 0  # who goes away from now on has nothing there
            reached = self._layers(number, end, self._carried() if propagate else rows.live)
        result = self._result()
        result.kept = kept
        return result

    def _layers(self, begin: int, end: int, carried: int) -> int:
        """Rows `[0, live)` run layers [begin, end), rows `[live, carried)` only get their K,V.

        Where they climb, they go as far as C++ can take them: some may have left on the way. Counts the work. Returns the
        boundary where those that did not leave are then.
        """
        model, rows, context = self.plan.model, self.rows, self.context
        if self.climbs:
            limit = min((group.resume for group in self.away), default=model.depth)
            live, made = rows.live, climb.climb_of(self.plan, begin, limit)
            climbed = made.run(self.plan, rows, carried, context)
            self.decided, self.home = climbed.decided, climbed.home
            for band, count, said in climbed.left:
                begin, live = self._came_back(begin, live, band.leave)
                self.work[begin : band.leave] = [live] * (band.leave - begin)
                for_good = band.resume == model.depth
                if not for_good:
                    self.skips.append((said, band))
                self.away.insert(0, _Away(count, band.leave, band.resume, band, said if for_good else None))
                begin, live = band.leave, live - count
            # At the end of the call, whoever comes back there is ours to bring.
            begin, live = self._came_back(begin, live, climbed.boundary - (climbed.boundary == made.end))
            self.work[begin : climbed.boundary] = [live] * (climbed.boundary - begin)
            self.lead = live
            return climbed.boundary
        self.work[begin:end] = [rows.live] * (end - begin)
        if not isinstance(model.stack, str) and model.stack.usable():
            model.stack.run(begin, end, rows.hidden[:carried], rows.live, rows.seq, rows.pos, rows.slots, context)
            return end
        counter = rows.counter if carried > rows.live else None
        for layer in model.layers[begin:end]:
            layer.run(rows.hidden, rows.live, carried, rows.seq, rows.pos, rows.slots, context, counter)
        return end

    def _came_back(self, begin: int, live: int, boundary: int) -> tuple[int, int]:
        """In a climb with `live` rows at `begin`, rows came back at boundaries up to `boundary`: counts the work between.

        Returns the last of these boundaries and the rows that are live there.
        """
        for at in sorted({group.resume for group in self.away if group.resume <= boundary}):
            self.work[begin:at] = [live] * (at - begin)
            begin, live = at, live + sum(group.count for group in self.away if group.resume == at)
            self.away = [group for group in self.away if group.resume != at]
        return begin, live

    def _carried(self) -> int:
        """Rows but those that wait from an earlier pass, which lie last: their K,V below are their own."""
        return len(self.rows) - sum(group.count for group in self.away if group.band is None and not group.held)

    # -- boundaries -----------------------------------------------------------------------------------------------------

    def _resume(self, boundary: int) -> None:
        """Rows whose band ends here become runners again, with the residual their jump map gives them."""
        at = self.rows.live
        # Rows that follow never meet bands that resume (policies.check_policy): these come right behind the live prefix.
        for group in self._bring([group.resume == boundary < self.plan.model.depth for group in self.away]):
            if group.band is not None and group.band.jump is not None:
                stream = self.rows.hidden[at : at + group.count]
                stream.copy_(group.band.jump(stream))
            at += group.count

    def _bring(self, returning: list[bool]) -> list[_Away]:
        """Whole groups go behind the live rows that make tokens, before those that follow; returns them."""
        if not any(returning):
            return []
        rows, before = self.rows, self.rows.live
        # If not so, they already lie right behind the live prefix.
        if self.lead < before or returning != sorted(returning, reverse=True):
            state = torch.zeros(len(rows), dtype=torch.int8)
            state[self.lead : before] = LEAVING  # not really: to lie behind those that come
            at = before
            for group, back in zip(self.away, returning, strict=True):
                state[at : at + group.count] = RUN if back else AWAY
                at += group.count
            rows.partition(state.to(rows.hidden.device))
        groups = [group for group, back in zip(self.away, returning, strict=True) if back]
        self.away = [group for group, back in zip(self.away, returning, strict=True) if not back]
        brought = sum(group.count for group in groups)
        rows.set_live(before + brought)
        self.lead += brought
        return groups

    def _hold(self, boundary: int) -> None:
        """The live rows stop here; those that make tokens lie before those that follow them."""
        rows, depth = self.rows, self.plan.model.depth
        if rows.live > self.lead:
            self.away.insert(0, _Away(rows.live - self.lead, boundary, depth, follow=True))
        self.away.insert(0, _Away(self.lead, boundary, depth, held=True))
        self.lead = 0
        rows.set_live(0)

    def _join(self, boundary: int) -> None:
        """Rows that waited here go on: those whose own token is due, then those whose sequence has a row that goes on."""
        waiting = [group.band is None and not group.held and group.leave == boundary for group in self.away]
        if not any(waiting):
            return
        rows = self.rows
        own = [wait and not group.follow for wait, group in zip(waiting, self.away, strict=True)]
        if any(own):
            self._bring(own)
        behind = [(at, group) for at, group in self._places() if group.follow and group.leave == boundary]
        if not behind or self.lead == 0:
            return
        going = torch.zeros(self.context.block_table.shape[0], dtype=torch.bool, device=rows.seq.device)
        going[rows.seq[: self.lead].long()] = True
        state = torch.full((len(rows),), AWAY, dtype=torch.int8, device=rows.seq.device)
        state[: rows.live] = RUN
        for at, group in behind:
            part = slice(at, at + group.count)
            follows = going[rows.seq[part].long()]
            state[part] = torch.where(follows, RUN, AWAY).to(torch.int8)
            group.count -= int(follows.sum())
        if bool((state[rows.live :] == RUN).any()):
            rows.partition(state)
        self.away = [group for group in self.away if group.count]

    def _places(self) -> list[tuple[int, _Away]]:
        """Groups with the place in the buffers where they begin."""
        counts = [group.count for group in self.away]
        return list(zip(itertools.accumulate(counts, initial=self.rows.live), self.away, strict=False))

    def _boundary(self, band: Band) -> None:
        """Judge the live rows; those that leave go behind the live prefix and get their K,V and, if for good, their head."""
        rows, plan = self.rows, self.plan
        block = plan.blocks.get(band.leave)
        if block is not None:
            # Rows that wait have their own K,V here already, or will when they come; others give what they left with.
            block.store(rows, self.context, rows.live if plan.kv_policy == "recompute" else self._carried())
        if plan.voting and band.leave in plan.votes and rows.live:
            assert band.router is not None
            scores = band.router(rows.hidden[: rows.live]).double()
            plan.votes[band.leave].index_add_(
                0, rows.seq[: rows.live].long(), torch.stack([scores, torch.ones_like(scores)], 1)
            )
        if not plan.open or self.lead == 0 or plan.closed(band):
            return
        decided = self._decide(band, block)
        if decided is None:
            return
        state, ready = decided
        if plan.kv_policy == "release":
            self._release(band, block, state[: self.lead] == LEAVING, ready)
            return
        gone = int((state[: self.lead] == LEAVING).sum()) if self.lead < rows.live else -1
        live, left = rows.partition(state)
        gone = left if gone < 0 else gone
        self.lead -= gone
        leaving = slice(live, live + left)
        for_good = band.resume == plan.model.depth
        if not for_good:
            self.skips.append((rows.index[leaving], band))
            if plan.history_wanted:
                rows.carried[TAKEN][leaving] |= 1 << plan.numbers[band.leave]
        elif ready is None:
            ready = self._head(band, block, slice(live, live + gone))
        self.away.insert(0, _Away(left, band.leave, band.resume, band, ready if for_good else None))
        if plan.kv_policy == "copy":
            copy_last(self.context.pages, rows.slots[leaving], band.leave, band.resume, plan.model.layers)
        if plan.kv_policy == "predict" and band.kv is not None:
            backfill_kv(
                rows.hidden[leaving], band.kv.weight, rows.pos[leaving], rows.slots[leaving], self.context.pages, band.leave,
                bias=band.kv.bias, cos=self.context.cos, sin=self.context.sin,
                variant=plan.propagation.variants(band.leave, band.resume), down=band.kv.down,
            )  # fmt: skip

    def _release(self, band: Band, block: Block | None, leaves: Tensor, ready: Tensor | None) -> None:
        """`release`: the token is known here and judged no more, the row goes on to the top."""
        rows = self.rows
        if ready is None:
            ready = self._head(band, block, slice(0, self.lead))[leaves]
        self.released.append((rows.index[: self.lead][leaves], band, ready))
        rows.may_leave[: self.lead] &= ~leaves

    def _decide(self, band: Band, block: Block | None) -> tuple[Tensor, Tensor | None] | None:
        """int8 [n] states for the partition and, where judging had to make them, the leavers' head-ready rows in order.

        Rows that follow do what the row of their sequence does. None when nobody leaves.
        """
        decided = self._judged(band, block)
        rows, lead = self.rows, self.lead
        if decided is not None and lead < rows.live:
            state = decided[0]
            state_of = torch.zeros(self.context.block_table.shape[0], dtype=torch.int8, device=state.device)
            state_of[rows.seq[:lead].long()] = state[:lead]
            state[lead : rows.live] = state_of[rows.seq[lead : rows.live].long()]
        return decided

    def _judged(self, band: Band, block: Block | None) -> tuple[Tensor, Tensor | None] | None:
        """`_decide` for the rows that make tokens."""
        if self.decided is not None:
            decided, self.decided = self.decided, None
            return decided
        rows, plan, live = self.rows, self.plan, self.lead
        judge = None if block is not None else plan.judge(band)
        if judge is not None:
            hidden = rows.hidden[:live]
            threshold: float | Tensor = band.threshold if band.decay is None else band.thresholds(rows.step[:live])
            if plan.depth is not None:
                # A request that names its depth is not judged by anything else; the others are judged as they always are.
                asked = plan.depth[rows.seq[:live].long()]
                here = (asked == band.leave) & (band.resume == plan.model.depth)
                named = torch.full_like(asked, math.inf, dtype=torch.float32).masked_fill(here, -math.inf)
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
        """bool [lead] and, when the criterion had to read the exit head of every leading row, their head-ready rows."""
        rows, plan, live = self.rows, self.plan, self.lead
        hidden = rows.hidden[:live]
        heads: list[Tensor] = []

        @functools.cache
        def stats() -> ExitStats:
            heads.append(self._head(band, block, slice(0, live)))
            return plan.stats(band, heads[0])

        votes = plan.votes.get(band.leave)
        carried = {name: value[:live] for name, value in rows.carried.items()}
        previous, taken = carried.pop("previous", None), carried.pop(TAKEN, None)
        view = View(
            hidden=hidden, seq=rows.seq[:live], step=rows.step[:live], previous=previous, stats=stats, depth=plan.depth,
            leave=band.leave, layers=plan.model.depth, carried=carried,
            votes=None if votes is None else votes[rows.seq[:live].long()],
            skipped=None if taken is None else functools.partial(plan.skipped, taken),
        )  # fmt: skip
        leaves = plan.named(band, view.seq, band.criterion.leaves(view, band.thresholds(view.step))) & rows.may_leave[:live]
        for name, value in view.carried.items():
            rows.carry(name, value)
        if plan.previous_wanted:
            rows.carry("previous", hidden)
        if plan.observed and band.resume == plan.model.depth:
            score, token = names(band.leave)
            whole = heads and band.shortlist is None
            said = (
                stats().argmax if whole else plan.model.argmax(heads[0] if heads else self._head(band, block, slice(0, live)))
            )
            rows.carry(
                score, torch.full_like(hidden[:, 0], math.nan, dtype=torch.float32) if view.score is None else view.score
            )
            rows.carry(token, said)
        return leaves, heads[0] if heads else None

    def _result(self) -> Result:
        """What the rows made, brought to the caller's order: those that are away lie behind the live ones, by group."""
        rows, model, total = self.rows, self.plan.model, len(self.rows)
        ready = self._ready() if self.home is None else self.home
        numbers = self.plan.numbers
        # numpy: between two passes over a model's weights everything is cold, and a tensor op costs many times as much.
        facts = np.zeros((3, total), np.int64)
        facts[:2] = model.depth
        exit_layer, layers_run, bands_taken = facts
        held = np.zeros(total, np.bool_)
        if rows.moved or self.away or self.skips:
            if rows.moved and self.home is None:
                ready = self._home(ready)
            home = rows.index.cpu().numpy()
            for at, group in self._places():
                gone = home[at : at + group.count]
                exit_layer[gone] = group.leave
                layers_run[gone] -= model.depth - group.leave
                if group.band is not None:
                    bands_taken[gone[: 0 if group.ready is None else group.ready.shape[0]]] |= 1 << numbers[group.leave]
                elif group.held:
                    held[gone] = True
            for skipped, band in self.skips:
                gone = skipped.cpu().numpy()
                layers_run[gone] -= band.resume - band.leave
                bands_taken[gone] |= 1 << numbers[band.leave]
        fresh = total - sum(count for _, _, count in rows.joins)
        for at, _, count in rows.joins:  # these had run so many layers before
            layers_run[fresh : fresh + count] -= at
            fresh += count
        for released, band, made in self.released:
            ready = ready.index_copy(0, released.long(), made)
            gone = released.cpu().numpy()
            exit_layer[gone] = band.leave
            bands_taken[gone] |= 1 << numbers[band.leave]
        exits, layers, taken = torch.from_numpy(facts).to(ready.device).unbind()
        result = Result(ready, exits.int(), layers.int(), taken, self.work, self.block_work)
        result.held = torch.from_numpy(held) if self.hold else None
        if self.hold or self.plan.kv_policy in EXACT:
            result.hidden = self._home(rows.hidden)
        if self.hold or self.plan.observed:
            result.carried = {name: self._home(value) for name, value in rows.carried.items()}
        return result

    def _home(self, value: Tensor) -> Tensor:
        """Rows [n, ...] from the order of the buffers to the caller's."""
        return torch.empty_like(value).index_copy_(0, self.rows.index.long(), value)

    def _ready(self) -> Tensor:
        """Head-ready rows [n, ready] in buffer order; zero for rows that made no token."""
        rows, model = self.rows, self.plan.model
        parts = [model.finish(rows.hidden[: rows.live])] if rows.live else []
        if all(group.ready is not None and group.ready.shape[0] == group.count for group in self.away):
            parts += [group.ready for group in self.away if group.ready is not None]
            return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else rows.hidden.new_empty(0, model.ready_size)
        ready = rows.hidden.new_zeros(len(rows), model.ready_size)
        if parts:
            ready[: rows.live] = parts[0]
        for at, group in self._places():
            if group.ready is not None:
                ready[at : at + group.ready.shape[0]] = group.ready
        return ready

    def _head(self, band: Band, block: Block | None, which: slice) -> Tensor:
        """Head-ready rows of a slice of the buffers."""
        rows = self.rows
        if block is not None:
            count = which.stop - which.start
            self.block_work[band.leave] = self.block_work.get(band.leave, 0) + count
            return block.ready(rows.hidden[which], rows, which.start, which.stop, self.context)
        return band.head_or_norm()(rows.hidden[which], self.plan.model.finish)
