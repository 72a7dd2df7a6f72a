"""MuE's decoder: BERT layers with cross-attention, one token per sequence and step, each stopping at its own layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError, UnsupportedModelError
from dyndepth.ops import compact_rows, ragged_attention
from dyndepth.runtime.session import Work


@dataclass(frozen=True)
class Decoded:
    """What was generated."""

    #: int64 [n, t + new]: the given tokens and the new ones; after its end a sequence repeats the end token.
    sequences: Tensor
    #: int32 [n, new]: layers that each new token ran; 0 after the end.
    layers_run: Tensor
    #: Rows x layers of the steps that made the new tokens.
    work: Work


class Decoder:
    """Greedy decoding of a BertLMHeadModel with cross-attention.

    K,V of a sequence are one page of `ragged_attention`, those that the cross-attention reads another, so a row that runs on
    finds them by its sequence's number wherever it stands: rows are compacted, K,V never move.
    """

    def __init__(self, model: Any) -> None:
        config: Any = getattr(model, "config", None)
        if type(model).__name__ != "BertLMHeadModel" or not (config.is_decoder and config.add_cross_attention):
            raise UnsupportedModelError(
                f"MuE: decoder must be a BertLMHeadModel with is_decoder and add_cross_attention, got {type(model).__name__}"
            )
        self.model = model
        self.layers = list(model.bert.encoder.layer)
        self.width = int(config.hidden_size)
        self.heads = int(config.num_attention_heads)
        self.dim = self.width // self.heads

    @torch.no_grad()
    def generate(
        self, hidden: Tensor, lengths: Tensor, start: Tensor, *, threshold: float, max_new_tokens: int, end: int
    ) -> Decoded:
        """Continue `start` int64 [n, t], reading the first `lengths` int64 [n] tokens of `hidden` [n, T, d]."""
        if self.model.training:
            raise ArgumentError("MuE.generate: the decoder must be in eval mode, got training mode (call .eval())")
        n, given = start.shape
        room = self.model.config.max_position_embeddings
        if max_new_tokens < 1 or given < 1 or given + max_new_tokens > room:
            raise ArgumentError(f"MuE.generate: wanted 1 to {room} tokens in all, got {given} and {max_new_tokens} new ones")
        if n != len(lengths):
            raise ArgumentError(f"MuE.generate: start must have {len(lengths)} rows, one per sample, got {n}")
        if math.isnan(threshold):
            raise ArgumentError("MuE.generate: decoder_threshold must be a number, got NaN")
        state = _State(self, hidden, lengths, given + max_new_tokens)
        device = hidden.device
        tokens = torch.full((n, given + max_new_tokens), max(end, 0), dtype=torch.int64, device=device)
        tokens[:, :given] = start.to(device)
        layers_run = torch.zeros(n, max_new_tokens, dtype=torch.int32)
        work = Work([0] * len(self.layers))
        running = torch.arange(n, device=device)
        for at in range(given + max_new_tokens - 1):
            judged = at >= given - 1
            last, depths = self._step(state, tokens[running, at], running, at, threshold if judged else math.inf)
            if not judged:
                continue
            new = at - given + 1
            layers_run[running.cpu(), new] = depths
            work.rows += len(running)
            for layer in range(len(self.layers)):
                work.layers[layer] += int((depths > layer).sum())
            logits = self.model.cls(last[:, None])[:, 0]
            if bool(torch.isnan(logits).any()):
                raise ArgumentError(f"MuE.generate: logits of new token {new + 1} hold NaN")
            chosen = logits.argmax(-1)
            tokens[running, at + 1] = chosen
            running = running[chosen != end]
            if len(running) == 0:
                tokens, layers_run = tokens[:, : at + 2], layers_run[:, : new + 1]
                break
        return Decoded(tokens, layers_run, work)

    def _step(self, state: _State, tokens: Tensor, seq: Tensor, at: int, threshold: float) -> tuple[Tensor, Tensor]:
        """One token of each running sequence: (residuals at its last layer [m, d], layers run int32 [m] on the CPU)."""
        position = torch.full((len(tokens), 1), at, device=tokens.device)
        hidden = self.model.bert.embeddings(input_ids=tokens[:, None], position_ids=position)[:, 0]
        depths = torch.full((len(tokens),), len(self.layers), dtype=torch.int32)
        rows = torch.arange(len(tokens), device=tokens.device)  # those that run on, and where they stand in `hidden`
        x = hidden
        for number, layer in enumerate(self.layers):
            # Every row's K,V: of those that stopped, of the residual they stopped with.
            state.store(number, layer.attention.self, hidden, seq, at)
            if len(rows) == 0:
                continue
            before, x = x, self._layer(number, layer, state, x, seq[rows], at)
            hidden = x if len(rows) == len(hidden) else hidden.index_copy(0, rows, x)
            if threshold == math.inf or number + 1 == len(self.layers):
                continue
            cosine = torch.nn.functional.cosine_similarity(x.float(), before.float(), dim=-1, eps=1e-20)
            leaves = cosine > threshold
            if bool(leaves.any()):
                depths[rows[leaves].cpu()] = number + 1
                (x, rows), _, counts = compact_rows(leaves.to(torch.int8), [x, rows])
                live = int(counts[0])
                x, rows = x[:live], rows[:live]
        return hidden, depths

    def _layer(self, number: int, layer: Any, state: _State, x: Tensor, seq: Tensor, at: int) -> Tensor:
        """One layer for rows [m, d] of sequences `seq`; their own K,V are stored already."""
        scale = self.dim**-0.5
        table = state.table
        seq32 = seq.to(torch.int32)
        position = torch.full_like(seq32, at)
        own, cross = layer.attention, layer.crossattention
        q = own.self.query(x).view(-1, self.heads, self.dim)
        seen = ragged_attention(q, state.own[number], table, seq32, position, scale=scale)
        x = own.output(seen.flatten(1), x)
        q = cross.self.query(x).view(-1, self.heads, self.dim)
        seen = ragged_attention(q, state.cross[number], table, seq32, state.last[seq], scale=scale)
        x = cross.output(seen.flatten(1), x)
        return layer.feed_forward_chunk(x)


class _State:
    """K,V of all sequences: `own` [layers][2, n, capacity, heads, dim], `cross` [layers][2, n, T, heads, dim]."""

    def __init__(self, decoder: Decoder, hidden: Tensor, lengths: Tensor, capacity: int) -> None:
        n, seen = hidden.shape[:2]
        heads, dim = decoder.heads, decoder.dim
        self.own = [hidden.new_zeros(2, n, capacity, heads, dim) for _ in decoder.layers]
        self.cross = []
        for layer in decoder.layers:
            cross = layer.crossattention.self
            parts = [project(hidden).view(n, seen, heads, dim) for project in (cross.key, cross.value)]
            self.cross.append(torch.stack(parts))
        #: A page per sequence.
        self.table = torch.arange(n, dtype=torch.int32, device=hidden.device)[:, None].contiguous()
        #: Cross-attention sees positions 0 .. last: all of the sample's tokens.
        self.last = (lengths - 1).to(torch.int32).to(hidden.device)

    def store(self, number: int, projections: Any, hidden: Tensor, seq: Tensor, at: int) -> None:
        pages = self.own[number]
        pages[0, seq, at] = projections.key(hidden).view(-1, *pages.shape[3:])
        pages[1, seq, at] = projections.value(hidden).view(-1, *pages.shape[3:])
