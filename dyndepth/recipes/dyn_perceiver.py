"""Dyn-Perceiver (arXiv 2306.11248): train two branches together, spread samples over exits by a power law, infer in batches.

The published code stores the logits of all exits and decides afterwards. Here a batch shrinks at every exit
(`compact_rows` moves features, latent codes and numbers together), so samples that leave really cost nothing more.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F

from dyndepth.calibration import thresholds_for
from dyndepth.errors import ArgumentError
from dyndepth.ops import compact_rows
from dyndepth.recipes.dyn_perceiver_model import STAGES, DynPerceiver, Logits, PerceiverConfig
from dyndepth.recipes.gradient import Epoch, descend

__all__ = [
    "EXITS", "FACTORS", "POWERS", "DynPerceiver", "DynamicPerceiver", "Logits", "Output", "PerceiverConfig", "costs",
    "geometric_thresholds", "infer", "loss", "scores_of", "train", "work_of",
]  # fmt: skip

EXITS = 4
#: Powers p of the exit fractions q_k ~ p^k: from nearly all at the first exit to nearly all at the last.
POWERS: tuple[float, ...] = tuple(float(p) for p in np.geomspace(0.05, 20, 33))
#: The published factors on q_k, found by hand: fewer at exit 1, half at exit 3.
FACTORS = (0.85, 1.0, 0.5, 1.0)
Array = NDArray[np.float64]


def loss(found: Logits, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`CE_3 + CE_4 + (CE_1 + CE_2) / 2 + sum_{k < 4} KL(exit 4 || exit k) T^2 / 2`; exit 4 is not taught by the others.

    Exit 3 reads the convolutional branch, exit 4 both; labels int64 [n]. KL is summed over classes, averaged over samples.
    """
    weights = (0.5, 0.5, 1.0, 1.0)
    total = sum(
        (weight * F.cross_entropy(logits, labels) for weight, logits in zip(weights, found.all(), strict=True)),
        found.merged.new_zeros(()),
    )
    teacher = F.log_softmax(found.merged.detach() / temperature, -1)
    for logits in found.all()[:-1]:
        taught = F.log_softmax(logits / temperature, -1)
        total = total + 0.5 * temperature**2 * F.kl_div(taught, teacher, reduction="batchmean", log_target=True)
    return total


def train(
    model: DynPerceiver,
    epochs: Epoch,
    *,
    count: int,
    rate: float = 1e-3,
    decay: float = 0.05,
    ema: float = 0.0,
    advance: Callable[[], None] = lambda: None,
) -> DynPerceiver:
    """Train in place for `count` epochs; returns the model, in eval mode.

    Args:
        epochs: called with 0, 1, ..., gives that epoch's batches of ({"pixel_values": [n, c, h, w]}, labels).
        rate, decay: of AdamW; the rate falls as a cosine.
        ema: how much of the averaged weights stays at each step (0.9999 in the paper's 300 epochs); 0 averages nothing.
            The averaged weights are what the model ends with.
    """
    if not 0 <= ema < 1:
        raise ArgumentError(f"dyn_perceiver.train: ema must be in [0, 1), got {ema}")
    averaged = copy.deepcopy(model) if ema else None

    def after() -> None:
        if averaged is None:
            return
        for mine, new in zip(averaged.parameters(), model.parameters(), strict=True):
            mine.data.lerp_(new.data, 1 - ema)
        for counted, now in zip(averaged.buffers(), model.buffers(), strict=True):
            counted.copy_(now)

    model.train()
    try:
        descend(
            list(model.parameters()),
            lambda inputs, labels, _: loss(model(inputs["pixel_values"]), labels),
            epochs,
            range(count),
            rate=rate,
            decay=decay,
            after=after,
            advance=advance,
        )
    finally:
        model.eval()
    if averaged is not None:
        model.load_state_dict(averaged.state_dict())
    return model


@torch.no_grad()
def scores_of(model: DynPerceiver, batches: Iterable[Tensor]) -> tuple[Array, NDArray[np.int64]]:
    """(largest probabilities, answers), both [samples, exits], with every exit computed: what calibration needs.

    The model must be in eval mode: in training mode its batch norms would learn from these samples.
    """
    _evaluating(model, "dyn_perceiver.scores_of")
    found = [torch.stack(model(pixels).all(), 1) for pixels in batches]
    if not found:
        raise ArgumentError("dyn_perceiver.scores_of: wanted at least one batch, got none")
    logits = torch.cat(found).cpu()
    for number in range(1, EXITS + 1):
        _checked(logits[:, number - 1], number, "dyn_perceiver.scores_of")
    return _surest(logits).double().numpy(), logits.argmax(-1).numpy()


