"""How much each exit's loss counts, and what LayerSkip switches on when: schedules as plain functions of layer and step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dyndepth.errors import ArgumentError


def equal_weights(exits: Sequence[int], layers: int) -> list[float]:
    """Every exit alike (Balcony); they sum to 1."""
    return [1 / len(exits)] * len(exits)


def calm_weights(exits: Sequence[int], layers: int) -> list[float]:
    """CALM's anytime loss: exit i weighs i / sum of i, so later exits count more (Schuster et al. 2022, eq. 3)."""
    return [leave / sum(exits) for leave in exits]


def ee_tuning_weights(exits: Sequence[int], layers: int) -> list[float]:
    """EE-LLM / EE-Tuning: small weights that grow with depth, as their 1.3B recipe's 0.25 and 0.5 at a quarter and a half.

    Not normalised: the final exit has weight 1, and a frozen base leaves that term constant.
    """
    return [leave / layers for leave in exits]


WEIGHTS: dict[str, Callable[[Sequence[int], int], list[float]]] = {
    "equal": equal_weights,
    "calm": calm_weights,
    "ee_tuning": ee_tuning_weights,
}


def warm_cosine(rate: float, warmup: float, update: int, updates: int) -> float:
    """Learning rate of an update (counted from 0): linear warm-up over a share of all, then a cosine to zero."""
    warm = max(1, round(warmup * updates))
    if update < warm:
        return rate * (update + 1) / warm
    return rate * 0.5 * (1 + math.cos(math.pi * (update - warm) / max(1, updates - warm)))


def layerskip_dropout(layers: int, most: float, progress: float = 1.0) -> list[float]:
    """Per layer, the chance that LayerSkip leaves it out in training: exponential from 0 at the first to `most` at the last.

    p_l = S(t) * most * (exp(l ln2 / (L - 1)) - 1); S(t) = exp(t ln2) - 1 with t in [0, 1] grows over training where
    pre-training from scratch, 1 for continued training (Elhoushi et al. 2024, section 4.1).
    """
    if not 0 <= most <= 1 or not 0 <= progress <= 1:
        raise ArgumentError(f"layerskip_dropout: most and progress must be in [0, 1], got {most} and {progress}")
    scale = (math.exp(progress * math.log(2)) - 1) * most
    return [scale * (math.exp(layer * math.log(2) / max(1, layers - 1)) - 1) for layer in range(layers)]


def layerskip_exits(layers: int, step: int, steps: int, curriculum: str, every: int = 8) -> list[int]:
    """Boundaries (1 .. layers) whose early-exit loss is on at a step.

    `rotational`: every `every`-th layer, shifted by one each step. `gradual`: from the last layer down, one more every
    steps / (2 layers) steps, so that all are on after half of the training. The top is always on.
    """
    if curriculum == "rotational":
        on = {layer + 1 for layer in range(layers) if layer % every == step % every}
    elif curriculum == "gradual":
        count = min(layers, 1 + int(step * 2 * layers / max(1, steps)))
        on = set(range(layers - count + 1, layers + 1))
    else:
        raise ArgumentError(f"layerskip_exits: curriculum must be rotational or gradual, got {curriculum!r}")
    return sorted(on | {layers})


def layerskip_weights(exits: Sequence[int], layers: int, scale: float = 1.0) -> list[float]:
    """LayerSkip's e(l): scale * sum_{i <= l} i below the last layer, L - 1 + scale * sum_{i <= L - 2} i there; sum 1.

    `exits` are boundaries, so layer index l = leave - 1.
    """

    def raw(leave: int) -> float:
        layer = leave - 1
        if layer < layers - 1:
            return scale * layer * (layer + 1) / 2
        return layers - 1 + scale * (layers - 2) * (layers - 1) / 2

    values = [raw(leave) for leave in exits]
    total = sum(values)
    return [value / total if total else 1 / len(values) for value in values]
