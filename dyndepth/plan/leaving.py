"""What happens at a boundary, in sizes: what judges rows, where those that leave go on, and through which head or map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dyndepth.errors import ArgumentError
from dyndepth.exits import HEADS, Band, Exits
from dyndepth.exits import JUMPS as _KINDS
from dyndepth.exits.criteria import Patience, RouterScore
from dyndepth.exits.heads import BlockHead, MlpHead, TranslatorHead
from dyndepth.exits.maps import AdapterJump, MlpJump
from dyndepth.exits.router import STAT_FEATURES
from dyndepth.plan.sizes import Sizes

#: None (the identity), those of exits, and an adapter without the linear jump beside it.
JUMPS = ("", *_KINDS, "adapter alone")
#: Bytes of a row that Patience leaves for the next boundary: the arg max and how often it stayed (int64).
_PATIENCE = (8, 8)


@dataclass(frozen=True)
class Leaving:
    """At boundary `leave`, so many of the live rows skip layers.

    Args:
        rows: how many; a boundary that nobody leaves at is judged all the same.
        words: words of the LM head that judging reads (`exit_stats`); 0: none.
        neurons: of the router that judges residuals (`router_score`) where no words are read, or it sees their `statistics`;
            0: no router (a fixed depth, a schedule, a cosine).
        history: boundaries of which the router knows whether a row left there.
        previous: a cosine with the residual at the judged boundary before; at the first one nobody is judged.
        carried: bytes of a row, by tensor, that the criterion leaves for later boundaries.
        resume: the boundary where the rows go on; None: they leave for good.
        head: of rows that leave for good, one of HEADS. jump: of rows that resume, one of JUMPS, "" the identity.
        inner: rank of a translator (0: a whole matrix); neurons of the head's or the jump's feed-forward block.
        readout: rank of the translator behind an mlp or block head; None: the norm alone.
        source: the layer that a block head is a copy of, which tells its window.
        kv_rank: of the K,V maps; 0: they read the whole residual.
    """

    leave: int
    rows: int = 0
    words: int = 0
    neurons: int = 1
    statistics: bool = False
    history: int = 0
    previous: bool = False
    carried: tuple[int, ...] = ()
    resume: int | None = None
    head: str = "norm"
    jump: str = ""
    inner: int = 0
    readout: int | None = None
    source: int = -1
    kv_rank: int = 0

    @property
    def routed(self) -> bool:
        """Whether a router judges."""
        return self.neurons > 0 and (self.words == 0 or self.statistics)

    @property
    def features(self) -> int:
        """Numbers of a row that the router sees beside its residual."""
        return self.history + STAT_FEATURES * self.statistics

    @property
    def plain(self) -> bool:
        """Whether rows leave for good through the final norm, judged by the head's statistics or the residual alone."""
        bare = Leaving(self.leave, self.rows, self.words, self.neurons, kv_rank=self.kv_rank)
        return self == bare and (self.words > 0 or self.neurons > 0)

    @classmethod
    def of(cls, band: Band, layers: int, vocab: int, rows: int = 0) -> Leaving:
        """Of a band of a model with so many layers and words."""
        criterion, words = band.criterion, vocab if band.shortlist is None else len(band.shortlist)
        router = criterion.router if isinstance(criterion, RouterScore) else None
        head = jump = ""
        inner, readout, made = 0, None, None
        if band.resume == layers:
            made = band.head_or_norm()
            head, inner = made.kind, _rank(made) if isinstance(made, TranslatorHead) else 0
            inner = made.up.shape[0] if isinstance(made, MlpHead) else inner
            if isinstance(made, MlpHead | BlockHead) and made.readout is not None:
                readout = _rank(made.readout)
        elif band.jump is not None:
            jump = band.jump.kind
            inner = band.jump.up.shape[-2] if isinstance(band.jump, MlpJump | AdapterJump) else 0
            jump += " alone" if isinstance(band.jump, AdapterJump) and band.jump.linear is None else ""
        return cls(
            leave=band.leave, rows=rows, words=words if criterion.needs_logits else 0,
            neurons=0 if router is None else len(router.bias1), history=len(criterion.history),
            statistics=router is not None and router.stats_weight is not None, previous=criterion.needs_previous,
            carried=_PATIENCE if isinstance(criterion, Patience) else (),
            resume=None if band.resume == layers else band.resume, head=head or "norm", jump=jump, inner=inner, readout=readout,
            source=made.source if isinstance(made, BlockHead) else -1,
            kv_rank=0 if band.kv is None else band.kv.rank or 0,
        )  # fmt: skip


def leavings(exits: Exits, vocab: int, gone: Mapping[int, int] | None = None) -> list[Leaving]:
    """Of all bands that judge rows, in order; `gone` has how many rows leave by boundary."""
    waited = any(band.criterion.needs_previous or band.criterion.carries for band in exits)
    shut = [band for band in exits if band.criterion.kind == "never" or (band.criterion.scored and band.threshold == math.inf)]
    found = [
        Leaving.of(band, exits.model.layers, vocab, (gone or {}).get(band.leave, 0))
        for band in exits
        if waited or all(band is not one for one in shut)
    ]
    return sorted(found, key=lambda one: one.leave)


def by_boundary(sizes: Sizes, rows: int, exits: Sequence[Leaving]) -> dict[int, Leaving]:
    """In the order of boundaries; ArgumentError where no pass of `rows` rows can leave like that."""
    found = {each.leave: each for each in exits}
    if len(found) < len(exits) or any(not 1 <= leave < sizes.layers for leave in found):
        raise ArgumentError(
            f"plan: wanted different boundaries in [1, {sizes.layers}), got {sorted(each.leave for each in exits)}"
        )
    found = dict(sorted(found.items()))
    for one in found.values():
        if one.resume is not None and not one.leave < one.resume <= sizes.layers:
            raise ArgumentError(
                f"plan: rows that leave at {one.leave} must resume in ({one.leave}, {sizes.layers}], got {one.resume}"
            )
        if one.head not in HEADS or one.jump not in JUMPS:
            raise ArgumentError(
                f"plan: head must be one of {', '.join(HEADS)} and jump one of {', '.join(JUMPS[1:])} or '', "
                f"got {one.head!r} and {one.jump!r}"
            )
    if any(one.rows < 0 or one.rows > live for one, live in zip(found.values(), _live(found, rows), strict=True)):
        raise ArgumentError(f"plan: {rows} rows cannot leave as {[each.rows for each in exits]}")
    return {leave: replace(one, resume=None) if one.resume == sizes.layers else one for leave, one in found.items()}


def _live(exits: Mapping[int, Leaving], rows: int) -> list[int]:
    """Rows that are live at each boundary, those that resume there included."""
    found, live, away = [], rows, list[Leaving]()
    for leave, one in exits.items():
        back = [each for each in away if each.resume is not None and each.resume <= leave]
        away = [each for each in away if each not in back]
        live += sum(each.rows for each in back)
        found.append(live)
        live -= one.rows
        away.append(one)
    return found


def _rank(translator: TranslatorHead) -> int:
    return 0 if translator.down is None else translator.down.shape[0]
