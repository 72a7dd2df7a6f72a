"""CTC: greedy decoding, prefix beam search for a whole batch, and the sentence posterior as a criterion.

CTC (Graves et al. 2006): a path is one symbol per frame; its text drops repeats and then blanks. A text's probability is the
sum over its paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyndepth.encoders.criteria import SampleCriterion, SampleView, register_criterion
from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.exits.criteria import View


@dataclass(frozen=True)
class Hypotheses:
    """The best texts of every sample, best first."""

    #: texts[i][k]: symbols of sample i's text number k; fewer than `beam` where there are no more.
    texts: list[list[list[int]]]
    #: fp64 [n, beam]: log of the summed probability of those of the text's paths that the search kept; -inf past the last text.
    scores: Tensor

    def posterior(self) -> Tensor:
        """fp64 [n]: the best text's share of the probability of all that are listed."""
        return torch.softmax(self.scores, 1)[:, 0]


def padded_logs(logits: Tensor, lengths: Tensor) -> Tensor:
    """fp32 log probabilities [n, longest, V], 0 past a sample's end, of logits [tokens, V] in packed order."""
    logs = torch.log_softmax(logits.float(), -1)
    keep = (torch.arange(int(lengths.max())) < lengths[:, None]).to(logits.device)
    empty = logs.new_zeros(*keep.shape, logs.shape[-1])
    return empty.index_put(keep.nonzero(as_tuple=True), logs)


def greedy(logits: Tensor, lengths: Tensor, blank: int = 0) -> list[list[int]]:
    """Symbols of every sample's best path: logits [tokens, V] in packed order, lengths int64 [n] on the CPU."""
    best = logits.argmax(-1).cpu()
    found = []
    for path in torch.split(best, lengths.tolist()):
        symbols = torch.unique_consecutive(path)
        found.append(symbols[symbols != blank].tolist())
    return found


@torch.no_grad()
def beam_search(logits: Tensor, lengths: Tensor, beam: int = 16, blank: int = 0) -> Hypotheses:
    """Prefix beam search (Hannun et al. 2014, without a language model), all samples and prefixes of a frame at once.

    Args:
        logits: [tokens, V] in packed order.
        lengths: int64 [n], frames of every sample, on the CPU.
        beam: prefixes that are kept after every frame, and texts that are returned.
        blank: the blank symbol.

    Exact if no prefix is ever dropped. A sample's result does not depend on the others.
    """
    if beam < 1:
        raise ArgumentError(f"beam_search: beam must be at least 1, got {beam}")
    if logits.dim() != 2 or len(logits) != int(lengths.sum()) or int(lengths.min()) < 1:
        raise ArgumentError(f"beam_search: logits must be [{int(lengths.sum())}, V], got {list(logits.shape)}")
    if not 0 <= blank < logits.shape[1]:
        raise ArgumentError(f"beam_search: blank must be below {logits.shape[1]}, got {blank}")
    logs = padded_logs(logits, lengths).double()
    n, longest, symbols = logs.shape
    search = _Search(n, beam, symbols, blank, logs.device)
    live = torch.arange(longest) < lengths[:, None]
    for frame in range(longest):
        search.step(logs[:, frame], live[:, frame].to(logs.device))
    return Hypotheses(search.texts(), search.total())


