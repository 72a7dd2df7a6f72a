"""Routers by logistic regression: convex, so a few Newton steps find the one optimum and nothing is tuned by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyndepth.exits import Router
from dyndepth.exits.products import EPS
from dyndepth.exits.router import stat_features
from dyndepth.ops import ExitStats
from dyndepth.ops._math import rms_normalise

#: L2 penalties tried, per row; from strong to weak, each starts where the last one ended.
PENALTIES = (1e-1, 3e-2, 1e-2, 1e-3)
_NEWTON_STEPS = 12


def fit_router(
    residual: Tensor,
    agrees: Tensor,
    held_out: Tensor,
    stats: ExitStats | None = None,
    *,
    skipped: Tensor | None = None,
    history: Sequence[int] = (),
    balanced: bool = False,
) -> tuple[Router, dict[str, float]]:
    """A one-neuron router that predicts `agrees` (bool [n]) from `residual` [n, d] and, if given, the head's statistics.

    `skipped` (float32 [n, k], with the k boundaries of `history`) says which bands below a row has taken; what each of them
    adds to the logit is found with the rest.

    Rows where `held_out` is true choose the penalty by log-loss. Returns the router and its held-out log-loss, that of the
    constant guess beside it, and the area under the ROC curve. Probabilities refer to the mix of rows it was shown, or, if
    `balanced`, to one where half of the rows agree: both classes then weigh the same in every loss (CALM's classifier).
    """
    width = residual.shape[1]
    parts = [rms_normalise(residual, EPS)]
    if stats is not None:
        parts.append(stat_features(stats))
    if skipped is not None:
        parts.append(skipped)
    x = torch.cat([*parts, torch.ones(residual.shape[0], 1)], dim=1)
    y = agrees.float()
    train, test = ~held_out, held_out if bool(held_out.any()) else ~held_out
    best: tuple[float, Tensor] | None = None
    weights = torch.zeros(x.shape[1], dtype=torch.float64)
    base = y[train].mean().clamp(1e-6, 1 - 1e-6)
    share = torch.where(agrees, 0.5 / base, 0.5 / (1 - base)) if balanced else torch.ones_like(y)
    x_train, y_train, share_train = x[train], y[train], share[train]
    for penalty in PENALTIES:
        weights = _newton(x_train, y_train, share_train, penalty, weights)
        loss = _log_loss(x[test] @ weights.float(), y[test], share[test])
        if best is None or loss < best[0]:
            best = (loss, weights)
    assert best is not None
    loss, weights = best
    router = Router(width, stats=stats is not None, history=history)
    router.weight1.data = weights[None, :width].float().contiguous()
    known = weights.shape[0] - 1 - len(router.history)
    if router.stats_weight is not None:
        router.stats_weight.data = weights[None, width:known].float().contiguous()
    if router.history_weight is not None:
        router.history_weight.data = weights[None, known:-1].float().contiguous()
    router.weight2.data = torch.ones(1)
    router.bias2.data = weights[-1:].float().clone()
    guess = torch.logit(torch.full_like(base, 0.5) if balanced else base).expand(int(test.sum()))
    return router, {
        "log_loss": loss,
        "log_loss_of_constant": _log_loss(guess, y[test], share[test]),
        "auc": _auc(x[test] @ weights.float(), agrees[test]),
    }


def _newton(x: Tensor, y: Tensor, share: Tensor, penalty: float, weights: Tensor) -> Tensor:
    """Sums over rows, each weighing its `share`, in fp32; the solve in fp64."""
    ridge = torch.full_like(weights, penalty * x.shape[0])
    ridge[-1] = 1e-6 * x.shape[0]  # the bias is free; this only keeps the system regular when y is constant
    for _ in range(_NEWTON_STEPS):
        p = torch.sigmoid(x @ weights.float())
        gradient = (x.T @ (share * (p - y))).double() + ridge * weights
        curvature = ((x * (share * (p * (1 - p)).clamp_min(1e-6))[:, None]).T @ x).double() + torch.diag(ridge)
        step = torch.linalg.solve(curvature, gradient)
        weights = weights - step
        if float(step.abs().max()) < 1e-4:
            break
    return weights


def _log_loss(logit: Tensor, y: Tensor, share: Tensor) -> float:
    return float(torch.nn.functional.binary_cross_entropy_with_logits(logit, y, weight=share))


def _auc(score: Tensor, positive: Tensor) -> float:
    """Probability that a random positive outranks a random negative (ties count half); 0.5 without one of the two."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if positives == 0 or negatives == 0:
        return 0.5
    _, inverse, counts = score.unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0).double() - (counts.double() - 1) / 2
    return float((ranks[inverse][positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))
