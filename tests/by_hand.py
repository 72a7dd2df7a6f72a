"""Decoding with some layers left out, by hand: transformers' own layers, one after the other, over one cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

#: (layer, residual [1, 1, d]) -> the residual that a skipping token goes on with, or None if it runs the layer.
Skip = Callable[[int, Tensor], Tensor | None]


@torch.no_grad()
def logits(model: Any, ids: Tensor, prompt: int, skip: Callable[[int], Skip], *, keys_values: bool = False) -> list[Tensor]:
    """Logits [V] of every row from the last prompt token on, of a Llama; rows before it run every layer.

    `skip(step)` says what the row at a step does; `keys_values` writes K,V of skipped layers from the residual before them.
    """
    cache = DynamicCache(config=model.config)
    if prompt > 1:
        model(ids[None, : prompt - 1], past_key_values=cache, use_cache=True)
    found = []
    for step, at in enumerate(range(prompt - 1, ids.shape[0])):
        place = torch.tensor([[at]])
        hidden = model.model.embed_tokens(ids[None, at : at + 1])
        rotary = model.model.rotary_emb(hidden, place)
        for number, layer in enumerate(model.model.layers):
            instead = skip(step)(number, hidden)
            if instead is None:
                hidden = layer(
                    hidden, attention_mask=None, position_ids=place, past_key_values=cache, position_embeddings=rotary
                )
                continue
            if keys_values:
                own, normed = layer.self_attn, layer.input_layernorm(hidden)
                key, value = (part(normed).view(1, 1, -1, own.head_dim).transpose(1, 2) for part in (own.k_proj, own.v_proj))
                cos, sin = (each[:, None] for each in rotary)
                half = key.shape[-1] // 2
                key = key * cos + torch.cat([-key[..., half:], key[..., :half]], dim=-1) * sin
                cache.update(key, value, number)
            hidden = instead
        found.append(model.lm_head(model.model.norm(hidden))[0, 0])
    return found
