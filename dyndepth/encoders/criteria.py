"""Criteria for whole samples; those of dyndepth.exits.criteria that look at one boundary serve here too.

What a criterion must remember goes into `view.carried` and travels with the samples. Sources are named per class.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dyndepth.errors import ExitsError
from dyndepth.exits.criteria import CRITERIA, Criterion, View
from dyndepth.ops import ExitStats


@dataclass
class SampleView(View):
    """`View` of samples: `hidden` is one pooled vector each, `seq` the caller's number of the sample, `step` always 0.

    `stats` are per sample; for heads that answer per token they are per token, in packed order, and `reduce` averages
    [tokens, ...] to [live, ...].
    """

    #: The exit's logits, [live, classes] or [tokens, classes].
    answers: Callable[[], Tensor] = field(kw_only=True)
    #: Means over each sample's tokens.
    reduce: Callable[[Tensor], Tensor] = field(kw_only=True)
    #: int64 [live], tokens per sample, on the CPU.
    lengths: Tensor = field(kw_only=True)
    #: Width of the answers.
    classes: int = field(kw_only=True)


@dataclass(frozen=True)
class SampleCriterion(Criterion):
    """Base of the criteria below. `module` holds learned weights, kept with the exit; `per_token` reads frames."""

    module: nn.Module | None = None
    per_token: ClassVar[bool] = False

    @classmethod
    def make_module(cls, settings: dict[str, Any]) -> nn.Module | None:
        """The module that `settings` of a file describe."""
        return None

    def module_settings(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class RegressionPatience(SampleCriterion):
    """PABEE for regression (Zhou et al. 2020): boundaries in a row whose answer moved by less than `tolerance`.

    Leaves when the count reaches the threshold; the count starts again at 0 when the answer moves.
    """

    kind: ClassVar[str] = "regression_patience"
    most: ClassVar[float] = float("inf")
    carries: ClassVar[bool] = True
    needs_logits = True
    tolerance: float = 0.5

    def score(self, view: View) -> Tensor:
        assert isinstance(view, SampleView)
        answer = view.answers()[:, 0].float()
        count = torch.zeros_like(answer)
        if "patience_count" in view.carried:
            near = (answer - view.carried["patience_answer"]).abs() < self.tolerance
            count = torch.where(near, view.carried["patience_count"] + 1, 0)
        view.carried["patience_answer"], view.carried["patience_count"] = answer, count
        return count


class LambdaHead(nn.Module):
    """PALBERT's lambda: the probability of stopping here, from the pooled residuals of this exit and the one before.

    `[h_i ; h_{i-1}]` (zeros before the first), three times linear and tanh, linear to one, sigmoid (Balagansky and Gavrilov
    2022, sec. 3; their code's `cat`).
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        sizes = [2 * width, inner, inner, inner]
        steps = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
        self.body = nn.Sequential(*steps, nn.Linear(inner, 1))
        self.width, self.inner = width, inner

    def forward(self, hidden: Tensor, previous: Tensor | None) -> Tensor:
        """fp32 [n] in [0, 1]; hidden and previous [n, width]."""
        before = torch.zeros_like(hidden) if previous is None else previous
        return torch.sigmoid(self.body(torch.cat([hidden, before], -1).float()))[:, 0]


@dataclass(frozen=True)
class QExit(SampleCriterion):
    """Leaves where the posterior of stopping, sum over j <= i of lambda_j prod_{k<j} (1 - lambda_k), exceeds q (PALBERT).

    The threshold is q; 1/2 is the median of the posterior, 1 closes the exit. Deterministic, unlike PonderNet's draws.
    """

    kind: ClassVar[str] = "q_exit"
    carries: ClassVar[bool] = True
    needs_previous = True

    def lam(self, view: View) -> Tensor:
        if self.module is None:
            raise ExitsError(f"criterion {self.kind}: the exit has no lambda head")
        return self.module(view.hidden, view.previous)

    def score(self, view: View) -> Tensor:
        lam = self.lam(view)
        rest = view.carried.get("q_rest", torch.ones_like(lam))
        # Rounding would take the sum above 1 by an ulp, and so past q = 1. 1 - rest would lose small probabilities instead.
        passed = (view.carried.get("q_passed", torch.zeros_like(lam)) + lam * rest).clamp(max=1)
        view.carried["q_rest"], view.carried["q_passed"] = rest * (1 - lam), passed
        return passed

    def leaves(self, view: View, threshold: Tensor) -> Tensor:
        view.score = self.score(view)
        return view.score > threshold

    @classmethod
    def make_module(cls, settings: dict[str, Any]) -> nn.Module:
        return LambdaHead(**settings)

    def module_settings(self) -> dict[str, Any]:
        return {} if not isinstance(self.module, LambdaHead) else {"width": self.module.width, "inner": self.module.inner}


#: The caller's numbers of the samples, carried where criteria draw.
NUMBER = "number"


@dataclass(frozen=True)
class PonderDraw(QExit):
    """PonderNet's baseline (Banino et al. 2021): leaves with probability lambda_i, drawn anew at every exit.

    The draw is a function of `seed`, the sample's number (`numbers=` of the call; its place in the call without) and the
    boundary, so that it does not depend on who left before, and with numbers not on the batch. The score is lambda minus the
    draw; the threshold is 0.
    """

    kind: ClassVar[str] = "ponder_draw"
    seed: int = 0

    def score(self, view: View) -> Tensor:
        return self.lam(view) - draw(view.carried.get(NUMBER, view.seq), view.leave, self.seed)


def draw(ids: Tensor, boundary: int, seed: int) -> Tensor:
    """Uniform fp32 [n] in [0, 1) from whole numbers: splitmix64's finaliser (Steele, Lea and Flood 2014)."""
    # Tensors wrap around at 2^64 by themselves; Python's numbers have to be told.
    key = (boundary * 0x3F58476D1CE4E5B9 + seed + 2**63) % 2**64 - 2**63
    mixed = ids.long() * 0x1E3779B97F4A7C15 + key
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ _shifted(mixed, shift)) * factor
    mixed = mixed ^ _shifted(mixed, 31)
    return (_shifted(mixed, 40)).float() / 2**24


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros; int64 has no unsigned shift."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class ExitGate(SampleCriterion):
    """JEI-DNN's gate (Regol et al. 2024): features of the exit's softmax, a linear and a sigmoid give g.

    Features are [max p, H(p), margin, H(p^2 / sum p^2)]. The exit's probability is P_l = min(g_l, 1 - sum_{j<l} g_j), at
    least 0; its conditional a_l = clip(P_l / prod_{j<l} (1 - a_j), 0, 1) is the score; the paper's threshold is 1/2.
    """

    kind: ClassVar[str] = "exit_gate"
    carries: ClassVar[bool] = True
    needs_logits = True

    def score(self, view: View) -> Tensor:
        if self.module is None:
            raise ExitsError("criterion exit_gate: the exit has no gate")
        gate = torch.sigmoid(self.module(gate_features(view)))[:, 0]
        spent = view.carried.get("gate_spent", torch.zeros_like(gate))
        rest = view.carried.get("gate_rest", torch.ones_like(gate))
        share = torch.minimum(gate, 1 - spent).clamp_min(0)
        # Where nothing is left the share is 0 as well: 0 / 0 counts as 1, for all of it has left before.
        conditional = torch.where(rest > 0, share / rest, torch.ones_like(rest)).clamp(0, 1)
        view.carried["gate_spent"], view.carried["gate_rest"] = spent + gate, rest * (1 - conditional)
        return conditional

    @classmethod
    def make_module(cls, settings: dict[str, Any]) -> nn.Module:
        return nn.Linear(4, 1)


