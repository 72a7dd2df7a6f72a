"""Teacher-forced passes: every token of given sequences as one row, judged exactly as it would be in generation.

Rows of one sequence go up together; a row that leaves gets its back-filled K,V before any later row of the sequence reads
that layer, so the result equals decoding the same tokens one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.exits import Exits, PromptRouter
from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.policies import check_policy
from dyndepth.runtime.session import DEFAULT_CHUNK, DEFAULT_PENDING, Session, Work

#: fp32 logits of this many rows at a time: 256 rows x 50k tokens x 4 bytes = 50 MB.
HEAD_ROWS = 256


@dataclass
class Scored:
    """Head-ready rows of all tokens, sequence by sequence, and what the pass did. Row r predicts the token after it."""

    model: Model
    ready: Tensor  # [tokens, ready]
    exit_layer: Tensor  # int32 [tokens]
    layers_run: Tensor  # int32 [tokens]
    bands_taken: Tensor  # int64 [tokens], bit i set for the i-th band
    #: bool [tokens]: rows that were judged (from each sequence's `start` on).
    judged: Tensor
    work: Work  # judged rows only

    def argmax(self) -> Tensor:
        """int64 [tokens], the most likely next token of every row."""
        if self.ready.shape[0] == 0:
            return torch.empty(0, dtype=torch.int64)
        return torch.cat([self.model.argmax(part).cpu() for part in self.ready.split(HEAD_ROWS)])

    def logits(self) -> Tensor:
        """float32 [tokens, V]."""
        return torch.cat([self.model.logits(part) for part in self.ready.split(HEAD_ROWS)])


def score(
    causal_lm: Any,
    sequences: Sequence[Tensor],
    exits: Exits | None = None,
    *,
    start: Sequence[int] | None = None,
    kv: str | None = None,
    depth: Sequence[int | None] | None = None,
    chunk: int = DEFAULT_CHUNK,
    embeds: bool = False,
    pending: int = DEFAULT_PENDING,
) -> Scored:
    """Run token sequences (int64 [t] each, or embeddings [t, d]) through the model with dynamic depth.

    Under `recompute` every layer is run, as all K,V are the full model's; `layers_run` and `work` are what generation runs.

    `start[i]` is the first position of sequence i whose row may leave (position of the last prompt token, in generation);
    rows before it run at full depth. None lets every row leave.
    """
    model = bind(causal_lm)
    starts = [0] * len(sequences) if start is None else list(start)
    if len(starts) != len(sequences):
        raise ArgumentError(f"score: start must have one entry per sequence ({len(sequences)}), got {len(starts)}")
    lengths = [int(tokens.shape[0]) for tokens in sequences]
    exact = kv == "recompute"
    if any(isinstance(band.criterion, PromptRouter) for band in exits or ()):
        raise ExitsError("score: criterion prompt_router is decided while generate runs a prompt, and there is none")
    if exact:
        check_policy(exits, "recompute")
    # Pages are taken as sequences come and given back as they end, so memory does not grow with their number.
    session = Session(model, lengths, exits, kv="release" if exact else kv, depth=depth, chunk=chunk, first=[0] * len(lengths))
    ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    done = 0
    work = session.work()
    total = sum(lengths)
    seq = torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(lengths, dtype=torch.int64))
    pos = torch.cat([torch.arange(length) for length in lengths]) if lengths else torch.empty(0, dtype=torch.int64)
    first = torch.tensor(starts, dtype=torch.int64)[seq] if lengths else pos
    judged = pos >= first
    content = torch.cat(list(sequences)) if sequences else torch.empty(0, dtype=torch.int64)
    ready: list[Tensor] = []
    top: list[Tensor] = []
    went: list[Tensor] = []
    for begin in range(0, total, chunk):
        part = slice(begin, begin + chunk)
        source: dict[str, Any] = {"embeds": content[part]} if embeds else {"tokens": content[part]}
        step = (pos[part] - first[part]).clamp_min(0)
        result = session.run(seq[part], pos[part], step=step, may_leave=judged[part], **source)
        ready.append(result.ready)
        if exact:
            assert result.hidden is not None
            top.append(model.finish(result.hidden))
        went.append(torch.stack([result.exit_layer.long(), result.layers_run.long(), result.bands_taken]).cpu())
        work.add(result, result.ready.shape[0], full=int((~judged[part]).sum()))
        while done < len(lengths) and int(ends[done]) <= begin + chunk:
            session.pages.release(done)
            done += 1
    exit_layer, layers_run, bands_taken = torch.cat(went, dim=1) if went else torch.zeros(3, 0, dtype=torch.int64)
    made = torch.cat(ready) if ready else torch.empty(0, model.ready_size)
    if exact and total:
        forced = _recomputed(exit_layer, layers_run, bands_taken, lengths, model.depth, pending)
        made = torch.where(forced.to(made.device)[:, None], torch.cat(top), made)
        work.layers = [int((layers_run[judged] > layer).sum()) for layer in range(model.depth)]
    return Scored(
        model=model,
        ready=made,
        exit_layer=exit_layer.int(),
        layers_run=layers_run.int(),
        bands_taken=bands_taken,
        judged=judged,
        work=work,
    )


def _recomputed(
    exit_layer: Tensor, layers_run: Tensor, bands_taken: Tensor, lengths: Sequence[int], depth: int, pending: int
) -> Tensor:
    """What `recompute` makes of early exits, in place; bool [tokens], tokens whose exit is refused as too many wait.

    A token runs as many layers as the deepest of its sequence from it on; those that nobody follows are never recomputed.
    """
    forced = torch.zeros_like(exit_layer, dtype=torch.bool)
    parts = (values.split(list(lengths)) for values in (exit_layer, layers_run, bands_taken, forced))
    for exits, runs, bands, kept in zip(*parts, strict=True):
        waiting = 0
        for row, left in enumerate(exits.tolist()):
            kept[row] = left < depth and waiting == pending
            waiting = 0 if left == depth or kept[row] else waiting + 1
        exits[kept], bands[kept] = depth, 0
        runs.copy_(exits.flip(0).cummax(0).values.flip(0))
    return forced
