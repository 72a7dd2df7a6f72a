"""Rows: tokens being computed, kept as a live prefix that compact_rows maintains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dyndepth.ops import compact_rows


@dataclass
class Rows:
    """Buffers of n rows. Rows `[0, live)` run on; behind them lie the rows that left, latest first.

    Away rows keep the residual they left with: propagation reads it at every layer they skip, a jump map reads it when
    they resume.
    """

    hidden: Tensor  # [n, d]
    seq: Tensor  # int32 [n], sequence in the block table
    pos: Tensor  # int32 [n], position in the sequence
    slots: Tensor  # int32 [n], where its K,V go; -1 nowhere
    step: Tensor  # int32 [n], how many tokens were generated before this one (decay of CALM, schedules)
    may_leave: Tensor  # bool [n]; prompt rows of a full-depth prefill may not
    #: Rows that waited and join above layer 0, at the end of the buffers: (boundary, they follow a row of their sequence,
    #: how many), by ascending boundary, those that follow last at each.
    joins: Sequence[tuple[int, bool, int]] = ()
    index: Tensor = field(init=False)  # int32 [n], place in the caller's order
    #: Per-row state that criteria carry from boundary to boundary, by name; moved with the rows.
    carried: dict[str, Tensor] = field(init=False)
    live: int = field(init=False)
    _counter: Tensor | None = field(init=False)
    #: Rows may lie in another order than the caller's.
    moved: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.set_live(len(self) - sum(count for _, _, count in self.joins))
        self.index = torch.arange(len(self), dtype=torch.int32, device=self.hidden.device)
        self.carried = {}

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def partition(self, state: Tensor) -> tuple[int, int]:
        """compact_rows over every buffer; returns (live, left) and makes `live` the new prefix."""
        names = list(self.carried)
        payloads = [self.hidden, self.seq, self.pos, self.slots, self.step, self.may_leave, self.index]
        moved, _, counts = compact_rows(state, payloads + [self.carried[name] for name in names])
        self.hidden, self.seq, self.pos, self.slots, self.step, self.may_leave, self.index = moved[: len(payloads)]
        self.carried = dict(zip(names, moved[len(payloads) :], strict=True))
        self.moved = True
        live, left = counts.tolist()
        self.set_live(live, counts[:1])
        return live, left

    def moved_to(
        self, live: int, seq: Tensor, pos: Tensor, slots: Tensor, may_leave: Tensor, index: Tensor, step: Tensor
    ) -> None:
        """The rows were partitioned elsewhere, residuals in place: take the other buffers, and `live` as the new prefix."""
        assert not self.carried, "rows carry what was not moved"
        self.seq, self.pos, self.slots, self.may_leave, self.step, self.index = seq, pos, slots, may_leave, step, index
        self.moved = True
        self.set_live(live)

    def carry(self, name: str, value: Tensor) -> None:
        """Let state of the first rows travel with them; the others keep what they had, NaN or -1 at first."""
        if name not in self.carried:
            self.carried[name] = self.nothing(value, len(self))
        self.carried[name][: value.shape[0]] = value

    @staticmethod
    def nothing(like: Tensor, count: int) -> Tensor:
        """Carried state of rows that have none."""
        return like.new_full((count, *like.shape[1:]), torch.nan if like.is_floating_point() else -1)

    def set_live(self, live: int, counter: Tensor | None = None) -> None:
        self.live, self._counter = live, counter

    @property
    def counter(self) -> Tensor | None:
        """`live` as int32 [1] on the device, for ops that read it there; None while every row is live."""
        if self.live == len(self):
            return None
        if self._counter is None:  # made when it is asked for: layers that run in one call of C++ do not
            self._counter = torch.tensor([self.live], dtype=torch.int32, device=self.hidden.device)
        return self._counter
