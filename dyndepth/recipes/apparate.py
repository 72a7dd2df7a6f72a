"""Apparate (arXiv 2312.05385): ramps release a token early, the row goes on, and thresholds are tuned on the feedback.

As every row runs every layer, K,V are always the full model's own, a batch keeps its size, and the full model's answer is known
for every token that a ramp released. Thresholds climb greedily, ramp by ramp, for the most latency saved while the share of
released tokens that the full model would have said too stays above a budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.exits import Exits
from dyndepth.recipes import ee_tuning
from dyndepth.runtime import entry
from dyndepth.runtime.observe import Observed, Observer

Array = NDArray[np.float64]
#: The published search: the first and the smallest step of a threshold.
STEP, SMALLEST = 0.01, 0.001


def exits(model: Any, leave: Sequence[int] = (), *, heads: Exits | None = None) -> Exits:
    """Closed ramps under the largest probability; `tune` opens them.

    Args:
        model: a supported transformers causal LM.
        leave: boundaries; by default those of the heads, else eighths of the depth.
        heads: trained heads (dyndepth.train, ee_tuning.train); without them the model's final norm and LM head.
    """
    found = ee_tuning.exits(model, leave, heads=heads, threshold=math.inf)
    return Exits(found.bands, found.model, {**found.record, "recipe": "Apparate (arXiv 2312.05385)"})


@dataclasses.dataclass(frozen=True)
class Feedback:
    """What ramps made of rows, and whether the full model agreed: what thresholds are tuned on."""

    #: Boundaries of the ramps, ascending, and layers of the model.
    ramps: tuple[int, ...]
    layers: int
    scores: Array  # [rows, ramps], higher is safer
    agrees: NDArray[np.bool_]  # [rows, ramps]

    def __len__(self) -> int:
        return self.scores.shape[0]

    @staticmethod
    def of(seen: Sequence[Observed], layers: int) -> Feedback:
        """What an observer was told in calls of `generate`; raises NotEnoughDataError if a ramp did not judge every row."""
        if not seen or any(bool(each.scores.isnan().any()) for each in seen):
            raise NotEnoughDataError("apparate.Feedback: wanted rows that every ramp has judged, with a score (kv='release')")
        scores, agrees = torch.cat([each.scores for each in seen]), torch.cat([each.agrees for each in seen])
        return Feedback(seen[0].exits, layers, scores.double().numpy(), agrees.numpy())

    def released(self, thresholds: ArrayLike) -> NDArray[np.int64]:
        """int64 [rows]: the first ramp that is sure of the row; the number of ramps where none is."""
        sure = self.scores >= np.asarray(thresholds, dtype=np.float64)
        return np.concatenate([sure, np.ones((len(self), 1), dtype=bool)], axis=1).argmax(axis=1)

    def accuracy(self, thresholds: ArrayLike) -> float:
        """Share of rows whose token is the full model's, released early or not."""
        right = np.concatenate([self.agrees, np.ones((len(self), 1), dtype=bool)], axis=1)
        return float(right[np.arange(len(self)), self.released(thresholds)].mean())

    def saved(self, thresholds: ArrayLike) -> float:
        """Share of the layers that a token need not wait for, on average."""
        waits = np.array([*self.ramps, self.layers]) / self.layers
        return float(1 - waits[self.released(thresholds)].mean())

    def utilities(self, thresholds: ArrayLike, overhead: float) -> Array:
        """Per ramp: layers that its releases save less what it costs rows that pass it, per row, in layers.

        `overhead` is the cost of judging a row, in layers. A ramp below 0 delays tokens on the whole: leave it out.
        """
        which = self.released(thresholds)
        saves = np.array([np.mean(which == k) * (self.layers - ramp) for k, ramp in enumerate(self.ramps)])
        return saves - overhead * np.array([np.mean(which > k) for k in range(len(self.ramps))])


