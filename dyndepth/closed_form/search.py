"""Which bands, and how freely: both are measured, never assumed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.closed_form.measure import Lottery, Measured, Sample, draw
from dyndepth.exits import Band, Exits, ModelFacts
from dyndepth.exits.criteria import Criterion


@dataclass
class Candidate:
    """A band with maps, and what skipping it at random did."""

    band: Band
    errors: dict[str, float]
    #: Share of rows that skipped it and still agreed.
    agreement: float = math.nan
    #: Disagreements that one skip caused among the rows that did not skip (through the back-filled K,V).
    harm: float = math.nan
    router: dict[str, float] | None = None
    #: What judging one row costs, in layers: an exit's head and shortlist are work too.
    judging: float = 0.0

    @property
    def saved(self) -> int:
        return self.band.resume - self.band.leave

    @property
    def loss_per_layer(self) -> float:
        """Disagreements per layer saved when rows skip at random, their neighbours' included."""
        return (1 - self.agreement + self.harm) / self.saved

    @property
    def span(self) -> tuple[int, int]:
        return self.band.leave, self.band.resume


def with_criterion(band: Band, criterion: Criterion, threshold: float = 0.0) -> Band:
    """The same maps under another criterion (weights are shared)."""
    return Band(
        band.leave, band.resume, criterion, threshold=threshold, head=band.head, jump=band.jump, kv=band.kv,
        decay=band.decay, shortlist=band.shortlist,
    )  # fmt: skip


def probe(
    candidates: Sequence[Candidate], sample: Sample, facts: ModelFacts, share: float, advance: Callable[[], None]
) -> None:
    """Let a share of the rows skip each candidate alone, at random; fill in agreement and harm."""
    for candidate in candidates:
        measured = sample.run(Exits([with_criterion(candidate.band, Lottery(share))], facts), "predict")
        candidate.agreement, candidate.harm = _agreement_and_harm(measured)
        advance()


def _agreement_and_harm(measured: Measured) -> tuple[float, float]:
    skipped, others = measured.skipped, measured.judged & ~measured.skipped
    if not bool(skipped.any()):
        return 0.0, 0.0
    wrong_others = float((~measured.agrees[others]).sum())
    return float(measured.agrees[skipped].float().mean()), wrong_others / float(skipped.sum())


def promising(candidates: Sequence[Candidate], layers: int, size: int) -> list[Candidate]:
    """The `size` best bands that resume, by loss per layer at random, and every early exit.

    What an exit's router sees of the logits tells far more than a low boundary's residual: an exit that loses at random may
    win when rows are judged, so chance does not rule it out.
    """
    resuming = sorted((c for c in candidates if c.band.resume < layers), key=lambda c: (c.loss_per_layer, c.span))
    return sorted([*resuming[:size], *(c for c in candidates if c.band.resume == layers)], key=lambda c: c.span)


@dataclass(frozen=True)
class Labels:
    """Rows that skipped one candidate at random, and whether they agreed."""

    rows: Tensor  # int64, into the sample
    agrees: Tensor  # bool


def label(
    candidates: Sequence[Candidate], sample: Sample, facts: ModelFacts, rounds: int, advance: Callable[[], None]
) -> list[Labels]:
    """Passes in which every row skips at most one candidate, drawn at random: labels for all routers at once.

    Candidates may overlap or share a boundary; they are dealt into as few passes as that allows.
    """
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in candidates]
    groups = _boundaries_apart(candidates)
    sequence = torch.cat([torch.full(t.shape, i) for i, t in enumerate(sample.tokens)])
    step = torch.cat([(torch.arange(t.shape[0]) - s).clamp_min(0) for t, s in zip(sample.tokens, sample.start, strict=True)])
    for seed, group in itertools.product(range(rounds), groups):
        share = min(0.3, 0.9 / len(group))
        bands = [with_criterion(candidates[i].band, Lottery(share, number, seed)) for number, i in enumerate(group)]
        measured = sample.run(Exits(bands, facts), "predict")
        drawn = draw(sequence, step, share, seed)
        for number, i in enumerate(group):
            # A row that drew a band may still have been away, or kept from leaving, when it came by.
            rows = (measured.skipped & (drawn == number)).nonzero()[:, 0]
            found[i].append((rows, measured.agrees[rows]))
        advance()
    return [Labels(torch.cat([r for r, _ in parts]), torch.cat([a for _, a in parts])) for parts in found]


def _boundaries_apart(candidates: Sequence[Candidate]) -> list[list[int]]:
    """Deal candidates into groups in which no two leave at the same boundary."""
    groups: list[list[int]] = []
    for i, candidate in enumerate(candidates):
        for group in groups:
            if all(candidates[j].band.leave != candidate.band.leave for j in group):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


#: Sets that `choose` tries one by one; where there are more it grows one set greedily.
_SETS = 2000


def choose(candidates: Sequence[Candidate], chances: Sequence[Tensor], agreement: float, most: int) -> list[int]:
    """The set of at most `most` bands expected to save most layers at the wanted agreement; one per boundary.

    `chances[i]` [rows] is what candidate i's router says of every judged row. A band more must earn 2 % for its weights. If
    no set is expected to save anything, the candidate that loses least per layer: its threshold will close it.
    """
    best: tuple[float, tuple[int, ...]] = (0.0, ())
    if sum(math.comb(len(candidates), size) for size in range(1, most + 1)) > _SETS:
        grown = greedy(candidates, chances, agreement, most)
        best = (grown[-1][0], tuple(grown[-1][1])) if grown else best
        most = 0
    for size in range(1, most + 1):
        for chosen in itertools.combinations(range(len(candidates)), size):
            if len({candidates[i].band.leave for i in chosen}) < size:
                continue
            saved = _expected_saving([candidates[i] for i in chosen], [chances[i] for i in chosen], 1 - agreement)
            if saved > best[0] * 1.02:
                best = (saved, chosen)
    return list(best[1]) or [min(range(len(candidates)), key=lambda i: candidates[i].loss_per_layer)]