def gate_features(view: View) -> Tensor:
    """`gate_features_of` the exit's logits."""
    return gate_features_of(view.stats())


def gate_features_of(stats: ExitStats) -> Tensor:
    """fp32 [n, 4]: largest probability, entropy, margin, entropy at temperature 1/2; entropies in nats."""
    top1 = torch.exp(stats.top1 - stats.logsumexp)
    return torch.stack([top1, stats.entropy, top1 - torch.exp(stats.top2 - stats.logsumexp), stats.entropy_half], -1)


@dataclass(frozen=True)
class FrameEntropy(SampleCriterion):
    """Minus the mean entropy of a sample's frames over the size of the vocabulary (early-exit ASR, Wright et al. 2023).

    `xi = (1 / (T V)) sum_t H(p_t)` over the valid frames only; leaves when xi <= -threshold.
    """

    kind: ClassVar[str] = "frame_entropy"
    most: ClassVar[float] = 0.0
    needs_logits = True
    per_token: ClassVar[bool] = True

    def score(self, view: View) -> Tensor:
        assert isinstance(view, SampleView)
        return -view.reduce(view.stats().entropy) / view.classes


@dataclass(frozen=True)
class PatientConfidence(SampleCriterion):
    """PCEE-BERT's patience over confidence (Zhang et al. 2022; LGViT's fourth rule): `patience` exits in a row were sure.

    The score is the smallest of the last `patience` largest probabilities, 0 before so many exits have judged: it reaches the
    threshold just when all of them did.
    """

    kind: ClassVar[str] = "patient_confidence"
    carries: ClassVar[bool] = True
    needs_logits = True
    patience: int = 2

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ExitsError(f"criterion patient_confidence: patience must be at least 1, got {self.patience}")

    def score(self, view: View) -> Tensor:
        stats = view.stats()
        sure = torch.exp(stats.top1 - stats.logsumexp)[:, None]
        before = view.carried.get("recent_confidence", sure.new_zeros(len(sure), self.patience))
        recent = torch.cat([before[:, 1:], sure], 1)
        view.carried["recent_confidence"] = recent
        return recent.amin(1)


#: Criteria of tokens that serve samples as they are.
_SHARED = ("top_probability", "margin", "entropy", "saturation", "patience", "fixed_depth", "always", "never")

SAMPLE_CRITERIA: dict[str, type[Criterion]] = {
    **{kind: CRITERIA[kind] for kind in _SHARED},
    **{c.kind: c for c in (RegressionPatience, QExit, PonderDraw, ExitGate, FrameEntropy, PatientConfidence)},
}  # fmt: skip


def register_criterion(criterion: type[Criterion]) -> type[Criterion]:
    """Decorator: files may name this criterion."""
    if not criterion.kind or criterion.kind in SAMPLE_CRITERIA:
        raise ExitsError(f"register_criterion: kind must be new and not empty, got {criterion.kind!r}")
    SAMPLE_CRITERIA[criterion.kind] = criterion
    return criterion
