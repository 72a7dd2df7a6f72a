"""Early exit as it is usually written in PyTorch: transformers' own layers and DynamicCache, nothing compacted.

Two variants over the same exits as dyndepth's dynamic mode. "all rows agree": the batch leaves when every row would, and
skipped layers get K,V of the exit residual from their own projections (CALM). "mask only": every layer runs for every row
and the exits are selected afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from compare.system import Cell, Output, System, end_ids, suppressed
from dyndepth.exits import Band
from dyndepth.exits.criteria import View
from dyndepth.op import backend
from dyndepth.ops import ExitStats
from dyndepth.ops.exit_stats import stats_of_logits


class Naive(System):
    """`together`: the batch leaves as one or not at all; else every layer is run and exits are selected afterwards."""

    system = "naive PyTorch"

    def __init__(self, together: bool) -> None:
        self.together = together
        self.mode = "all rows agree" if together else "mask only"
        self.note = "K,V of skipped layers from their own projections" if together else "runs every layer for every row"

    def refuses(self, cell: Cell) -> str | None:
        kind = cell.model.config.model_type
        if kind != "llama":
            return f"is written for llama's layers, got {kind}"
        for band in cell.exits:
            criterion = band.criterion
            if band.resume != cell.layers or band.has_block or criterion.carries or criterion.needs_previous:
                return (
                    f"knows exits that leave for good by what they see at one boundary, got band [{band.leave}, {band.resume})"
                )
        return None

    def generate(self, cell: Cell, new_tokens: int, forced: Tensor | None = None) -> Output:
        with torch.no_grad(), backend("torch"):
            return _Decoding(cell, self.together).run(new_tokens, forced)


class _Decoding:
    """One call: cache, mask and positions of its rows."""

    def __init__(self, cell: Cell, together: bool) -> None:
        self.cell, self.together = cell, together
        self.decoder: Any = cell.model.get_decoder()
        self.head: Any = cell.model.get_output_embeddings()
        self.bands = {band.leave: band for band in cell.exits.prepared(cell.model.device, cell.model.dtype)}
        # Gathered once, as dyndepth does.
        self.words = {
            leave: None if band.shortlist is None else self.head.weight[band.shortlist] for leave, band in self.bands.items()
        }
        self.cache: Any = DynamicCache(config=cell.model.config)
        self.mask = cell.inputs["attention_mask"]
        self.position = self.mask.sum(1, keepdim=True) - 1
        self.rows_run = 0

    def run(self, new_tokens: int, forced: Tensor | None) -> Output:
        cell, ids = self.cell, self.cell.inputs["input_ids"]
        if cell.width > 1:  # the last prompt token makes a token, so it may leave like any other
            positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, :-1]
            self.decoder(
                input_ids=ids[:, :-1], attention_mask=self.mask[:, :-1], position_ids=positions, past_key_values=self.cache,
                use_cache=True,
            )  # fmt: skip
        ends, tokens, said, left = end_ids(cell.model), ids[:, -1], [], []
        for step in range(new_tokens):
            ready, went = self._step(tokens, step)
            logits = self.head(ready).float()
            said.append((logits if forced is not None else suppressed(logits, ends)).argmax(-1))
            left.append(went)
            tokens = said[-1] if forced is None else forced[:, step]
            self.mask = nn.functional.pad(self.mask, (0, 1), value=1)
            self.position = self.position + 1
        share = self.rows_run / (cell.batch * new_tokens * cell.layers)
        return Output(torch.stack(said, dim=1), share, torch.stack(left, dim=1))

    def _step(self, tokens: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Head-ready rows [batch, d], and where each left."""
        hidden = self.decoder.embed_tokens(tokens[:, None])
        mask = create_causal_mask(
            config=self.cell.model.config, inputs_embeds=hidden, attention_mask=self.mask, past_key_values=self.cache,
            position_ids=self.position,
        )  # fmt: skip
        angles = self.decoder.rotary_emb(hidden, position_ids=self.position)
        went = torch.full_like(tokens, self.cell.layers)
        ready: Tensor | None = None
        for number, layer in enumerate(self.decoder.layers):
            if number in self.bands:
                head, leaves = self._judge(self.bands[number], hidden[:, 0], step)
                leaves = leaves & (went == self.cell.layers)
                if self.together and bool(leaves.all()):
                    for skipped in self.decoder.layers[number:]:
                        _fill(skipped.self_attn, skipped.input_layernorm(hidden), angles, self.cache)
                    return head(), torch.full_like(went, number)
                if not self.together:
                    went = torch.where(leaves, number, went)
                    ready = head() if ready is None else torch.where(leaves[:, None], head(), ready)
            hidden = layer(
                hidden, attention_mask=mask, position_ids=self.position, past_key_values=self.cache, use_cache=True,
                position_embeddings=angles,
            )  # fmt: skip
            self.rows_run += tokens.shape[0]
        top = self.decoder.norm(hidden[:, 0])
        return top if ready is None else torch.where((went < self.cell.layers)[:, None], ready, top), went

    def _judge(self, band: Band, hidden: Tensor, step: int) -> tuple[Callable[[], Tensor], Tensor]:
        """The head-ready rows on demand (once made, kept), and bool [batch]: whose criterion fires."""
        made: list[Tensor] = []

        def ready() -> Tensor:
            if not made:
                made.append(band.head_or_norm()(hidden, self.decoder.norm))
            return made[0]

        def stats() -> ExitStats:
            words, ids = self.words[band.leave], band.shortlist
            if words is None or ids is None:
                return stats_of_logits(self.head(ready()))
            found = stats_of_logits(nn.functional.linear(ready(), words))
            return found._replace(argmax=ids[found.argmax])

        rows = torch.arange(hidden.shape[0], dtype=torch.int32)
        view = View(
            hidden=hidden, seq=rows, step=torch.full_like(rows, step), previous=None, stats=stats, depth=None,
            leave=band.leave, layers=self.cell.layers,
        )  # fmt: skip
        return ready, band.criterion.leaves(view, band.thresholds(view.step))


def _fill(attention: Any, normed: Tensor, angles: tuple[Tensor, Tensor], cache: Any) -> None:
    """K,V of a layer that is skipped, from the residual that was left with."""
    shape = (*normed.shape[:-1], -1, attention.head_dim)
    key = attention.k_proj(normed).view(shape).transpose(1, 2)
    value = attention.v_proj(normed).view(shape).transpose(1, 2)
    cache.update(apply_rotary_pos_emb(key, key, *angles)[1], value, attention.layer_idx)
