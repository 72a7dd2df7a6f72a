"""Conditions that switch at a step of their own: the source's early, the target's afterwards (arXiv 2402.08601)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError


@dataclass(frozen=True)
class ConditionSwitch:
    """Which condition (prompt embedding) each row of a batch is denoised under, by the number of its step.

    Early steps fix the layout, which editing keeps: they take the source. Rows may switch at different steps, be at different
    steps, and be a part of the batch (`rows`), so it goes together with batches that are compacted.
    """

    #: [n, ...] each, of one shape and dtype.
    source: Tensor
    target: Tensor
    #: int64 [n]: the first step under the target.
    at: Tensor

    def __post_init__(self) -> None:
        n = len(self.source) if self.source.dim() else 0
        if n == 0 or self.source.shape != self.target.shape or self.source.dtype != self.target.dtype:
            raise ArgumentError(
                f"ConditionSwitch: source and target must be alike [n, ...], got {self.source.dtype} "
                f"{list(self.source.shape)} and {self.target.dtype} {list(self.target.shape)}"
            )
        if self.at.dtype != torch.int64 or list(self.at.shape) != [n]:
            raise ArgumentError(f"ConditionSwitch: at must be int64 [{n}], got {self.at.dtype} {list(self.at.shape)}")

    def __call__(self, step: int | Tensor, rows: Tensor | None = None) -> Tensor:
        """[m, ...]: the condition of every row at `step`, one for all or int64 [m]; `rows` int64 [m] picks and orders rows."""
        source, target, at = self.source, self.target, self.at
        if rows is not None:
            source, target, at = source[rows], target[rows], at[rows]
        if isinstance(step, Tensor) and step.shape != at.shape:
            raise ArgumentError(f"ConditionSwitch: step must be a number or int64 [{len(at)}], got {list(step.shape)}")
        switched = (step >= at).view(-1, *[1] * (source.dim() - 1))
        return torch.where(switched, target, source)
