"""DeeBERT (Xin et al., ACL 2020, arXiv 2004.12993): off-ramps after every layer of a fine-tuned BERT, left at low entropy.

Two stages: the model and its top classifier are fine-tuned as usual; then they are frozen, and the off-ramps learn. So the
full model's answers are those of plain fine-tuning, and exits can be added to a model that somebody else has trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dyndepth.encoders import SampleExits
from dyndepth.errors import ArgumentError
from dyndepth.exits.criteria import Entropy
from dyndepth.recipes.sample_heads import linear_exits
from dyndepth.training.encoder_losses import below_top, top_only
from dyndepth.training.encoder_states import Inputs
from dyndepth.training.encoder_trainer import EncoderConfig, train_encoder


def exits(
    model: Any,
    classes: int | None = None,
    *,
    entropy: float = 0.1,
    leave: Sequence[int] | None = None,
    pooling: str = "first",
    dense: bool = True,
) -> SampleExits:
    """Untrained off-ramps: a pooler (`dense`) and a classifier each.

    A sample leaves where its answer's entropy is at most `entropy`, in nats: the paper's S, the same for all layers.
    """
    if not entropy >= 0:
        raise ArgumentError(f"deebert.exits: entropy must be 0 or more, got {entropy}")
    name = "DeeBERT (arXiv 2004.12993)"
    return linear_exits(model, classes, lambda _: Entropy(), -entropy, name, leave=leave, pooling=pooling, dense=dense)


def train(
    model: Any,
    exits: SampleExits,
    inputs: Inputs,
    labels: Tensor,
    *,
    first: EncoderConfig | None = None,
    second: EncoderConfig | None = None,
    validation: tuple[Inputs, Tensor] | None = None,
    folder: str | Path | None = None,
) -> SampleExits:
    """Both stages, or the second alone.

    Args:
        first: settings of fine-tuning (`base_lr` above 0); None leaves the model and its top as they are. A model without a
            head of its own needs the top trained: with `base_lr` 0 only its final head learns.
        second: settings of the off-ramps' stage, in which nothing else changes.
        folder: checkpoints go to `folder`/first and `folder`/second.
    """
    second = second or EncoderConfig(lr=1e-3)
    if second.base_lr:
        raise ArgumentError(f"deebert.train: the second stage is on a frozen model, so base_lr must be 0, got {second.base_lr}")
    places = [None if folder is None else Path(folder) / name for name in ("first", "second")]
    if first is not None:
        top = nn.ModuleList([] if exits.final is None else [exits.final])
        exits = train_encoder(
            model, exits, inputs, labels, top_only, config=first, validation=validation, train_only=top, folder=places[0]
        ).exits
    ramps = nn.ModuleList([point.head for point in exits])
    return train_encoder(
        model, exits, inputs, labels, below_top, config=dataclasses.replace(second), validation=validation, train_only=ramps,
        folder=places[1],
    ).exits  # fmt: skip
