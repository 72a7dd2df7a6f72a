"""PALBERT (Balagansky and Gavrilov, NeurIPS 2022, arXiv 2204.03276): a learned posterior of stopping, read at its quantile.

One classifier for all layers and a lambda head that says how likely a sample is to stop here. Training weighs every layer's
loss with the probability of stopping there. Q-exit leaves when the posterior's CDF passes q, the same way every time;
PonderNet draws at every layer; the expectation runs all layers and averages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndepth.encoders import DynamicEncoder, LambdaHead, PonderDraw, QExit, SampleExits, bind
from dyndepth.errors import ArgumentError
from dyndepth.recipes.sample_heads import linear_exits
from dyndepth.training.encoder_losses import PonderLoss, posterior, stopping
from dyndepth.training.encoder_states import Inputs
from dyndepth.training.encoder_trainer import EncoderConfig, train_encoder


def exits(
    model: Any,
    classes: int | None = None,
    *,
    q: float = 0.5,
    leave: Sequence[int] | None = None,
    pooling: str = "first",
    inner: int | None = None,
) -> SampleExits:
    """Untrained exits under Q-exit: one classifier for all layers, the top included, even where the model has its own.

    Args:
        q: quantile of the posterior of stopping; 1/2, its median, in the paper. 1 closes the exits.
        inner: width of the lambda head; the model's by default.
        model, classes, leave, pooling: as for pabee.exits.
    """
    if not 0 <= q <= 1:
        raise ArgumentError(f"palbert.exits: q must be in [0, 1], got {q}")
    width = bind(model).width
    judge = QExit(module=LambdaHead(width, width if inner is None else inner))
    name = "PALBERT (arXiv 2204.03276)"
    return linear_exits(model, classes, lambda _: judge, q, name, leave=leave, pooling=pooling, dense=True, one_head=True)


def ponder(exits: SampleExits, *, seed: int = 0) -> SampleExits:
    """The same exits under PonderNet's baseline: a sample leaves with probability lambda, by a draw from seed and number."""
    points = [_judged(point.criterion) for point in exits]
    made = [type(p)(p.leave, p.head, PonderDraw(module=m, seed=seed), 0.0) for p, m in zip(exits, points, strict=True)]
    return SampleExits(made, exits.model, final=exits.final, record={**exits.record, "exit": "PonderNet"})


def _judged(criterion: Any) -> Any:
    if not isinstance(criterion, QExit):
        raise ArgumentError(f"palbert.ponder: wanted exits of palbert.exits, got the criterion {criterion.kind}")
    return criterion.module


@torch.no_grad()
def expectation(model: Any, exits: SampleExits, **inputs: Tensor) -> Tensor:
    """fp32 [n, classes]: probabilities of all layers, weighed with the posterior of stopping. Runs every layer."""
    encoder = DynamicEncoder(model, exits)
    found = encoder.everywhere(**inputs)
    p = posterior(stopping(found, encoder.exits))
    mixed = sum(p[:, k, None] * torch.softmax(logits.float(), -1) for k, (_, logits) in enumerate(found))
    assert isinstance(mixed, Tensor)
    return mixed[torch.argsort(found[0][0].ids).to(mixed.device)]


def train(
    model: Any,
    exits: SampleExits,
    inputs: Inputs,
    labels: Tensor,
    *,
    beta: float = 0.5,
    rate: float = 0.1,
    direction: str = "posterior",
    detach: bool = False,
    config: EncoderConfig | None = None,
    validation: tuple[Inputs, Tensor] | None = None,
    folder: str | Path | None = None,
) -> SampleExits:
    """Train classifier, lambda head and, with `config.base_lr`, the model; `beta` ... `detach` are PonderLoss's."""
    loss = PonderLoss(exits, beta=beta, rate=rate, direction=direction, detach=detach)
    config = config or EncoderConfig(base_lr=2e-5, lr=2e-4)
    return train_encoder(model, exits, inputs, labels, loss, config=config, validation=validation, folder=folder).exits
