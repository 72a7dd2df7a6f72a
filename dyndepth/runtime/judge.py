"""Judging rows in one call of C++ where a boundary's head, shortlist and criterion are of the common kinds (csrc/cpu/
judge_rows.cpp). Everything else, and every provider that somebody forced, goes op by op through the band's own modules: the
reference this path is tested against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyndepth.exits import Band, NormHead, TranslatorHead
from dyndepth.exits.criteria import Criterion, Entropy, Margin, RouterScore, TopProbability
from dyndepth.exits.maps import EPS
from dyndepth.exits.router import STAT_FEATURES
from dyndepth.op import cpp_allowed
from dyndepth.ops import _cpp
from dyndepth.runtime.bind import Model
from dyndepth.runtime.bind_layer import optional
from dyndepth.runtime.norms import has_hooks, rms_style

#: Criteria by the number that csrc/cpu/judge_rows.cpp knows them by.
_KINDS: dict[type[Criterion], int] = {RouterScore: 0, TopProbability: 1, Margin: 2, Entropy: 3}
#: Ops that one call stands for: forcing a provider other than cpp for one of them turns it off.
REPLACED = ("ragged_linear", "exit_stats", "router_score")
_ROUTER_EPS = 1e-6  # ops.router_score's default


@dataclass(frozen=True)
class Judge:
    """Tensors of one boundary, as judge_rows takes them."""

    gain: Tensor
    style: int
    eps: float
    translator: TranslatorHead | None
    head: tuple[Tensor, Tensor | None]
    softcap: float
    router: list[Tensor]
    silu: bool
    kind: int

    def __call__(
        self, hidden: Tensor, threshold: float | Tensor, may_leave: Tensor, total: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Judge residuals [live, d] of a buffer of `total` rows.

        Returns fp32 [live] scores, higher is safer; int8 [total] states for compact_rows (a row leaves when its score reaches
        the threshold, one for all or fp32 [live], and it may); and the head-ready rows [left, d] of those that leave.
        """
        t = self.translator
        down, up, bias = (None, None, None) if t is None else (t.down, t.up, t.bias)
        one, many = (0.0, threshold) if isinstance(threshold, Tensor) else (float(threshold), None)
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.dyndepth_cpp.judge_rows(
            hidden, self.gain, self.style, self.eps, down, up, bias, EPS, *self.head, self.softcap, self.router, self.silu,
            _ROUTER_EPS, self.kind, one, many, may_leave, total,
        )  # fmt: skip
        return found

    def parts(self, maps: Sequence[Tensor | None] = ()) -> tuple[list[Tensor], list[int], list[float]]:
        """Tensors, facts and numbers as climb_layers takes them; a bit of the last fact per part that may be missing.

        maps: weight and bias of K,V maps, the rotary tables of their layers and `down`, for rows that leave. Empty: none.
        """
        t = self.translator
        optional_parts = [*((None, None, None) if t is None else (t.down, t.up, t.bias)), self.head[1]]
        present = [part is not None for part in optional_parts] + [bool(self.router)] + [part is not None for part in maps]
        tensors = [self.gain, self.head[0], *(part for part in optional_parts if part is not None), *self.router]
        tensors += [part for part in maps if part is not None]
        bits = sum(1 << at for at, there in enumerate(present) if there)
        return tensors, [self.style, self.kind, int(self.silu), bits], [self.eps, EPS, self.softcap, _ROUTER_EPS]


def judge_of(model: Model, band: Band, head: tuple[Tensor, Tensor | None] | None) -> Judge | None:
    """The boundary's judge, or None if something about it is out of the common. `head` is the LM head over its shortlist."""
    norm: Any = optional(model.decoder, model.family.final_norm)
    criterion = band.criterion
    router = band.router
    known = (
        _cpp.missing() is None
        and model.device.type == "cpu"
        and band.resume == model.depth
        and type(criterion) in _KINDS
        and type(band.head) in (NormHead, TranslatorHead, type(None))
        and model.final_norm is not None
    )
    style = rms_style(norm)
    if not known or head is None or style is None:
        return None
    if type(criterion) is RouterScore and (router is None or router.stats_weight is None or router.cosine_weight is not None):
        return None
    if router is not None and router.history:  # another constant of the logit for every row
        return None
    parts = [head[0], norm.weight, *(() if band.head is None else band.head.parameters())]
    if any(part.dtype != model.dtype or not part.is_contiguous() for part in parts):
        return None
    if any(module is not None and has_hooks(module) for module in (band.head, router)):
        return None
    assert model.final_norm is not None
    weights: list[Tensor] = []
    if router is not None and router.stats_weight is not None:
        weights = [router.weight1, router.bias1, router.weight2, router.bias2, router.stats_weight]
        neurons, width = router.weight1.shape[0], model.hidden_size
        sizes = [(neurons, width), (neurons,), (neurons,), (1,), (neurons, STAT_FEATURES)]
        if any(
            part.dtype != torch.float32 or not part.is_contiguous() or tuple(part.shape) != size
            for part, size in zip(weights, sizes, strict=True)
        ):
            return None
    return Judge(
        gain=norm.weight.detach(),
        style=style,
        eps=model.final_norm.eps,
        translator=band.head if isinstance(band.head, TranslatorHead) else None,
        head=head,
        softcap=model.logit_softcap,
        router=[weight.detach() for weight in weights],
        silu=False if router is None else router.silu,
        kind=_KINDS[type(criterion)],
    )


def usable() -> bool:
    """Nobody forced another provider for an op that a judge stands for."""
    return cpp_allowed(*REPLACED)
