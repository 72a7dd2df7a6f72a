"""Processors and stopping criteria of transformers for sequences that grow raggedly: asked per sequence and prefix."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError

#: Processors whose answer for a row depends on nothing but its logits: one call serves rows of any prefixes.
_PREFIX_FREE = {
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TopHLogitsWarper", "MinPLogitsWarper",
    "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "LogitNormalization",
}  # fmt: skip


#: transformers' own that carry state from call to call: asked about drafts that are then refused, they would go astray.
_STATEFUL = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor",
    "ClassifierFreeGuidanceLogitsProcessor", "DiaClassifierFreeGuidanceLogitsProcessor",
}  # fmt: skip

#: Those that forbid the same few words whatever the scores are, some at some lengths of the text only: where they keep them.
_FORBIDDING = {
    "MinLengthLogitsProcessor": "eos_token_id",
    "MinNewTokensLengthLogitsProcessor": "eos_token_id",
    "SuppressTokensLogitsProcessor": "suppress_tokens",
    "SuppressTokensAtBeginLogitsProcessor": "begin_suppress_tokens",
}

#: What a request's text is so far: its number -> int64 [t].
Texts = Callable[[int], Tensor]


def refuse_stateful(plugs: Any) -> None:
    """Raise for what follows the rows of a batch from call to call (`follows_rows`): here it would meet drafts."""
    for each in plugs:
        if getattr(each, "follows_rows", False) or type(each).__name__ in _STATEFUL:
            raise ArgumentError(
                f"generate: {type(each).__name__} follows the rows of a batch token by token and cannot be asked about drafts; "
                "it works with mode='dynamic'"
            )


def _together(asked: dict[int, Tensor], requests: int, texts: Texts) -> Tensor:
    """int64 [requests, t]: prefixes [t] by request; others show their own text, cut, or begun with its first token again."""
    length = next(iter(asked.values())).shape[0]
    rows = []
    for request in range(requests):
        ids = asked[request] if request in asked else texts(request)
        missing = length - ids.shape[0]
        if missing > 0:
            ids = torch.cat([(ids[:1] if ids.shape[0] else ids.new_zeros(1)).expand(missing), ids])
        rows.append(ids[:length])
    return torch.stack(rows)


class Processed:
    """A transformers LogitsProcessorList, called with every row's own prefix.

    Processors must be functions of (request, its ids, its logits): they are asked about drafts, some of which are refused, and
    more than once per token. Some keep something per request and want as many rows as there are requests: every call has a row
    for each, in order; the answers for rows that ask nothing are dropped.
    """

    def __init__(self, processors: Any, requests: int, texts: Texts) -> None:
        refuse_stateful(processors)
        self.processors, self.requests, self.texts = list(processors), requests, texts
        self.empty = len(self.processors) == 0
        self._free = all(
            type(each).__name__ in _PREFIX_FREE and type(each).__module__.startswith("transformers.") for each in processors
        )

    def __call__(self, prefixes: Sequence[tuple[int, Tensor]], logits: Tensor) -> Tensor:
        """Scores fp32 [n, V] from logits [n, V].

        `prefixes[i]` is the request of row i and int64 [t_i], what the processors see as its input_ids.
        """
        if self.empty or not prefixes:
            return logits
        if self._free:
            scores, ids = logits, torch.zeros(len(prefixes), 1, dtype=torch.int64, device=logits.device)
            for each in self.processors:
                scores = each(ids, scores)
            return scores
        scores = torch.empty_like(logits)
        for together in self._calls(prefixes):
            anyone = next(iter(together.values()))
            asked = {request: prefixes[row][1] for request, row in together.items()}
            ids = _together(asked, self.requests, self.texts).to(logits.device)
            found = logits[[together.get(request, anyone) for request in range(self.requests)]]
            for each in self.processors:
                found = self._constrained(each, ids, found, asked) if _asks(each) else each(ids, found)
            for request, row in together.items():
                scores[row] = found[request]
        return scores

    @staticmethod
    def _constrained(processor: Any, ids: Tensor, scores: Tensor, asked: dict[int, Tensor]) -> Tensor:
        """A user's function of (request, ids) is called for rows that ask, and for no others."""
        scores = scores.clone()
        allowed = processor._prefix_allowed_tokens_fn
        for request in asked:
            own = type(processor)(functools.partial(_other_request, allowed, request), 1)
            scores[request] = own(ids[request : request + 1], scores[request : request + 1])[0]
        return scores

    @staticmethod
    def _calls(prefixes: Sequence[tuple[int, Tensor]]) -> list[dict[int, int]]:
        """Rows by request, for as few calls as can be: prefixes of a call are equally long and of different requests."""
        calls: dict[tuple[int, int], dict[int, int]] = {}
        for row, (request, prefix) in enumerate(prefixes):
            turn = 0
            while request in calls.setdefault((prefix.shape[0], turn), {}):
                turn += 1
            calls[prefix.shape[0], turn][request] = row
        return list(calls.values())


def _asks(processor: Any) -> bool:
    return type(processor).__name__ == "PrefixConstrainedLogitsProcessor"


def _other_request(allowed: Callable[[int, Tensor], Any], request: int, row: int, ids: Tensor) -> Any:
    return allowed(request, ids)


def has_eos(criteria: Any) -> bool:
    """There is an end-of-sequence token: what follows it is padding."""
    return any(hasattr(each, "eos_token_id") for each in criteria)


class Stops:
    """A transformers StoppingCriteriaList, asked for one sequence at one length at a time.

    Criteria other than transformers' end token and length see a row for every request, as Processed has it.
    """

    def __init__(self, criteria: Any, requests: int, texts: Texts) -> None:
        refuse_stateful(criteria)
        self.requests, self.texts = requests, texts
        self.has_eos = has_eos(criteria)
        self._ends: set[int] = set()
        self._longest: int | None = None
        self._others = []
        for each in criteria:
            plain = type(each).__module__.startswith("transformers.")
            if plain and type(each).__name__ == "EosTokenCriteria":
                self._ends.update(each.eos_token_id.flatten().tolist())
            elif plain and type(each).__name__ == "MaxLengthCriteria":
                self._longest = each.max_length if self._longest is None else min(self._longest, each.max_length)
            else:
                self._others.append(each)

    def __call__(self, request: int, ids: Tensor, scores: Tensor | None = None) -> bool:
        """Whether the request's text int64 [t] ends with its last token; `scores` fp32 [V] are those it was chosen from."""
        if self._longest is not None and ids.shape[0] >= self._longest:
            return True
        if self._ends and int(ids[-1]) in self._ends:
            return True
        if not self._others:
            return False
        rows = _together({request: ids}, self.requests, self.texts)
        given = None if scores is None else (scores.expand(self.requests, -1),)
        for each in self._others:
            answer = torch.as_tensor(each(rows, given)).flatten()
            if bool(answer[request if answer.shape[0] == self.requests else 0]):
                return True
        return False


def forbidden_words(processors: Any) -> Tensor | None:
    """int64 [k]: all that these processors may ever forbid, none without processors; None where one may do anything else.

    A best word that is not among them is the best of the processed scores too: nobody has to make those. (They cost more than a
    small model's LM head.)
    """
    found = [torch.empty(0, dtype=torch.long)]
    for processor in processors:
        kind = type(processor)  # itself: what derives from it may do more
        words = _FORBIDDING.get(kind.__name__) if kind.__module__.startswith("transformers.") else None
        if words is None:
            return None
        found.append(torch.as_tensor(getattr(processor, words)).reshape(-1).long().cpu())
    return torch.cat(found)
