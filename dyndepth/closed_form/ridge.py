"""Ridge regression from normal equations accumulated in fp64, with the penalty chosen on held-out rows."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError

Key = TypeVar("Key", bound=Hashable)

#: Penalties tried, as a share of the mean squared feature (features are rms-normed, so that is 1).
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


class NormalEquations:
    """Sums over rows of x x^T, x y^T and y y (per column), x carrying a constant 1 for the bias. fp64, fixed size."""

    def __init__(self, features: int, targets: int) -> None:
        self.gram = torch.zeros(features + 1, features + 1, dtype=torch.float64)
        self.cross = torch.zeros(features + 1, targets, dtype=torch.float64)
        self.square = torch.zeros(targets, dtype=torch.float64)
        self.rows = 0

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Rows x [n, features], y [n, targets], each counting `weight` [n] times (once where None is given).

        Products of a chunk are fp32, autocast or not, their sums over chunks fp64.
        """
        x = torch.cat([x.float(), torch.ones(x.shape[0], 1)], dim=1)
        y = y.float()
        if weight is not None:
            x, y = x * weight.float().sqrt()[:, None], y * weight.float().sqrt()[:, None]
        with torch.autocast(x.device.type, enabled=False):
            self.gram += (x.T @ x).double()
            self.cross += (x.T @ y).double()
        self.square += y.pow(2).sum(0).double()
        self.rows += x.shape[0]

    def solve(self, penalty: float) -> Tensor:
        """[features + 1, targets] minimising squared error plus `penalty * rows` times squared weights (bias excluded)."""
        ridge = torch.full((self.gram.shape[0],), penalty * self.rows, dtype=torch.float64)
        ridge[-1] = 0
        return torch.linalg.solve(self.gram + torch.diag(ridge + 1e-9 * self.rows), self.cross)

    def error(self, weights: Tensor, columns: slice = slice(None)) -> float:
        """Mean squared error of `weights` on these rows, relative to the mean square of the targets."""
        cross, square = self.cross[:, columns], self.square[columns]
        wrong = (weights * (self.gram @ weights)).sum() - 2 * (weights * cross).sum() + square.sum()
        return float(wrong / square.sum().clamp_min(1e-30))

    @staticmethod
    def bytes(features: int, targets: int) -> int:
        """Memory of one accumulator."""
        return 8 * ((features + 1) * (features + 1 + targets) + targets)


def solve_best(
    fitting: NormalEquations, held_out: NormalEquations, columns: Mapping[Key, slice]
) -> dict[Key, tuple[Tensor, float]]:
    """Per group of target columns, (float32 weights [features + 1, columns], relative error on held-out rows).

    Every group takes the penalty of PENALTIES that is best on its held-out rows.
    """
    best: dict[Key, tuple[Tensor, float]] = {}
    for penalty in PENALTIES:
        weights = fitting.solve(penalty)
        if not bool(torch.isfinite(weights).all()):
            raise ArgumentError("fit: the model's activations are not finite; nothing can be regressed on them")
        for key, part in columns.items():
            error = held_out.error(weights[:, part], part)
            if key not in best or error < best[key][1]:
                best[key] = (weights[:, part].float(), error)
    return best