class _Search:
    """State of the search: per sample and prefix, log probabilities of its paths that end in a blank, and in its last symbol.

    Prefixes are told apart by a 64-bit hash, so that one that comes back after it was dropped is itself again.
    """

    def __init__(self, n: int, beam: int, symbols: int, blank: int, device: torch.device) -> None:
        self.n, self.beam, self.symbols, self.blank = n, beam, symbols, blank
        low = torch.full((n, beam), -torch.inf, dtype=torch.float64, device=device)
        self.in_blank, self.in_symbol = low.clone(), low.clone()
        self.in_blank[:, 0] = 0.0  # the empty prefix
        self.last = torch.full((n, beam), -1, device=device)
        self.name = torch.zeros((n, beam), dtype=torch.int64, device=device)
        self.parent = torch.ones((n, beam), dtype=torch.int64, device=device)
        self.history: list[tuple[Tensor, Tensor]] = []

    def total(self) -> Tensor:
        return torch.logaddexp(self.in_blank, self.in_symbol)

    def step(self, logs: Tensor, live: Tensor) -> None:
        """One frame: log probabilities [n, V]; samples that are not `live` bool [n] stay as they are."""
        n, beam, symbols = self.n, self.beam, self.symbols
        total, low = self.total(), -torch.inf
        has_last = self.last >= 0
        last = self.last.clamp_min(0)
        of_last = logs.gather(1, last)
        # The prefix stays: a blank follows, or its last symbol again.
        stay_blank = total + logs[:, self.blank, None]
        stay_symbol = torch.where(has_last, self.in_symbol + of_last, low)
        # It grows: a symbol equal to its last needs a blank between.
        grown = total[:, :, None] + logs[:, None, :]
        repeat = torch.where(has_last, self.in_blank + of_last, grown.gather(2, last[..., None])[..., 0])
        grown = grown.scatter(2, last[..., None], repeat[..., None])
        grown[:, :, self.blank] = low
        # Growing into a prefix that is already there adds to that one. name[k] is the parent of j at most once.
        known = (self.parent[:, :, None] == self.name[:, None, :]) & (total > low)[:, None, :] & (total > low)[:, :, None]
        found, source = known.any(2), known.int().argmax(2)
        at = source * symbols + last
        flat = grown.view(n, beam * symbols)
        stay_symbol = torch.where(found, torch.logaddexp(stay_symbol, flat.gather(1, at)), stay_symbol)
        # A place past the end takes what belongs to nobody.
        at = torch.where(found, at, beam * symbols)
        flat = torch.cat([flat, flat.new_empty(n, 1)], 1).scatter(1, at, low)[:, :-1]
        scores = torch.cat([torch.logaddexp(stay_blank, stay_symbol), flat], 1)
        chosen = scores.topk(beam, dim=1).indices
        stays = chosen < beam
        where = (chosen - beam).clamp_min(0)
        origin = torch.where(stays, chosen, where // symbols)
        symbol = where % symbols
        nowhere = torch.full_like(stay_blank, low)
        kept = {
            "in_blank": torch.where(stays, stay_blank.gather(1, origin), nowhere),
            "in_symbol": torch.where(stays, stay_symbol.gather(1, origin), flat.gather(1, where)),
            "last": torch.where(stays, self.last.gather(1, origin), symbol),
            "parent": torch.where(stays, self.parent.gather(1, origin), self.name.gather(1, origin)),
            "name": torch.where(stays, self.name.gather(1, origin), _named(self.name.gather(1, origin), symbol)),
        }
        for name, value in kept.items():
            setattr(self, name, torch.where(live[:, None], value, getattr(self, name)))
        same = torch.arange(beam, device=logs.device).expand(n, beam)
        self.history.append((torch.where(live[:, None], origin, same), torch.where(live[:, None] & ~stays, symbol, -1)))

    def texts(self) -> list[list[list[int]]]:
        """Symbols of every prefix, followed back through the frames."""
        at = torch.arange(self.beam, device=self.last.device).expand(self.n, self.beam)
        added = []
        for origin, symbol in reversed(self.history):
            added.append(symbol.gather(1, at))
            at = origin.gather(1, at)
        rows = torch.stack(added[::-1], 2).tolist()
        counts = (self.total() > -torch.inf).sum(1).tolist()
        return [
            [[symbol for symbol in path if symbol >= 0] for path in beams[:count]]
            for beams, count in zip(rows, counts, strict=True)
        ]


def _named(parent: Tensor, symbol: Tensor) -> Tensor:
    """Hash of a prefix and one more symbol: products modulo 2^64 and a shift (constants of splitmix64)."""
    mixed = (parent + symbol + 1) * 0x1E3779B97F4A7C15
    return (mixed ^ ((mixed >> 29) & ((1 << 35) - 1))) * 0x3F58476D1CE4E5B9


@register_criterion
@dataclass(frozen=True)
class SentencePosterior(SampleCriterion):
    """The best text's share among the `beam` best of a prefix beam search (early-exit ASR, Wright et al. 2023).

    `psi = exp(s_1) / sum_{k <= beam} exp(s_k)` over log scores s; leaves when psi >= threshold.
    """

    kind: ClassVar[str] = "sentence_posterior"
    needs_logits = True
    per_token: ClassVar[bool] = True
    beam: int = 16
    blank: int = 0

    def __post_init__(self) -> None:
        if self.beam < 2:
            raise ExitsError(f"criterion sentence_posterior: beam must be at least 2, got {self.beam}")

    def score(self, view: View) -> Tensor:
        assert isinstance(view, SampleView)
        return beam_search(view.answers(), view.lengths, self.beam, self.blank).posterior().float()


def ctc_losses(
    logits: Tensor, lengths: Tensor, labels: Sequence[Tensor], blank: int = 0, *, zero_infinity: bool = False
) -> Tensor:
    """fp32 [n]: minus the log probability of each sample's text; +inf where it has too few frames for it.

    Args:
        logits: [tokens, V] in packed order; differentiable.
        lengths: int64 [n] on the CPU.
        labels: int64 [symbols] per sample, in the order of `lengths`.
        zero_infinity: 0, without gradient, instead of +inf.
    """
    logs = padded_logs(logits, lengths).transpose(0, 1)
    sizes = torch.tensor([len(text) for text in labels])
    wanted = torch.cat([text.long().cpu() for text in labels]) if len(labels) else torch.zeros(0, dtype=torch.int64)
    return torch.nn.functional.ctc_loss(
        logs, wanted.to(logs.device), lengths, sizes, blank=blank, reduction="none", zero_infinity=zero_infinity
    )
