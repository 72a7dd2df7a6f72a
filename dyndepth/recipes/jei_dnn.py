"""JEI-DNN (Regol et al., ICLR 2024, arXiv 2310.09163): exits and the gates that choose them learn together.

The model stays frozen. After every layer an inference module answers, and a gate turns four numbers about its answer into a
chance to leave; clipped one after the other these chances are a distribution over the exits. Gates learn where leaving is
worth its cost, modules learn on the samples that gates send them, in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.encoders import DynamicEncoder, ExitGate, SampleExits, bind
from dyndepth.errors import ArgumentError
from dyndepth.recipes.sample_heads import linear_exits
from dyndepth.training.encoder_losses import JointExitLoss, exit_distribution, gates_of
from dyndepth.training.encoder_states import Inputs
from dyndepth.training.encoder_trainer import EncoderConfig, train_encoder

#: A sample leaves at the first exit whose conditional probability reaches this.
THRESHOLD = 0.5


def exits(model: Any, classes: int | None = None, *, leave: Sequence[int] | None = None, pooling: str = "first") -> SampleExits:
    """Untrained inference modules, linear on a normed pooled vector, each with a gate of four weights and a bias."""
    name = "JEI-DNN (arXiv 2310.09163)"
    return linear_exits(
        model, classes, lambda _: ExitGate(module=nn.Linear(4, 1)), THRESHOLD, name, leave=leave, pooling=pooling, norm=True
    )


def costs(model: Any, exits: SampleExits) -> list[float]:
    """Layers below each exit over those of the model, and 1 for the top: FLOPs of equal layers, relative."""
    depth = bind(model).depth
    return [point.leave / depth for point in exits] + [1.0]


@torch.no_grad()
def distribution(model: Any, exits: SampleExits, **inputs: Tensor) -> Tensor:
    """fp32 [n, exits + 1]: every sample's chance to leave at each exit and at the top. Runs every layer."""
    encoder = DynamicEncoder(model, exits)
    found = encoder.everywhere(**inputs)
    shares, _ = exit_distribution(torch.sigmoid(gates_of(found, encoder.exits)))
    return shares[torch.argsort(found[0][0].ids).to(shares.device)]


def train(
    model: Any,
    exits: SampleExits,
    inputs: Inputs,
    labels: Tensor,
    *,
    trade: float = 0.5,
    warmup: int | None = None,
    warmup_lr: float | None = None,
    every: int = 200,
    scale: str = "batch",
    config: EncoderConfig | None = None,
    validation: tuple[Inputs, Tensor] | None = None,
    folder: str | Path | None = None,
) -> SampleExits:
    """Warm up the modules, then train gates and modules in turn; the model is frozen.

    Args:
        trade: lambda, what running all layers costs, in nats; the paper runs 0.01 to 9, one training per budget.
        warmup: updates of the modules alone, a third of all by default.
        warmup_lr: rate of the warm-up, `config.lr` by default. Gates of five weights want more than modules bear: modules that
            know the training samples by heart leave nothing for gates to learn.
        every: updates of a phase; 200 in the paper.
        scale: "batch" or "sample": how P weighs the modules' losses, as in JointExitLoss.
        validation: as for train_encoder, twice: the warm-up's best modules by its own loss go into the phases, where loss and
            cost that the exit distribution expects are judged. Only looks of the phases count.
        folder: checkpoints go to `folder`/warmup and `folder`/phases.
    """
    config = config or EncoderConfig(lr=1e-2, weight_decay=5e-4, batch=64, updates=3000)
    if config.base_lr:
        raise ArgumentError(f"jei_dnn.train: the model is frozen, so base_lr must be 0, got {config.base_lr}")
    warmup = config.updates // 3 if warmup is None else warmup
    if not 0 <= warmup < config.updates:
        raise ArgumentError(f"jei_dnn.train: warmup must be in [0, {config.updates}), the updates of all, got {warmup}")
    places = [None if folder is None else Path(folder) / name for name in ("warmup", "phases")]
    if warmup:
        first = replace(config, updates=warmup, lr=config.lr if warmup_lr is None else warmup_lr)
        loss = JointExitLoss(exits, costs(model, exits), trade, warmup=warmup, scale=scale)
        exits = train_encoder(model, exits, inputs, labels, loss, config=first, validation=validation, folder=places[0]).exits
    loss = JointExitLoss(exits, costs(model, exits), trade, warmup=0, every=every, scale=scale)
    return train_encoder(
        model, exits, inputs, labels, loss, config=replace(config, updates=config.updates - warmup), validation=validation,
        judge=loss.judge, folder=places[1],
    ).exits  # fmt: skip
