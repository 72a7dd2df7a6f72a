"""PABEE (Zhou et al., NeurIPS 2020, arXiv 2006.04152): a sample leaves when P exits in a row have given the same answer.

A classifier after every layer behind a pooler that all share; all are trained together with the model, deeper ones weighing
more. The count and the last answer travel with every sample, so batches of any size leave exactly where single samples do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dyndepth.encoders import RegressionPatience, SampleExits, bind
from dyndepth.errors import ArgumentError
from dyndepth.exits.criteria import Criterion, Patience
from dyndepth.recipes.sample_heads import linear_exits
from dyndepth.training.encoder_losses import layer_weighted
from dyndepth.training.encoder_states import Inputs
from dyndepth.training.encoder_trainer import EncoderConfig, train_encoder


def exits(
    model: Any,
    classes: int | None = None,
    *,
    patience: int = 6,
    tolerance: float | None = None,
    leave: Sequence[int] | None = None,
    pooling: str = "first",
) -> SampleExits:
    """Untrained exits after every layer.

    Args:
        model: a supported encoder.
        classes: answers; None takes those of the model's own head.
        patience: P, agreements in a row after which a sample leaves, so at layer P + 1 at the earliest; 0 is the full model.
            The paper's sweep is 3 to 8 on 12 layers, 6 being its usual value.
        tolerance: for regression (one answer): two answers agree when they differ by less.
        leave: boundaries; all by default.
        pooling: of the shared tanh pooler; the paper's is the first token.
    """
    if tolerance is not None:
        classes = bind(model).classes if classes is None else classes
        if classes not in (1, None):  # None: linear_exits says that classes must be given
            raise ArgumentError(f"pabee.exits: tolerance is for regression with one answer, got classes {classes}")
    criterion: Criterion = Patience() if tolerance is None else RegressionPatience(tolerance=tolerance)
    name = "PABEE (arXiv 2006.04152)"
    return linear_exits(
        model, classes, lambda _: criterion, threshold(patience), name, leave=leave, pooling=pooling, dense=True, one_dense=True
    )


def threshold(patience: int) -> float:
    """The exits' threshold for a patience; 0 closes them, as in the published code."""
    if patience < 0:
        raise ArgumentError(f"pabee: patience must be 0 or more, got {patience}")
    return float(patience) if patience else math.inf


def train(
    model: Any,
    exits: SampleExits,
    inputs: Inputs,
    labels: Tensor,
    *,
    config: EncoderConfig | None = None,
    validation: tuple[Inputs, Tensor] | None = None,
    folder: str | Path | None = None,
) -> SampleExits:
    """Train all exits together, sum l CE_l / sum l; `config.base_lr` above 0 trains the model too, as the paper does.

    labels: int64 classes, or floats for regression (squared error). Other arguments: dyndepth.training.train_encoder.
    """
    config = config or EncoderConfig(base_lr=2e-5, lr=2e-4)
    done = train_encoder(model, exits, inputs, labels, layer_weighted, config=config, validation=validation, folder=folder)
    return done.exits
