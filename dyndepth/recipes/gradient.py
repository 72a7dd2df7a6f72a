"""The plain loop that recipes of vision encoders train with: AdamW, a cosine over epochs, clipped gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

#: An epoch: (inputs, labels) of every batch, given its number.
Epoch = Callable[[int], Iterable[tuple[Mapping[str, Tensor], Tensor]]]


def descend(
    parameters: list[Any],
    loss: Callable[[Mapping[str, Tensor], Tensor, int], Tensor],
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
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    step = 0
    for done, number in enumerate(numbers):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done / len(numbers)))
        for inputs, labels in epochs(number):
            with torch.enable_grad():
                optimizer.zero_grad()
                loss(inputs, labels, step).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            after()
            step += 1
        advance()
    optimizer.zero_grad()