def _surest(logits: Tensor) -> Tensor:
    """fp32 [...]: largest probability of logits [..., classes]; what thresholds are made of and compared with."""
    return logits.float().softmax(-1).amax(-1)


def _checked(logits: Tensor, number: int, op: str) -> None:
    # NaN reaches no threshold, so such a sample would run to the end and be answered with the first class.
    if bool(torch.isnan(logits).any()):
        raise ArgumentError(f"{op}: logits must be numbers, got NaN at exit {number}")


def _evaluating(model: DynPerceiver, op: str) -> None:
    if model.training:
        raise ArgumentError(f"{op}: the model must be in eval mode, got training mode (call model.eval())")


def geometric_thresholds(scores: ArrayLike, power: float, factors: Sequence[float] = (1.0,) * EXITS) -> Array:
    """Thresholds [exits] by which the share `q_k ~ factors[k] power^k` of the scored samples leaves at exit k.

    At each exit the floor(n q_k) surest of those still there leave (dyndepth.calibration.thresholds_for); the last is -inf.
    `scores` [samples, exits] are largest probabilities on a validation set.
    """
    count = np.asarray(scores).shape[-1] if np.asarray(scores).ndim == 2 else 0
    if not (math.isfinite(power) and power > 0):
        raise ArgumentError(f"geometric_thresholds: power must be positive, got {power}")
    if len(factors) != count or min(factors) < 0 or not sum(factors) > 0:
        raise ArgumentError(f"geometric_thresholds: factors must be {count} numbers from 0 up, got {list(factors)}")
    weights = np.array([factor * power**k for k, factor in enumerate(factors)])
    return thresholds_for(scores, weights / weights.sum())


@dataclass
class Output:
    """Answers in the caller's order."""

    #: [n, classes], each from the exit where the sample left.
    logits: Tensor
    #: int32 [n], 1 to 4.
    exits: Tensor
    #: Samples that ran each part, by name: latent 1..4, features 1..4, merged.
    work: dict[str, int]


class DynamicPerceiver:
    """Batched inference: at every exit the samples whose largest probability reaches its threshold leave the batch.

    Args:
        model: in eval mode.
        thresholds: of the four exits; the last one is not looked at. +inf closes an exit.
        compact: False runs everything for everybody and picks afterwards: the same answers, for comparison.
    """

    def __init__(self, model: DynPerceiver, thresholds: Sequence[float] | Array, *, compact: bool = True) -> None:
        if len(thresholds) != EXITS or any(math.isnan(value) for value in thresholds):
            raise ArgumentError(f"DynamicPerceiver: thresholds must be {EXITS} numbers, got {list(thresholds)}")
        self.model, self.compact = model, compact
        self.thresholds = [float(value) for value in thresholds]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Output:
        """pixels [n, channels, height, width]."""
        _evaluating(self.model, "DynamicPerceiver")
        return self._picked(pixels) if not self.compact else self._shrinking(pixels)

    def _picked(self, pixels: Tensor) -> Output:
        found = torch.stack(self.model(pixels).all(), 1)
        surest = _surest(found)
        leaves = surest >= torch.tensor(self.thresholds, device=surest.device)
        leaves[:, -1] = True
        first = leaves.int().argmax(1)
        for number in range(1, EXITS + 1):  # those that have left before are not asked there
            _checked(found[first >= number - 1, number - 1], number, "DynamicPerceiver")
        parts = ("latent", "features")
        work = {f"{part} {k + 1}": len(pixels) for k in range(STAGES) for part in parts} | {"merged": len(pixels)}
        return Output(found[torch.arange(len(first)), first], (first + 1).int(), work)

    def _shrinking(self, pixels: Tensor) -> Output:
        model = self.model
        x, z = model.begin(pixels)
        ids = torch.arange(len(pixels), device=pixels.device)
        pass_ = _Pass(len(pixels), model.config.classes, x)
        logits: Tensor | None = None
        for k in range(STAGES):
            pass_.work[f"latent {k + 1}"] = len(ids)
            x, z = model.latents[k](x, z)
            if k >= STAGES - 2:
                number = k - STAGES + 3
                logits = model.exit(number, z, logits)
                x, z, ids, logits = pass_.leave(number, self.thresholds[number - 1], logits, [x, z, ids, logits])
                if len(ids) == 0:
                    return pass_.output()
            pass_.work[f"features {k + 1}"] = len(ids)
            x = model.features[k](x)
        assert logits is not None
        x, z, ids, logits = pass_.leave(3, self.thresholds[2], model.exit_features(x), [x, z, ids, logits])
        if len(ids):
            pass_.work["merged"] = len(ids)
            merged = model.exit_merged(x, z, logits)
            _checked(merged, 4, "DynamicPerceiver")
            pass_.take(4, ids, merged)
        return pass_.output()


