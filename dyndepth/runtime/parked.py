"""Parked rows: what one pass left between two layers and a later one takes up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dyndepth.runtime.pages import Indices
from dyndepth.runtime.rows import Rows


@dataclass(frozen=True)
class Parked:
    """Rows [p], ascending by boundary; at each, those whose token is still to come before those that follow another row.

    A row waits with the residual it has at its boundary, its K,V in the layers below are in the pages. Rows are chosen and
    joined on the host: which of them a pass takes up is scheduling, not arithmetic.
    """

    hidden: Tensor  # [p, d]
    seq: Indices  # [p]
    pos: Indices  # [p]
    step: Indices  # [p]
    #: Boundary where each row waits.
    at: Indices
    #: bool [p]: the row's own token is due (it was held); otherwise it goes on when a later row of its sequence does.
    wants: NDArray[np.bool_]
    #: What criteria carry from boundary to boundary, by name, [p, ...].
    carried: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.seq.shape[0]

    @staticmethod
    def nothing(like: Tensor) -> Parked:
        """No rows; `like` [n, d] gives width, dtype and device."""
        none = np.empty(0, dtype=np.int64)
        return Parked(like[:0], none, none, none, none, np.empty(0, dtype=np.bool_))

    @staticmethod
    def of(hidden: Tensor, *facts: NDArray[Any], carried: dict[str, Tensor]) -> Parked:
        """Rows in any order; `facts` are seq, pos, step, at and wants."""
        seq, pos, step, at, wants = facts
        rows = Parked(hidden, seq, pos, step, at, wants, carried)
        return rows if len(rows) < 2 else rows._picked(np.lexsort((rows.pos, rows.seq, ~rows.wants, rows.at)))

    @staticmethod
    def following(hidden: Tensor, seq: Sequence[int], pos: Sequence[int], step: Sequence[int], at: int) -> Parked:
        """Rows that wait at `at` until a later row of their sequence goes on there."""
        facts = [np.asarray(each, dtype=np.int64) for each in (seq, pos, step, [at] * len(seq))]
        return Parked.of(hidden, *facts, np.zeros(len(seq), dtype=np.bool_), carried={})

    def where(self, mask: NDArray[np.bool_]) -> Parked:
        return self if bool(mask.all()) else self._picked(np.flatnonzero(mask))

    def __add__(self, other: Parked) -> Parked:
        if not len(self) or not len(other):
            return self if len(self) else other
        names = self.carried.keys() | other.carried.keys()
        return Parked.of(
            torch.cat([self.hidden, other.hidden]),
            *(np.concatenate([getattr(self, name), getattr(other, name)]) for name in ("seq", "pos", "step", "at", "wants")),
            carried={name: torch.cat([part._state(name, self, other) for part in (self, other)]) for name in names},
        )

    def groups(self) -> list[tuple[int, bool, int]]:
        """(boundary, rows follow, how many) of consecutive rows: `Rows.joins`."""
        found: list[tuple[int, bool, int]] = []
        for at, wants in zip(self.at.tolist(), self.wants.tolist(), strict=True):
            if found and found[-1][:2] == (at, not wants):
                found[-1] = (at, not wants, found[-1][2] + 1)
            else:
                found.append((at, not wants, 1))
        return found

    def counts(self, sequences: int) -> Indices:
        """Rows parked per sequence."""
        return np.bincount(self.seq, minlength=sequences)

    def _state(self, name: str, *sources: Parked) -> Tensor:
        """Carried state, NaN or -1 for rows that have none, as Rows.carry has it."""
        if name in self.carried:
            return self.carried[name]
        like = next(source.carried[name] for source in sources if name in source.carried)
        return Rows.nothing(like, len(self))

    def _picked(self, order: Indices) -> Parked:
        index = torch.from_numpy(order).to(self.hidden.device)
        return Parked(
            self.hidden[index], self.seq[order], self.pos[order], self.step[order], self.at[order], self.wants[order],
            {name: value[index] for name, value in self.carried.items()},
        )  # fmt: skip
