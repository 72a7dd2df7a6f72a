"""Losses of an exit against the full model, per token and in nats; several of them never form a full row of logits.

KL divergences are KL(full || exit) at temperature 1, as Balcony (arXiv 2503.05005) trains, but the mean over tokens: the
published code divides by the batch size only, so its gradient grows with the sequence length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LOSSES = ("sampled_kl", "kl", "top_kl", "state", "ce")


@dataclass(frozen=True)
class Readout:
    """The shared LM head as training sees it: frozen weights, bias and cap."""

    weight: Tensor  # [V, ready]
    bias: Tensor | None
    softcap: float

    @property
    def words(self) -> int:
        return self.weight.shape[0]

    def __call__(self, ready: Tensor) -> Tensor:
        """float32 logits [n, V]."""
        logits = nn.functional.linear(ready.to(self.weight.dtype), self.weight, self.bias).float()
        return logits if self.softcap == 0 else torch.tanh(logits / self.softcap) * self.softcap

    def restricted(self, ids: Tensor) -> Readout:
        """The head over some words only, in the order of `ids` (int64)."""
        ids = ids.to(self.weight.device)
        return Readout(self.weight[ids], None if self.bias is None else self.bias[ids], self.softcap)


@dataclass(frozen=True)
class Words:
    """Words whose logits stand for the vocabulary: all of `frequent`, and a random part of the others.

    `weight[i]` is the logarithm of how many words the i-th one stands for: 0 for frequent ones, log((V - F) / R) for the R
    drawn from the other V - F. Added to the logits it makes their log-sum-exp an estimate of the whole vocabulary's.
    """

    ids: Tensor  # int64 [w]
    weight: Tensor  # float32 [w]

    @classmethod
    def draw(cls, words: int, frequent: Tensor, random: int, generator: torch.Generator) -> Words:
        """All of `frequent` (distinct ids) and `random` of the other words, without repetition."""
        others = torch.ones(words, dtype=torch.bool)
        others[frequent] = False
        rest = others.nonzero()[:, 0]
        count = min(random, rest.shape[0])
        chosen = rest[torch.randperm(rest.shape[0], generator=generator)[:count]]
        correction = math.log(rest.shape[0] / count) if count else 0.0
        weight = torch.cat([torch.zeros(frequent.shape[0]), torch.full((count,), correction)])
        return cls(torch.cat([frequent, chosen]), weight)


def kl(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """float32 [n]: KL(softmax(teacher) || softmax(student)) of logits [n, w]; `weight` [w] is added to both (see Words)."""
    if weight is not None:
        student, teacher = student + weight, teacher + weight
    target = torch.log_softmax(teacher, -1)
    return (target.exp() * (target - torch.log_softmax(student, -1))).sum(-1)


def top_kl(student: Tensor, top_ids: Tensor, top_logits: Tensor, logsumexp: Tensor) -> Tensor:
    """float32 [n]: KL over the teacher's `k` most likely words and one mass for all others; at most the full KL.

    Args:
        student: logits [n, V].
        top_ids, top_logits: int [n, k] and float32 [n, k], the teacher's most likely words.
        logsumexp: float32 [n], of all the teacher's logits.
    """
    # float64 for the rest: 1 - sum of probabilities loses what is left of it in fp32 when the teacher is sure.
    target = (top_logits.double() - logsumexp[:, None].double()).clamp_max(0)
    log_q = torch.log_softmax(student, -1).double()
    mine = log_q.gather(-1, top_ids.long())
    known = (target.exp() * (target - mine)).sum(-1)
    if top_ids.shape[1] == student.shape[1]:  # all words are on the list: what is left of 1 would be rounding
        return known.float()
    rest = (1 - target.exp().sum(-1)).clamp_min(0)
    others = torch.logsumexp(log_q.scatter(-1, top_ids.long(), -torch.inf), -1)
    return (known + torch.xlogy(rest, rest) - rest * others).float()


def state(student: Tensor, teacher: Tensor) -> Tensor:
    """float32 [n]: squared error of head-ready rows [n, r], relative to the teacher's square; reads no word at all."""
    wanted = teacher.float()
    return (student.float() - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1).clamp_min(1e-12)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """float32 [n] against int64 labels [n]; 0 where a label is -100."""
    return nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
