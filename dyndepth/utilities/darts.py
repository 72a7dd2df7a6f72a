"""DARTS+ (arXiv 1909.06035): when to stop an architecture search. The semantics of patience, over epochs in place of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError

#: DARTS' operations, in the order of its architecture weights.
OPS = (
    "none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5",
)  # fmt: skip


def derived(alpha: Tensor, ops: Sequence[str] = OPS) -> list[tuple[int, int, str]]:
    """The cell that architecture weights [edges, ops] stand for, as DARTS derives it: (node, input, operation), ascending.

    Edges come node by node, node k (from 0) having k + 2 inputs. An edge has its strongest operation but "none"; a node keeps
    the two inputs whose operation is strongest, by softmax over all operations of the edge.
    """
    edges, count = 0, 0
    while edges < len(alpha):
        edges, count = edges + count + 2, count + 1
    if alpha.dim() != 2 or edges != len(alpha) or edges == 0 or alpha.shape[1] != len(ops):
        raise ArgumentError(f"derived: alpha must be [2 + 3 + ... edges, {len(ops)} operations], got {list(alpha.shape)}")
    weight = torch.softmax(alpha.detach().double().cpu(), -1)
    real = [at for at, name in enumerate(ops) if name != "none"]
    best = weight[:, real].max(-1)
    cell, first = [], 0
    for node in range(count):
        strengths = best.values[first : first + node + 2]
        kept = sorted(torch.argsort(strengths, descending=True, stable=True)[:2].tolist())
        cell += [(node, source, ops[real[int(best.indices[first + source])]]) for source in kept]
        first += node + 2
    return cell


class DartsPlus:
    """Stops a search when the normal cell has `skips` skip-connects, or when nothing has changed places for `patience` epochs.

        stop = DartsPlus()
        for epoch in range(600):
            ...
            if stop.update(alpha_normal):
                break

    Args:
        skips: skip-connects in the derived normal cell that are too many (the paper's first rule: two); None turns it off.
        patience: epochs in a row in which every edge's learnable operations kept their order (its second rule: ten); None
            turns it off.
        ops: names of the columns. Learnable ones are those with weights: neither "none", pooling nor skip-connects.

    `reason` says which rule fired, `count` how long the ranking has stood. Ties are broken by column, so weights that have
    not moved keep their ranking.
    """

    def __init__(self, skips: int | None = 2, patience: int | None = 10, ops: Sequence[str] = OPS) -> None:
        given = [number for number in (skips, patience) if number is not None]
        if not given or min(given) < 1:
            raise ArgumentError(f"DartsPlus: wanted skips or patience, at least 1, got {skips} and {patience}")
        self.skips, self.patience, self.ops = skips, patience, tuple(ops)
        self.learnable = [at for at, name in enumerate(ops) if name not in ("none", "skip_connect") and "pool" not in name]
        if patience is not None and not self.learnable:
            raise ArgumentError(f"DartsPlus: none of {', '.join(ops)} is learnable")
        self.reason: str | None = None
        self.count = 0
        self._ranking: list[list[int]] | None = None

    def update(self, alpha: Tensor) -> bool:
        """One epoch has ended with architecture weights [edges, ops] of the normal cell; True to stop."""
        if not bool(torch.isfinite(alpha).all()):
            raise ArgumentError("DartsPlus: alpha holds NaN or infinity")
        found = sum(name == "skip_connect" for _, _, name in derived(alpha, self.ops))
        ranking = torch.argsort(alpha.detach().cpu()[:, self.learnable], dim=-1, descending=True, stable=True).tolist()
        self.count = self.count + 1 if ranking == self._ranking else 0
        self._ranking = ranking
        if self.skips is not None and found >= self.skips:
            self.reason = f"{found} skip-connects in the normal cell"
        elif self.patience is not None and self.count >= self.patience:
            self.reason = f"the ranking of learnable operations has stood for {self.count} epochs"
        return self.reason is not None

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON; a search that was interrupted goes on counting."""
        return {"reason": self.reason, "count": self.count, "ranking": self._ranking}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reason, self.count, self._ranking = state["reason"], int(state["count"]), state["ranking"]
