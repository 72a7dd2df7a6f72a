"""How true every exit's scores are: against whether the row that leaves there says what the full model says."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dyndepth.calibration import Reliability, Requests, brier
from dyndepth.closed_form.measure import Lottery, Sample
from dyndepth.exits import Always, Band, Criterion, Exits, Never, RouterScore, TopProbability
from dyndepth.exits.codec import number_to_json
from dyndepth.exits.criteria import View
from dyndepth.report.measure import Advance, groups
from dyndepth.runtime.bind import bind
from dyndepth.runtime.score import score

#: A band that resumes is tried on one row in four at a time, so that the rows between them stay near the full model.
_LOTS = 4
#: At most so many bins, and at least so many rows in each: the standard error of a share of 30 rows is up to nine points.
_BINS, _BIN_ROWS = 15, 30


@dataclass(frozen=True)
class Judged:
    """What a band's score says, and what the row that takes the band says; over rows with a score (the others never leave)."""

    leave: int
    resume: int
    criterion: str
    threshold: float | str
    #: Judged rows, and how many of them the criterion had no score for.
    rows: int
    silent: int
    #: Share of rows for which this band alone gives the full model's token.
    agreement: float | None
    #: Share of rows whose score reaches the threshold, and the share of those that agree.
    reaching: float | None
    agreement_reaching: float | None
    #: Expected calibration error and Brier score, for scores that are probabilities.
    calibration_error: float | None
    brier: float | None
    #: Per bin of equal count, in ascending order: mean score, share that agreed, rows.
    bins: list[dict[str, float]]
    #: How the rows were made to leave, or why there is nothing to show.
    note: str


def reliability(requests: Requests, exits: Exits, kv: str | None, advance: Advance) -> list[Judged]:
    """Every band's scores against whether the row that takes this band, and no other, says what the full model says.

    The past of a row that leaves for good is exact: what the row reads in the layers below was written at full depth. A row
    that resumes reads layers that earlier rows may have skipped, so one row in four takes the band at a time, by lot.
    """
    scores: dict[int, list[Tensor]] = {band.leave: [] for band in exits if band.criterion.scored}
    agrees: dict[int, list[Tensor]] = {leave: [] for leave in scores}
    reaches: dict[int, list[Tensor]] = {leave: [] for leave in scores}
    for tokens, start in groups(requests) if scores else ():
        sample, heard = _listen(requests.model, exits, tokens, start)
        step = torch.cat([torch.arange(t.shape[0]) - s for t, s in zip(tokens, start, strict=True)])[sample.judged]
        for band in exits:
            if band.leave in scores:
                found = heard[band.leave][sample.judged]
                scores[band.leave].append(found)
                agrees[band.leave].append(_agrees(band, exits, sample, kv)[sample.judged])
                reaches[band.leave].append(found >= band.thresholds(step))
        advance(len(tokens))
    return [
        _judged(band, exits, *(torch.cat(part[band.leave]) for part in (scores, agrees, reaches)))
        if band.criterion.scored
        else _unscored(band)
        for band in exits
    ]


@dataclass(frozen=True)
class _Listening(Criterion):
    """Writes down another criterion's scores, chunk by chunk in the caller's order of rows; nobody leaves."""

    kind: ClassVar[str] = "listening"
    criterion: Criterion
    heard: list[Tensor]

    @property
    def needs_logits(self) -> bool:  # type: ignore[override]
        return self.criterion.needs_logits

    @property
    def needs_previous(self) -> bool:  # type: ignore[override]
        return self.criterion.needs_previous

    def leaves(self, view: View, threshold: Tensor) -> Tensor:
        self.heard.append(self.criterion.score(view).float().cpu())
        return torch.zeros_like(view.seq, dtype=torch.bool)


def _listen(model: Any, exits: Exits, tokens: list[Tensor], start: list[int]) -> tuple[Sample, dict[int, Tensor]]:
    """The sequences with the full model's answers, and per boundary float32 [rows] scores, NaN where the criterion is silent.

    One pass at full depth gives both.
    """
    heard: dict[int, list[Tensor]] = {band.leave: [] for band in exits if band.criterion.scored}
    bound = bind(model)
    # Every band is judged, those without a score by Never: saturation looks back at the boundary before.
    deaf = [
        _with(band, _Listening(band.criterion, heard[band.leave]) if band.leave in heard else Never())
        for band in exits.prepared(bound.device, bound.dtype)
    ]
    full = score(model, tokens, Exits(deaf, exits.model), start=start, kv="propagate")
    sample = Sample(model, tokens, start, full.argmax(), full.judged)
    return sample, {leave: torch.cat(parts) for leave, parts in heard.items()}


def _agrees(band: Band, exits: Exits, sample: Sample, kv: str | None) -> Tensor:
    """bool [rows]: what a row says that takes this band is what the full model says; judged rows only."""
    if band.resume == exits.model.layers:  # the layers above are nobody's past: all may leave at once, and leave holes
        return sample.run(Exits([_with(band, Always())], exits.model), "none").agrees
    agrees = torch.zeros_like(sample.judged)
    for number in range(_LOTS):
        lot = sample.run(Exits([_with(band, Lottery(1 / _LOTS, number))], exits.model), kv)
        agrees |= lot.skipped & lot.agrees
    return agrees


def _with(band: Band, criterion: Criterion) -> Band:
    """The same maps under another criterion, which never looks at the threshold; an infinite one would close the band."""
    other = copy.copy(band)
    other.criterion, other.threshold = criterion, 0.0
    return other


def _judged(band: Band, exits: Exits, scores: Tensor, agrees: Tensor, reaches: Tensor) -> Judged:
    told = scores.isfinite()
    x, y, over = scores[told].double().numpy(), agrees[told].numpy(), reaches[told].numpy()
    found = Reliability.of(x, y, max(1, min(_BINS, len(x) // _BIN_ROWS))) if len(x) else None
    probability = isinstance(band.criterion, RouterScore | TopProbability) and found is not None
    if found is None:
        note = f"Criterion {band.criterion.kind} has no score here: it compares with an earlier boundary, and there is none."
    elif band.resume == exits.model.layers:
        note = "Every judged row leaves here, with full depth's past."
    else:
        note = f"Rows take this band by lot, one in {_LOTS} at a time, each once; the others of its past ran every layer."
    return Judged(
        **_facts(band),
        rows=len(scores),
        silent=len(scores) - len(x),
        agreement=float(y.mean()) if len(x) else None,
        reaching=float(over.mean()) if len(x) else None,
        agreement_reaching=float(y[over].mean()) if over.any() else None,
        calibration_error=found.calibration_error if probability and found is not None else None,
        brier=brier(x, y) if probability else None,
        bins=[] if found is None else _bins(found),
        note=note,
    )


def _unscored(band: Band) -> Judged:
    return Judged(
        **_facts(band), rows=0, silent=0, agreement=None, reaching=None, agreement_reaching=None, calibration_error=None,
        brier=None, bins=[], note=f"Criterion {band.criterion.kind} decides without a score.",
    )  # fmt: skip


def _facts(band: Band) -> dict[str, Any]:
    return {
        "leave": band.leave,
        "resume": band.resume,
        "criterion": band.criterion.kind,
        "threshold": number_to_json(band.threshold),
    }


def _bins(found: Reliability) -> list[dict[str, float]]:
    return [
        {"score": float(score), "agreement": float(agreement), "rows": int(rows)}
        for score, agreement, rows in zip(found.score, found.agreement, found.count, strict=True)
    ]
