"""Requests that join and leave: sequences of one session, decoded together, slots and pages taken again by the next ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dyndepth.exits import Exits
from dyndepth.runtime.bind import bind
from dyndepth.runtime.session import DEFAULT_PAGE_SIZE, Session


@dataclass(frozen=True)
class Request:
    """A prompt (ids [t], t >= 2) that wants at most `new_tokens` tokens and is there from step `arrives` on."""

    prompt: Tensor
    new_tokens: int
    arrives: int

    @property
    def positions(self) -> int:
        """K,V it can need; the last new token is not run."""
        return len(self.prompt) + self.new_tokens - 1


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    #: Layers that every token ran.
    layers: list[int] = field(default_factory=list)


@dataclass
class _Running:
    request: Request
    answer: Answer
    pages: int


class Pool:
    """`slots` sequences of up to `capacity` positions over `pages` pages, fewer than all of them could need at once.

    A request waits until there is a slot and pages for the longest it can get; it is prefilled when it joins, and its pages
    are released the step after which it ends.
    """

    def __init__(self, causal_lm: Any, exits: Exits | None, ends: Sequence[int], slots: int, capacity: int, pages: int) -> None:
        self.model, self.ends = bind(causal_lm), frozenset(ends)
        self.session = Session(self.model, [capacity] * slots, exits, pages=pages, first=[0] * slots)
        self._running: dict[int, _Running] = {}
        self.slots = slots

    @torch.no_grad()
    def run(self, requests: Sequence[Request], tick: Callable[[], None] = lambda: None) -> list[Answer]:
        """Answers in the order of the requests; `tick` is called after every step. Raises if one can never be served."""
        answers = [Answer() for _ in requests]
        waiting = sorted(zip(requests, answers, strict=True), key=lambda pair: pair[0].arrives)
        step = 0
        while waiting or self._running:
            while waiting and waiting[0][0].arrives <= step and self._join(*waiting[0]):
                waiting.pop(0)
            if self._running:
                self._step()
            elif waiting[0][0].arrives <= step:
                raise RuntimeError(
                    f"a request of {waiting[0][0].positions} positions can never be served: {self.session.pages.free} of "
                    f"{self.session.pages.total} pages are free and nobody runs"
                )
            step += 1
            tick()
        return answers

    def _join(self, request: Request, answer: Answer) -> bool:
        """Prefills the request into a free slot; False where it has to wait."""
        wanted = -(-request.positions // DEFAULT_PAGE_SIZE)
        promised = sum(
            one.pages - -(-self.session.pages.length(slot) // DEFAULT_PAGE_SIZE) for slot, one in self._running.items()
        )
        free = [slot for slot in range(self.slots) if slot not in self._running]
        if not free or wanted > self.session.pages.free - promised:
            return False
        self.session.prefill([request.prompt[:-1]], self.session.work(), first=free[0])
        self._running[free[0]] = _Running(request, answer, wanted)
        return True

    def _step(self) -> None:
        """One token of every running request."""
        slots = sorted(self._running)
        running = [self._running[slot] for slot in slots]
        made = [len(one.answer.tokens) for one in running]
        last = [one.answer.tokens[-1] if one.answer.tokens else int(one.request.prompt[-1]) for one in running]
        positions = [len(one.request.prompt) - 1 + count for one, count in zip(running, made, strict=True)]
        result = self.session.run(slots, positions, tokens=torch.tensor(last), step=made)
        tokens = self.model.argmax(result.ready).tolist()
        for slot, one, token, layers in zip(slots, running, tokens, result.layers_run.tolist(), strict=True):
            one.answer.tokens.append(token)
            one.answer.layers.append(layers)
            if token in self.ends or len(one.answer.tokens) == one.request.new_tokens:
                self.session.pages.release(slot)
                del self._running[slot]


def schedule(prompts: Sequence[Tensor], most: int, seed: int, most_new: int) -> list[Request]:
    """The prompts in bursts: up to `most` / 2 arrive together, then a pause. Seeded, so that every round is the same."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    requests, at, burst = [], 0, 0
    for prompt in prompts:
        if burst == 0:
            burst, at = number(1, max(1, most // 2)), at + number(0, 8)
        burst -= 1
        requests.append(Request(prompt, number(1, most_new), at))
    return requests
