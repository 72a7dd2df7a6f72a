"""TaoCache (arXiv 2508.08978): late denoising steps are skipped where the model's output can be told in advance.

Outputs of consecutive steps differ by Delta_i = e_i - e_{i-1} (i counts the steps done, the latest being the least noisy).
Late in the process Delta_i points where Delta_{i-1} did, and the ratio of their norms hardly depends on the prompt: it is
calibrated once per step. A skipped step takes e_{i-1} + ratio_i Delta_{i-1} for its output and runs nothing.

Nothing that was told in this way is taken for something seen. After a step was skipped, the model's output e_i is compared with
the last one that it really computed, e_j: their difference D is the sum of Delta_{j+1} ... Delta_i, each `ratio` times the one
before, so Delta_i = D ratio_{j+2} ... ratio_i / (1 + ratio_{j+2} + ratio_{j+2} ratio_{j+3} + ...).

Which prompts skip is decided for each by itself; those that do not run the model as one smaller batch. The paper's predictor is
not public: this one is what its text says of cosines and ratios.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError


def moments(delta: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [n] each, from [n, ...] twice: cosine of a sample's two differences, and |delta| / |before|.

    Both are 0 where one of them is zero, so that nobody is thought predictable for standing still.
    """
    pair = torch.stack([delta.flatten(1).float(), before.flatten(1).float()], 1)
    largest = pair.abs().amax(2)  # [n, 2]: squares of entries over it neither vanish nor overflow
    pair = pair / torch.where(largest > 0, largest, 1.0)[:, :, None]
    products = pair @ pair.transpose(1, 2)  # [n, 2, 2]: norm^2, dot, dot, norm^2 in one product
    norm, dot, norm_before = products[:, 0, 0].sqrt(), products[:, 0, 1], products[:, 1, 1].sqrt()
    known = (largest > 0).all(1)
    cosine = torch.where(known, dot / (norm * norm_before), 0.0)
    ratio = torch.where(known, norm / norm_before * (largest[:, 0] / largest[:, 1]), 0.0)
    return cosine, ratio


