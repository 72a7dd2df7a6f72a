"""Losses of encoders with exits. Results are those of `DynamicEncoder.everywhere`: (samples, logits) per exit, the top last.

Labels are int64 [n] for classes and floats [n] for regression (one logit); they stand in the order of the samples. L is the
number of layers, l the layers below an exit, CE_l its mean cross-entropy in nats (mean squared error for regression).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dyndepth.encoders.criteria import gate_features_of
from dyndepth.encoders.exits import SampleExits
from dyndepth.errors import ArgumentError
from dyndepth.ops.exit_stats import stats_of_logits
from dyndepth.training.encoder_states import Everywhere


def per_sample(logits: Tensor, labels: Tensor) -> Tensor:
    """fp32 [n]: cross-entropy with int64 labels, squared error with float labels and one logit."""
    if labels.is_floating_point():
        if logits.shape[1] != 1:
            raise ArgumentError(f"encoder loss: labels that are numbers want one logit, got {logits.shape[1]}")
        return (logits[:, 0].float() - labels.float()) ** 2
    return functional.cross_entropy(logits.float(), labels, reduction="none")


def exit_losses(found: Everywhere, labels: Tensor) -> Tensor:
    """fp32 [n, exits + 1]: every sample's loss at every exit."""
    return torch.stack([per_sample(logits, labels) for _, logits in found], 1)


def layer_weighted(found: Everywhere, labels: Tensor) -> Tensor:
    """sum_l l CE_l / sum_l l (PABEE, Zhou et al. 2020, eq. 5; CALM, FREE)."""
    weights = torch.tensor([samples.boundary for samples, _ in found], dtype=torch.float32)
    losses = exit_losses(found, labels).mean(0)
    return (losses * weights.to(losses.device)).sum() / weights.sum()


def unweighted(found: Everywhere, labels: Tensor) -> Tensor:
    """sum_l CE_l (BranchyNet; MuE; LGViT's first stage; DeeBERT's second without the top)."""
    return exit_losses(found, labels).mean(0).sum()


def top_only(found: Everywhere, labels: Tensor) -> Tensor:
    """CE_L: plain fine-tuning (the first stage of DeeBERT and COST-EFF)."""
    return per_sample(found[-1][1], labels).mean()


def below_top(found: Everywhere, labels: Tensor) -> Tensor:
    """sum over l < L of CE_l: exits of a model that stays as it is (DeeBERT, Xin et al. 2020, second stage)."""
    return exit_losses(found[:-1], labels).mean(0).sum()


# PonderNet and PALBERT.


def posterior(lambdas: Tensor) -> Tensor:
    """p_i = lambda_i prod_{j<i} (1 - lambda_j), the last entry what is left: [n, exits] -> [n, exits + 1]."""
    rest = torch.cumprod(1 - lambdas, 1)
    before = torch.cat([torch.ones_like(rest[:, :1]), rest[:, :-1]], 1)
    return torch.cat([lambdas * before, rest[:, -1:]], 1)


def geometric_prior(exits: int, rate: float) -> Tensor:
    """Truncated geometric distribution over `exits` and the top: rate (1 - rate)^i, the last entry the remaining mass."""
    if not 0 < rate < 1:
        raise ArgumentError(f"geometric_prior: rate must be in (0, 1), got {rate}")
    return posterior(torch.full((1, exits), rate))[0]


def stopping(found: Everywhere, exits: SampleExits) -> Tensor:
    """fp32 [n, exits]: every exit's probability of stopping, from its lambda head on pooled residuals and those before."""
    lambdas: list[Tensor] = []
    previous: Tensor | None = None
    for (samples, _), point in zip(found, exits, strict=False):
        pooled = samples.pooled(point.head.pooling)
        if point.judge is None:
            raise ArgumentError(f"encoder loss: the exit at {point.leave} has no lambda head")
        lambdas.append(point.judge(pooled, previous))
        previous = pooled
    return torch.stack(lambdas, 1)


