"""Where rows leave, how many, and what judging them reads: from exits and their record, from a user, or from a curve."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dyndepth.errors import ArgumentError
from dyndepth.exits import Band, Exits

#: Words that a shortlist holds where nothing says how many (closed_form.fit takes as many).
SHORTLIST = 1024


@dataclass(frozen=True)
class Exit:
    """A band `[leave, resume)` and the share `rate` of the rows live at `leave` that take it.

    Args:
        head: weights of the exit head (an early exit) or of the jump map (a band that resumes); 0 for the norm alone.
        words: vocabulary words that judging looks at; 0 where a router needs no logits.
        kv_rank: of the K,V maps; 0: they read the whole residual.
    """

    leave: int
    resume: int
    rate: float
    head: int = 0
    words: int = 0
    kv_rank: int = 0

    def __post_init__(self) -> None:
        name = f"exit at {self.leave}"
        if not 1 <= self.leave < self.resume:
            raise ArgumentError(f"{name}: wanted 1 <= leave < resume, got resume {self.resume}")
        if not 0 <= self.rate <= 1:
            raise ArgumentError(f"{name}: rate must be in [0, 1], got {self.rate}")
        if min(self.head, self.words, self.kv_rank) < 0:
            got = f"{self.head}, {self.words}, {self.kv_rank}"
            raise ArgumentError(f"{name}: head, words and kv_rank must not be negative, got {got}")


def check(exits: Sequence[Exit], layers: int) -> tuple[Exit, ...]:
    """In ascending order; ArgumentError for two at one boundary or one above the model."""
    ordered = tuple(sorted(exits, key=lambda exit_: exit_.leave))
    for one, other in itertools.pairwise(ordered):
        if one.leave == other.leave:
            raise ArgumentError(f"rates: two bands leave at boundary {one.leave}; a boundary has at most one")
    for one in ordered:
        if one.resume > layers:
            raise ArgumentError(f"rates: band [{one.leave}, {one.resume}) is above the model's {layers} layers")
    return ordered


def parse_rates(text: str, layers: int, words: int = SHORTLIST) -> tuple[Exit, ...]:
    """`20:0.15,23:0.1`: of the rows live at boundary 20, 15 % leave for good; of the rest at 23, 10 %."""
    found = []
    for part in text.split(","):
        boundary, colon, share = part.partition(":")
        try:
            leave, rate = int(boundary), float(share)
        except ValueError:
            colon = ""
        if not colon:
            raise ArgumentError(f"rates: wanted BOUNDARY:SHARE,... such as 20:0.15,23:0.1, got {part.strip()!r}")
        if not 1 <= leave < layers:
            raise ArgumentError(f"rates: boundary must be in [1, {layers - 1}] for a model of {layers} layers, got {leave}")
        if not 0 <= rate <= 1:
            raise ArgumentError(f"rates: a share must be in [0, 1], got {share.strip()} at boundary {leave}")
        found.append(Exit(leave, layers, rate, words=words))
    return check(found, layers)


def curve(layers: int, reach: float = 0.5, steepness: float = 4.0, points: int = 6, words: int = SHORTLIST) -> tuple[Exit, ...]:
    """Exits for a model of which nothing is known: a share `reach (e / layers) ** steepness` could have left by boundary e.

    `points` boundaries in the upper two thirds. The defaults are an assumption near what the demo's exits reach at 95 %
    agreement: 10 % by two thirds of the layers, 18 % by 23 of 30.
    """
    if not 0 <= reach <= 1 or not 0 <= steepness < math.inf:
        raise ArgumentError(f"curve: wanted reach in [0, 1] and steepness >= 0, got {reach}, {steepness}")
    if layers < 2 or points < 1:
        raise ArgumentError(f"curve: wanted at least two layers and one point, got {layers}, {points}")
    boundaries = sorted({max(1, round(layers * (1 / 3 + 2 / 3 * i / (points + 1)))) for i in range(1, points + 1)})
    found, gone = [], 0.0
    for leave in boundaries:
        by = reach * (leave / layers) ** steepness
        if leave < layers and gone < 1:
            found.append(Exit(leave, layers, (by - gone) / (1 - gone), words=words))
            gone = by
    return tuple(found)


def exits_of(exits: Exits, rates: Mapping[int, float] | None = None) -> tuple[Exit, ...]:
    """The bands of an Exits, with rates by boundary (bands without one are left out), or with rates from its record.

    A record says how many rows x layers were run, not where rows left: one rate is assumed at every open band, the one that
    leaves as much work. ArgumentError where there is neither.
    """
    if rates is not None:
        layers, vocab = exits.model.layers, exits.model.vocab_size
        bands = {band.leave: _sized(band, layers, vocab) for band in exits}
        unknown = sorted(set(rates) - set(bands))
        if unknown:
            known = ", ".join(str(leave) for leave in bands) or "none"
            raise ArgumentError(f"rates: no band leaves at boundary {unknown[0]}; boundaries of the exits are {known}")
        return tuple(dataclasses.replace(bands[leave], rate=rates[leave]) for leave in sorted(rates))
    fraction = recorded_work(exits)
    if fraction is None:
        raise ArgumentError("exits: their record says nothing of rows x layers; give rates, or run dyndepth calibrate")
    return exits_at(exits, fraction)


def exits_at(exits: Exits, fraction: float) -> tuple[Exit, ...]:
    """The bands of an Exits with one rate at every open one, such that `fraction` of rows x layers is run."""
    layers, vocab = exits.model.layers, exits.model.vocab_size
    opened = [band.criterion.kind != "never" and not (band.criterion.scored and math.isinf(band.threshold)) for band in exits]
    return equal_rates([_sized(band, layers, vocab) for band in exits], opened, fraction, layers)


def _sized(band: Band, layers: int, vocab: int) -> Exit:
    part = band.head_or_norm() if band.resume == layers else band.jump
    weights = 0 if part is None else sum(value.numel() for value in part.state_dict().values() if value.dim() > 1)
    words = 0
    if band.criterion.needs_logits:
        words = vocab if band.shortlist is None else band.shortlist.shape[0]
    rank = 0 if band.kv is None else band.kv.rank or 0
    return Exit(band.leave, band.resume, 0.0, head=weights, words=words, kv_rank=rank)


def recorded_work(exits: Exits) -> float | None:
    """Share of rows x layers run, as calibrated with these thresholds, or else as fit tested it; None where neither is."""
    certificate = exits.certificate or {}
    for entry in (certificate, exits.record.get("test"), exits.record.get("tune")):
        value = entry.get("rows_x_layers") if isinstance(entry, dict) else None
        if isinstance(value, int | float) and 0 < value <= 1:
            return float(value)
    return None


def equal_rates(bands: Sequence[Exit], opened: Sequence[bool], fraction: float, layers: int) -> tuple[Exit, ...]:
    """One rate at every open band such that `fraction` of rows x layers is run, by bisection."""

    def at(rate: float) -> tuple[Exit, ...]:
        return tuple(dataclasses.replace(b, rate=rate if o else 0.0) for b, o in zip(bands, opened, strict=True))

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if work(at(middle), layers) > fraction else (low, middle)
    return at(high)


def occupancy(exits: Sequence[Exit], layers: int) -> tuple[list[float], list[float]]:
    """(per layer the share of rows that run it, per exit the share of all rows that is live at it)."""
    exits = check(exits, layers)
    by_leave = {one.leave: one for one in exits}
    back = [0.0] * (layers + 1)
    present, live, at_exit = [], 1.0, []
    for layer in range(layers):
        live += back[layer]
        if layer in by_leave:
            one = by_leave[layer]
            at_exit.append(live)
            if one.resume < layers:
                back[one.resume] += live * one.rate
            live *= 1 - one.rate
        present.append(live)
    return present, at_exit


def work(exits: Sequence[Exit], layers: int) -> float:
    """Expected share of rows x layers that is run."""
    return sum(occupancy(exits, layers)[0]) / layers


def subset(exits: Sequence[Exit], keep: Iterable[int], layers: int) -> tuple[Exit, ...]:
    """The exits at boundaries `keep` only.

    Rows that would have left for good at a dropped exit leave at the next kept one: who is sure early is sure later. Bands
    that resume are kept or dropped as they are.
    """
    kept, chosen = set(keep), []
    staying = staying_kept = 1.0
    for one in check(exits, layers):
        if one.resume < layers:
            if one.leave in kept:
                chosen.append(one)
            continue
        staying *= 1 - one.rate
        if one.leave in kept:
            rate = 0.0 if staying_kept == 0 else 1 - staying / staying_kept
            chosen.append(dataclasses.replace(one, rate=min(1.0, max(0.0, rate))))
            staying_kept = staying
    return tuple(chosen)