class _Pass:
    """What has left so far."""

    def __init__(self, count: int, classes: int, like: Tensor) -> None:
        self.logits = like.new_zeros(count, classes)
        self.exits = torch.zeros(count, dtype=torch.int32)
        parts = [f"{part} {k + 1}" for k in range(STAGES) for part in ("latent", "features")]
        self.work = dict.fromkeys([*parts, "merged"], 0)

    def take(self, number: int, ids: Tensor, logits: Tensor) -> None:
        self.logits[ids] = logits
        self.exits[ids.cpu()] = number

    def leave(self, number: int, threshold: float, logits: Tensor, rows: list[Tensor]) -> tuple[Tensor, ...]:
        """Those that are sure leave with `logits`; the rest of `rows` (x, z, ids, logits of exit 2 so far), in order."""
        _checked(logits, number, "DynamicPerceiver")
        leaves = _surest(logits) >= threshold
        if not bool(leaves.any()):
            return tuple(rows)
        self.take(number, rows[2][leaves], logits[leaves])
        moved, _, counts = compact_rows(leaves.to(torch.int8), [row.contiguous() for row in rows])
        return tuple(row[: int(counts[0])] for row in moved)

    def output(self) -> Output:
        return Output(self.logits, self.exits, self.work)


def infer(model: DynPerceiver, pixels: Tensor, thresholds: Sequence[float] | Array) -> Output:
    """One batch through `DynamicPerceiver`."""
    return DynamicPerceiver(model, thresholds)(pixels)


@torch.no_grad()
def costs(model: DynPerceiver, pixels: Tensor) -> dict[str, Any]:
    """Floating-point operations of a sample (pixels [1, ...]): of every part, and up to every exit.

    As torch counts them: products, convolutions and attention. The model must be in eval mode.
    """
    _evaluating(model, "dyn_perceiver.costs")
    from torch.utils.flop_counter import FlopCounterMode

    def flops(run: Callable[[], Any]) -> tuple[Any, float]:
        with FlopCounterMode(display=False) as counter:
            result = run()
        return result, float(counter.get_total_flops())

    parts: dict[str, float] = {}
    (x, z), parts["stem"] = flops(lambda: model.begin(pixels))
    z = z.detach()  # the counter asks views of parameters for their history
    exits: list[float] = []
    logits: Tensor | None = None
    for k in range(STAGES):
        (x, z), parts[f"latent {k + 1}"] = flops(lambda k=k, x=x, z=z: model.latents[k](x, z))  # type: ignore[misc]
        if k >= STAGES - 2:
            exits.append(sum(parts.values()))
            logits = model.exit(len(exits), z, logits)
        x, parts[f"features {k + 1}"] = flops(lambda k=k, x=x: model.features[k](x))  # type: ignore[misc]
    assert logits is not None
    late: Tensor = logits
    exits.append(sum(parts.values()))
    _, parts["merged"] = flops(lambda: model.exit_merged(x, z, late))
    exits.append(sum(parts.values()))
    return {"parts": parts, "exits": exits}


def work_of(output: Output, cost: Mapping[str, Any]) -> float:
    """Share of a batch's operations that was run; `cost` of `costs`."""
    samples = len(output.exits)
    run = cost["parts"]["stem"] * samples + sum(cost["parts"][part] * count for part, count in output.work.items())
    return float(run / (samples * cost["exits"][-1]))