class PonderLoss:
    """sum_i mean(p_i CE_i) + beta KL, the KL between p and a truncated geometric prior (PonderNet, Banino et al. 2021).

    `direction` "posterior" is KL(p || prior), as PonderNet and PALBERT write it; "prior" is KL(prior || p), what PALBERT's
    published code computes (torch's order of arguments).

    Args:
        exits: under dyndepth.encoders.QExit or PonderDraw.
        beta, rate: 0.5 and 0.1 in PALBERT; `rate` is the prior's.
        detach: lambda heads do not change the model below them (PALBERT's `detach_lambda`).
    """

    def __init__(
        self, exits: SampleExits, *, beta: float = 0.5, rate: float = 0.1, direction: str = "posterior", detach: bool = False
    ) -> None:
        if direction not in ("posterior", "prior"):
            raise ArgumentError(f"PonderLoss: direction must be posterior or prior, got {direction!r}")
        self.exits, self.beta, self.direction, self.detach = exits, beta, direction, detach
        self.prior = geometric_prior(len(exits), rate)

    def __call__(self, found: Everywhere, labels: Tensor) -> Tensor:
        read = found
        if self.detach:
            read = [(replace(samples, hidden=samples.hidden.detach()), logits) for samples, logits in found]
        p = posterior(stopping(read, self.exits))
        expected = (p * exit_losses(found, labels)).sum(1).mean()
        return expected + self.beta * self.divergence(p)

    def divergence(self, p: Tensor) -> Tensor:
        """Mean KL in nats over samples, p [n, exits + 1]."""
        tiny = torch.finfo(torch.float32).tiny
        prior = self.prior.to(p.device)
        a, b = (p, prior.expand_as(p)) if self.direction == "posterior" else (prior.expand_as(p), p)
        return (a * (a.clamp_min(tiny).log() - b.clamp_min(tiny).log())).sum(1).mean()


# JEI-DNN.


def exit_distribution(gates: Tensor) -> tuple[Tensor, Tensor]:
    """P_l = max(0, min(g_l, 1 - sum_{j<l} g_j)), the rest at the top, and a_l = clip(P_l / prod_{j<l} (1 - a_j), 0, 1).

    gates [n, exits] in [0, 1] -> P [n, exits + 1], which sums to 1, and a [n, exits] (JEI-DNN, Regol et al. 2024, sec. 4).
    """
    spent = gates.cumsum(1) - gates
    shares = torch.minimum(gates, 1 - spent).clamp_min(0)
    rest, conditional = torch.ones_like(gates[:, 0]), []
    for share in shares.unbind(1):
        conditional.append(torch.where(rest > 0, share / rest, torch.ones_like(rest)).clamp(0, 1))
        rest = rest * (1 - conditional[-1])
    return torch.cat([shares, 1 - shares.sum(1, keepdim=True)], 1), torch.stack(conditional, 1)


def gates_of(found: Everywhere, exits: SampleExits) -> Tensor:
    """fp32 logits [n, exits] of the gates, from features of the exits' detached logits."""
    values = []
    for (_, logits), point in zip(found, exits, strict=False):
        if point.judge is None:
            raise ArgumentError(f"encoder loss: the exit at {point.leave} has no gate")
        values.append(point.judge(gate_features_of(stats_of_logits(logits.detach().float())))[:, 0])
    return torch.stack(values, 1).float()


#: What a factor of the modules' losses in JointExitLoss is computed over.
SCALES = ("batch", "sample")


