"""Early exit as the papers' code runs it: layer after layer for all, and out when the last sample of the batch is sure.

Nothing is moved. With one sample this is the loop of PABEE, DeeBERT, COST-EFF and LGViT; with more it is CALM's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dyndepth.encoders import DynamicEncoder, SampleView
from dyndepth.encoders.family import pack
from dyndepth.encoders.samples import Samples
from dyndepth.ops.exit_stats import stats_of_logits


@torch.no_grad()
def together(encoder: DynamicEncoder, inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], int]:
    """Logits per sample ([classes], or [frames, classes]) in the caller's order, and the layers that all of them ran.

    The batch leaves at the first exit where each sample would, by the exits' own criteria and thresholds.
    """
    family = encoder.family
    samples = pack(family.embed(**family.given(inputs)), packed_layout=False)
    points = {point.leave: point for point in encoder.exits}
    carried: dict[str, Tensor] = {}
    previous: Tensor | None = None
    for layer in range(encoder.depth):
        samples = replace(family.step(layer, samples), boundary=layer + 1)
        if layer + 1 not in points:
            continue
        point = points[layer + 1]
        answers = point.head(samples, family.finish)
        pooled = samples.pooled(point.head.pooling) if point.criterion.needs_previous else samples.hidden[:, 0]
        view = _view(samples, answers, pooled, previous, carried, encoder)
        threshold = torch.full((samples.count,), point.threshold, device=pooled.device)
        if bool(point.criterion.leaves(view, threshold).all()):
            return _apart(samples, answers, encoder.answers_per_token(point.head)), layer + 1
        carried, previous = view.carried, pooled
    return _apart(samples, encoder.final_answers(samples), bool(encoder.per_token)), encoder.depth


def _view(
    samples: Samples,
    answers: Tensor,
    pooled: Tensor,
    previous: Tensor | None,
    carried: dict[str, Tensor],
    encoder: DynamicEncoder,
) -> SampleView:
    stats: Any = functools.cache(lambda: stats_of_logits(answers))
    return SampleView(
        hidden=pooled, seq=samples.ids, step=torch.zeros_like(samples.ids), previous=previous, stats=stats, depth=None,
        leave=samples.boundary, layers=encoder.depth, carried=carried, answers=lambda: answers, reduce=samples.reduce,
        lengths=samples.lengths, classes=answers.shape[-1],
    )  # fmt: skip


def _apart(samples: Samples, answers: Tensor, per_token: bool) -> list[Tensor]:
    parts = answers.split(samples.lengths.tolist()) if per_token else answers.unbind()
    order = torch.argsort(samples.ids).tolist()
    return [parts[at] for at in order]
