"""Routers of several bands in one pass: what is left at a boundary depends on what the row skipped below it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from dyndepth.closed_form.heads import exit_argmax, exit_statistics
from dyndepth.closed_form.measure import Sample, draw
from dyndepth.closed_form.router import fit_router
from dyndepth.closed_form.search import Candidate, with_criterion
from dyndepth.exits import Band, Exits, ModelFacts
from dyndepth.exits.criteria import Criterion, RouterScore, View
from dyndepth.runtime.bind import Model

#: Rows below which a router keeps what it learned before: labelling passes may bring hardly anybody by.
_FEW = 64


@dataclass
class Seen:
    """Rows that came by one boundary in labelling passes, or, of a band that resumes, those that took it and no later one."""

    rows: Tensor  # int64 [n], into the sample
    residual: Tensor  # [n, d], on the CPU
    #: float32 [n, k]: which of the bands below (`history` of `below`) the row had skipped.
    skipped: Tensor
    #: bool [n]: the row's token was the full model's; None for exits, whose own arg max says it (closed_form.heads).
    agrees: Tensor | None


@dataclass(frozen=True)
class _Recorder(Criterion):
    """Sends rows away by lot, each band by a lot of its own, and keeps what it saw of them."""

    kind: ClassVar[str] = "recorder"
    scored: ClassVar[bool] = False
    share: float = 0.3
    seed: int = 0
    below: tuple[int, ...] = ()
    #: (sequence, step, residual, skipped) of every call.
    kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list, compare=False)

    @property
    def history(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.below

    def leaves(self, view: View, threshold: Tensor) -> Tensor:
        seq, step = view.seq.long(), view.step.long()
        go = draw(seq, step, self.share, self.seed) == 0 if self.share else torch.zeros_like(seq, dtype=torch.bool)
        wanted = go if self.share else ~go
        skipped = view.hidden.new_zeros(len(seq), 0, dtype=torch.float32)
        if self.below and view.skipped is not None:
            skipped = view.skipped(self.below)
        self.kept.append(tuple(part[wanted].clone().cpu() for part in (seq, step, view.hidden, skipped)))  # type: ignore[arg-type]
        return go


def below(bands: Sequence[Band], leave: int) -> tuple[int, ...]:
    """Boundaries of the bands that a row can have skipped when it comes to boundary `leave`."""
    return tuple(sorted(band.leave for band in bands if band.resume <= leave))


def see(
    bands: Sequence[Band],
    sample: Sample,
    facts: ModelFacts,
    *,
    share: float = 0.3,
    rounds: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> list[Seen]:
    """Passes in which rows take any of the bands by lot: labels for routers that see what a row already skipped.

    Args:
        bands: at most one per boundary, ascending. Exits let nobody go: their rows are those that come by.
        share: chance to take a band where a row comes by.
        rounds: passes, each with other lots.

    Judged rows only, but for the first of a sequence. A band's label is the whole history's: the row took it, maybe some below,
    and none above.
    """
    depth = facts.layers
    found: list[list[Seen]] = [[] for _ in bands]
    first = torch.tensor([0, *(t.shape[0] for t in sample.tokens)]).cumsum(0)[:-1] + torch.tensor(sample.start)
    for number in range(rounds):
        recorders = [
            _Recorder(share=share if band.resume < depth else 0.0, seed=number * len(bands) + i, below=below(bands, band.leave))
            for i, band in enumerate(bands)
        ]
        tried = [
            Band(b.leave, b.resume, recorder, threshold=0.0, head=b.head, jump=b.jump, kv=b.kv)
            for b, recorder in zip(bands, recorders, strict=True)
        ]
        measured = sample.run(Exits(tried, facts), "predict")
        last = _last(measured.scored.bands_taken)
        for i, recorder in enumerate(recorders):
            seq, step, residual, skipped = (torch.cat(parts) for parts in zip(*recorder.kept, strict=True))
            rows = first[seq] + step
            mine = step > 0  # rows of the prompt stand at step 0, too, and never leave
            if bands[i].resume < depth:
                mine &= last[rows] == i
            rows, residual, skipped = rows[mine], residual[mine], skipped[mine]
            agrees = measured.agrees[rows] if bands[i].resume < depth else None
            found[i].append(Seen(rows, residual, skipped, agrees))
        advance()
    return [_joined(parts) for parts in found]


def tell_of_history(model: Model, chosen: Sequence[Candidate], sample: Sample, facts: ModelFacts) -> list[Candidate]:
    """Candidates of one set whose routers also see which of the set's other bands a row has skipped by then.

    Routers of bands that nothing lies below stay as they are, and so do those of block heads, whose rows depend on others.
    """
    bands = [candidate.band for candidate in chosen]
    if not any(below(bands, band.leave) for band in bands):
        return list(chosen)
    rising = sorted(bands, key=lambda band: band.leave)
    seen = {band.leave: part for band, part in zip(rising, see(rising, sample, facts), strict=True)}
    told = []
    for candidate in chosen:
        band, part = candidate.band, seen[candidate.band.leave]
        history = below(bands, band.leave)
        if history and not band.has_block and len(part.rows) >= _FEW:
            top = band.resume == facts.layers
            agrees = exit_argmax(model, band, part.residual) == sample.answers[part.rows] if top else part.agrees
            assert agrees is not None
            stats = exit_statistics(model, band, part.residual) if top else None
            router, quality = fit_router(
                part.residual, agrees, part.rows % 5 == 0, stats, skipped=part.skipped, history=history
            )
            candidate = replace(candidate, band=with_criterion(band, RouterScore(router), band.threshold), router=quality)
        told.append(candidate)
    return told


def _last(taken: Tensor) -> Tensor:
    """int64: number of the highest bit that is set, -1 for none."""
    last = torch.full_like(taken, -1)
    for bit in range(62):
        last[(taken >> bit) & 1 == 1] = bit
    return last


def _joined(parts: Sequence[Seen]) -> Seen:
    agrees = [part.agrees for part in parts if part.agrees is not None]
    return Seen(
        torch.cat([part.rows for part in parts]),
        torch.cat([part.residual for part in parts]),
        torch.cat([part.skipped for part in parts]),
        torch.cat(agrees) if agrees else None,
    )
