"""A request: a prompt, what it asks for, and what it has got so far."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError


@dataclass(eq=False)
class Request:
    """One prompt in an engine.

    Args:
        prompt: int64 [t], token ids, t >= 1.
        max_new_tokens: tokens after which it ends.
        ends: id or ids that end it; the end token is part of its tokens.
        processors: transformers' LogitsProcessorList (or any callable of (ids [1, t], logits [1, V])), for this request alone.
            One that raises fails its own request, with the exception in `error`.
        sample: draw tokens instead of taking the likeliest.
        seed: of the draws; a request's draws do not depend on what runs beside it.
    """

    prompt: Tensor
    max_new_tokens: int = 128
    ends: int | Iterable[int] = ()
    processors: Any = None
    sample: bool = False
    seed: int = 0

    #: Generated so far, and the boundary where the row behind each token left (the number of layers: it reached the top).
    tokens: list[int] = field(default_factory=list, init=False)
    exit_layers: list[int] = field(default_factory=list, init=False)
    #: queued, running, finished, cancelled or failed.
    state: str = field(default="queued", init=False)
    #: Why it failed.
    error: Exception | None = field(default=None, init=False)
    #: Times that its pages were taken away and its rows run again.
    preempted: int = field(default=0, init=False)
    # -- the engine's own ---------------------------------------------------------------------------------------------
    number: int = field(default=-1, init=False)
    slot: int = field(default=-1, init=False)
    #: Tokens in a row that left early: under `recompute` they bound what is parked.
    early: int = field(default=0, init=False)
    #: Pass and time at which its newest row began to wait, and where; boundary 0: it does not wait.
    since: tuple[int, float] = field(default=(0, 0.0), init=False)
    waits_at: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.prompt = torch.as_tensor(self.prompt).detach().cpu().clone()  # the caller may use the buffer again
        if self.prompt.dim() != 1 or self.prompt.shape[0] < 1 or self.prompt.dtype != torch.int64:
            raise ArgumentError(
                f"Request: prompt must be int64 [t] with t >= 1, got {self.prompt.dtype} {list(self.prompt.shape)}"
            )
        if self.max_new_tokens < 1:
            raise ArgumentError(f"Request: max_new_tokens must be at least 1, got {self.max_new_tokens}")
        try:
            given = [self.ends] if isinstance(self.ends, int) else self.ends
            self.end_ids = frozenset(operator.index(each) for each in given)
        except TypeError:
            raise ArgumentError(f"Request: ends must be an id or several, got {self.ends!r}") from None
        self._generator = torch.Generator().manual_seed(self.seed) if self.sample else None

    @property
    def ids(self) -> Tensor:
        """int64 [t + tokens], prompt and tokens."""
        return torch.cat([self.prompt, torch.tensor(self.tokens, dtype=torch.int64)])

    @property
    def position(self) -> int:
        """Of the newest row: the one that makes the next token."""
        return self.prompt.shape[0] - 1 + len(self.tokens)

    @property
    def newest(self) -> int:
        return self.tokens[-1] if self.tokens else int(self.prompt[-1])

    @property
    def done(self) -> bool:
        return self.state in ("finished", "cancelled", "failed")

    def choose(self, logits: Tensor) -> int:
        """The next token from its row's logits fp32 [V]."""
        scores = logits[None]
        if self.processors is not None:
            scores = self.processors(self.ids[None].to(logits.device), scores.clone())
        if self._generator is None:
            return int(scores.argmax())
        return int(torch.multinomial(torch.softmax(scores[0].float().cpu(), dim=-1), 1, generator=self._generator))
