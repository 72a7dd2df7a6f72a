"""Measured agreement: teacher-forced passes with real decisions and real back-fill, against the full model's arg max."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dyndepth.exits import Exits
from dyndepth.exits.criteria import Criterion, View
from dyndepth.runtime.score import Scored, score


@dataclass(frozen=True)
class Lottery(Criterion):
    """Rows leave by lot, the same rows in every run: a row draws one band (see `draw`) and leaves where it is band `number`."""

    kind: ClassVar[str] = "lottery"
    scored: ClassVar[bool] = False
    known: ClassVar[bool] = True
    share: float = 0.3
    number: int = 0
    seed: int = 0

    def leaves(self, view: View, threshold: Tensor) -> Tensor:
        return draw(view.seq.long(), view.step.long(), self.share, self.seed) == self.number


def draw(seq: Tensor, step: Tensor, share: float, seed: int) -> Tensor:
    """int64: the number of the band a row drew; each number from 0 up has the chance `share`.

    A fixed function of its arguments: multiplicative hashing, stirred twice; int64 wraps by design.
    """
    x = seq * 0x9E3779B1 + step * 0x85EBCA77 + (seed + 1) * 0xC2B2AE3D
    for _ in range(2):
        x = (x ^ (x >> 15)) * 0x2C1B3C6D & 0xFFFFFFFF
    uniform = (x ^ (x >> 12)).double() / 2.0**32
    return (uniform / share).floor().long()


@dataclass(frozen=True)
class Sample:
    """Sequences with the full model's answers."""

    causal_lm: Any
    tokens: list[Tensor]
    start: list[int]
    #: int64 [rows] and bool [rows]: the full model's arg max, and which rows generation would judge.
    answers: Tensor
    judged: Tensor

    @classmethod
    def of(cls, causal_lm: Any, tokens: Sequence[Tensor], start: Sequence[int]) -> Sample:
        full = score(causal_lm, tokens, None, start=start)
        return cls(causal_lm, list(tokens), list(start), full.argmax(), full.judged)

    def head(self, rows: int) -> Sample:
        """The first sequences that together have at least `rows` judged rows."""
        taken, count, total = 0, 0, 0
        for tokens, start in zip(self.tokens, self.start, strict=True):
            taken, count, total = taken + 1, count + tokens.shape[0] - start, total + tokens.shape[0]
            if count >= rows:
                break
        return Sample(self.causal_lm, self.tokens[:taken], self.start[:taken], self.answers[:total], self.judged[:total])

    def run(self, exits: Exits, kv: str | None = None) -> Measured:
        scored = score(self.causal_lm, self.tokens, exits, start=self.start, kv=kv)
        return Measured(scored, scored.argmax() == self.answers, self.judged)


@dataclass(frozen=True)
class Measured:
    """Agreement with the full model, row by row."""

    scored: Scored
    agrees: Tensor  # bool [rows]
    judged: Tensor  # bool [rows]

    @property
    def skipped(self) -> Tensor:
        """bool [rows]: judged rows that left out a layer."""
        return self.judged & (self.scored.layers_run < self.scored.model.depth)

    @property
    def agreement(self) -> float:
        """Share of judged rows whose arg max is the full model's."""
        return float(self.agrees[self.judged].float().mean())

    @property
    def rows_x_layers(self) -> float:
        """Share of rows x layers that judged rows ran."""
        return self.scored.work.fraction
