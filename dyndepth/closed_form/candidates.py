"""Candidate bands and their closed-form maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.closed_form import low_rank
from dyndepth.closed_form.ridge import NormalEquations, solve_best
from dyndepth.closed_form.trace import Chunk
from dyndepth.exits import Band, JumpMap, KVMap, TranslatorHead
from dyndepth.exits.products import EPS
from dyndepth.ops._math import rms_normalise
from dyndepth.runtime.bind import Model

Span = tuple[int, int]


def candidate_spans(layers: int) -> list[Span]:
    """Bands worth measuring: a tenth and a sixth of the depth on a grid of a tenth, exits of a tenth to a third.

    The first tenth of the layers is left alone: residuals there are still little more than the embedding.
    """
    grid = max(1, round(layers / 10))
    spans = {
        (leave, leave + length) for length in (grid, max(1, round(layers / 6))) for leave in range(grid, layers - length, grid)
    }
    spans |= {(layers - max(1, round(layers * share)), layers) for share in (1 / 10, 1 / 6, 1 / 4, 1 / 3)}
    return sorted((leave, resume) for leave, resume in spans if leave >= 1)


@dataclass
class Boundary:
    """Accumulators of one boundary: rms-normed residual there -> everything that bands leaving there need."""

    leave: int
    #: Boundaries where bands from here resume; the model's depth stands for "leaves for good".
    resumes: list[int]
    fitting: NormalEquations
    held_out: NormalEquations
    #: Columns of each target: ("jump", resume), ("head", 0), ("kv", layer).
    columns: dict[tuple[str, int], slice]
    _solved: dict[tuple[str, int], tuple[Tensor, float]] | None = None

    def solved(self) -> dict[tuple[str, int], tuple[Tensor, float]]:
        if self._solved is None:
            self._solved = solve_best(self.fitting, self.held_out, self.columns)
        return self._solved


class MapFitter:
    """Accumulates normal equations for all candidate bands in one streaming pass, then solves for their maps.

    kv_rank: K,V maps are cut to this rank, of bands where that is fewer numbers than whole maps. None: all are whole.
    """

    def __init__(self, model: Model, spans: Sequence[Span], kv_rank: int | None = None) -> None:
        self.model, self.kv_rank = model, kv_rank
        self.boundaries = [
            self._boundary(leave, sorted(r for e, r in spans if e == leave)) for leave in sorted({e for e, _ in spans})
        ]

    @staticmethod
    def memory(model: Model, spans: Sequence[Span]) -> int:
        """Bytes at the peak: accumulators of all boundaries, what solving one of them takes, and everybody's maps."""
        width, kv = model.hidden_size, 2 * model.layers[0].kv_heads * model.layers[0].head_dim
        accumulators = maps = solving = 0
        for leave in {e for e, _ in spans}:
            resumes = [r for e, r in spans if e == leave]
            heads = sum(model.ready_size if r == model.depth else width for r in resumes)
            targets = heads + kv * (max(resumes) - leave)
            accumulators += 2 * NormalEquations.bytes(width, targets)
            # fp64: the system and its factors, the solution and the product that judges it.
            solving = max(solving, 8 * (width + 1) * (3 * (width + 1) + 2 * targets))
            # fp32: the best solution, and the same columns again as maps of each band.
            maps += 4 * (width + 1) * (targets + heads + kv * sum(r - leave for r in resumes))
        return accumulators + solving + maps

    @property
    def accumulators(self) -> int:
        """Bytes held by the normal equations."""
        both = [equations for b in self.boundaries for equations in (b.fitting, b.held_out)]
        return sum(t.numel() * t.element_size() for e in both for t in (e.gram, e.cross, e.square))

    def needs(self) -> tuple[list[int], list[int]]:
        """(boundaries, layers) to ask `trace` for."""
        boundaries = {b.leave for b in self.boundaries} | {r for b in self.boundaries for r in b.resumes}
        layers = {layer for b in self.boundaries for layer in range(b.leave, max(b.resumes))}
        return sorted(boundaries), sorted(layers)

    def add(self, chunk: Chunk, fitting: Tensor, held_out: Tensor) -> None:
        """Take in rows of a chunk where `fitting` (bool) is true; those where `held_out` is true judge penalties."""
        for boundary in self.boundaries:
            residual = chunk.residual[boundary.leave]
            x = rms_normalise(residual, EPS).cpu()
            y = torch.cat([self._target(kind, at, boundary, chunk) for kind, at in boundary.columns], dim=1)
            for accumulator, mask in ((boundary.fitting, fitting), (boundary.held_out, held_out)):
                if bool(mask.any()):
                    accumulator.add(x[mask], y[mask])

    def band(self, span: Span) -> tuple[Band, dict[str, float]]:
        """The closed band of a span with its maps, and their relative squared errors on held-out rows."""
        leave, resume = span
        boundary = next(b for b in self.boundaries if b.leave == leave)
        solved = boundary.solved()
        top = resume == self.model.depth
        weights, error = solved["head", 0] if top else solved["jump", resume]
        kv, kv_error = self._kv(boundary, range(leave, resume))
        head = jump = None
        if top:
            head = TranslatorHead(self.model.hidden_size, self.model.ready_size, rank=None)
            head.up.data, head.bias.data = weights[:-1].T.contiguous(), weights[-1].contiguous()
        else:
            jump = JumpMap(self.model.hidden_size)
            jump.weight.data, jump.bias.data = weights[:-1].T.contiguous(), weights[-1].contiguous()
        errors = {"head" if top else "jump": error, "kv": kv_error}
        return Band(leave, resume, head=head, jump=jump, kv=kv), errors

    def _kv(self, boundary: Boundary, layers: range) -> tuple[KVMap, float]:
        """Maps of these layers, and the mean of their relative errors."""
        solved, width = boundary.solved(), self.model.hidden_size
        weights = torch.cat([solved["kv", layer][0] for layer in layers], dim=1)
        errors = [solved["kv", layer][1] for layer in layers]
        kv_width, rank, found = weights.shape[1] // (2 * len(layers)), self.kv_rank, None
        up, bias = weights[:-1].T, weights[-1]
        if rank is not None and low_rank.pays(rank, width, weights.shape[1]):
            places = [boundary.columns["kv", layer] for layer in layers]
            columns = torch.cat([torch.arange(place.start, place.stop) for place in places])
            found = low_rank.cut(weights, boundary.fitting, columns, kv_width, rank)
            up, bias = found.up, found.bias
            parts = found.weights.double().split(2 * kv_width, dim=1)
            errors = [boundary.held_out.error(part, place) for part, place in zip(parts, places, strict=True)]
        kv = KVMap(len(layers), kv_width, width, None if found is None else rank)
        kv.weight.data = up.unflatten(0, (len(layers), 2, kv_width)).contiguous()
        kv.bias.data = bias.unflatten(0, (len(layers), 2, kv_width)).contiguous()
        if kv.down is not None and found is not None:
            kv.down.data = found.down.contiguous()
        return kv, sum(errors) / len(errors)

    def _boundary(self, leave: int, resumes: list[int]) -> Boundary:
        model, columns, at = self.model, {}, 0
        kv = 2 * model.layers[0].kv_heads * model.layers[0].head_dim
        targets = [("head", 0, model.ready_size) if r == model.depth else ("jump", r, model.hidden_size) for r in resumes]
        targets += [("kv", layer, kv) for layer in range(leave, max(resumes))]
        for kind, number, width in targets:
            columns[kind, number] = slice(at, at + width)
            at += width
        fitting, held_out = NormalEquations(model.hidden_size, at), NormalEquations(model.hidden_size, at)
        return Boundary(leave, resumes, fitting, held_out, columns)

    def _target(self, kind: str, at: int, boundary: Boundary, chunk: Chunk) -> Tensor:
        residual = chunk.residual[boundary.leave]
        if kind == "kv":
            return chunk.kv[at].flatten(1).float().cpu()
        if kind == "jump":
            return (chunk.residual[at].float() - residual.float()).cpu()
        return (chunk.ready.float() - self.model.finish(residual).float()).cpu()
