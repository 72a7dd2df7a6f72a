"""Thresholds with a certificate for encoders: whole samples that leave early give the full model's answer but for a share.

The same procedure as dyndepth.calibrate, on samples instead of requests: a sample's loss is 1 where its answer is another than
at full depth, and samples drawn independently are what the bound speaks of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dyndepth.calibration.bounds import fraction
from dyndepth.calibration.selection import learn_then_test
from dyndepth.encoders import DynamicEncoder, SampleExits
from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.exits.codec import number_to_json
from dyndepth.runtime.session import Work

#: Distances from the highest score, falling in equal ratios: the default path of one threshold for all exits.
_STRICTEST, _FREEST, _POINTS = 1e-4, 0.6, 24


def default_levels(most: float) -> list[float]:
    """Thresholds from strict to free below `most`, the highest score of a criterion, in equal ratios of the distance."""
    distances = np.geomspace(_STRICTEST, _FREEST, _POINTS)
    return [float(most - distance) for distance in distances]


def calibrate_samples(
    model: Any,
    exits: SampleExits,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    risk: float = 0.02,
    confidence: float = 0.95,
    path: Sequence[float | Sequence[float]] | None = None,
    bound: str = "hoeffding_bentkus",
    same: Callable[[Tensor, Tensor], bool] | None = None,
    layout: str = "auto",
) -> SampleExits:
    """The same exits with the freest thresholds whose disagreement with full depth is certified, or closed if none is.

    Learn-then-Test with fixed-sequence testing along `path`. With the confidence asked for (over the draw of the samples) a new
    sample of the same kind gets another answer than at full depth with a probability of at most `risk`.

    Args:
        model: the encoder that the exits were made for.
        batches: independent samples as keyword arguments of the model, not those that heads were trained on.
        risk, confidence: in (0, 1).
        path: thresholds, safest first, chosen without looking at these samples: a number for all exits or one each. None goes
            down from the criteria's highest score, which must be finite and the same for all.
        bound: as in dyndepth.calibrate.
        same: whether two answers of a sample are the same, [classes] or [frames, classes]; the arg max by default (of
            every frame).
        layout: as in DynamicEncoder.

    Returns exits with `record["certificate"]`: certified, risk, confidence, n, measured_risk, samples_x_layers, tested, ...
    """
    error = 1 - fraction(confidence, "calibrate_samples", "confidence")
    fraction(risk, "calibrate_samples", "risk")
    agree = same or _same_argmax
    vectors = _vectors(exits, path)
    reference, _ = answers(DynamicEncoder(model, exits.closed(), layout=layout), batches)
    if not reference:
        raise NotEnoughDataError("calibrate_samples: wanted at least one sample, got none")
    tested: list[dict[str, Any]] = []

    def losses() -> Iterator[NDArray[np.float64]]:
        for vector in vectors:
            found, work = answers(DynamicEncoder(model, exits.with_thresholds(vector), layout=layout), batches)
            lost = np.array([0.0 if agree(a, b) else 1.0 for a, b in zip(found, reference, strict=True)])
            tested.append(
                {
                    "thresholds": [number_to_json(value) for value in vector],
                    "loss": float(lost.mean()),
                    "samples_x_layers": work.fraction,
                }
            )
            yield lost

    selection = learn_then_test(losses(), risk, error, bound)
    chosen = selection.chosen
    certificate: dict[str, Any] = {
        "certified": chosen is not None, "loss": "disagreement", "risk": risk, "confidence": confidence,
        "method": f"learn-then-test, fixed sequence, {bound}", "n": len(reference),
        "tested": [{**entry, "p_value": p} for entry, p in zip(tested, selection.p_values, strict=True)],
    }  # fmt: skip
    result = exits.closed() if chosen is None else exits.with_thresholds(vectors[chosen])
    if chosen is not None:
        certificate["measured_risk"] = tested[chosen]["loss"]
        certificate["samples_x_layers"] = tested[chosen]["samples_x_layers"]
    certificate["thresholds"] = [number_to_json(point.threshold) for point in result]
    result.record = {**exits.record, "certificate": certificate}
    return result


def answers(encoder: DynamicEncoder, batches: Sequence[Mapping[str, Tensor]]) -> tuple[list[Tensor], Work]:
    """Every sample's logits ([classes], or [its frames, classes]) in the order of the batches, and the work of all."""
    found: list[Tensor] = []
    work = Work([0] * encoder.depth)
    for inputs in batches:
        out = encoder(**inputs)
        work = work + out.work
        frames = getattr(out, "frames", None)
        found += out.logits if frames is None else [row[:n] for row, n in zip(out.logits, frames.tolist(), strict=True)]
    return found, work


def _same_argmax(mine: Tensor, full: Tensor) -> bool:
    return torch.equal(mine.argmax(-1), full.argmax(-1))


def _vectors(exits: SampleExits, path: Sequence[float | Sequence[float]] | None) -> list[list[float]]:
    if path is None:
        most = {point.criterion.most for point in exits if point.criterion.scored}
        if len(most) != 1 or not np.isfinite(next(iter(most))):
            raise ArgumentError(
                f"calibrate_samples: criteria {sorted({e.criterion.kind for e in exits})} do not share a finite highest "
                "score, from which no path follows; give path="
            )
        path = default_levels(next(iter(most)))
    vectors = [[float(step)] * len(exits) if isinstance(step, int | float) else [float(x) for x in step] for step in path]
    if not vectors or any(len(v) != len(exits) or np.isnan(v).any() for v in vectors):
        raise ArgumentError(f"calibrate_samples: path must be numbers or vectors of {len(exits)} that are not NaN, got {path}")
    return vectors
