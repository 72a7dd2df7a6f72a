"""The loop that recipes of vision encoders and MuE train with, on accelerate: AdamW, a cosine by epoch, clipped gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dyndepth.files import require

#: An epoch: (inputs, labels) of every batch, given its number. Inputs are what the recipe's loss reads.
Epoch = Callable[[int], Iterable[tuple[Mapping[str, Any], Tensor]]]


def descend(
    parameters: list[Any],
    loss: Callable[[Mapping[str, Any], Tensor, int], Tensor],
    epochs: Epoch,
    numbers: range,
    *,
    rate: float,
    decay: float,
    after: Callable[[], None] = lambda: None,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Minimise `loss(inputs, labels, step)` over the epochs with these numbers; gradients are gone afterwards.

    The rate falls by epoch, for how many batches there will be is not known beforehand. `after` is called after every step,
    `advance` after every epoch.
    """
    require("accelerate", "training needs the package accelerate: pip install 'dyndepth[train]'")
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="no", cpu=parameters[0].device.type == "cpu")
    optimizer: Any = accelerator.prepare(torch.optim.AdamW(parameters, lr=rate, weight_decay=decay))
    step = 0
    for done, number in enumerate(numbers):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done / len(numbers)))
        for inputs, labels in epochs(number):
            with torch.enable_grad():
                optimizer.zero_grad()
                accelerator.backward(loss(inputs, labels, step))
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            after()
            step += 1
        advance()
    optimizer.zero_grad()
