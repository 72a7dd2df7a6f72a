"""What the recipes for encoders share: linear heads at many layers, and looks at what they answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dyndepth.encoders import DynamicEncoder, LinearHead, SampleExit, SampleExits, SampleHead, Samples, bind, facts_of
from dyndepth.encoders.exits import prepared
from dyndepth.errors import ArgumentError
from dyndepth.exits.criteria import Criterion
from dyndepth.ops import ExitStats, exit_stats
from dyndepth.ops.exit_stats import stats_of_logits
from dyndepth.training.encoder_states import Everywhere, Inputs, PooledStates, chosen


def layers_for(model: Any, leave: Sequence[int] | None) -> list[int]:
    """The given boundaries, or all below the top."""
    depth = bind(model).depth
    found = list(range(1, depth)) if leave is None else sorted(leave)
    if not found or found[0] < 1 or found[-1] >= depth or len(set(found)) != len(found):
        raise ArgumentError(f"recipe: leave must be different boundaries in [1, {depth}), got {found}")
    return found


def linear_exits(
    model: Any,
    classes: int | None,
    criterion: Callable[[int], Criterion],
    threshold: float,
    recipe: str,
    *,
    leave: Sequence[int] | None = None,
    pooling: str = "first",
    dense: bool = False,
    norm: bool = False,
    one_head: bool = False,
    one_dense: bool = False,
) -> SampleExits:
    """A LinearHead at every boundary, and at the top of a model without a head of its own.

    Args:
        classes: width of the answers; None takes the model's own head's.
        criterion: made for each boundary.
        one_head: the same head at all of them and at the top, in place of a head that the model may have; `one_dense`: the
            same pooler, each its own classifier.
    """
    family = bind(model)
    if classes is None:
        classes = family.classes
    if classes is None:
        raise ArgumentError(f"recipe: {type(model).__name__} has no head of its own, so classes must be given, got None")
    found = layers_for(model, leave)
    own = family.classes is None or one_head
    heads = [LinearHead(family.width, classes, pooling=pooling, dense=dense, norm=norm) for _ in range(len(found) + own)]
    if one_head:
        heads = [heads[0]] * len(heads)
    elif one_dense and dense:
        for head in heads[1:]:
            head.dense = heads[0].dense
    final = heads[-1] if own else None
    exits = [SampleExit(at, head, criterion(at), threshold) for at, head in zip(found, heads, strict=False)]
    return SampleExits(exits, facts_of(model, final), final=final, record={"recipe": recipe})


@torch.no_grad()
def answers(model: Any, exits: SampleExits, inputs: Inputs, *, batch: int = 32) -> Tensor:
    """fp32 [n, exits + 1, classes]: logits of every exit and the top, in the caller's order."""
    return _everywhere(DynamicEncoder(model, exits), inputs, batch, lambda found: [each.float() for _, each in found])


@torch.no_grad()
def confidences(model: Any, exits: SampleExits, inputs: Inputs, *, batch: int = 32) -> Tensor:
    """fp32 [n, exits + 1]: largest probability at every exit and the top, in the caller's order.

    Computed as DynamicEncoder computes them for TopProbability, with the same op: thresholds that are quantiles of these
    scores are compared with scores of the same kind, not with another formula's rounding.
    """
    encoder = DynamicEncoder(model, exits)
    some = next(iter(model.parameters()))
    used = prepared(exits, some.device, some.dtype)
    heads = [*(point.head for point in used), used.final]

    def read(found: Everywhere) -> list[Tensor]:
        each = (_stats(head, samples, logits) for head, (samples, logits) in zip(heads, found, strict=True))
        return [torch.exp(stats.top1 - stats.logsumexp) for stats in each]

    return _everywhere(encoder, inputs, batch, read)


def _stats(head: SampleHead | None, samples: Samples, logits: Tensor) -> ExitStats:
    last, features = (None, None) if head is None else (head.last, head.features(samples))
    if last is None or features is None:
        return stats_of_logits(logits)
    return exit_stats(features.contiguous(), last.weight.contiguous(), head_bias=last.bias)


def _everywhere(encoder: DynamicEncoder, inputs: Inputs, batch: int, read: Callable[[Everywhere], list[Tensor]]) -> Tensor:
    """[n, exits + 1, ...]: what `read` makes of every exit and the top, in the caller's order."""
    if isinstance(inputs, PooledStates):
        return torch.stack(read(inputs.everywhere(encoder)), 1)
    count = len(next(iter(inputs.values())))
    mask = inputs.get("attention_mask")
    order = torch.arange(count) if mask is None else torch.argsort(mask.sum(1).cpu(), stable=True)
    parts: list[Tensor] = []
    for rows in order.split(batch):
        given, _ = chosen(inputs, rows)
        found = encoder.everywhere(**given)
        values = torch.stack(read(found), 1)
        parts.append(values[torch.argsort(found[0][0].ids).to(values.device)])
    whole = torch.cat(parts)
    return whole[torch.argsort(order).to(whole.device)]
