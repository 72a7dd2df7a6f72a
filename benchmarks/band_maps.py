"""Candidate bands of `make band-frontier` and `make jump-maps`: their ridge maps and readouts, fitted once and kept."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dyndepth.closed_form.candidates import MapFitter
from dyndepth.closed_form.progress import Progress
from dyndepth.closed_form.trace import trace
from dyndepth.data import Piece
from dyndepth.exits import Band, Exits, TranslatorHead
from dyndepth.files import replacing
from dyndepth.runtime.bind import Model
from dyndepth.runtime.fingerprint import facts_of
from dyndepth.training.starts import fit_readout

LEAVES, LENGTHS = (5, 8, 10, 13, 15, 18, 20, 23, 25), (2, 3, 5, 10)
Span = tuple[int, int]


def spans(depth: int, exits: Sequence[int]) -> list[Span]:
    """Bands of every length from every boundary that resume below the top, and the exits."""
    resuming = [(leave, leave + length) for leave, length in itertools.product(LEAVES, LENGTHS) if leave + length < depth]
    return sorted([*resuming, *((leave, depth) for leave in exits)])


def regressed(model: Model, wanted: Sequence[Span], pieces: Sequence[Piece], name: str, report: Progress) -> MapFitter:
    """Normal equations of the judged rows; one document in eight judges the penalties."""
    fitter = MapFitter(model, wanted)
    judged = torch.cat([torch.arange(p.tokens.shape[0]) >= p.start for p in pieces])
    held = torch.cat([torch.full((p.tokens.shape[0],), i % 8 == 0) for i, p in enumerate(pieces)])
    with report.stage(f"regressing {name}", len(judged)) as advance:
        for chunk in trace(model, [p.tokens for p in pieces], *fitter.needs(), advance=advance):
            part = slice(chunk.begin, chunk.begin + chunk.ready.shape[0])
            fitter.add(chunk, judged[part] & ~held[part], judged[part] & held[part])
    return fitter


def ridge_bands(
    folder: Path, model: Model, wanted: Sequence[Span], pieces: Sequence[Piece], report: Progress
) -> dict[Span, Band]:
    """Bands with ridge maps. Kept by length, as exits hold one band a boundary."""
    lengths = sorted({resume - leave for leave, resume in wanted})
    done = folder / "done"
    if not done.exists():
        fitter = regressed(model, wanted, pieces, "maps", report)
        for length in lengths:
            bands = [fitter.band(span)[0] for span in wanted if span[1] - span[0] == length]
            Exits(bands, facts_of(model)).save_pretrained(folder / str(length))
        done.touch()
    found = {length: Exits.from_pretrained(folder / str(length)) for length in lengths}
    return {(band.leave, band.resume): band for exits in found.values() for band in exits}


def first(pieces: Sequence[Piece], judged: int, skip: int = 0) -> list[Piece]:
    """Pieces with `judged` judged rows, after those that hold the first `skip`."""
    taken, count = [], 0
    for piece in pieces:
        if count >= skip + judged:
            break
        if count >= skip:
            taken.append(piece)
        count += piece.judged
    return taken


def ridge_readouts(
    path: Path, model: Model, leaves: Sequence[int], tokens: Sequence[Tensor], report: Progress
) -> dict[int, TranslatorHead]:
    """Ridge readouts at boundaries of bands, which have none: what top-1 probability and margin are read from there."""
    heads = {leave: TranslatorHead(model.hidden_size, model.ready_size, None) for leave in leaves}
    if not path.exists():
        parts: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {leave: [] for leave in leaves}
        with report.stage("regressing readouts", sum(len(t) for t in tokens)) as advance:
            for chunk in trace(model, tokens, leaves, (), advance=advance):
                for leave in leaves:
                    stream = chunk.residual[leave]
                    usual = stream.float().norm(dim=1) < 10 * stream.float().norm(dim=1).median()  # no attention sinks
                    parts[leave].append((stream[usual], model.finish(stream[usual]), chunk.ready[usual]))
        for leave in leaves:
            fit_readout(heads[leave], parts.pop(leave))
        with replacing(path) as temporary:
            torch.save({leave: head.state_dict() for leave, head in heads.items()}, temporary)
    for leave, state in torch.load(path, weights_only=True).items():
        heads[leave].load_state_dict(state)
    return {leave: head.to(model.dtype) for leave, head in heads.items()}
