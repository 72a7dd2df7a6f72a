"""What a pass needs that does not change between passes: model, bands, their heads and judges."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dyndepth.exits import Band, Exits
from dyndepth.exits.criteria import known_before
from dyndepth.exits.products import linear
from dyndepth.ops import ExitStats, exit_stats
from dyndepth.ops.exit_stats import stats_of_logits
from dyndepth.runtime.bind import Model
from dyndepth.runtime.block import Block
from dyndepth.runtime.judge import Judge, headless_judge_of, judge_of, usable
from dyndepth.runtime.propagate import Propagation

if TYPE_CHECKING:
    from dyndepth.runtime.climb import Climb


@dataclass(frozen=True)
class Plan:
    """Everything a pass needs that does not change between passes."""

    model: Model
    exits: Exits | None
    kv_policy: str
    #: Bound block heads by boundary.
    blocks: dict[int, Block]
    propagation: Propagation
    #: int32 [sequences] on the device, -1 for none: depth asked for per request; None when nobody asked.
    depth: Tensor | None = None
    #: Criteria may decide; False keeps every row to the top (block heads still store their K,V).
    open: bool = True
    #: float64 [sequences, 2] by boundary: what bands that are decided by the prompt (PromptRouter) sum over it, and of how many
    #: rows; passes with `voting` add to it.
    votes: dict[int, Tensor] = field(default_factory=dict)
    voting: bool = False
    #: Somebody wants to know what exits make of every row (dyndepth.runtime.observe).
    observed: bool = False
    #: Rows of the LM head that a band's shortlist names, by boundary; filled on first use.
    shortlists: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    #: Judges by boundary, None where judging goes op by op; filled on first use.
    judges: dict[int, Judge | None] = field(default_factory=dict)
    #: dyndepth.runtime.climb's, by where they begin, at most end, and what of a plan they depend on; filled on first use.
    climbs: dict[tuple[int, int, bool, bool, tuple[bool, ...]], Climb] = field(default_factory=dict)
    #: Answers of `closed` by boundary and threshold.
    shut: dict[tuple[int, float], bool] = field(default_factory=dict)

    @functools.cached_property
    def bands(self) -> dict[int, Band]:
        return {} if self.exits is None else {band.leave: band for band in self.exits}

    @functools.cached_property
    def numbers(self) -> dict[int, int]:
        """Which bit of a row's history stands for the band that leaves at a boundary."""
        return {leave: number for number, leave in enumerate(self.bands)}

    @functools.cached_property
    def stops(self) -> list[int]:
        """Where a pass looks up from the layers: its ends, and the boundaries where rows leave or resume."""
        return sorted({0, self.model.depth} | {stop for band in self.bands.values() for stop in (band.leave, band.resume)})

    @functools.cached_property
    def previous_wanted(self) -> bool:
        """A criterion compares residuals with those at the previous boundary."""
        return any(band.criterion.needs_previous for band in self.bands.values())

    @functools.cached_property
    def history_wanted(self) -> bool:
        """A criterion wants to know which bands a row skipped."""
        return any(band.criterion.history for band in self.bands.values())

    def skipped(self, taken: Tensor, boundaries: Sequence[int]) -> Tensor:
        """float32 [n, k] from bits (int64 [n], bit i for the i-th band): 1 where the row took the band of each boundary."""
        known = [self.numbers.get(boundary, 62) for boundary in boundaries]  # at most 62 bands: that bit is never set
        # No tensor is made of the numbers: on a GPU that would be a copy from the host, which a graph cannot hold.
        return torch.stack([(taken >> bit) & 1 for bit in known], 1).float()

    def closed(self, band: Band) -> bool:
        """No row can leave here, and judging it would tell later boundaries nothing."""
        key = band.leave, math.inf if band.threshold == math.inf else 0.0  # whether it is infinite is all that counts
        if key not in self.shut:
            self.shut[key] = self._closed(band)
        return self.shut[key]

    def _closed(self, band: Band) -> bool:
        shut = band.criterion.kind == "never" or (band.criterion.scored and band.threshold == math.inf)
        waited_for = any(other.criterion.needs_previous or other.criterion.carries for other in self.exits or ())
        watched = self.observed and band.criterion.scored
        return shut and self.depth is None and not waited_for and not watched

    def head(self, band: Band) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of the LM head over the band's shortlist; None if it is no plain linear."""
        plain, ids = self.model.plain_head(), band.shortlist
        if plain is None or ids is None:
            return plain
        if band.leave not in self.shortlists:  # gathered once: exit_stats would gather these rows on every call
            self.shortlists[band.leave] = plain[0][ids], None if plain[1] is None else plain[1][ids]
        return self.shortlists[band.leave]

    def stats(self, band: Band, ready: Tensor, live: Tensor | None = None) -> ExitStats:
        """exit_stats of head-ready rows over the band's shortlist; a head that is no plain linear runs as its module.

        live: int32 [1] on the device, only so many rows are asked for. None: all.
        """
        model, ids, head = self.model, band.shortlist, self.head(band)
        if head is None:
            logits = model.logits(ready)
            found = stats_of_logits(logits if ids is None else logits[:, ids])
        else:
            found = exit_stats(ready.contiguous(), head[0], head_bias=head[1], softcap=model.logit_softcap, live=live)
        if ids is None:
            return found
        # A row that nobody asked for has any number there, and it must not be looked up.
        return found._replace(argmax=ids[found.argmax if live is None else found.argmax.clamp(0, len(ids) - 1)])

    def logits(self, band: Band, ready: Tensor) -> Tensor:
        """fp32 [n, V] logits of head-ready rows, -inf for tokens outside the band's shortlist."""
        model, ids, head = self.model, band.shortlist, self.head(band)
        if ids is None:
            return model.logits(ready)
        if head is None:
            some = model.logits(ready)[:, ids]
        else:
            some = linear(ready, *head).float()
            if model.logit_softcap:
                some = model.logit_softcap * torch.tanh(some / model.logit_softcap)
        return some.new_full((ready.shape[0], model.vocab_size), -math.inf).index_copy_(1, ids, some)

    def named(self, band: Band, seq: Tensor, leaves: Tensor) -> Tensor:
        """`leaves` bool [n], but rows whose request names its depth leave there and nowhere else, judged by nothing."""
        if self.depth is None:
            return leaves
        asked = self.depth[seq.long()]
        return torch.where(asked >= 0, (asked == band.leave) & (band.resume == self.model.depth), leaves)

    def judge(self, band: Band) -> Judge | None:
        """The one call that judges at a boundary; None where criteria see more than that, or rows are observed."""
        if self.observed or not usable():
            return None
        if band.leave not in self.judges:
            self.judges[band.leave] = judge_of(self.model, band, self.head(band))
        return self.judges[band.leave]

    def judge_in_climb(self, band: Band) -> Judge | None:
        """What judges between layers of a climb: `judge`, or one that reads no head; None: Python has to look."""
        if self.observed or not usable():
            return None
        if not known_before(band.criterion) and (self.depth is not None or band.decay is not None):
            return None
        return self.judge(band) or headless_judge_of(self.model, band)
