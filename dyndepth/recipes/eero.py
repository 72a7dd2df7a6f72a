"""EERO (Valade et al., UAI 2025, arXiv 2402.03779): each exit is a classifier with a reject option, under one budget.

Which share of samples each exit should answer comes from exponential weights of its error and its cost; where it puts its
threshold, from a quantile of the scores of the samples that are still there. Unlabelled requests suffice for the quantiles.
Exits may come from any other recipe; nothing is trained here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dyndepth.calibration import betting_bound, exponential_weights, thresholds_for
from dyndepth.encoders import SampleExits, bind
from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.exits.criteria import TopProbability
from dyndepth.recipes.sample_heads import answers, confidences
from dyndepth.training.encoder_states import Inputs

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Budgeted:
    """What `budgeted` chose."""

    #: [exits + 1]: wanted shares, thresholds (the last -inf), error of every exit on the labelled samples.
    shares: Array
    thresholds: Array
    errors: Array
    #: Mean cost that the fitting half reaches, that the other half reaches, and what the latter shows of all requests.
    fitted: float
    checked: float
    bound: float
    #: Whether the fitting half keeps the budget, up to shares rounded to whole samples. Ties can make that impossible: where
    #: heads are so sure that many scores are 1 in float32, no threshold lets a part of those samples leave, and all stay.
    met: bool


def leaving(scores: Array, thresholds: Array) -> NDArray[np.int64]:
    """int64 [n]: the first exit whose score reaches its threshold; the last one (-inf) is reached by all.

    Compared in float32, as encoders do.
    """
    return (scores.astype(np.float32) >= thresholds.astype(np.float32)).argmax(1)


def budgeted(
    scores: Array,
    wrong: Array,
    costs: Array,
    budget: float,
    *,
    temperature: float = 0.05,
    confidence: float = 0.95,
    seed: int = 0,
) -> Budgeted:
    """Shares by exponential weights, thresholds by conditional quantiles, and a bound on what they will cost.

    Args:
        scores: [n, exits + 1], each exit's largest probability; the last column is the top's and is not read.
        wrong: [m, exits + 1], 1 where an exit's answer is wrong, 0 where not, of labelled samples (the same or others).
        costs: [exits + 1], ascending: layers that run until each exit.
        budget: wanted mean cost.
        temperature: beta; small ones follow the errors, large ones spread the samples.
        confidence: of the bound.
        seed: of the halves.

    Thresholds are quantiles on one half of `scores`, where the mean cost exceeds the budget by at most what ties and the
    rounding of shares to whole samples make; `met` says whether ties did. They do not depend on the other half, so its costs
    are a sample of what independent requests of the same kind cost, and a betting bound (Waudby-Smith and Ramdas 2024) on
    their mean holds.
    """
    if scores.ndim != 2 or wrong.ndim != 2 or not scores.shape[1] == wrong.shape[1] == len(costs):
        raise ArgumentError(
            "eero.budgeted: scores, wrong and costs must speak of as many exits, got "
            f"{list(scores.shape)}, {list(wrong.shape)} and {len(costs)}"
        )
    if len(scores) < 2 or not len(wrong):
        raise NotEnoughDataError(f"eero.budgeted: wanted at least 2 scored samples and a labelled one, got {len(scores)}")
    errors = wrong.mean(0)
    shares = exponential_weights(errors, costs, budget, temperature)
    order = np.random.default_rng(seed).permutation(len(scores))
    fit, check = scores[order[: len(order) // 2]], scores[order[len(order) // 2 :]]
    thresholds = thresholds_for(fit, shares)
    reached = [costs[leaving(part, thresholds)] for part in (fit, check)]
    low, width = costs[0], max(costs[-1] - costs[0], 1e-12)
    bound = low + width * betting_bound((reached[1] - low) / width, 1 - confidence)
    fitted, checked = (float(part.mean()) for part in reached)
    rounding = (len(costs) - 1) * (costs[-1] - costs[0]) / len(fit)
    return Budgeted(shares, thresholds, errors, fitted, checked, float(bound), bool(fitted <= budget + rounding + 1e-9))


def fit(
    model: Any,
    exits: SampleExits,
    inputs: Inputs,
    labels: Tensor,
    budget: float,
    *,
    unlabelled: Inputs | None = None,
    temperature: float = 0.05,
    confidence: float = 0.95,
    seed: int = 0,
) -> SampleExits:
    """The exits' heads under the largest probability, with thresholds that spend `budget` layers per sample on average.

    Args:
        model, exits: a model and trained exits of any recipe whose heads answer per sample.
        inputs, labels: labelled samples that nothing was trained on: errors of the exits.
        budget: mean layers per sample, from the first exit's to the model's.
        unlabelled: samples for the thresholds; `inputs` by default.

    Returns exits whose `record["eero"]` holds budget, shares, errors, and the mean layers: on the half that thresholds were
    fitted on, on the other half, and the bound that this one proves with `confidence`. `budget_met` is False where tied scores
    keep so many samples that the fitting half exceeds the budget.
    """
    costs = np.array([*(point.leave for point in exits), bind(model).depth], dtype=np.float64)
    logits = answers(model, exits, inputs)
    wrong = (logits.argmax(-1).cpu() != labels.cpu()[:, None]).double().numpy()
    scores = confidences(model, exits, inputs if unlabelled is None else unlabelled).double().cpu().numpy()
    found = budgeted(scores, wrong, costs, budget, temperature=temperature, confidence=confidence, seed=seed)
    result = exits.with_criterion(TopProbability(), found.thresholds[:-1].tolist())
    about = {
        "budget": budget, "confidence": confidence, "shares": found.shares.tolist(), "errors": found.errors.tolist(),
        "layers_fitted": found.fitted, "layers_checked": found.checked, "layers_bound": found.bound, "budget_met": found.met,
        "samples": len(scores),
    }  # fmt: skip
    return SampleExits(result, exits.model, final=exits.final, record={**exits.record, "eero": about})