class JointExitLoss:
    """JEI-DNN (Regol et al. 2024): a warm-up of the inference modules, then gates and modules in turn.

    Warm-up: sum_l (G + 1 - l) CE_l with G gates, l from 0. Gates: every sample's best exit is argmin_l CE_l + lambda cost_l,
    and its gates learn, by BCE, 0 before it and 1 from it on, the ones weighed by how many zeros there are to one in the
    batch, within [1/most, most]. Modules: `module_loss`, P from the gates without gradient.

    Args:
        exits: under dyndepth.encoders.ExitGate.
        costs: of leaving at each exit and of the top, the top's 1 (relative FLOPs).
        trade: lambda, the price of cost in nats.
        warmup: updates before the phases; `every` updates each, 200 in the paper, gates first.
        most: largest weight of the ones.
        scale: of the modules' losses, "batch" (ours) or "sample" (published); see `module_loss`.
    """

    def __init__(
        self, exits: SampleExits, costs: Sequence[float], trade: float, *, warmup: int, every: int = 200, most: float = 5.0,
        scale: str = "batch",
    ) -> None:  # fmt: skip
        if scale not in SCALES:
            raise ArgumentError(f"JointExitLoss: scale must be batch or sample, got {scale!r}")
        if len(costs) != len(exits) + 1:
            raise ArgumentError(f"JointExitLoss: costs must be {len(exits) + 1} numbers, got {len(costs)}")
        self.exits, self.costs, self.trade = exits, torch.tensor(costs, dtype=torch.float32), trade
        self.warmup, self.every, self.most, self.scale = warmup, every, most, scale
        self.phase = "warmup"

    def at_update(self, update: int) -> None:
        after = update - self.warmup
        self.phase = "warmup" if after < 0 else ("gates", "modules")[after // self.every % 2]

    def __call__(self, found: Everywhere, labels: Tensor) -> Tensor:
        losses = exit_losses(found, labels)
        if self.phase == "gates":
            return self.gate_loss(gates_of(found, self.exits), losses.detach())
        if self.phase == "modules":
            with torch.no_grad():
                shares, _ = exit_distribution(torch.sigmoid(gates_of(found, self.exits)))
            return self.module_loss(shares, losses)
        count = losses.shape[1]
        return (losses.mean(0) * torch.arange(count, 0, -1, device=losses.device)).sum()

    def module_loss(self, shares: Tensor, losses: Tensor) -> Tensor:
        """Mean over exits and samples of P_l CE_l c; P and CE fp32 [n, exits + 1].

        "sample": c = sum_l CE_l / sum_l P_l CE_l of every sample, and gradients go through it, as in the published code. P then
        cancels: value and gradient are those of the plain mean of all losses. That mean is what is computed, because the
        quotient has no value for a sample whose losses are 0.
        "batch": c = sum CE / sum P CE over exits and the batch, detached, so that modules learn with the weights P_l c. This c
        lies between the least and the largest of the samples' own. Those, detached, would be no alternative: a sample that
        leaves where its loss is 0.01 while that of another exit is 5 would count 501 times.
        """
        if self.scale == "sample":
            return losses.mean()
        scale = (losses.sum() / (shares * losses).sum().clamp_min(1e-12)).detach()
        return (shares * losses * scale).mean()

    def targets(self, losses: Tensor) -> Tensor:
        """fp32 [n, exits]: 1 from every sample's best exit on."""
        best = (losses + self.trade * self.costs.to(losses.device)).argmin(1)
        return (torch.arange(losses.shape[1] - 1, device=losses.device) >= best[:, None]).float()

    def gate_loss(self, gates: Tensor, losses: Tensor) -> Tensor:
        wanted = self.targets(losses)
        ones = wanted.sum(0)
        weight = ((len(wanted) - ones) / ones.clamp_min(1)).clamp(1 / self.most, self.most)
        return functional.binary_cross_entropy_with_logits(gates, wanted, pos_weight=weight)

    def judge(self, found: Everywhere, labels: Tensor) -> Tensor:
        """For a validation split: expected loss and cost under the exit distribution, whatever the phase."""
        shares, _ = exit_distribution(torch.sigmoid(gates_of(found, self.exits)))
        return (shares * (exit_losses(found, labels) + self.trade * self.costs.to(shares.device))).sum(1).mean()


# COST-EFF.


def soft_ce(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """-mean sum_c softmax(teacher / T)_c log softmax(student / T)_c, in nats (Hinton et al. 2015; COST-EFF)."""
    wanted = torch.softmax(teacher.float() / temperature, -1)
    return -(wanted * torch.log_softmax(student.float() / temperature, -1)).sum(-1).mean()


def representation_mse(student: Sequence[Any], teacher: Sequence[Any]) -> Tensor:
    """Mean squared error, averaged over the tensors (hidden states or attention maps) of two lists of equal shapes."""
    if len(student) != len(teacher):
        raise ArgumentError(f"representation_mse: wanted {len(teacher)} tensors, got {len(student)}")
    return torch.stack([functional.mse_loss(a.float(), b.float()) for a, b in zip(student, teacher, strict=True)]).mean()


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0] * ctx.factor, None


def scaled_gradient(value: Tensor, factor: float) -> Tensor:
    """The value itself, whose gradient is multiplied by `factor`."""
    result: Tensor = _Scaled.apply(value, factor)
    return result


def equilibrium(layers: int, leave: Sequence[int] | None = None) -> Any:
    """Gradient equilibrium for the first argument of `everywhere` (Li et al. 2019; COST-EFF).

    At the l-th of L exits, the top being the last, the gradient is multiplied by 1 / (L - l + 1), and before that what comes
    from above by L - l: every exit then counts 1 / L in the gradient of the embedding, instead of all that lie above adding up.

    `leave`: layers below each exit, the top left out; after each of the `layers` by default, as in the papers.
    """
    at = sorted(range(1, layers) if leave is None else leave)
    if len(set(at)) != len(at) or any(not 1 <= boundary < layers for boundary in at):
        raise ArgumentError(f"equilibrium: leave must be different boundaries in [1, {layers}), got {at}")
    above = {boundary: len(at) - number for number, boundary in enumerate(at)}

    def fork(hidden: Tensor, boundary: int) -> tuple[Tensor, Tensor]:
        shared = scaled_gradient(hidden, 1 / (above[boundary] + 1))
        return shared, scaled_gradient(shared, above[boundary])

    return fork
