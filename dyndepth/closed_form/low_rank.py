"""K,V maps that share what they read: all layers of a band through one narrow product of the residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.closed_form.ridge import NormalEquations

#: Below this share of their mean square, targets count as constant: sums of a chunk are fp32.
_CONSTANT = 1e-6


@dataclass(frozen=True)
class Cut:
    """`weights` [features + 1, targets] cut to a rank: `up @ down @ x + bias`."""

    down: Tensor  # [rank, features]
    up: Tensor  # [targets, rank]
    bias: Tensor  # [targets]

    @property
    def weights(self) -> Tensor:
        """[features + 1, targets] again, the bias last."""
        return torch.cat([(self.up @ self.down).T, self.bias[None]])


def pays(rank: int, features: int, targets: int) -> bool:
    """Whether maps of this rank are fewer numbers than one matrix."""
    return rank * (features + targets) < features * targets


def cut(weights: Tensor, fitting: NormalEquations, columns: Tensor, group: int, rank: int) -> Cut:
    """The best approximation of rank `rank` on the rows that `fitting` has seen.

    Reduced-rank regression (Izenman 1975): of all `B` of the rank it takes the one with the least `E |S (W - B)^T x|^2`, which
    is what the singular values of `C^(1/2) W S` say, C being the covariance of x. Means are the bias's affair: it is set such
    that every target keeps its mean prediction. S divides every `group` columns by the root of their mean variance, so that
    K and V of all layers count alike: layers differ by orders of magnitude in size, and their attention does not care.

    Args:
        weights: [features + 1, targets], the bias last, as `solve_best` gives them.
        columns: int64 [targets], where the targets are among those of `fitting`.
    """
    mean = fitting.gram[-1, :-1] / fitting.rows
    covariance = fitting.gram[:-1, :-1] / fitting.rows - torch.outer(mean, mean)
    square = (fitting.square[columns] / fitting.rows).unflatten(0, (-1, group)).mean(1)
    variance = square - (fitting.cross[-1, columns] / fitting.rows).square().unflatten(0, (-1, group)).mean(1)
    # Targets that do not vary have a variance of rounding errors, by which nothing may be multiplied: their means are enough.
    varies = variance > _CONSTANT * square
    spread = variance.where(varies, 1.0).sqrt().repeat_interleave(group)
    whole = weights[:-1].double()
    scaled = whole / spread * varies.repeat_interleave(group)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    right = torch.linalg.svd(root @ scaled, full_matrices=False).Vh[:rank]  # [rank, targets]
    down, up = right @ scaled.T, spread[:, None] * right.T
    bias = weights[-1].double() + mean @ (whole - (up @ down).T)
    return Cut(down.float(), up.float(), bias.float())
