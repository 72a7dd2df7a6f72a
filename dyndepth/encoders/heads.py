"""Exit heads of encoders: what turns the samples at a boundary into answers.

A head is called as `head(samples, finish)`, `finish` being the model's own final norm and classifier, and gives logits
[n, classes], or [tokens, classes] in packed order if it answers per token (CTC). Heads that end in one linear give its input
as `features`, so that `exit_stats` judges them without storing logits, and answers are computed for those that leave only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dyndepth.encoders.samples import POOLINGS, Samples
from dyndepth.errors import ArgumentError, ExitsError

Finish = Callable[[Samples], Tensor]


class SampleHead(nn.Module):
    """Base. `kind` names it in files; `settings` are the JSON arguments that make it again."""

    kind: ClassVar[str] = ""
    #: Answers per token instead of per sample; None: as the model does.
    per_token: ClassVar[bool | None] = False

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    @property
    def classes(self) -> int | None:
        """Width of the answers; None where the model decides."""
        return None

    @property
    def width(self) -> int | None:
        """Width of the residuals it reads; None for any."""
        return None

    @property
    def pooling(self) -> str:
        """How criteria that compare residuals see a sample."""
        return "first"

    @property
    def tokens(self) -> int:
        """Tokens that a sample must have for it to be read; distillation heads read two."""
        return 2

    def features(self, samples: Samples) -> Tensor | None:
        """Input of `last`, [n, f] or [tokens, f]; None for heads that do not end in one linear."""
        return None

    @property
    def last(self) -> nn.Linear | None:
        return None

    def forward(self, samples: Samples, finish: Finish) -> Tensor:
        features = self.features(samples)
        if features is None or self.last is None:
            raise NotImplementedError
        return self.last(features)


class ModelHead(SampleHead):
    """The model's own final norm, pooler and classifier, read early: the model cut off at this layer."""

    kind = "model"
    per_token = None

    def forward(self, samples: Samples, finish: Finish) -> Tensor:
        return finish(samples)


class ReadoutHead(SampleHead):
    """Base of heads that end in `out`, one linear from as many features as residuals are wide."""

    out: nn.Linear

    @property
    def classes(self) -> int:
        return self.out.out_features

    @property
    def width(self) -> int:
        return self.out.in_features

    @property
    def last(self) -> nn.Linear:
        return self.out


class LinearHead(ReadoutHead):
    """`out(act(dense(norm(pool(h)))))`, each of norm and dense optional.

    With `dense` (tanh) on the first token this is BERT's pooler and classifier (DeeBERT, PABEE, COST-EFF); with `norm` and no
    dense it is JEI-DNN's inference module; `pooling="mean"` serves sentence encoders and speech classification.

    Args:
        width, classes: of the residuals and the answers.
        pooling: first, mean or max over a sample's tokens.
        dense: a square linear and tanh before the classifier.
        norm: a LayerNorm on the pooled vector.
    """

    kind = "linear"

    def __init__(self, width: int, classes: int, *, pooling: str = "first", dense: bool = False, norm: bool = False) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ExitsError(f"linear head: pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        self._pooling = pooling
        self.norm = nn.LayerNorm(width) if norm else None
        self.dense = nn.Linear(width, width) if dense else None
        self.out = nn.Linear(width, classes)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "width": self.out.in_features, "classes": self.out.out_features, "pooling": self._pooling,
            "dense": self.dense is not None, "norm": self.norm is not None,
        }  # fmt: skip

    @property
    def pooling(self) -> str:
        return self._pooling

    def features(self, samples: Samples) -> Tensor:
        pooled = samples.pooled(self._pooling)
        if self.norm is not None:
            pooled = self.norm(pooled)
        return pooled if self.dense is None else torch.tanh(self.dense(pooled))


class CtcHead(ReadoutHead):
    """One linear per frame, log-softmax left to who reads it (early-exit ASR, Wright et al. 2023): answers per token."""

    kind = "ctc"
    per_token = True

    def __init__(self, width: int, classes: int, *, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else None
        self.out = nn.Linear(width, classes)

    @property
    def settings(self) -> dict[str, Any]:
        return {"width": self.out.in_features, "classes": self.out.out_features, "norm": self.norm is not None}

    @property
    def pooling(self) -> str:
        return "mean"

    def features(self, samples: Samples) -> Tensor:
        tokens = samples.tokens()
        return tokens if self.norm is None else self.norm(tokens)


HEADS: dict[str, type[SampleHead]] = {head.kind: head for head in (ModelHead, LinearHead, CtcHead)}


def register_head(head: type[SampleHead]) -> type[SampleHead]:
    """Decorator: files may name this kind of head."""
    if not head.kind or head.kind in HEADS:
        raise ArgumentError(f"register_head: kind must be new and not empty, got {head.kind!r}")
    HEADS[head.kind] = head
    return head