def climb(feedback: Feedback, accuracy: float = 0.99, *, step: float = STEP, smallest: float = SMALLEST) -> list[float]:
    """Thresholds that save much while accuracy on `feedback` never falls below the budget: a greedy climb.

    All ramps start closed at 1. In each round every ramp is tried one step of its own lower; of those that keep the budget
    the one wins that gains most saving for its loss of accuracy, and its step doubles. A ramp that would break the budget
    halves its step. The climb ends when no step from `smallest` up is left. Thresholds are then raised as far as releases on
    `feedback` stay the same.

    Args:
        feedback: scores in [0, 1] and agreement, per row and ramp.
        accuracy: the budget: least share of rows that say what the full model says.
        step, smallest: of thresholds, at first and at last.

    Returns one threshold per ramp; inf for a ramp that stays closed.
    """
    if not 0 <= accuracy <= 1 or not 0 < smallest <= step:
        raise ArgumentError(
            f"apparate.climb: wanted accuracy in [0, 1] and 0 < smallest <= step, got {accuracy}, {smallest} and {step}"
        )
    if len(feedback) == 0:
        raise NotEnoughDataError("apparate.climb: wanted at least one row of feedback, got none")
    count = len(feedback.ramps)
    thresholds, steps = np.full(count, np.nextafter(1, 2)), np.full(count, step)
    now = feedback.accuracy(thresholds), feedback.saved(thresholds)
    while (open_still := (steps >= smallest) & (thresholds > 0)).any():
        best: tuple[tuple[float, float], int, Array, tuple[float, float]] | None = None
        for ramp in np.flatnonzero(open_still).tolist():
            tried = thresholds.copy()
            tried[ramp] -= steps[ramp]
            then = feedback.accuracy(tried), feedback.saved(tried)
            if then[0] < accuracy:
                steps[ramp] /= 2
                continue
            loss, gain = now[0] - then[0], then[1] - now[1]
            worth = (gain / loss if loss > 0 else math.inf), gain
            if best is None or worth > best[0]:
                best = worth, ramp, tried, then
        if best is not None:
            _, ramp, thresholds, now = best
            steps[ramp] *= 2
    which = feedback.released(thresholds)
    return [float(feedback.scores[which == k, k].min(initial=math.inf)) for k in range(count)]


def tune(
    model: Any,
    exits: Exits,
    inputs: Sequence[Mapping[str, Any] | Tensor],
    accuracy: float = 0.99,
    *,
    step: float = STEP,
    smallest: float = SMALLEST,
    **options: Any,
) -> Exits:
    """The same ramps with thresholds climbed on the full model's own continuations of `inputs`.

    Args:
        model: the model that the exits were made for.
        exits: of `exits`; what thresholds they have does not matter.
        inputs: batches as for `generate`: requests like those to come.
        accuracy: the budget on them; `climb` says how it is kept, and `step` and `smallest` are its.
        options: of `generate`: max_new_tokens and the like.

    Returns exits whose `record["apparate"]` says what was reached: accuracy, saved (share of layers not waited for), rows.
    """
    seen: list[Observed] = []
    for batch in inputs:
        generate(model, batch, exits.with_thresholds(math.inf), observe=seen.append, **options)
    feedback = Feedback.of(seen, exits.model.layers)
    thresholds = climb(feedback, accuracy, step=step, smallest=smallest)
    reached = {"budget": accuracy, "accuracy": feedback.accuracy(thresholds), "saved": feedback.saved(thresholds)}
    result = exits.with_thresholds(thresholds)
    result.record = {**exits.record, "apparate": {**reached, "rows": len(feedback)}}
    return result


def generate(
    model: Any, inputs: Mapping[str, Any] | Tensor, exits: Exits, *, observe: Observer | None = None, **options: Any
) -> Any:
    """`model.generate` with ramps that release tokens early while their rows go on to the top.

    Args:
        model: the model that the exits were made for.
        inputs: what a tokenizer returns (padded on the left), or input ids [batch, t].
        exits: of `tune`, or any that leave for good.
        observe: is told of every row at every ramp, with the full model's token: feedback to tune anew when the traffic
            changes (`Feedback.of`, `climb`).
        options: of transformers' generate and of dyndepth.generate.

    Returns what transformers' generate returns; `exit_layers` says where tokens were released, `layers_run` that all ran.
    """
    content = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    return model.generate(**content, custom_generate=entry.generate, exits=exits, kv="release", observe=observe, **options)
