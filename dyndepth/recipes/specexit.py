"""SpecExit (arXiv 2509.24248): a sequence stops thinking when it is sure, far enough and nearly done.

Not layers but tokens are left out: three signals per new token (confidence of the answer, progress of the reasoning, tokens
that remain) are smoothed per row, and at the end of a reasoning step a row whose signals all agree is made to answer. Rows of
a batch decide each for themselves. `Answer` is a logits processor, `Stop` a stopping criterion; both work with
`custom_generate=dyndepth.generate` and with transformers' own generate. specexit_probe.py fits the signals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from dyndepth.errors import ArgumentError
from dyndepth.recipes.specexit_probe import Probe, Trace, fit, traces

__all__ = ["SEPARATORS", "Answer", "Probe", "Rule", "Signals", "Stop", "Trace", "fit", "separators", "traces"]

#: Ends of a reasoning step, as the authors' code lists them; those that a tokenizer makes one token of are looked for.
SEPARATORS = ("\n\n", "\n\n\n", ".\n\n", ".\n\n\n", " \n\n", " \n\n\n")

#: (logits [n, V], tokens made before this one [n]) -> float32 [n, 3]: confidence in [0, 1], progress in [0, 1], tokens that
#: remain. Every row must depend on its own logits alone.
Signals = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """A step is the last one if all three smoothed signals say so. The defaults are the authors'.

    Args:
        confidence, progress: lower bounds, exclusive.
        remain: tokens, upper bound, exclusive.
        alpha: weight of the newest signal in the exponentially weighted mean, which starts with the first one.
    """

    confidence: float = 0.8
    progress: float = 0.3
    remain: float = 200.0
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ArgumentError(f"specexit.Rule: alpha must be in (0, 1], got {self.alpha}")

    def smoothed(self, before: Tensor, now: Tensor) -> Tensor:
        """float32 [n, 3]; rows that have seen nothing are NaN in `before`."""
        return torch.where(before.isnan(), now, self.alpha * now + (1 - self.alpha) * before)

    def holds(self, smoothed: Tensor) -> Tensor:
        """bool [n]; False for rows that have seen nothing."""
        confidence, progress, remain = smoothed.unbind(-1)
        return (confidence > self.confidence) & (progress > self.progress) & (remain < self.remain)


def separators(tokenizer: Any, texts: Iterable[str] = SEPARATORS) -> list[int]:
    """Ids of the texts that are one token; ArgumentError if none is."""
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    found = sorted({each[0] for each in ids if len(each) == 1})
    if not found:
        raise ArgumentError(f"specexit.separators: none of {list(texts)} is one token of this tokenizer")
    return found


class _Watch:
    """State of the rows of one generation: [batch] each, a row touched by its own tokens and logits only."""

    #: Rows are followed by their place in the batch: nothing that asks about single prefixes may use this (runtime/stops.py).
    follows_rows = True
    #: Smoothed signals, float32 [batch, 3], NaN before the first.
    smoothed: Tensor
    #: int64 [batch]: tokens that a row had made when it was stopped, -1 for rows that were not.
    stopped: Tensor
    #: bool [batch]: rows that still think, and those whose newest token ends a step.
    thinking: Tensor
    at_step: Tensor

    def __init__(
        self, signals: Signals, separators: Iterable[int], end: int, *, begin: int | None = None, rule: Rule | None = None
    ) -> None:
        self.signals, self.end, self.begin, self.rule = signals, end, begin, Rule() if rule is None else rule
        self.separators = torch.tensor(sorted(separators), dtype=torch.int64)
        if self.separators.numel() == 0:
            raise ArgumentError("specexit: wanted at least one separator token, got none")
        if end in self.separators or end < 0:
            raise ArgumentError(f"specexit: end must be a token id and no separator, got {end}")
        self._ids: Tensor | None = None

    def _are(self, ids: Tensor) -> bool:
        """The state is that of these sequences int64 [batch, t]."""
        return self._ids is not None and self._ids.shape == ids.shape and torch.equal(self._ids, ids)

    def _advance(self, ids: Tensor) -> None:
        """The sequences are a token longer."""
        self._ids, last = ids.clone(), ids[:, -1]
        self.thinking &= last != self.end
        if self.begin is not None:
            again = last == self.begin
            self.thinking |= again
            self.smoothed[again] = torch.nan
        self.at_step = self.thinking & torch.isin(last, self.separators.to(ids.device))

    def _start(self, ids: Tensor) -> None:
        """New sequences: nothing of theirs was seen."""
        self._ids = ids.clone()
        batch, self.width = ids.shape
        self.smoothed = torch.full((batch, 3), torch.nan, device=ids.device)
        self.at_step = torch.zeros(batch, dtype=torch.bool, device=ids.device)
        self.thinking = torch.ones_like(self.at_step)
        self.stopped = torch.full((batch,), -1, dtype=torch.int64, device=ids.device)
        if self.begin is not None:
            place = torch.arange(1, self.width + 1, device=ids.device)
            begun, ended = ((place * (ids == token)).amax(-1) for token in (self.begin, self.end))
            self.thinking = begun > ended

    def _observe(self, logits: Tensor, made: int) -> None:
        """Signals of logits [batch, V] that the next token of every row is chosen from."""
        now = self.signals(logits, torch.full((logits.shape[0],), made, device=logits.device)).float()
        self.smoothed = torch.where(self.thinking[:, None], self.rule.smoothed(self.smoothed, now), self.smoothed)

    def _decide(self, made: int) -> Tensor:
        """bool [batch]: rows whose newest token ends their last step."""
        stops = self.at_step & self.rule.holds(self.smoothed)
        self.stopped[stops] = made
        self.thinking &= ~stops
        return stops


class Answer(_Watch, LogitsProcessor):
    """After its last step a row gets the token `end` (`</think>`) and goes on to its answer, as in SpecExit.

    `model.generate(..., logits_processor=[Answer(probe, separators(tokenizer), end)])`. With the end-of-sequence token for
    `end`, the row ends there.

    Args:
        signals: a Probe, or any `Signals`.
        separators: token ids that end a step; the rule is asked at no other token.
        end: the token that ends thinking, made by the model or by this. A row is not judged after it.
        begin: the token that begins thinking (`<think>`): a row thinks from there on, in the prompt or in new tokens. None:
            every row thinks from its first new token on.
        rule: thresholds and smoothing.

    `stopped` int64 [batch] says after how many new tokens each row was stopped (-1: not), `smoothed` float32 [batch, 3] what
    it had seen last (of a row that has ended: whatever the runtime goes on with). A call whose sequences are not those of the
    last one, a token longer, starts anew. Logits are those that come here: as the model makes them, unless other processors
    come before. Beam search and `mode="lossless"`, which ask about rows in another order, are not for this.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._are(input_ids[:, :-1]):
            self._advance(input_ids)
        else:
            self._start(input_ids)
        made = input_ids.shape[1] - self.width
        stops = self._decide(made)
        self._observe(scores, made)
        if not bool(stops.any()):
            return scores
        scores = scores.masked_fill(stops[:, None], -torch.inf)
        scores[stops, self.end] = 0.0
        return scores


class Stop(_Watch, StoppingCriteria):
    """After its last step a row's sequence ends: the same decisions as Answer's, without a token more.

    `model.generate(..., stopping_criteria=[Stop(...)], output_scores=True, return_dict_in_generate=True)`: criteria see
    logits as scores only, after all processors, so signals differ from Answer's where sampling changes them. Arguments and
    attributes as Answer's. ArgumentError without scores. Where the model has no end-of-sequence token, transformers goes on
    writing a row that stopped until all have.
    """

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if not scores:
            raise ArgumentError(
                "specexit.Stop: wanted scores (output_scores=True with return_dict_in_generate=True), got none; "
                "specexit.Answer as a logits processor needs none"
            )
        if not self._are(input_ids[:, :-1]):
            self._start(input_ids[:, :-1])
        made = input_ids.shape[1] - self.width
        self._observe(scores[-1].to(input_ids.device), made - 1)
        self._advance(input_ids)
        return self._decide(made)
