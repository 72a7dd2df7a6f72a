"""Calibration requests: prompts, what the full model answers, and what a set of thresholds loses on each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dyndepth.calibration.losses import disagreement, inconsistency
from dyndepth.data import continuations, document, encode
from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits
from dyndepth.runtime.score import score
from dyndepth.runtime.session import Work

#: disagreement: given the full model's text so far, the share of tokens that come out different (decisions and back-fill as
#: in decoding). inconsistency: 1 - ROUGE-L between the free-running continuation and the full model's.
LOSSES = ("disagreement", "inconsistency")
_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Lost:
    """What one configuration lost: a number in [0, 1] per request, and rows x layers it ran (decoding only)."""

    losses: NDArray[np.float64]
    work: Work


class Requests:
    """Independent prompts with the full model's greedy answers, `new_tokens` long or up to the end-of-sequence token."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[str | Tensor],
        tokenizer: Any = None,
        *,
        new_tokens: int = 64,
        batch: int = 16,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        if new_tokens < 1 or batch < 1:
            raise ArgumentError(f"calibrate: new_tokens and batch must be at least 1, got {new_tokens} and {batch}")
        encoded = encode(prompts, tokenizer, "calibrate: prompts", special=True)
        names = [document(prompt) for prompt in encoded]
        for number, name in enumerate(names):
            if encoded[number].shape[0] == 0:
                raise ArgumentError(f"calibrate: prompts[{number}] is empty")
            if names.index(name) < number:
                raise ArgumentError(
                    f"calibrate: prompts[{number}] repeats prompts[{names.index(name)}]; the bound counts independent requests"
                )
        self.model, self.new_tokens, self.batch = model, new_tokens, batch
        self.documents = names
        # Longest first, so that rows of a batch have much the same length; losses come back in the caller's order.
        order = sorted(range(len(encoded)), key=lambda i: -encoded[i].shape[0])
        self.tokens: list[Tensor] = [torch.empty(0)] * len(encoded)
        self.start = [prompt.shape[0] - 1 for prompt in encoded]
        for group in self._groups(order):
            tokens, _ = continuations(model, [encoded[i] for i in group], _UNLIMITED, new_tokens, batch, lambda _: None)
            for i, text in zip(group, tokens, strict=True):
                self.tokens[i] = text
            advance(len(group))
        self._order = order
        self._answers: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def data_hash(self) -> str:
        """SHA-256 over prompts and answers in order."""
        whole = hashlib.sha256()
        for tokens, start in zip(self.tokens, self.start, strict=True):
            whole.update(f"{start}:".encode() + tokens.numpy().tobytes())
        return whole.hexdigest()

    def lost(
        self,
        exits: Exits,
        loss: str = "disagreement",
        kv: str | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Lost:
        """Losses of these exits, one per request in the order of the prompts, measured with the real K,V policy."""
        if loss not in LOSSES:
            raise ArgumentError(f"calibrate: loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        measure = self._forced if loss == "disagreement" else self._free
        losses = np.zeros(len(self))
        work: Work | None = None
        for group in self._groups(self._order):
            found, done = measure(group, exits, kv)
            losses[group] = found
            work = done if work is None else work + done
            advance(len(group))
        if work is None:
            raise ArgumentError("calibrate: there are no prompts")
        return Lost(losses, work)

    @property
    def rounding(self) -> float:
        """Mean disagreement between the full model's own decoding and its teacher-forced arg max: the floor of any loss."""
        shares = []
        for group in self._groups(self._order):
            for i, answer in zip(group, self._full(group), strict=True):
                shares.append(float((answer != self.tokens[i][self.start[i] + 1 :]).float().mean()))
        return float(np.mean(shares))

    def _groups(self, order: Sequence[int]) -> list[list[int]]:
        return [list(order[at : at + self.batch]) for at in range(0, len(order), self.batch)]

    def _full(self, group: Sequence[int]) -> list[Tensor]:
        """The full model's arg max at every answered position, by the same passes that measure; computed once."""
        missing = [i for i in group if i not in self._answers]
        if missing:
            for i, answer in zip(group, self._answered(group, None, None)[0], strict=True):
                self._answers[i] = answer
        return [self._answers[i] for i in group]

    def _answered(self, group: Sequence[int], exits: Exits | None, kv: str | None) -> tuple[list[Tensor], Work]:
        # The last token's row produces nothing that was generated: it is not run.
        tokens, start = [self.tokens[i][:-1] for i in group], [self.start[i] for i in group]
        scored = score(self.model, tokens, exits, start=start, kv=kv)
        parts = scored.argmax().split([text.shape[0] for text in tokens])
        return [part[begin:] for part, begin in zip(parts, start, strict=True)], scored.work

    def _forced(self, group: Sequence[int], exits: Exits, kv: str | None) -> tuple[list[float], Work]:
        full = self._full(group)
        mine, work = self._answered(group, exits, kv)
        return [disagreement(a.tolist(), b.tolist()) for a, b in zip(mine, full, strict=True)], work

    def _free(self, group: Sequence[int], exits: Exits, kv: str | None) -> tuple[list[float], Work]:
        prompts = [self.tokens[i][: self.start[i] + 1] for i in group]
        works: list[Work] = []
        tokens, _ = continuations(
            self.model, prompts, _UNLIMITED, self.new_tokens, self.batch, lambda _: None, works=works, exits=exits, kv=kv
        )
        found = [
            inconsistency(mine[p.shape[0] :].tolist(), self.tokens[i][p.shape[0] :].tolist())
            for i, p, mine in zip(group, prompts, tokens, strict=True)
        ]
        return found, works[0]
