"""Exits that are taken with known rates, whatever they are worth.

Exits for good are judged by the shipped judges, with thresholds that the wanted share of rows reaches, or let rows go by lot,
as bands that resume do. Tokens are forced and the pages are those of every other block, so that all blocks of a scenario do the
same and the rows x layers that are removed are counted exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyndepth.exits import Band, Exits, JumpMap, KVMap, NormHead
from dyndepth.exits.criteria import Criterion, View
from dyndepth.runtime.bind import Model
from dyndepth.runtime.fingerprint import facts_of

_HALVINGS = 24


@dataclass(frozen=True, eq=False)
class Forced(Criterion):
    """Row of sequence s at step t leaves where `leaving[t, s]`: one look-up, nothing is judged."""

    kind: ClassVar[str] = "forced"
    scored: ClassVar[bool] = False
    known: ClassVar[bool] = True
    leaving: Tensor | None = None  # bool [steps, sequences]

    def leaves(self, view: View, threshold: Tensor) -> Tensor:
        assert self.leaving is not None
        at = view.step.long() * self.leaving.shape[1] + view.seq.long()
        return self.leaving.flatten().index_select(0, at)  # an index of two tensors takes several times as long


@dataclass(frozen=True)
class Scenario:
    """Bands (leave, resume, share of live rows that leaves), ascending and not overlapping; `name` says them to people.

    kv_rank: of K,V maps, which are zeros then; None: shipped maps where there are some, of full rank.
    by_lot: rows leave for good by lot too, and nothing is judged; else the shipped judges say who does.
    """

    name: str
    bands: tuple[tuple[int, int, float], ...]
    kv_rank: int | None = None
    by_lot: bool = False

    @property
    def rate(self) -> float:
        return self.bands[0][2]


@dataclass(frozen=True)
class Draw:
    """Who leaves where, of bands by lot: bool [steps, sequences] per band; and rows live at every layer, per step."""

    leaving: list[Tensor]
    live: list[list[int]]

    @property
    def counts(self) -> list[int]:
        """Row counts that occur, 0 left out."""
        return sorted({rows for step in self.live for rows in step if rows})

    @property
    def run(self) -> int:
        """Rows x layers that are left."""
        return sum(map(sum, self.live))


def draw(scenario: Scenario, layers: int, steps: int, batch: int, seed: int) -> Draw:
    """Of the live rows the share of the rate leaves, over all steps to the nearest row; which ones is random."""
    generator = torch.Generator().manual_seed(seed)
    leaving = [torch.zeros(steps, batch, dtype=torch.bool) for _ in scenario.bands]
    owed = [0.5] * len(scenario.bands)  # rounds to the nearest
    live = []
    for step in range(steps):
        resumes = torch.zeros(batch, dtype=torch.int64)
        rows = [batch] * layers
        for number, (leave, resume, rate) in enumerate(scenario.bands):
            here = (resumes <= leave).nonzero()[:, 0]
            owed[number] += rate * len(here)
            count = min(math.floor(owed[number] + 1e-9), len(here))
            owed[number] -= count
            gone = here[torch.randperm(len(here), generator=generator)[:count]]
            leaving[number][step, gone] = True
            resumes[gone] = resume
            for layer in range(leave, resume):
                rows[layer] -= count
        live.append(rows)
    return Draw(leaving, live)


def left(live: Sequence[Sequence[int]], boundary: int) -> int:
    """Rows that left at a boundary, over all steps."""
    return sum(step[boundary - 1] - step[boundary] for step in live)


def boundary_bytes(exits: Exits, draw: Draw, width: int) -> float:
    """Bytes of weights a step that boundaries read: judges where rows come by, K,V and jump maps where rows leave."""
    total = 0
    for band in exits:
        judging = moving = 0
        if band.criterion.scored:
            words = 0 if band.shortlist is None else len(band.shortlist)
            judging = _bytes(band.head) + _bytes(band.router) + words * width * _element(band)
        moving = _bytes(band.kv) + _bytes(band.jump)
        for live in draw.live:
            total += judging * (live[band.leave - 1] > 0) + moving * (live[band.leave - 1] > live[band.leave])
    return total / len(draw.live)


def _bytes(part: torch.nn.Module | None) -> int:
    return 0 if part is None else sum(weight.numel() * weight.element_size() for weight in part.parameters())


def _element(band: Band) -> int:
    assert band.kv is not None
    return band.kv.weight.element_size()


def perfect_saving(draw: Draw, layer_s: Mapping[int, float], batch: int) -> float:
    """Seconds a step that a machine without any overhead would save: per layer its time with all rows less its time with
    the rows that are left. `layer_s` is seconds of a layer by rows; no rows take no time."""
    times = {0: 0.0, **layer_s}
    return sum(times[batch] - times[rows] for step in draw.live for rows in step) / len(draw.live)


def forced_exits(model: Model, scenario: Scenario, draw: Draw, shipped: Sequence[Band] = ()) -> tuple[Exits, dict[str, str]]:
    """Exits for good with shipped judges, closed (`at_rates` opens them), or by lot; bands that leave as drawn. And per
    band where its maps come from.

    Maps, heads and judges are the shipped ones where a shipped band is the same; elsewhere K,V and jump maps are zeros of the
    right shape, and head and judge are those of another boundary (by lot and the norm alone where nothing is shipped): what
    they cost does not depend on their values.
    """
    bands, said = [], {}
    kv_width = model.layers[0].kv_heads * model.layers[0].head_dim
    for (leave, resume, _), leaving in zip(scenario.bands, draw.leaving, strict=True):
        same = next((band for band in shipped if (band.leave, band.resume) == (leave, resume)), None)
        fitted = None if same is None or scenario.kv_rank is not None else same.kv
        kv = KVMap(resume - leave, kv_width, model.hidden_size, scenario.kv_rank) if fitted is None else fitted
        said[f"[{leave}, {resume})"] = "zeros" if fitted is None else "shipped"
        if resume < model.depth:
            bands.append(Band(leave, resume, Forced(leaving=leaving), jump=JumpMap(model.hidden_size), kv=kv))
            continue
        source = same or next((band for band in shipped if band.resume == model.depth), None)
        if source is None or scenario.by_lot:
            head = NormHead() if source is None else source.head_or_norm()
            bands.append(Band(leave, resume, Forced(leaving=leaving), head=head, kv=kv))
        else:
            head = source.head_or_norm()
            bands.append(Band(leave, resume, source.criterion, head=head, kv=kv, shortlist=source.shortlist))
    return Exits(bands, facts_of(model)), said


def at_rates(exits: Exits, scenario: Scenario, draw: Draw, run: Callable[[Exits], list[list[int]]]) -> tuple[Exits, Draw]:
    """Thresholds at which the scenario's share of the live rows leaves, as nearly as rows go; and what is live then.

    `run` runs all steps and returns the live rows by layer per step. Scores are shares; the search halves their logits.
    """
    thresholds = [math.inf if band.criterion.scored else band.threshold for band in exits]
    live = run(exits.with_thresholds(thresholds))
    for number, (band, (leave, _, rate)) in enumerate(zip(exits, scenario.bands, strict=True)):
        if not band.criterion.scored:
            continue
        wanted = rate * sum(step[leave - 1] for step in live)
        low, high, best = -24.0, 24.0, (math.inf, math.inf, live)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            thresholds[number] = 1 / (1 + math.exp(-middle))
            found = run(exits.with_thresholds(thresholds))
            gone = left(found, leave)
            best = min(best, (abs(gone - wanted), thresholds[number], found), key=lambda one: one[0])
            low, high = (middle, high) if gone > wanted else (low, middle)
            if gone == round(wanted):
                break
        _, thresholds[number], live = best
    return exits.with_thresholds(thresholds), Draw(draw.leaving, live)
