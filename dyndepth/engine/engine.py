"""The engine: requests that come and go, one pass per step, rows parked at exit points until a rule sends them on.

Re-batching (DREX, Liu et al. 2025, arXiv:2512.15705) without involuntary exits or stays: a row leaves where its criterion says
so and nowhere else. What waits is a row with its residual; the other requests go on meanwhile. Which rows run together changes
no row's arithmetic on the CPU's kernels, so a request's tokens do not depend on the others, on rules or on preemption.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dyndepth.engine.request import Request
from dyndepth.engine.rules import Immediate, Moment, Rule, Waiting
from dyndepth.errors import ArgumentError, PagesFullError
from dyndepth.exits import Exits
from dyndepth.runtime.bind import bind, most_likely
from dyndepth.runtime.parked import Parked
from dyndepth.runtime.policies import EXACT
from dyndepth.runtime.result import Result
from dyndepth.runtime.session import DEFAULT_CHUNK, DEFAULT_PAGE_SIZE, DEFAULT_PENDING, Session


@dataclass(frozen=True)
class Event:
    """A token of a request, where its row left (the number of layers: the top), and whether the request ended with it.

    `token` is None where the request's processor raised: it failed (`request.error`).
    """

    request: Request
    token: int | None
    exit_layer: int
    last: bool


@dataclass
class Counts:
    """What an engine did."""

    passes: int = 0
    #: Passes that sent waiting rows on, by boundary, and how many rows.
    flushes: dict[int, int] = field(default_factory=dict)
    flushed: dict[int, int] = field(default_factory=dict)
    #: The longest that a row has waited at one exit point, in passes.
    longest_wait: int = 0
    #: Rows that were not asked whether they leave, because too many tokens were parked (`recompute` only).
    kept: int = 0
    preempted: int = 0
    #: Rows judged at each boundary that makes tokens leave, and those that left.
    judged: dict[int, int] = field(default_factory=dict)
    left: dict[int, int] = field(default_factory=dict)


class Engine:
    """Decoding for requests that arrive at any time.

        engine = dyndepth.Engine(model, exits)
        engine.add_request(Request(prompt_ids, max_new_tokens=64, ends=[tokenizer.eos_token_id]))
        for event in engine.stream(): ...

    Args:
        causal_lm: the model.
        exits: dyndepth.Exits for it, None for full depth.
        kv: K,V policy, as for dyndepth.generate.
        rule: when rows that wait go on (dyndepth.engine.rules); None: at once.
        slots: requests that run together.
        longest: positions a request may take, prompt included.
        page_size, pages: geometry of the K,V pages; None: as many as all slots can need. With fewer, requests wait for pages
            and, when pages run out, the latest request gives its own back and is run again later.
        longest_wait: passes after which a row that waits at an exit point goes on, whatever the rule says.
        pending: with kv="recompute", tokens of a request that may be parked before its next one runs every layer.
        chunk: prompt rows per step: a long prompt joins over several steps, and the others go on meanwhile.
        graphs: replay passes in which nobody waits as CUDA graphs; as for dyndepth.generate.
    """

    def __init__(
        self,
        causal_lm: Any,
        exits: Exits | None = None,
        *,
        kv: str | None = None,
        rule: Rule | None = None,
        slots: int = 16,
        longest: int = 2048,
        page_size: int = DEFAULT_PAGE_SIZE,
        pages: int | None = None,
        longest_wait: int = 32,
        pending: int = DEFAULT_PENDING,
        chunk: int = DEFAULT_CHUNK,
        graphs: bool | str = False,
    ) -> None:
        for name, value in (("slots", slots), ("longest", longest), ("longest_wait", longest_wait)):
            if not isinstance(value, int) or value < 1:
                raise ArgumentError(f"Engine: {name} must be at least 1, got {value!r}")
        self.model = bind(causal_lm)
        longest = min(longest, self.model.positions_limit or longest)
        self.session = Session(
            self.model, [longest] * slots, exits, kv=kv, page_size=page_size, pages=pages, chunk=chunk, pending=pending,
            first=[0] * slots, graphs=graphs,
        )  # fmt: skip
        if self.session.plan.votes:
            raise ArgumentError("Engine: bands that prompts decide (prompt_router) work with dyndepth.generate, not here")
        if self.session.kv_policy == "release" and not isinstance(rule, Immediate | None):
            raise ArgumentError(f"Engine: under kv='release' rows go on at once, so rule must be Immediate(), got {rule!r}")
        self.longest, self.longest_wait, self.rule = longest, longest_wait, rule or Immediate()
        self._named: torch.Tensor | None = None
        self._points = [band.leave for band in exits or () if band.resume == self.model.depth]
        self._queue: list[Request] = []
        self._running: dict[int, Request] = {}
        self._parked = Parked.nothing(torch.empty(0, self.model.hidden_size, dtype=self.model.dtype, device=self.model.device))
        self._numbers = 0
        self.counts = Counts()
        #: Rows x layers of decoding, of prompts, and of rows that ran again after a preemption.
        self.work, self.prompt_work, self.repeated = self.session.work(), self.session.work(), self.session.work()

    # -- requests -----------------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> Request:
        """Queue a request; it joins when a slot and pages are free, in the order of arrival. Returns it."""
        if not isinstance(request, Request):
            raise ArgumentError(f"Engine: wanted a dyndepth.Request, got {type(request).__name__}")
        if request.number >= 0:
            raise ArgumentError("Engine: the request was added before; make a new one")
        most = request.prompt.shape[0] + request.max_new_tokens - 1
        room = min(self.longest, self.session.pages.limit * self.session.pages.page_size)
        if most > room:
            raise ArgumentError(f"Engine: the request can take {most} positions, there is room for {room}")
        low, high = int(request.prompt.min()), int(request.prompt.max())
        if low < 0 or high >= self.model.vocab_size:
            raise ArgumentError(f"Engine: prompt ids must be in [0, {self.model.vocab_size}), got {low} to {high}")
        if request.lossless and self.session.kv_policy != "recompute":
            raise ArgumentError(f"Engine: mode='lossless' works with kv='recompute' only, got kv={self.session.kv_policy!r}")
        if request.depth is not None:
            self._may_name(request.depth)
        request.number, self._numbers = self._numbers, self._numbers + 1
        self._queue.append(request)
        return request

    def _may_name(self, depth: int) -> None:
        """From the first request that names its depth on, passes look at what requests ask for."""
        allowed = [*self._points, self.model.depth]
        if depth not in allowed:
            raise ArgumentError(f"Engine: depth must name an exit point or the top, one of {allowed}, got {depth}")
        if self._named is None:
            self._named = torch.full((self.session.pages.sequences,), -1, dtype=torch.int32, device=self.model.device)
            self.session.name_depths(self._named)

    def cancel(self, request: Request) -> None:
        """Stop a request and give back what it holds; the tokens it has stay. Harmless when it is done."""
        if request.done:
            return
        if request in self._queue:
            self._queue.remove(request)
        elif self._runs(request):
            self._drop(request)
        else:
            raise ArgumentError("Engine: cannot cancel a request that is not this engine's")
        request.state = "cancelled"

    def _runs(self, request: Request) -> bool:
        return self._running.get(request.slot) is request

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._running)

    def stream(self) -> Iterator[Event]:
        """Steps until nothing is left, and yields every token as it comes, but those of requests cancelled meanwhile."""
        while self.busy:
            for event in self.step():
                if event.request.state != "cancelled":
                    yield event

    # -- one pass -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Let requests join, run one pass, and return the tokens it made (none when rows only came to wait).

        Should it raise (out of memory, an interrupt), every request that was running is queued again, and its rows will be run
        again: nothing is left half done.
        """
        try:
            return self._step()
        except BaseException:
            for request in list(self._running.values()):
                self._requeue(request)
            raise

    def _step(self) -> list[Event]:
        self._admit()
        self._make_room()
        self._build()
        fresh = [request for request in self._running.values() if not (request.owed or request.waits_at)]
        if not fresh and not any(request.waits_at for request in self._running.values()):
            return []
        going = self._going(fresh)
        hold = frozenset(self._points) - going
        flushed = [request for request in self._running.values() if request.waits_at and request.waits_at in going]
        present = np.isin(self._parked.seq, [request.slot for request in [*fresh, *flushed]])
        taken, others = self._parked.where(present), self._parked.where(~present)
        self._note(flushed)
        seq = [request.slot for request in fresh]
        pos = [request.position for request in fresh]
        step = [len(request.tokens) + len(request.unverified) for request in fresh]
        may_leave = torch.ones(len(fresh) + len(taken), dtype=torch.bool)
        if self.session.kv_policy == "recompute":
            free = {slot: self._may_leave(request) for slot, request in self._running.items()}
            may_leave = torch.tensor([free[slot] for slot in [*seq, *taken.seq.tolist()]], dtype=torch.bool)
            self.counts.kept += sum(not (request.lossless or free[request.slot]) for request in fresh)
        tokens = torch.tensor([request.newest for request in fresh], dtype=torch.int64)
        result = self.session.run(seq, pos, tokens=tokens, step=step, may_leave=may_leave, parked=taken, hold=hold)
        self.counts.passes += 1
        self.work.add(result, 0)
        if result.hidden is not None:  # the pass may have left rows between layers
            others = self.session.left(result, seq, pos, step, taken) + others
        self._parked = others
        makers = [*fresh, *(self._running[slot] for slot in taken.seq[taken.wants].tolist())]
        rows = [*range(len(fresh)), *(len(fresh) + np.flatnonzero(taken.wants)).tolist()]
        parked = self._behind(taken, len(fresh))
        return self._tokens(makers, rows, parked, result)

    def _may_leave(self, request: Request) -> bool:
        """Under `recompute`: few enough of its tokens wait, or it names an exit, so that none of its rows will want them."""
        if request.lossless:
            return request.may_draft
        named = request.depth is not None and request.depth < self.model.depth
        return named or request.early < self.session.pending

    @staticmethod
    def _behind(taken: Parked, fresh: int) -> dict[int, list[int]]:
        """Per slot, the rows of a pass that were taken up behind a row of their request, by position."""
        found: dict[int, list[tuple[int, int]]] = {}
        for at, (slot, pos, wants) in enumerate(zip(taken.seq.tolist(), taken.pos.tolist(), taken.wants.tolist(), strict=True)):
            if not wants:
                found.setdefault(slot, []).append((pos, fresh + at))
        return {slot: [row for _, row in sorted(rows)] for slot, rows in found.items()}

    def _going(self, fresh: list[Request]) -> frozenset[int]:
        """Boundaries where rows go on in this pass."""
        now = time.monotonic()
        found = []
        for boundary in self._points:
            waits = [request.since for request in self._running.values() if request.waits_at == boundary]
            passes = max((self.counts.passes - since for since, _ in waits), default=0)
            seconds = max((now - began for _, began in waits), default=0.0)
            found.append(Waiting(boundary, len(waits), passes, seconds))
        rates = {point: self.counts.left.get(point, 0) / judged for point, judged in self.counts.judged.items()}
        context = sum(request.position + 1 for request in self._running.values()) // len(self._running)
        going = frozenset(self.rule(found, Moment(len(fresh), len(self._running), context, rates))) & frozenset(self._points)
        going |= {each.boundary for each in found if each.passes >= self.longest_wait}
        if not fresh and not any(each.rows for each in found if each.boundary in going):
            going |= {max(found, key=lambda each: each.passes if each.rows else -1).boundary}
        return going

    def _note(self, flushed: list[Request]) -> None:
        """Count requests whose rows go on."""
        counts = self.counts
        for boundary in {request.waits_at for request in flushed}:
            counts.flushes[boundary] = counts.flushes.get(boundary, 0) + 1
        for request in flushed:
            counts.flushed[request.waits_at] = counts.flushed.get(request.waits_at, 0) + 1
            counts.longest_wait = max(counts.longest_wait, counts.passes - request.since[0])

    def _tokens(self, makers: list[Request], rows: list[int], parked: dict[int, list[int]], result: Result) -> list[Event]:
        """Give every maker its token, its draft or what verification leaves of its drafts, or note that it waits."""
        depths = result.exit_layer.tolist()
        held = [False] * len(depths) if result.held is None else result.held.tolist()
        self._judged(makers, [depths[row] for row in rows], [held[row] for row in rows])
        now = time.monotonic()
        due = []
        for request, row in zip(makers, rows, strict=True):
            if held[row]:
                if request.waits_at != depths[row]:
                    request.since, request.waits_at = (self.counts.passes, now), depths[row]
            else:
                request.waits_at = 0
                due.append((request, row))
        if not due:
            return []
        top = self.model.depth
        groups = [
            [*parked.get(request.slot, []), row] if request.lossless and depths[row] == top else [row] for request, row in due
        ]
        chosen = torch.tensor([row for group in groups for row in group], device=result.ready.device)
        ready = result.ready[chosen]
        if all(request.plain for request, _ in due):  # nobody looks at logits
            logits, best = ready.new_empty(len(ready), 0), self.model.argmax(ready).tolist()
        else:
            logits = self.model.logits(ready)
            best = most_likely(logits).tolist()
        events = []
        begin = 0
        for (request, row), group in zip(due, groups, strict=True):
            part, begin = slice(begin, begin + len(group)), begin + len(group)
            if self._runs(request):  # otherwise another one's processor cancelled it
                events += self._made(request, depths[row], logits[part], best[part])
        return events

    def _made(self, request: Request, depth: int, logits: torch.Tensor, best: list[int]) -> list[Event]:
        """What a request makes of the logits [rows, V] of its row that left at `depth`, and of rows that it verifies."""
        drafting = request.lossless and depth < self.model.depth
        drafts = len(request.unverified)
        made: list[tuple[int, int]] = []
        try:
            if drafting:
                request.draft(logits[0], best[0], depth)
            elif request.lossless:
                made = request.verify(logits, best, depth)
            else:
                made = [(best[0] if request.plain else request.choose(logits[0]), depth)]
        except Exception as error:  # a user's function: its request fails, the others go on
            request.error = error
        if not self._runs(request) or (drafting and request.error is None):
            return []
        if request.error is not None:
            self._drop(request)
            request.state = "failed"
            return [Event(request, None, depth, True)]
        events: list[Event] = []
        for token, left in made:
            request.tokens.append(token)
            request.exit_layers.append(left)
            request.early = request.early + 1 if left < self.model.depth else 0
            request.accepted += len(events) < min(drafts, len(made) - 1)
            self.work.rows += 1
            over = token in request.end_ids or len(request.tokens) == request.max_new_tokens
            events.append(Event(request, token, left, over))
            if over:
                self._drop(request)
                request.state = "finished"
                return events
        if request.lossless:
            self.session.pages.truncate(request.slot, request.position)
        return events

    def _judged(self, makers: list[Request], depths: list[int], held: list[bool]) -> None:
        """Rates for rules: rows that came past each exit point in this pass, and those that left there."""
        for request, depth, waits in zip(makers, depths, held, strict=True):
            for point in self._points:
                if request.waits_at < point <= depth:
                    self.counts.judged[point] = self.counts.judged.get(point, 0) + 1
            if depth < self.model.depth and not waits:
                self.counts.left[depth] = self.counts.left.get(depth, 0) + 1

    # -- slots and pages ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Queued requests take free slots while there are pages for them."""
        while self._queue:
            slot = next((slot for slot in range(self.session.pages.sequences) if slot not in self._running), None)
            request = self._queue[0]
            pages = self.session.pages
            # A page for each that runs: otherwise who joins would take what the others need next, and be put back at once.
            if slot is None or pages.needed(slot, request.position + 1) + len(self._running) > pages.available:
                return
            self._queue.pop(0)
            request.slot, request.state, request.waits_at, request.owed = slot, "running", 0, request.position
            self._running[slot] = request
            pages.reserve(slot, request.position + 1)
            if self._named is not None:
                self._named[slot] = -1 if request.depth is None else request.depth

    def _build(self) -> None:
        """K,V of requests that join, `chunk` rows at most: the prompt's at full depth, those of tokens as they were judged."""
        budget = self.session.chunk
        for request in sorted(self._running.values(), key=lambda each: each.number):
            if not request.owed or budget <= 0:
                continue
            ids, prompt = request.ids[:-1], request.prompt.shape[0]
            begin = ids.shape[0] - request.owed
            part = torch.arange(begin, min(begin + budget, ids.shape[0]))
            judged = part >= prompt - 1
            exact = self.session.kv_policy in EXACT or not bool(judged.any())
            result = self.session.run(
                torch.full_like(part, request.slot), part, tokens=ids[part], step=(part - prompt + 1).clamp_min(0),
                may_leave=False if exact else judged,
            )  # fmt: skip
            (self.repeated if request.tokens else self.prompt_work).add(result, len(part))
            request.owed -= len(part)
            budget -= len(part)

    def _make_room(self) -> None:
        """Pages for the next row of every running request, or, latest first, requests give theirs back."""
        for request in sorted(self._running.values(), key=lambda each: each.number):
            while request.state == "running":
                try:
                    self.session.pages.reserve(request.slot, request.position + 1)
                    break
                except PagesFullError:
                    self._preempt(max(self._running.values(), key=lambda each: each.number))

    def _preempt(self, request: Request) -> None:
        self._requeue(request)
        request.preempted += 1
        self.counts.preempted += 1

    def _requeue(self, request: Request) -> None:
        self._drop(request)
        request.state, request.waits_at = "queued", 0
        self._queue.insert(sum(each.number < request.number for each in self._queue), request)

    def _drop(self, request: Request) -> None:
        """Take a request out of its slot."""
        del self._running[request.slot]
        self.session.pages.release(request.slot)
        self._parked = self._parked.where(self._parked.seq != request.slot)
        request.slot = -1
        request.forget()
