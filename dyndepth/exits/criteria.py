"""Criteria: which rows leave at a boundary.

A criterion scores the live rows, higher meaning "safer to leave", and a row leaves when its score reaches the band's
threshold. Criteria without a score (`Always`, `Never`, `FixedDepth`, `Schedule`) decide by themselves. Sources are named
per class; docs/criteria.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dyndepth.errors import ExitsError
from dyndepth.exits.router import Router
from dyndepth.ops import ExitStats


@dataclass
class View:
    """What a criterion may look at: the live rows at one boundary, in buffer order."""

    hidden: Tensor  # [live, d]
    seq: Tensor  # int32 [live]
    step: Tensor  # int32 [live], tokens generated before this one
    #: Residuals at the previous boundary that judged these rows, None at the first.
    previous: Tensor | None
    #: Statistics of the exit head's logits over the band's shortlist, computed on the first call. Without a shortlist that
    #: reads the full LM head, worth several layers.
    stats: Callable[[], ExitStats]
    #: Depth asked for per sequence (int32 [sequences], -1 for none), None when the call asked for none.
    depth: Tensor | None
    #: Layers below this boundary, and layers of the model.
    leave: int
    layers: int
    #: float32 [live, k], 1 where a row skipped the band that leaves at each of k boundaries; None where nobody asked for it.
    skipped: Callable[[Sequence[int]], Tensor] | None = None
    #: State carried with the rows between boundaries, [live] per name; replace entries to change them.
    carried: dict[str, Tensor] = field(default_factory=dict)
    #: float64 [live, 2]: sum of this boundary's router scores over the prompt of each row's sequence, and how many there were;
    #: None where no prompt was asked (PromptRouter).
    votes: Tensor | None = None
    #: int32 [1] on the device where rows past it are there too, and mean nothing (graph style); None: all rows are live.
    live: Tensor | None = None
    #: float32 [live], what `leaves` compared with the threshold; None under criteria without a score.
    score: Tensor | None = None


@dataclass(frozen=True)
class Criterion:
    """Base. `kind` names it in files; subclasses are frozen so that exits can be shared between calls."""

    kind: ClassVar[str] = ""
    #: Needs the logits of the exit head (only bands that leave for good have one).
    needs_logits = False
    #: Needs the residual at the previous boundary; never fires at the first.
    needs_previous = False
    #: Has a score that a threshold is compared with.
    scored: ClassVar[bool] = True
    #: Boundaries below whose bands it wants to know of every row, whether it skipped them (`View.skipped`).
    history: ClassVar[tuple[int, ...]] = ()
    #: Says who leaves from sequence, step and asked depth alone, so that it can be asked before the pass.
    known: ClassVar[bool] = False
    #: Leaves something with the rows for later boundaries.
    carries: ClassVar[bool] = False
    #: The highest score there can be: a threshold there closes the band but for perfect scores.
    most: ClassVar[float] = 1.0

    def score(self, view: View) -> Tensor:
        """float32 [live]."""
        raise NotImplementedError

    def leaves(self, view: View, threshold: Tensor) -> Tensor:
        """bool [live]; `threshold` is float32 [live] (it may depend on the step). NaN never leaves."""
        view.score = self.score(view)
        return view.score >= threshold


@dataclass(frozen=True)
class RouterScore(Criterion):
    """A learned probability that the full model would emit the same token (DESIGN; TIDE, FlexiDepth, CALM's classifier)."""

    kind: ClassVar[str] = "router"
    router: Router | None = None

    @property
    def needs_logits(self) -> bool:  # type: ignore[override]
        return self.router is not None and self.router.stats_weight is not None

    @property
    def needs_previous(self) -> bool:  # type: ignore[override]
        return self.router is not None and self.router.cosine_weight is not None

    @property
    def history(self) -> tuple[int, ...]:  # type: ignore[override]
        return () if self.router is None else self.router.history

    def score(self, view: View) -> Tensor:
        if self.router is None:
            raise ExitsError("criterion router: the band has no router")
        if self.needs_previous and view.previous is None:
            return _silent(view)
        skipped = view.skipped(self.history) if self.history and view.skipped is not None else None
        return self.router(view.hidden, view.previous, view.stats() if self.needs_logits else None, skipped, view.live)


def _silent(view: View) -> Tensor:
    """NaN: below every threshold, -inf included."""
    return torch.full_like(view.hidden[:, 0], math.nan, dtype=torch.float32)


@dataclass(frozen=True)
class PromptRouter(RouterScore):
    """A router asked once per sequence, of its prompt: all new tokens take the band, or none (FiRST's layer sets).

    The score is the router's mean over the prompt's residuals at this boundary while they run every layer, the last token's
    left out, as that one makes a token. NaN, so "stay", where there were none.
    """

    kind: ClassVar[str] = "prompt_router"

    def __post_init__(self) -> None:
        if self.router is not None and (self.router.stats_weight is not None or self.router.cosine_weight is not None):
            raise ExitsError("criterion prompt_router: the router may look at the residual alone, without cosine or statistics")
        if self.router is not None and self.router.history:
            raise ExitsError(
                "criterion prompt_router: prompts skip nothing while they decide, so the router may have no history, got "
                f"{list(self.router.history)}"
            )

    def score(self, view: View) -> Tensor:
        if view.votes is None:
            raise ExitsError(
                "criterion prompt_router is decided while generate runs a prompt; scoring, graph style and Engine have none"
            )
        return (view.votes[:, 0] / view.votes[:, 1]).float()


@dataclass(frozen=True)
class TopProbability(Criterion):
    """Largest probability of the exit head (EE-LLM; Kangaroo; LGViT)."""

    kind: ClassVar[str] = "top_probability"
    needs_logits = True

    def score(self, view: View) -> Tensor:
        stats = view.stats()
        return torch.exp(stats.top1 - stats.logsumexp)


@dataclass(frozen=True)
class Margin(Criterion):
    """Largest minus second largest probability (CALM's softmax measure; FREE)."""

    kind: ClassVar[str] = "margin"
    needs_logits = True

    def score(self, view: View) -> Tensor:
        stats = view.stats()
        return torch.exp(stats.top1 - stats.logsumexp) - torch.exp(stats.top2 - stats.logsumexp)


@dataclass(frozen=True)
class Entropy(Criterion):
    """Minus the entropy of the exit head in nats (DeeBERT, COST-EFF): leaves when entropy <= -threshold."""

    kind: ClassVar[str] = "entropy"
    most: ClassVar[float] = 0.0
    needs_logits = True

    def score(self, view: View) -> Tensor:
        return -view.stats().entropy


@dataclass(frozen=True)
class Saturation(Criterion):
    """Cosine of the residual with the one at the previous boundary (CALM's state measure; MuE). Silent at the first."""

    kind: ClassVar[str] = "saturation"
    needs_previous = True

    def score(self, view: View) -> Tensor:
        if view.previous is None:
            return _silent(view)
        return torch.nn.functional.cosine_similarity(view.hidden.float(), view.previous.float(), dim=-1, eps=1e-20)


@dataclass(frozen=True)
class Patience(Criterion):
    """How many boundaries in a row kept the same arg max (PABEE). Threshold p leaves after p agreements."""

    kind: ClassVar[str] = "patience"
    most: ClassVar[float] = math.inf
    carries: ClassVar[bool] = True
    needs_logits = True

    def score(self, view: View) -> Tensor:
        argmax = view.stats().argmax
        count = torch.zeros_like(argmax)
        if "patience_count" in view.carried:
            unchanged = argmax == view.carried["patience_argmax"]
            count = torch.where(unchanged, view.carried["patience_count"] + 1, 0)
        view.carried["patience_argmax"], view.carried["patience_count"] = argmax, count
        return count.float()


@dataclass(frozen=True)
class FixedDepth(Criterion):
    """The request says where its tokens leave (Balcony's static budgets, mixed in one batch): `generate(depth=...)`."""

    kind: ClassVar[str] = "fixed_depth"
    scored: ClassVar[bool] = False
    known: ClassVar[bool] = True

    def leaves(self, view: View, threshold: Tensor) -> Tensor:
        if view.depth is None:
            return torch.zeros_like(view.seq, dtype=torch.bool)
        return view.depth.index_select(0, view.seq) == view.leave


@dataclass(frozen=True)
class Schedule(Criterion):
    """Depth by position, the same for every row (SkipDecode): falls linearly from `first` at step 0 to `last` at `length`.

    Non-increasing, so every key a later token reads exists. A row leaves at the first boundary its depth allows.
    """

    kind: ClassVar[str] = "schedule"
    scored: ClassVar[bool] = False
    known: ClassVar[bool] = True
    first: int = 0
    last: int = 0
    length: int = 1

    def __post_init__(self) -> None:
        if self.last > self.first or self.length < 1:
            raise ExitsError(
                f"criterion schedule: depth must not increase and length must be at least 1, got first {self.first}, "
                f"last {self.last}, length {self.length}"
            )

    def leaves(self, view: View, threshold: Tensor) -> Tensor:
        done = (view.step.float() / self.length).clamp(0, 1)
        return self.first + (self.last - self.first) * done <= view.leave


@dataclass(frozen=True)
class Always(Criterion):
    """Every row takes the band: a model with those layers removed or replaced."""

    kind: ClassVar[str] = "always"
    scored: ClassVar[bool] = False
    known: ClassVar[bool] = True

    def leaves(self, view: View, threshold: Tensor) -> Tensor:
        return torch.ones_like(view.seq, dtype=torch.bool)


@dataclass(frozen=True)
class Never(Criterion):
    """No row takes the band: it is there but closed."""

    kind: ClassVar[str] = "never"
    scored: ClassVar[bool] = False

    def leaves(self, view: View, threshold: Tensor) -> Tensor:
        return torch.zeros_like(view.seq, dtype=torch.bool)


def known_before(criterion: Criterion) -> bool:
    """Whether it is `known`, said by the class that decides or by one derived from it: who derives from `Schedule` and decides
    by something else has not said so."""
    for cls in type(criterion).__mro__:
        if "known" in vars(cls):
            return bool(vars(cls)["known"])
        if "leaves" in vars(cls) or "score" in vars(cls):
            return False
    return False


CRITERIA: dict[str, type[Criterion]] = {
    c.kind: c
    for c in (
        RouterScore, PromptRouter, TopProbability, Margin, Entropy, Saturation, Patience, FixedDepth, Schedule, Always, Never,
    )
}  # fmt: skip

#: Criteria under which whole sequences share their bands, or depth never rises with the position: no later row of a
#: sequence ever reads a layer that an earlier one skipped, so the K,V policy `none` leaves no hole that is read.
HOLE_FREE = ("fixed_depth", "prompt_router", "schedule", "always", "never")


@dataclass(frozen=True)
class Decay:
    """CALM's threshold that relaxes with the position: `clip(0.9 threshold + 0.1 exp(-tau step / length), 0, 1)`.

    Schuster et al. 2022 (CALM), decaying threshold; early tokens are judged more strictly because their errors travel
    further. Made for scores in [0, 1]. (Both public implementations multiply the second term by the threshold too.)
    """

    tau: float = 4.0
    length: int = 512

    def __post_init__(self) -> None:
        if not (self.tau >= 0 and self.length >= 1):
            raise ExitsError(f"decay: wanted tau >= 0 and length >= 1, got tau {self.tau}, length {self.length}")

    def apply(self, threshold: float, step: Tensor) -> Tensor:
        if math.isinf(threshold):  # closed stays closed
            return torch.full_like(step, threshold, dtype=torch.float32)
        return (0.9 * threshold + 0.1 * torch.exp(-self.tau * step.float() / self.length)).clamp(0, 1)
