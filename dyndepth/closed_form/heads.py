"""What an exit's head says of residuals that were kept: its arg max, and its statistics over a shortlist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dyndepth.exits import Always, Band, BlockHead, Exits, ModelFacts
from dyndepth.ops import ExitStats, exit_stats
from dyndepth.ops.exit_stats import stats_of_logits
from dyndepth.runtime.bind import Model
from dyndepth.runtime.score import score

_ROWS = 512


def frequent(answers: Tensor, count: int) -> Tensor:
    """int64 ids of the `count` most frequent answers, in ascending order; fewer if fewer occur (but at least two)."""
    frequency = torch.bincount(answers, minlength=2)
    order = frequency.argsort(descending=True, stable=True)
    occurring = max(2, int((frequency > 0).sum()))
    return order[: min(count, occurring)].sort().values


def block_ready(causal_lm: Any, band: Band, facts: ModelFacts, tokens: Sequence[Tensor], start: Sequence[int]) -> Tensor:
    """[rows, ready] of a block head for all rows of some sequences; of rows before `start`, the full model's.

    A block attends to the rows before it, so residuals alone do not do: everybody from `start` on leaves there. Each row gives
    the block its K,V whether it leaves or not, so this is what any row that leaves would say.
    """
    everybody = Exits([Band(band.leave, band.resume, Always(), head=band.head)], facts)
    return score(causal_lm, tokens, everybody, start=start, kv="none").ready


def exit_argmax(model: Model, band: Band, residual: Tensor, ready: Tensor | None = None) -> Tensor:
    """int64 [n]: the token an early exit would emit (full vocabulary). `ready`: its head-ready rows, where they are known."""
    rows = residual if ready is None else ready
    return _by_rows(rows, lambda part: model.argmax(_ready(model, band, part) if ready is None else part).cpu())


def exit_statistics(model: Model, band: Band, residual: Tensor, ready: Tensor | None = None) -> ExitStats:
    """Statistics of an early exit's logits over its shortlist, on the CPU. `ready` as for exit_argmax."""
    plain, ids = model.plain_head(), band.shortlist
    assert ids is not None
    weight = None if plain is None else plain[0][ids.to(model.device)]
    bias = None if plain is None or plain[1] is None else plain[1][ids.to(model.device)]

    def run(part: Tensor) -> Tensor:
        rows = _ready(model, band, part) if ready is None else part
        if weight is None:
            stats = stats_of_logits(model.logits(rows)[:, ids.to(model.device)])
        else:
            stats = exit_stats(rows.contiguous(), weight, head_bias=bias, softcap=model.logit_softcap)
        return torch.stack([value.double().cpu() for value in stats], dim=1)

    columns = _by_rows(residual if ready is None else ready, run).unbind(1)
    return ExitStats(columns[0].long(), *(column.float() for column in columns[1:]))


def judging_cost(model: Model, band: Band) -> float:
    """Weights that judging a row at an exit reads, in layers: its head and the shortlist's rows of the LM head."""
    layer = sum(parameter.numel() for parameter in model.layers[0].module.parameters())
    head = sum(parameter.numel() for parameter in band.head_or_norm().parameters())
    words = model.vocab_size if band.shortlist is None else band.shortlist.shape[0]
    return (head + words * model.ready_size) / max(layer, 1)


def _ready(model: Model, band: Band, residual: Tensor) -> Tensor:
    head = band.head_or_norm()
    assert not isinstance(head, BlockHead)
    return head.to(device=model.device, dtype=model.dtype)(residual.to(model.device), model.finish)


def _by_rows(residual: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([run(part) for part in residual.split(_ROWS)])
