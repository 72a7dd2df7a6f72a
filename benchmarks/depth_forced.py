"""Exits that are taken at random with known rates: which rows leave is drawn before anything runs, so that the rows x layers
that are removed are known exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyndepth.exits import Band, Exits, JumpMap, KVMap, NormHead
from dyndepth.exits.criteria import Criterion, View
from dyndepth.exits.heads import Head
from dyndepth.runtime.bind import Model
from dyndepth.runtime.fingerprint import facts_of


@dataclass(frozen=True, eq=False)
class Forced(Criterion):
    """Row of sequence s at step t leaves where `leaving[t, s]`: one look-up, nothing is judged."""

    kind: ClassVar[str] = "forced"
    scored: ClassVar[bool] = False
    leaving: Tensor | None = None  # bool [steps, sequences]

    def leaves(self, view: View, threshold: Tensor) -> Tensor:
        assert self.leaving is not None
        return self.leaving[view.step.long(), view.seq.long()]


@dataclass(frozen=True)
class Scenario:
    """Bands (leave, resume, share of live rows that leaves), ascending and not overlapping; `name` says them to people."""

    name: str
    bands: tuple[tuple[int, int, float], ...]

    @property
    def rate(self) -> float:
        return self.bands[0][2]


@dataclass(frozen=True)
class Draw:
    """Who leaves where: bool [steps, sequences] per band, and rows live at every layer, per step."""

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


def perfect_saving(draw: Draw, layer_s: Mapping[int, float], batch: int) -> float:
    """Seconds a step that a machine without any overhead would save: per layer its time with all rows less its time with
    the rows that are left. `layer_s` is seconds of a layer by rows; no rows take no time."""
    times = {0: 0.0, **layer_s}
    return sum(times[batch] - times[rows] for step in draw.live for rows in step) / len(draw.live)


def forced_exits(model: Model, scenario: Scenario, draw: Draw, shipped: Sequence[Band] = ()) -> tuple[Exits, dict[str, str]]:
    """Exits that leave as drawn, and per band where its maps come from.

    Maps and heads are the shipped ones where a shipped band is the same; elsewhere K,V and jump maps are zeros of the right
    shape, and the head is a shipped one of another boundary (the norm alone without any): what they cost does not depend on
    their values.
    """
    bands, said = [], {}
    kv_width = model.layers[0].kv_heads * model.layers[0].head_dim
    for (leave, resume, _), leaving in zip(scenario.bands, draw.leaving, strict=True):
        same = next((band for band in shipped if (band.leave, band.resume) == (leave, resume)), None)
        head: Head | None = None
        if resume == model.depth:
            source = same or next((band for band in shipped if band.resume == model.depth), None)
            head = NormHead() if source is None else source.head_or_norm()
        kv = KVMap(resume - leave, kv_width, model.hidden_size) if same is None or same.kv is None else same.kv
        jump = None if resume == model.depth else JumpMap(model.hidden_size)
        bands.append(Band(leave, resume, Forced(leaving=leaving), head=head, jump=jump, kv=kv))
        said[f"[{leave}, {resume})"] = "zeros" if same is None or same.kv is None else "shipped"
    return Exits(bands, facts_of(model)), said
