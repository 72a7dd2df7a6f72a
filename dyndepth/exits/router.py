"""The router: a small learned function of the residual that predicts agreement with the full model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dyndepth.ops import ExitStats, router_score

#: Width of `stat_features`.
STAT_FEATURES = 4


def stat_features(stats: ExitStats) -> Tensor:
    """float32 [n, 4]: log-odds of the top-1 probability, the probability, the margin to the second, the entropy in nats.

    Statistics of a shortlist of the vocabulary are enough: a router that sees them judges better than the full head's
    top-1 probability (docs/notes/routers.md).
    """
    top1 = torch.exp(stats.top1 - stats.logsumexp)
    top2 = torch.exp(stats.top2 - stats.logsumexp)
    odds = torch.logit(top1.clamp(1e-4, 1 - 1e-4))
    return torch.stack([odds, top1, top1 - top2, stats.entropy], dim=1)


class Router(nn.Module):
    """Parameters of ops.router_score, always fp32. A fresh router scores 0.5 everywhere.

    `cosine` adds the cosine with the residual at the previous boundary, `stats` the statistics of the exit head's logits
    (over the band's shortlist if it has one), `history` one feature per boundary it names: 1 for rows that left there and came
    back, which have run fewer layers than their residual looks like.
    """

    def __init__(
        self,
        width: int,
        neurons: int = 1,
        *,
        silu: bool = False,
        cosine: bool = False,
        stats: bool = False,
        history: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.silu = silu
        self.weight1 = _frozen(neurons, width)
        self.bias1 = _frozen(neurons)
        self.weight2 = _frozen(neurons)
        self.bias2 = _frozen(1)
        self.cosine_weight = _frozen(neurons) if cosine else None
        self.stats_weight = _frozen(neurons, STAT_FEATURES) if stats else None
        self.history = tuple(history)
        self.history_weight = _frozen(neurons, len(self.history)) if self.history else None

    def forward(
        self,
        hidden: Tensor,
        previous: Tensor | None = None,
        stats: ExitStats | None = None,
        skipped: Tensor | None = None,
        live: Tensor | None = None,
    ) -> Tensor:
        """float32 [n] in [0, 1]. `skipped` float32 [n, len(history)]: 1 where the row took the band; None: nobody took any.

        With `live` int32 [1] on the device, rows at or past it are unspecified.
        """
        features = []
        if self.stats_weight is not None and stats is not None:
            features.append((stat_features(stats), self.stats_weight))
        if self.history_weight is not None and skipped is not None:
            features.append((skipped, self.history_weight))
        extra, weight = (torch.cat(parts, dim=1) for parts in zip(*features, strict=True)) if features else (None, None)
        return router_score(
            hidden, self.weight1, self.bias1, self.weight2, self.bias2,
            previous=None if self.cosine_weight is None else previous, cosine_weight=self.cosine_weight, extra=extra,
            extra_weight=weight, silu=self.silu, live=live,
        )  # fmt: skip


def _frozen(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape), requires_grad=False)
