"""One full-depth pass over token sequences that shows every residual, K and V to whoever wants to learn from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.runtime.bind import Model
from dyndepth.runtime.session import Session


@dataclass
class Chunk:
    """One chunk of rows on its way up; `residual` and `kv` are filled layer by layer."""

    #: Rows `begin .. begin + len` of the concatenated sequences.
    begin: int
    #: residual[e] [rows, d] at boundary e, for the boundaries asked for.
    residual: dict[int, Tensor]
    #: kv[l] [rows, 2, kv_heads * head_dim], K before rotation and V of layer l, for the layers asked for.
    kv: dict[int, Tensor]
    #: head-ready rows [rows, ready] of the full model.
    ready: Tensor


@torch.no_grad()
def trace(
    model: Model,
    sequences: Sequence[Tensor],
    boundaries: Sequence[int],
    layers: Sequence[int],
    *,
    chunk: int = 512,
    advance: Callable[[int], None] = lambda rows: None,
) -> Iterator[Chunk]:
    """Run sequences (int64 [t]) at full depth, whole sequences per chunk, at least `chunk` rows each but for the last.

    A chunk's tensors are the only thing kept, so memory does not grow with the number of tokens.
    """
    wanted_residuals, wanted_kv = set(boundaries), set(layers)
    begin, first = 0, 0
    while first < len(sequences):
        last, count = first, 0
        while last < len(sequences) and count < chunk:
            count += sequences[last].shape[0]
            last += 1
        part = sequences[first:last]
        lengths = [tokens.shape[0] for tokens in part]
        session = Session(model, lengths)
        seq = torch.repeat_interleave(torch.arange(len(part)), torch.tensor(lengths))
        pos = torch.cat([torch.arange(length) for length in lengths])
        rows, context = session.rows(seq, pos, tokens=torch.cat(list(part)))
        residual, kv = {}, {}
        for number, layer in enumerate(model.layers):
            if number in wanted_residuals:
                residual[number] = rows.hidden.clone()
            if number in wanted_kv:
                x = rows.hidden if layer.before_attention is None else layer.before_attention(rows.hidden)
                _, key, value = layer.project(x, 0)
                kv[number] = torch.stack([key.flatten(1), value.flatten(1)], dim=1)
            layer.run(rows.hidden, count, count, rows.seq, rows.pos, rows.slots, context)
        if model.depth in wanted_residuals:
            residual[model.depth] = rows.hidden
        yield Chunk(begin, residual, kv, model.finish(rows.hidden))
        advance(count)
        begin += count
        first = last
