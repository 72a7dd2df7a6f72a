"""FREE (arXiv 2310.05424): one exit, tokens that left are completed in parallel, and a threshold that learns online.

A token leaves at the shallow exit if its margin p1 - p2 exceeds the threshold. Its other layers run when a later token of its
sequence goes deep, stacked with it (`kv="recompute"`). That pass also says, for free, what the full model would have said of
the stacked tokens: pairs of a confidence and whether the exit agreed, from which a mixture of two Beta densities moves the
threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dyndepth.calibration import BetaMixture
from dyndepth.errors import ArgumentError
from dyndepth.exits import Band, Exits, Margin
from dyndepth.runtime import entry
from dyndepth.runtime.bind import bind
from dyndepth.runtime.fingerprint import check_exits, facts_of
from dyndepth.runtime.observe import Observed
from dyndepth.runtime.session import DEFAULT_PENDING

#: The published code stops learning after so many input sequences.
UPDATES = 300


def default_exit(layers: int) -> int:
    """A quarter of the depth: 6 of 24 decoder layers (T5-large; the paper takes 8 for T5-3B)."""
    return max(1, round(layers / 4))


def exits(model: Any, leave: int | None = None, *, heads: Exits | None = None, threshold: float = 0.9) -> Exits:
    """The shallow exit under its margin p1 - p2.

    Args:
        model: a supported transformers causal LM.
        leave: its boundary; by default that of the heads, else a quarter of the depth.
        heads: exits with a trained head there (dyndepth.train, dyndepth.fit); without them the model's final norm and LM head
            read the shallow residual, as in the paper, whose base was trained for that.
        threshold: margins at or above it leave.

    Raises ArgumentError for heads at several boundaries without `leave`, or none there.
    """
    bound = bind(model)
    head = None
    if heads is not None:
        check_exits(heads, bound)
        found = {band.leave: band.head_or_norm() for band in heads if band.resume == bound.depth}
        if leave is None and len(found) == 1:
            leave = next(iter(found))
        if leave not in found:
            raise ArgumentError(f"free.exits: there is one exit; leave must be one of {sorted(found)}, got {leave}")
        head = found[leave]
    leave = default_exit(bound.depth) if leave is None else leave
    if not 1 <= leave < bound.depth:
        raise ArgumentError(f"free.exits: leave must be in [1, {bound.depth}), got {leave}")
    record = {} if heads is None else heads.record
    band = Band(leave, bound.depth, Margin(), threshold=threshold, head=head)
    return Exits([band], facts_of(bound), {**record, "recipe": "FREE (arXiv 2310.05424)"})


@dataclass
class Adaptive:
    """A threshold that learns from the pairs that deep passes give away.

    `mixture` (dyndepth.calibration.BetaMixture) has the densities f of agreeing and disagreeing margins and takes the smallest
    threshold t of its grid with f_agree(t) / (f_agree(t) + f_disagree(t)) > ratio. It starts with Beta(2, 1) and Beta(1, 2).
    `updates` counts calls of `generate` that it has learned from; after `most` it stays as it is.
    """

    mixture: BetaMixture = field(default_factory=BetaMixture)
    most: int = UPDATES
    updates: int = 0

    @property
    def learns(self) -> bool:
        return self.updates < self.most

    @property
    def threshold(self) -> float:
        return self.mixture.threshold

    def update(self, seen: list[Observed]) -> None:
        """Learn from what passes found out of one exit; rows that it did not judge say nothing."""
        scores = torch.cat([each.scores[:, 0] for each in seen]) if seen else torch.empty(0)
        judged = ~scores.isnan()
        if bool(judged.any()):
            agrees = torch.cat([each.agrees[:, 0] for each in seen])
            self.mixture.update(scores[judged].clamp(0, 1).numpy(), agrees[judged].numpy())
            self.updates += 1


def generate(
    model: Any,
    inputs: Mapping[str, Any] | Tensor,
    exits: Exits,
    adaptive: Adaptive | None = None,
    *,
    pending: int = DEFAULT_PENDING,
    rollback: float | None = None,
    **options: Any,
) -> Any:
    """`model.generate` with synchronised parallel decoding: tokens that left are completed with the next that goes deep.

    Args:
        model: the model that the exits were made for.
        inputs: what a tokenizer returns (padded on the left), or input ids [batch, t].
        exits: of `exits`: one exit under its margin.
        adaptive: its threshold serves this call in place of the exit's, and it learns from what the call finds out.
        pending: tokens of a sequence that may be stacked; the next one goes deep with them. The paper has no bound.
        rollback: nats. When a pass completes stacked tokens, the first to which the full model gives a probability below
            exp(-rollback) becomes the full model's own token, and those after it are dropped. None keeps all; 0 keeps none
            that the full model would not say itself.
        options: of transformers' generate and of dyndepth.generate.

    Returns what transformers' generate returns. Raises ArgumentError for other exits.
    """
    if len(exits) != 1 or not isinstance(exits.bands[0].criterion, Margin):
        kinds = ", ".join(f"{band.criterion.kind} at {band.leave}" for band in exits)
        raise ArgumentError(f"free.generate: exits must be one under margin (free.exits), got {kinds or 'none'}")
    seen: list[Observed] = []
    if adaptive is not None:
        exits = exits.with_thresholds(adaptive.threshold)
    how: dict[str, Any] = {"kv": "recompute", "pending": pending}
    if rollback is not None:
        how = {"mode": "rollback", "drafts": pending, "rollback": rollback}
    if adaptive is not None and adaptive.learns:
        how["observe"] = seen.append
    content = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    out = model.generate(**content, custom_generate=entry.generate, exits=exits, **how, **options)
    if adaptive is not None:
        adaptive.update(seen)
    return out
