"""How true scores are: reliability bins (PCEE), proper scores, and a threshold that adapts online (FREE)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta as beta_distribution

from dyndepth.errors import ArgumentError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Reliability:
    """Bins of equal count over a score: mean score, share that agreed, count. Empty bins do not exist."""

    edges: Array  # [bins + 1]; bin b holds scores in [edges[b], edges[b + 1]), the last one its right edge too
    score: Array
    agreement: Array
    count: NDArray[np.int64]

    @classmethod
    def of(cls, scores: ArrayLike, agrees: ArrayLike, bins: int = 15) -> Reliability:
        """Bin validation rows: scores [n], agrees [n] (did the exit say what the full model says)."""
        x, y = _pairs(scores, agrees, "Reliability.of")
        if bins < 1:
            raise ArgumentError(f"Reliability.of: bins must be at least 1, got {bins}")
        edges = np.unique(np.quantile(x, np.linspace(0, 1, bins + 1)))
        if len(edges) == 1:
            edges = np.array([edges[0], np.nextafter(edges[0], math.inf)])
        which = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, len(edges) - 2)
        count = np.bincount(which, minlength=len(edges) - 1)
        kept = count > 0
        total = np.maximum(count, 1)
        mean, share = np.bincount(which, x, len(count)) / total, np.bincount(which, y, len(count)) / total
        return cls(np.append(edges[:-1][kept], edges[-1]), mean[kept], share[kept], count[kept])

    def threshold(self, agreement: float) -> float:
        """The lowest score from which every bin up agreed at least this often (PCEE's rule); inf if the top one did not."""
        enough = self.agreement >= agreement
        failing = np.flatnonzero(~enough)
        first = 0 if len(failing) == 0 else int(failing[-1]) + 1
        return math.inf if first == len(enough) else float(self.edges[first])

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: count-weighted |score - agreement|; scores must be probabilities."""
        return float(np.average(np.abs(self.score - self.agreement), weights=self.count))


def brier(scores: ArrayLike, agrees: ArrayLike) -> float:
    """Mean squared error of probabilities; a constant at the base rate q scores q (1 - q)."""
    x, y = _pairs(scores, agrees, "brier")
    return float(np.mean((x - y) ** 2))


@dataclass
class BetaMixture:
    """FREE's adaptive threshold: one Beta density per class (agrees, disagrees), moment-matched as pairs come in.

    `update` takes scores whose truth became known (a deep pass looked at them again), `threshold` is the smallest grid value
    at which agree / (agree + disagree) densities exceed `ratio`. `weight` mixes the soft responsibility with the label; the
    published code means 0.8 but overwrites the soft part, which is `weight=0`.
    """

    ratio: float = 0.4
    weight: float = 0.8
    grid: tuple[float, ...] = tuple(np.linspace(0.3, 0.9, 10).tolist())
    start: float = 0.9
    #: (a, b) of the density of disagreeing and agreeing scores.
    densities: list[tuple[float, float]] = field(default_factory=lambda: [(1.0, 2.0), (2.0, 1.0)])
    _scores: list[float] = field(default_factory=list)
    _agrees: list[float] = field(default_factory=list)

    def update(self, scores: ArrayLike, agrees: ArrayLike) -> None:
        """Add rows (scores in [0, 1]) and re-estimate both densities from all rows seen."""
        x, y = _pairs(scores, agrees, "BetaMixture.update")
        if x.min() < 0 or x.max() > 1:
            raise ArgumentError(f"BetaMixture.update: scores must be in [0, 1], got {x.min():.4g} to {x.max():.4g}")
        self._scores += np.clip(x, 1e-4, 1 - 1e-4).tolist()
        self._agrees += y.tolist()
        seen, label = np.array(self._scores), np.array(self._agrees)
        share = self.weight * self._agreeing(seen) + (1 - self.weight) * label
        for which, weights in enumerate((1 - share, share)):
            fitted = _moments(seen, weights)
            if fitted is not None:
                self.densities[which] = fitted

    @property
    def threshold(self) -> float:
        """`start` until rows were seen; the largest grid value if none is sure enough."""
        if not self._scores:
            return self.start
        sure = self._agreeing(np.array(self.grid)) > self.ratio
        return float(self.grid[int(np.argmax(sure))]) if sure.any() else float(self.grid[-1])

    def _agreeing(self, scores: Array) -> Array:
        wrong, right = (beta_distribution.pdf(scores, a, b) for a, b in self.densities)
        total = wrong + right
        return np.where(total > 0, right / np.where(total > 0, total, 1), 0.5)


def _moments(x: Array, weights: Array) -> tuple[float, float] | None:
    """Beta parameters with the weighted mean and variance; None while there is too little to say."""
    if weights.sum() < 2:
        return None
    mean = float(np.average(x, weights=weights))
    variance = float(np.average((x - mean) ** 2, weights=weights))
    if variance <= 0 or variance >= mean * (1 - mean):
        return None
    common = mean * (1 - mean) / variance - 1
    return mean * common, (1 - mean) * common


def _pairs(scores: ArrayLike, agrees: ArrayLike, op: str) -> tuple[Array, Array]:
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(agrees, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) == 0 or not np.isfinite(x).all():
        raise ArgumentError(
            f"{op}: scores and agrees must be finite, of one length and not empty, got {list(x.shape)} and {list(y.shape)}"
        )
    if not np.isin(y, (0, 1)).all():
        raise ArgumentError(f"{op}: agrees must be true or false")
    return x, y
