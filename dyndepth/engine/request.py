"""A request: a prompt, what it asks for, and what it has got so far."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.ops import accept_drafts
from dyndepth.runtime.speculate import DEFAULT_DRAFTS
from dyndepth.runtime.stops import refuse_stateful

MODES = ("dynamic", "lossless")


@dataclass(frozen=True)
class Draft:
    """A token that an early exit said, not verified yet."""

    token: int
    #: Boundary where its row left, and the distribution fp32 [V] that it was drawn from; None: it was the likeliest.
    at: int
    chances: Tensor | None


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
        mode: `dynamic`: tokens of rows that leave early are final. `lossless`: they are drafts, which the rows that made them
            verify when they go on to the top (as dyndepth.generate has it); the engine must run kv="recompute".
        drafts: with `lossless`, drafts before they are verified.
        depth: the exit point where all of its tokens leave (the number of layers: the top); None lets criteria decide.
    """

    prompt: Tensor
    max_new_tokens: int = 128
    ends: int | Iterable[int] = ()
    processors: Any = None
    sample: bool = False
    seed: int = 0
    mode: str = "dynamic"
    drafts: int = DEFAULT_DRAFTS
    depth: int | None = None

    #: Generated so far, and the boundary where the row behind each token left (the number of layers: it reached the top).
    tokens: list[int] = field(default_factory=list, init=False)
    exit_layers: list[int] = field(default_factory=list, init=False)
    #: queued, running, finished, cancelled or failed.
    state: str = field(default="queued", init=False)
    #: Why it failed.
    error: Exception | None = field(default=None, init=False)
    #: Times that its pages were taken away and its rows run again.
    preempted: int = field(default=0, init=False)
    #: With `lossless`: tokens drafted and verified, and those of them that held and are among its tokens.
    drafted: int = field(default=0, init=False)
    accepted: int = field(default=0, init=False)
    # -- the engine's own ---------------------------------------------------------------------------------------------
    number: int = field(default=-1, init=False)
    slot: int = field(default=-1, init=False)
    #: Tokens in a row that left early: under `recompute` they bound what is parked.
    early: int = field(default=0, init=False)
    #: Pass and time at which its newest row began to wait, and where; boundary 0: it does not wait.
    since: tuple[int, float] = field(default=(0, 0.0), init=False)
    waits_at: int = field(default=0, init=False)
    #: Rows before the newest whose K,V are not there yet: it is joining.
    owed: int = field(default=0, init=False)
    #: Drafts behind its tokens.
    unverified: list[Draft] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.prompt = torch.as_tensor(self.prompt).detach().cpu().clone()  # the caller may use the buffer again
        if self.prompt.dim() != 1 or self.prompt.shape[0] < 1 or self.prompt.dtype != torch.int64:
            raise ArgumentError(
                f"Request: prompt must be int64 [t] with t >= 1, got {self.prompt.dtype} {list(self.prompt.shape)}"
            )
        if self.mode not in MODES:
            raise ArgumentError(f"Request: mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.drafts < 1:
            raise ArgumentError(f"Request: drafts must be at least 1, got {self.drafts}")
        if self.lossless and isinstance(self.processors, Iterable):
            refuse_stateful(self.processors)
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
        return self.prompt.shape[0] - 1 + len(self.tokens) + len(self.unverified)

    @property
    def newest(self) -> int:
        if self.unverified:
            return self.unverified[-1].token
        return self.tokens[-1] if self.tokens else int(self.prompt[-1])

    @property
    def lossless(self) -> bool:
        return self.mode == "lossless"

    @property
    def may_draft(self) -> bool:
        """With `lossless`: its next row may leave early, and there will be room for the token that verifies it."""
        return len(self.unverified) < min(self.drafts, self.max_new_tokens - len(self.tokens) - 1)

    @property
    def done(self) -> bool:
        return self.state in ("finished", "cancelled", "failed")

    @property
    def plain(self) -> bool:
        """Its tokens are the likeliest as the model has them: nobody needs its logits."""
        return self.processors is None and self._generator is None

    def choose(self, logits: Tensor) -> int:
        """The next token from its row's logits fp32 [V]."""
        return self._drawn(self._scores(logits, 0))[0]

    def draft(self, logits: Tensor, best: int, at: int) -> None:
        """Note the token that a row which left at boundary `at` says; `best` is the arg max of its logits fp32 [V]."""
        if self.plain:
            self.unverified.append(Draft(best, at, None))
            return
        token, chances = self._drawn(self._scores(logits, len(self.unverified)))
        self.unverified.append(Draft(token, at, chances))

    def verify(self, logits: Tensor, best: list[int], top: int) -> list[tuple[int, int]]:
        """Tokens and where their rows left, from the full model's logits fp32 [drafts + 1, V] of the rows behind the drafts.

        Drafts as far as they hold, and one token more, of the model's `top`. Forgets the drafts.
        """
        drafts, self.unverified = self.unverified, []
        tokens = torch.tensor([[draft.token for draft in drafts]], dtype=torch.int64)
        count = torch.tensor([len(drafts)], dtype=torch.int32)
        if self._generator is None:
            if not self.plain:
                said = [draft.token for draft in drafts]
                best = [int(self._scores(row, said[:j]).argmax()) for j, row in enumerate(logits)]
            kept, last = accept_drafts(tokens, count, torch.tensor([best]))
        else:
            said = [draft.token for draft in drafts]
            rows = [torch.softmax(self._scores(row, said[:j])[0].float().cpu(), dim=-1) for j, row in enumerate(logits)]
            had = [draft.chances for draft in drafts if draft.chances is not None]
            luck = torch.rand(1, len(rows), generator=self._generator)
            given = torch.stack(had)[None] if had else rows[0].new_empty(1, 0, rows[0].shape[0])
            kept, last = accept_drafts(tokens, count, torch.stack(rows)[None], draft_probs=given, uniforms=luck)
        self.drafted += len(drafts)
        return [*((draft.token, draft.at) for draft in drafts[: int(kept)]), (int(last), top)]

    def _scores(self, logits: Tensor, drafts: int | list[int]) -> Tensor:
        """Processed scores fp32 [1, V] of a row behind its first so many drafts (or these)."""
        scores = logits[None]
        if self.processors is None:
            return scores
        said = [draft.token for draft in self.unverified[:drafts]] if isinstance(drafts, int) else drafts
        ids = torch.cat([self.ids, torch.tensor(said, dtype=torch.int64)])
        return torch.as_tensor(self.processors(ids[None].to(logits.device), scores.clone()))

    def _drawn(self, scores: Tensor) -> tuple[int, Tensor | None]:
        """A token and, where it was drawn, from what."""
        if self._generator is None:
            return int(scores.argmax()), None
        chances = torch.softmax(scores[0].float().cpu(), dim=-1)
        return int(torch.multinomial(chances, 1, generator=self._generator)), chances
