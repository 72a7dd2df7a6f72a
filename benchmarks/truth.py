"""How true the scores of `make band-frontier` are: two numbers per band, where bins of a thousand rows would be steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Truth:
    """Chance to agree of a score in (0, 1): sigmoid(slope * logit(score) + shift), by logistic regression (Platt scaling).

    Margins start at 0 where two words tie, which no probability of the first word does: (1 + margin) / 2 stands for them.
    """

    slope: float
    shift: float
    margin: bool

    @classmethod
    def of(cls, scores: Tensor, agrees: Tensor, margin: bool) -> Truth:
        x = torch.stack([_odds(scores, margin), torch.ones(len(scores), dtype=torch.float64)], dim=1)
        found, y = torch.tensor([1.0, 0.0], dtype=torch.float64), agrees.double()
        for _ in range(25):
            p = torch.sigmoid(x @ found)
            curvature = (x * (p * (1 - p))[:, None]).T @ x + 1e-3 * torch.eye(2, dtype=torch.float64)
            found = found - torch.linalg.solve(curvature, x.T @ (p - y) + 1e-3 * found)
        return cls(max(float(found[0]), 1e-3), float(found[1]), margin)  # more confidence never means less

    def chance(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(self.slope * _odds(scores, self.margin) + self.shift).float()

    def score(self, chance: float) -> float:
        """The lowest score with such a chance; inf where there is none."""
        if not 0 < chance < 1:
            return math.inf if chance >= 1 else -math.inf
        score = 1 / (1 + math.exp(min(700.0, -(math.log(chance / (1 - chance)) - self.shift) / self.slope)))
        return 2 * score - 1 if self.margin else score


def _odds(scores: Tensor, margin: bool) -> Tensor:
    scores = (1 + scores.double()) / 2 if margin else scores.double()
    return torch.logit(scores.clamp(1e-6, 1 - 1e-6))
