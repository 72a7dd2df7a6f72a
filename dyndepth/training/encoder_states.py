"""Pooled residuals of a frozen encoder, kept: what linear heads, gates and thresholds need, computed once per sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.encoders import DynamicEncoder, LinearHead, ModelHead, Samples
from dyndepth.errors import ArgumentError

Everywhere = list[tuple[Samples, Tensor]]


def chosen(inputs: Mapping[str, Tensor], rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Some samples of the inputs, shortest first, and their numbers; columns that are padding for all of them are cut off."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return {name: value[rows] for name, value in inputs.items()}, rows
    rows = rows[torch.argsort(mask[rows].sum(1).cpu(), stable=True)]
    width, keep = mask.shape[1], mask[rows].any(0)
    columns = keep.nonzero()[:, 0]
    return {
        name: value[rows][:, columns] if value.dim() > 1 and value.shape[1] == width else value[rows]
        for name, value in inputs.items()
    }, rows


@dataclass(frozen=True)
class PooledStates:
    """One vector per sample and exit, the top last: what its head pools. In the caller's order.

    A sample that is one token long pools to itself, so `everywhere` gives heads such samples and every loss runs on them.
    Several trainings on one frozen model may share them: `train_encoder` and the recipes take them for inputs. Which pooling
    they were made with is the caller's to know.
    """

    #: Layers below each exit, and the number of layers.
    boundaries: tuple[int, ...]
    #: [n, d] each.
    states: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.states[0])

    @staticmethod
    def fits(encoder: DynamicEncoder) -> bool:
        """All heads read one pooled vector per sample and nothing else."""
        final = encoder.exits.final
        return isinstance(final, LinearHead) and all(isinstance(point.head, LinearHead) for point in encoder.exits)

    @classmethod
    @torch.no_grad()
    def collect(cls, encoder: DynamicEncoder, inputs: Mapping[str, Tensor], *, batch: int = 64) -> PooledStates:
        """Run all layers for all samples once, those of similar lengths together."""
        mask = inputs.get("attention_mask")
        count = len(next(iter(inputs.values())))
        order = torch.arange(count) if mask is None else torch.argsort(mask.sum(1).cpu(), stable=True)
        heads = [*(point.head for point in encoder.exits), encoder.exits.final or ModelHead()]
        parts: list[list[Tensor]] = [[] for _ in heads]
        for rows in order.split(batch):
            given, _ = chosen(inputs, rows)
            for part, head, samples in zip(parts, heads, encoder.states(**given), strict=True):
                pooled = samples.pooled(head.pooling).float()
                part.append(pooled[torch.argsort(samples.ids).to(pooled.device)])
        home = torch.argsort(order)
        states = tuple(torch.cat(part)[home.to(part[0].device)] for part in parts)
        return cls((*encoder.boundaries, encoder.depth), states)

    def everywhere(self, encoder: DynamicEncoder, rows: Tensor | None = None) -> Everywhere:
        """As DynamicEncoder.everywhere, from what is kept; differentiable in the heads."""
        rows = torch.arange(len(self)) if rows is None else rows
        if self.boundaries != (*encoder.boundaries, encoder.depth):
            raise ArgumentError(
                f"PooledStates: kept at {list(self.boundaries)}, the exits are at {[*encoder.boundaries, encoder.depth]}"
            )
        heads = [*(point.head for point in encoder.exits), encoder.exits.final]
        ones, ids = torch.ones(len(rows), dtype=torch.int64), torch.arange(len(rows))
        found: Everywhere = []
        for boundary, state, head in zip(self.boundaries, self.states, heads, strict=True):
            samples = Samples(state[rows.to(state.device)], ones, ids, boundary)
            assert head is not None
            found.append((samples, head(samples, encoder.family.finish)))
        return found


#: Samples to train on: the encoder's arguments, [n, ...] each, or what a frozen model makes of them.
Inputs = Mapping[str, Tensor] | PooledStates