def greedy(
    candidates: Sequence[Candidate],
    chances: Sequence[Tensor],
    agreement: float,
    most: int,
    offsets: Tensor | None = None,
    gain: float = 1.02,
) -> list[tuple[float, list[int]]]:
    """(expected layers saved per row, set) of 1, 2, ... bands: each set the one before and the band that then adds most.

    Ends at `most` bands, or where no band multiplies the saving by `gain`. Arguments as for `choose`.
    `offsets` [candidates, candidates]: what having skipped band j adds to the logit of candidate i's chance.
    """
    grown: list[tuple[float, list[int]]] = []
    chosen: list[int] = []
    saved = 0.0
    while len(chosen) < most:
        taken = {candidates[i].band.leave for i in chosen}
        found = (0.0, -1)
        for i in (i for i in range(len(candidates)) if candidates[i].band.leave not in taken):
            wider = sorted([*chosen, i])
            part = None if offsets is None else offsets[wider][:, wider]
            found = max(
                found, (_expected_saving([candidates[j] for j in wider], [chances[j] for j in wider], 1 - agreement, part), i)
            )
        if found[1] < 0 or found[0] <= saved * gain:
            break
        saved, chosen = found[0], sorted([*chosen, found[1]])
        grown.append((saved, chosen))
    return grown


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (agreement, rows x layers) that no other beats in one and equals in the other, least work first.

    Of equal points the first stays.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][1], -points[i][0], i))
    kept: list[int] = []
    for i in order:
        if not kept or points[i][0] > points[kept[-1]][0]:
            kept.append(i)
    return kept


def expected_price(
    bands: Sequence[Candidate], chances: Sequence[Tensor], budget: float, offsets: Tensor | None = None
) -> tuple[float, float]:
    """(price per layer, expected layers saved per row): as high as `budget` expected disagreements per row allow."""
    low, high = 0.0, 1.0
    saving = 0.0
    for _ in range(16):
        price = (low + high) / 2
        loss, saved = _walk(bands, chances, thresholds(bands, price), offsets)
        if loss <= budget:
            low, saving = price, saved
        else:
            high = price
    return low, saving


def _expected_saving(
    bands: Sequence[Candidate], chances: Sequence[Tensor], budget: float, offsets: Tensor | None = None
) -> float:
    """Expected layers saved per row, of the price that the budget allows."""
    return expected_price(bands, chances, budget, offsets)[1]


def _walk(
    bands: Sequence[Candidate], chances: Sequence[Tensor], limits: Sequence[float], offsets: Tensor | None = None
) -> tuple[float, float]:
    """Rows go up and leave where their chance allows: (expected disagreements, layers saved net of judging) per row.

    `offsets` [bands, bands]: what having skipped band j adds to the logit of band i's chance, for routers that see what a row
    already skipped. Such a chance speaks of everything skipped so far; without offsets losses of several bands add up.
    """
    rows = chances[0].shape[0]
    away_until = torch.zeros(rows, dtype=torch.int64)
    taken = torch.zeros(rows, len(bands))
    harm, kept = torch.zeros(rows), torch.ones(rows)
    saved = 0.0
    for i in sorted(range(len(bands)), key=lambda i: bands[i].band.leave):
        candidate, chance = bands[i], chances[i]
        here = away_until <= candidate.band.leave
        if offsets is not None:
            chance = torch.sigmoid(torch.logit(chance) + taken @ offsets[i])
        leaves = here & (chance >= limits[i])
        saved -= float(here.sum()) * candidate.judging
        away_until[leaves] = candidate.band.resume
        taken[leaves, i] = 1
        harm[leaves] += candidate.harm
        kept[leaves] = chance[leaves] if offsets is not None else kept[leaves] - (1 - chance[leaves])
        saved += float(leaves.sum()) * candidate.saved
    return float((1 - kept + harm).sum()) / rows, saved / rows


def thresholds(candidates: Sequence[Candidate], price: float) -> list[float]:
    """Per band: leave if the expected disagreements per layer saved are at most `price`; inf where no chance is high enough."""
    limits = [1 - price * c.saved + c.harm for c in candidates]
    return [limit if limit <= 1 else math.inf for limit in limits]


def set_price(
    candidates: Sequence[Candidate],
    exits: Exits,
    sample: Sample,
    agreement: float,
    steps: int,
    advance: Callable[[], None],
) -> tuple[Exits, Measured]:
    """Bisect the price until the measured agreement on `sample`, decisions and back-fill included, just meets the wish.

    Returns the exits with the highest price tried that met it (closed exits if none did) and what was measured there.
    """
    low, high = 0.0, max((1 + c.harm) / c.saved for c in candidates)
    best = exits.with_thresholds(math.inf)
    best_measured = sample.run(best, "predict")
    for _ in range(steps):
        price = (low + high) / 2
        tried = exits.with_thresholds(thresholds(candidates, price))
        measured = sample.run(tried, "predict")
        if measured.agreement >= agreement:
            low, best, best_measured = price, tried, measured
        else:
            high = price
        advance()
    return best, best_measured
