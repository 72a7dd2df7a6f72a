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

from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits
from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.session import DEFAULT_CHUNK, Session, Work

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
) -> Scored:
    """Run token sequences (int64 [t] each, or embeddings [t, d]) through the model with dynamic depth.

    `start[i]` is the first position of sequence i whose row may leave (position of the last prompt token, in generation);
    rows before it run at full depth. None lets every row leave.
    """
    model = bind(causal_lm)
    starts = [0] * len(sequences) if start is None else list(start)
    if len(starts) != len(sequences):
        raise ArgumentError(f"score: start must have one entry per sequence ({len(sequences)}), got {len(starts)}")
    lengths = [int(tokens.shape[0]) for tokens in sequences]
    # Pages are taken as sequences come and given back as they end, so memory does not grow with their number.
    session = Session(model, lengths, exits, kv=kv, depth=depth, chunk=chunk, first=[0] * len(lengths))
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
    went: list[Tensor] = []
    for begin in range(0, total, chunk):
        part = slice(begin, begin + chunk)
        source = {"embeds": content[part]} if embeds else {"tokens": content[part]}
        step = (pos[part] - first[part]).clamp_min(0)
        result = session.run(seq[part], pos[part], step=step, may_leave=judged[part], **source)
        ready.append(result.ready)
        went.append(torch.stack([result.exit_layer.long(), result.layers_run.long(), result.bands_taken]).cpu())
        work.add(result, result.ready.shape[0], full=int((~judged[part]).sum()))
        while done < len(lengths) and int(ends[done]) <= begin + chunk:
            session.pages.release(done)
            done += 1
    exit_layer, layers_run, bands_taken = torch.cat(went, dim=1) if went else torch.zeros(3, 0, dtype=torch.int64)
    return Scored(
        model=model,
        ready=torch.cat(ready) if ready else torch.empty(0, model.ready_size),
        exit_layer=exit_layer.int(),
        layers_run=layers_run.int(),
        bands_taken=bands_taken,
        judged=judged,
        work=work,
    )
