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
from dyndepth.exits.criteria import Criterion, Entropy, Margin, RouterScore, TopProbability, known_before
from dyndepth.exits.maps import JumpMap
from dyndepth.exits.products import EPS
from dyndepth.exits.router import STAT_FEATURES
from dyndepth.op import cpp_allowed
from dyndepth.ops import _cpp
from dyndepth.runtime.bind import Model
from dyndepth.runtime.bind_layer import optional
from dyndepth.runtime.norms import has_hooks, rms_style

#: Criteria by the number that csrc/cpu/judge_rows.h knows them by; routers that see the residual alone, and criteria that
#: are known before the pass, have numbers of their own.
_KINDS: dict[type[Criterion], int] = {RouterScore: 0, TopProbability: 1, Margin: 2, Entropy: 3}
_RESIDUAL, KNOWN = 4, 5
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
    head: tuple[Tensor, Tensor | None] | None  # None where judging reads none
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
        assert self.head is not None, "a judge without a head judges inside a climb alone"
        t = self.translator
        down, up, bias = (None, None, None) if t is None else (t.down, t.up, t.bias)
        one, many = (0.0, threshold) if isinstance(threshold, Tensor) else (float(threshold), None)
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.dyndepth_cpp.judge_rows(
            hidden, self.gain, self.style, self.eps, down, up, bias, EPS, *self.head, self.softcap, self.router, self.silu,
            _ROUTER_EPS, self.kind, one, many, may_leave, total,
        )  # fmt: skip
        return found

    def parts(
        self, maps: Sequence[Tensor | None] = (), jump: Sequence[Tensor] = ()
    ) -> tuple[list[Tensor], list[int], list[float]]:
        """Tensors, facts and numbers as climb_layers takes them; a bit of the last fact per part that may be missing.

        maps: weight and bias of K,V maps, the rotary tables of their layers and `down`, for rows that leave. Empty: none.
        jump: weight and bias of the linear jump of rows that come back. Empty: the identity.
        """
        t = self.translator
        head = (None, None) if self.head is None else self.head
        single = [*((None, None, None) if t is None else (t.down, t.up, t.bias)), *head]
        router = [bool(self.router), len(self.router) > 4]
        filled = [*maps, *[None] * (4 - len(maps))]
        present = [part is not None for part in single] + router + [part is not None for part in filled] + [bool(jump)]
        tensors = [self.gain, *(part for part in single if part is not None), *self.router]
        tensors += [part for part in filled if part is not None] + [*jump]
        bits = sum(1 << at for at, there in enumerate(present) if there)
        return tensors, [self.style, self.kind, int(self.silu), bits], [self.eps, EPS, self.softcap, _ROUTER_EPS]


def judge_of(model: Model, band: Band, head: tuple[Tensor, Tensor | None] | None) -> Judge | None:
    """The boundary's judge, or None if something about it is out of the common. `head` is the LM head over its shortlist."""
    criterion, router = band.criterion, band.router
    if band.resume != model.depth or type(criterion) not in _KINDS or head is None:
        return None
    if type(criterion) is RouterScore and (router is None or router.stats_weight is None):
        return None
    return _judge(model, band, head, _KINDS[type(criterion)])


def headless_judge_of(model: Model, band: Band) -> Judge | None:
    """The judge of a boundary that reads no head, for climbs: its router sees the residual alone, or its criterion is known
    before the pass. Rows leave for good, or come back through the linear jump or none. None if something is out of the common.
    """
    criterion, router, jump = band.criterion, band.router, band.jump
    residual = type(criterion) is RouterScore and router is not None and router.stats_weight is None
    if not residual and not known_before(criterion):
        return None
    if jump is not None and (type(jump) is not JumpMap or not _plain(jump, model.dtype) or has_hooks(jump)):
        return None
    return _judge(model, band, None, _RESIDUAL if residual else KNOWN)


def _judge(model: Model, band: Band, head: tuple[Tensor, Tensor | None] | None, kind: int) -> Judge | None:
    norm: Any = optional(model.decoder, model.family.final_norm)
    style, router = rms_style(norm), band.router
    if (
        _cpp.missing() is not None
        or model.device.type != "cpu"
        or model.final_norm is None
        or style is None
        or type(band.head) not in (NormHead, TranslatorHead, type(None))
    ):
        return None
    if router is not None and (router.history or router.cosine_weight is not None):  # other features for every row
        return None
    parts = [norm.weight, *(() if band.head is None else band.head.parameters()), *(() if head is None else head[:1])]
    if any(part.dtype != model.dtype or not part.is_contiguous() for part in parts):
        return None
    if any(module is not None and has_hooks(module) for module in (band.head, router)):
        return None
    weights: list[Tensor] = []
    if router is not None and kind != KNOWN:
        stats = router.stats_weight
        weights = [router.weight1, router.bias1, router.weight2, router.bias2, *([] if stats is None else [stats])]
        neurons, width = router.weight1.shape[0], model.hidden_size
        sizes = [(neurons, width), (neurons,), (neurons,), (1,), (neurons, STAT_FEATURES)]
        if any(
            part.dtype != torch.float32 or not part.is_contiguous() or tuple(part.shape) != size
            for part, size in zip(weights, sizes, strict=False)
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
        kind=kind,
    )


def _plain(module: torch.nn.Module, dtype: torch.dtype) -> bool:
    return all(part.dtype == dtype and part.is_contiguous() for part in module.parameters())


def usable() -> bool:
    """Nobody forced another provider for an op that a judge stands for."""
    return cpp_allowed(*REPLACED)
