"""Processors and stopping criteria of transformers for sequences that grow raggedly: asked per sequence and prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError

#: Processors whose answer for a row depends on nothing but its logits: one call serves rows of any prefixes.
_PREFIX_FREE = {
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TopHLogitsWarper", "MinPLogitsWarper",
    "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "LogitNormalization",
}  # fmt: skip


def _refuse(plugs: Any) -> None:
    """Raise for what follows the rows of a batch from call to call (`follows_rows`): here it would meet drafts, row by row."""
    for each in plugs:
        if getattr(each, "follows_rows", False):
            raise ArgumentError(
                f"generate: {type(each).__name__} follows the rows of a batch token by token and cannot be asked about drafts; "
                "it works with mode='dynamic'"
            )


class Processed:
    """A transformers LogitsProcessorList, called with every row's own prefix.

    Some processors keep something per request and want as many rows as there are requests: every call has a row for each
    request, in order, and those that ask for nothing carry what another one asked.
    """

    def __init__(self, processors: Any, requests: int) -> None:
        _refuse(processors)
        self.processors, self.requests = processors, requests
        self.empty = len(processors) == 0
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
            return self.processors(torch.zeros(len(prefixes), 1, dtype=torch.int64, device=logits.device), logits)
        scores = torch.empty_like(logits)
        for together in self._calls(prefixes):
            anyone = next(iter(together.values()))
            rows = [together.get(request, anyone) for request in range(self.requests)]
            ids = torch.stack([prefixes[row][1] for row in rows]).to(logits.device)
            found = self.processors(ids, logits[rows])
            for request, row in together.items():
                scores[row] = found[request]
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


class Stops:
    """A transformers StoppingCriteriaList, asked for one sequence at one length at a time."""

    def __init__(self, criteria: Any) -> None:
        _refuse(criteria)
        #: There is an end-of-sequence token: what follows it is padding.
        self.has_eos = any(hasattr(each, "eos_token_id") for each in criteria)
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

    def __call__(self, ids: Tensor, scores: Tensor | None = None) -> bool:
        """Whether the sequence int64 [t] ends with its last token; `scores` fp32 [V] are those it was chosen from."""
        if self._longest is not None and ids.shape[0] >= self._longest:
            return True
        if self._ends and int(ids[-1]) in self._ends:
            return True
        given = None if scores is None else (scores[None],)
        return any(bool(torch.as_tensor(each(ids[None], given)).any()) for each in self._others)