@dataclass(frozen=True)
class TaoTable:
    """What calibration found, per step; the first two steps have no two differences and hold NaN."""

    #: Mean cosine of Delta_i with Delta_{i-1}.
    cosine: tuple[float, ...]
    #: Mean of |Delta_i| / |Delta_{i-1}|.
    ratio: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.cosine)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; NaN as null."""
        return {name: [None if math.isnan(v) else v for v in getattr(self, name)] for name in ("cosine", "ratio")}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> TaoTable:
        values = [tuple(math.nan if v is None else float(v) for v in entry[name]) for name in ("cosine", "ratio")]
        return cls(*values)


def calibrate_tao(outputs: Sequence[Sequence[Tensor]]) -> TaoTable:
    """Read the table off full runs: of each run its outputs [n, ...], one per step, all runs with equally many steps."""
    counts = {len(run) for run in outputs}
    if len(counts) != 1 or min(counts) < 3:
        raise ArgumentError(f"calibrate_tao: wanted runs of equally many steps, at least 3, got {sorted(counts)}")
    cosines: list[list[Tensor]] = [[] for _ in range(counts.pop())]
    ratios: list[list[Tensor]] = [[] for _ in cosines]
    for run in outputs:
        deltas = [b - a for a, b in itertools.pairwise(run)]  # deltas[i - 1] is Delta_i
        for at in range(2, len(run)):
            cosine, ratio = moments(deltas[at - 1], deltas[at - 2])
            cosines[at].append(cosine)
            ratios[at].append(ratio)
    means = [tuple(math.nan if not part else float(torch.cat(part).mean()) for part in parts) for parts in (cosines, ratios)]
    return TaoTable(*means)


class TaoCache:
    """One batch of prompts on its way through the steps.

        cache = TaoCache(table, threshold=0.95)
        for step, t in enumerate(timesteps):
            noise = cache(model_of, step, latents, conditions)       # model_of(latents, conditions) for the rows that run
            latents = scheduler.step(noise, t, latents).prev_sample

    Args:
        table: of the same model, scheduler and number of steps.
        threshold: a prompt skips a step when the calibrated cosine of the step and the cosine it showed itself, between the
            last two differences that the model really computed, both reach this.
        start: share of the steps that all run; the method is for late ones.
        most: skipped steps in a row, per prompt.

    The last step always runs. `runs` is bool [steps so far, n], `fraction` the share of prompts x steps that ran the model.
    """

    def __init__(self, table: TaoTable, *, threshold: float = 0.95, start: float = 0.5, most: int = 1) -> None:
        if not 0 <= start <= 1 or most < 0 or math.isnan(threshold):
            raise ArgumentError(
                f"TaoCache: wanted a threshold, start in [0, 1] and most at least 0, got {threshold}, {start}, {most}"
            )
        self.table, self.threshold, self.start, self.most = table, threshold, start, most
        self.runs: list[Tensor] = []
        #: What the last step gave out, and the Delta by which the next may go on.
        self._output: Tensor | None = None
        self._delta: Tensor | None = None
        #: Of each prompt the last output that the model computed, its step (int64 [n], CPU), and what it differed by then.
        self._real: Tensor | None = None
        self._at: Tensor | None = None
        self._seen: Tensor | None = None
        self._cosine: Tensor | None = None
        self._skipped: Tensor | None = None

    @property
    def fraction(self) -> float:
        """Share of prompts x steps that ran the model; NaN before the first."""
        return float(torch.stack(self.runs).float().mean()) if self.runs else math.nan

    @torch.no_grad()
    def __call__(self, model: Callable[..., Tensor], step: int, *rows: Tensor) -> Tensor:
        """The output [n, ...] of step `step` (0, 1, ...), from the model for some rows and extrapolated for the others.

        `model(*rows)` is called with the rows of every given tensor [n, ...] that run, if there are any.
        """
        if step != len(self.runs) or step >= self.table.steps:
            raise ArgumentError(f"TaoCache: step must be {len(self.runs)} of {self.table.steps}, got {step}")
        n = rows[0].shape[0] if rows and rows[0].dim() else 0
        if n == 0 or any(part.shape[0] != n for part in rows):
            raise ArgumentError(f"TaoCache: rows must be tensors of equally many prompts, got {[list(r.shape) for r in rows]}")
        if self._output is not None and len(self._output) != n:
            raise ArgumentError(f"TaoCache: this run has {len(self._output)} prompts, got {n}")
        skips = self._skips(step, n, rows[0].device)
        runs = ~skips
        output = self._told(step)
        if bool(runs.all()):
            output = model(*rows)
        elif bool(runs.any()):
            at = runs.nonzero()[:, 0]
            computed = model(*(part[at] for part in rows))
            assert output is not None
            output = output.index_copy(0, at, computed)
        assert output is not None
        self._remember(output, runs, step)
        return output

    def _skips(self, step: int, n: int, device: torch.device) -> Tensor:
        nobody = torch.zeros(n, dtype=torch.bool, device=device)
        late = math.ceil(self.start * self.table.steps) <= step < self.table.steps - 1
        if self._cosine is None or not late or not self.table.cosine[step] >= self.threshold:
            return nobody
        assert self._skipped is not None
        return (self._cosine >= self.threshold) & (self._skipped < self.most)

    def _told(self, step: int) -> Tensor | None:
        if self._output is None or self._delta is None:
            return None
        return self._output + (self.table.ratio[step] * self._delta).to(self._output.dtype)

    def _remember(self, output: Tensor, runs: Tensor, step: int) -> None:
        n = len(output)
        output = output.clone()  # what was returned is the caller's, who may write to it; so may the model to its buffer
        ran = runs.view(-1, *[1] * (output.dim() - 1))
        cosine = torch.full((n,), -math.inf, device=output.device) if self._cosine is None else self._cosine
        if self._real is None or self._at is None:
            self._real, self._at = output, torch.full((n,), step)
        else:
            difference = output - self._real
            delta = difference * self._shares(step).to(output.device, output.dtype).view_as(ran)
            if self._seen is None or self._delta is None:  # the second step, which all run
                self._seen, self._delta = difference, delta
            else:
                cosine = torch.where(runs, moments(difference, self._seen)[0], cosine)
                self._seen = torch.where(ran, difference, self._seen)
                self._delta = torch.where(ran, delta, (self.table.ratio[step] * self._delta).to(output.dtype))
            self._real = torch.where(ran, output, self._real)
            self._at = torch.where(runs.cpu(), step, self._at)
        before = torch.zeros(n, dtype=torch.int32, device=output.device) if self._skipped is None else self._skipped
        self._skipped = torch.where(runs, 0, before + 1).to(torch.int32)
        self._output, self._cosine = output, cosine
        self.runs.append(runs.cpu())

    def _shares(self, step: int) -> Tensor:
        """fp32 [n]: Delta of `step` over the difference to each prompt's last computed output; 1 where nothing was skipped."""
        assert self._at is not None
        shares = torch.ones(len(self._at))
        for at in self._at.unique().tolist():
            products = list(itertools.accumulate(self.table.ratio[at + 2 : step + 1], operator.mul, initial=1.0))
            shares[self._at == at] = products[-1] / sum(products)
        return shares
