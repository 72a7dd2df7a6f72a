"""What exits thought and whether the full model agreed: told to an observer as passes find out, for thresholds that adapt.

Under `recompute` and `release` every row that an exit judged may come to the top anyway. What the exits said of it travels with
the row (Rows.carry), parked or not, and is set against what the full model says when it gets there. Without an observer
nothing is carried and no head is read for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.runtime.policies import EXACT

_SCORE, _TOKEN = "observed_score", "observed_token"


@dataclass(frozen=True)
class Observed:
    """Rows that one pass brought to the top, on the CPU. Every row is told once, and only rows of text that stays."""

    #: Boundaries of the exits, ascending.
    exits: tuple[int, ...]
    #: float32 [n, exits]: what the criterion scored (judged or not free to leave); NaN where it did not judge or has no score.
    scores: Tensor
    #: int64 [n, exits]: arg max of the exit head's logits over the whole vocabulary; -1 where the exit did not judge.
    tokens: Tensor
    #: int64 [n]: arg max of the full model's logits.
    full: Tensor
    #: int64 [n]: the sequence, and tokens generated before the one that the row makes.
    seq: Tensor
    step: Tensor

    @property
    def agrees(self) -> Tensor:
        """bool [n, exits]: the exit would have said what the full model says; False where it did not judge."""
        return self.tokens == self.full[:, None]


Observer = Callable[[Observed], None]


def check_observer(observer: Observer | None, kv_policy: str) -> None:
    if observer is not None and kv_policy not in EXACT:
        raise ArgumentError(
            f"generate: observe compares exits with the full model, which kv must be one of {', '.join(EXACT)} for, "
            f"got kv={kv_policy!r}"
        )


def names(leave: int) -> tuple[str, str]:
    """Under which names a row carries what the exit at `leave` made of it: score and token."""
    return f"{_SCORE}_{leave}", f"{_TOKEN}_{leave}"


def observed(
    exits: Sequence[int],
    carried: dict[str, Tensor],
    rows: Tensor,
    full: Tensor,
    seq: Sequence[int] | Tensor,
    step: Sequence[int] | Tensor,
) -> Observed:
    """Rows (int64 [n], of a pass whose state is `carried`) with the full model's tokens `full` [n]."""
    count = rows.shape[0]
    scores, tokens = torch.full((count, len(exits)), torch.nan), torch.full((count, len(exits)), -1, dtype=torch.int64)
    for column, leave in enumerate(exits):
        score, token = names(leave)
        if token in carried:  # otherwise no row was judged here
            scores[:, column] = carried[score][rows.to(carried[score].device)].cpu()
            tokens[:, column] = carried[token][rows.to(carried[token].device)].cpu()
    return Observed(tuple(exits), scores, tokens, full.cpu(), torch.as_tensor(seq), torch.as_tensor(step))
