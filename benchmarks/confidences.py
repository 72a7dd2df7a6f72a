"""What `make band-frontier` judges rows by: a router, top-1 probability or margin, the latter also where bands resume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dyndepth.exits import TranslatorHead
from dyndepth.exits.criteria import Criterion, View
from dyndepth.ops import ExitStats, exit_stats
from dyndepth.runtime.bind import Model

CONFIDENCES = ("router", "top-1 probability", "margin")
ROUTER, TOP, MARGIN = CONFIDENCES


@dataclass(frozen=True)
class Confidence(Criterion):
    """Top-1 probability or margin of a readout at a boundary whose band resumes, and so has no head of its own."""

    kind: ClassVar[str] = "confidence"
    model: Any = None
    head: Any = None
    which: str = TOP

    def score(self, view: View) -> Tensor:
        return shown(readout_stats(self.model, self.head, view.hidden), self.which)


def readout_stats(model: Model, head: TranslatorHead, residual: Tensor) -> ExitStats:
    """Statistics of a readout's logits over the whole vocabulary."""
    plain = model.plain_head()
    assert plain is not None
    parts = [exit_stats(head(part, model.finish).contiguous(), plain[0], head_bias=plain[1]) for part in residual.split(512)]
    return ExitStats(*(torch.cat(values) for values in zip(*parts, strict=True)))


def shown(stats: ExitStats, which: str) -> Tensor:
    top = torch.exp(stats.top1 - stats.logsumexp)
    return top if which == TOP else top - torch.exp(stats.top2 - stats.logsumexp)
