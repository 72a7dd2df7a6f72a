"""A second witness: one sequence, one token at a time, transformers' own decoder layers and its DynamicCache, plain Python.

Nothing here is batched, paged, compacted or fused, and nothing of dyndepth's runtime is used, so a misunderstanding in
the runtime cannot hide. Written for the families whose decoder layers take (hidden, position_embeddings, past_key_values):
llama, mistral, qwen2, qwen3, gemma2, gemma3, olmo2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from dyndepth.exits import Exits
from dyndepth.exits.criteria import View


@dataclass
class Told:
    """What the oracle found for every token of one sequence."""

    logits: list[torch.Tensor] = field(default_factory=list)
    bands: list[int] = field(default_factory=list)  # bit mask
    layers: list[int] = field(default_factory=list)  # layers run
    #: keys[layer] [tokens, kv_heads, head_dim] after rotation, values[layer] likewise.
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


def rms(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def jumped(band: Any, h: torch.Tensor) -> torch.Tensor:
    """Residuals [n, d] where a band with a linear jump resumes."""
    return h + rms(h) @ band.jump.weight.T + band.jump.bias


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [heads, head_dim]; cos, sin [head_dim]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[:, half:], x[:, :half]], dim=-1) * sin


class Oracle:
    def __init__(self, model: Any, exits: Exits, kv: str, start: int) -> None:
        self.model, self.exits, self.kv, self.start = model, exits, kv, start
        self.cache = DynamicCache(config=model.config)
        # Plain growing layers: sliding-window layers of the cache would drop keys that the mask must see.
        from transformers.cache_utils import DynamicLayer

        self.cache.layers = [DynamicLayer() for _ in model.model.layers]
        self.told = Told()

    def run(self, tokens: torch.Tensor) -> Told:
        for position, token in enumerate(tokens.tolist()):
            self.step(token, position)
        for layer in self.cache.layers:
            self.told.keys.append(layer.keys[0].movedim(1, 0))
            self.told.values.append(layer.values[0].movedim(1, 0))
        return self.told

    def step(self, token: int, position: int) -> None:
        decoder = self.model.model
        depth = len(decoder.layers)
        h = decoder.embed_tokens(torch.tensor([[token]]))
        bands = {band.leave: (number, band) for number, band in enumerate(self.exits)}
        number, taken, ran, ready = 0, 0, 0, None
        carried: dict[str, torch.Tensor] = {}
        previous = None
        self.skipped: set[int] = set()
        while number < depth:
            if number in bands and position >= self.start:
                bit, band = bands[number]
                head_ready = band.head_or_norm()(h[0], decoder.norm) if band.resume == depth else None
                leaves = self.judge(band, h[0], head_ready, position, carried, previous)
                previous = h[0].clone()
                if leaves:
                    taken |= 1 << bit
                    self.skipped.add(band.leave)
                    self.fill(band, h[0], position)
                    if band.resume == depth:
                        ready = head_ready
                        break
                    h = h if band.jump is None else jumped(band, h[0])[None]
                    number = band.resume
                    continue
            h = self.layer(number, h, position)
            ran += 1
            number += 1
        ready = decoder.norm(h[0]) if ready is None else ready
        logits = self.model.lm_head(ready)[0]
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        self.told.logits.append(logits if cap is None else cap * torch.tanh(logits / cap))
        self.told.bands.append(taken)
        self.told.layers.append(ran)

    def judge(self, band: Any, h: torch.Tensor, head_ready: Any, position: int, carried: dict, previous: Any) -> bool:
        from dyndepth.ops.exit_stats import stats_of_logits

        def stats() -> Any:
            logits = self.model.lm_head(head_ready)
            cap = getattr(self.model.config, "final_logit_softcapping", None)
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            return stats_of_logits(logits if band.shortlist is None else logits[:, band.shortlist])

        step = torch.tensor([position - self.start], dtype=torch.int32)
        view = View(
            h, torch.zeros(1, dtype=torch.int32), step, previous, stats, None, band.leave, len(self.model.model.layers),
            lambda boundaries: torch.tensor([[float(boundary in self.skipped) for boundary in boundaries]]), carried,
        )  # fmt: skip
        return bool(band.criterion.leaves(view, band.thresholds(step)))

    def angles(self, number: int, position: int, h: torch.Tensor) -> Any:
        where = torch.tensor([[position]])
        rotary = self.model.model.rotary_emb
        if self.model.config.model_type == "gemma3_text":
            return rotary(h, where, self.model.config.layer_types[number])
        return rotary(h, where)

    def layer(self, number: int, h: torch.Tensor, position: int) -> torch.Tensor:
        mask = torch.zeros(1, 1, 1, position + 1)
        window = self.window(number)
        if window:
            mask[..., : max(0, position + 1 - window)] = -torch.inf
        return self.model.model.layers[number](
            h, attention_mask=mask, position_embeddings=self.angles(number, position, h), past_key_values=self.cache
        )

    def window(self, number: int) -> int:
        config = self.model.config
        kinds = getattr(config, "layer_types", None)
        sliding = kinds is None or kinds[number] == "sliding_attention"
        return (getattr(config, "sliding_window", None) or 0) if sliding else 0

    def fill(self, band: Any, h: torch.Tensor, position: int) -> None:
        """K,V of the skipped layers from the residual h [1, d] the row left with."""
        config = self.model.config
        kv_heads, dim = config.num_key_value_heads, config.head_dim
        for number in range(band.leave, band.resume):
            layer = self.model.model.layers[number]
            if self.kv == "predict":
                weight, bias = band.kv.weight[number - band.leave], band.kv.bias[number - band.leave]
                x = rms(h) if band.kv.down is None else rms(h) @ band.kv.down.T
                key, value = (x @ weight[i].T + bias[i] for i in (0, 1))
                key, value = key.view(kv_heads, dim), value.view(kv_heads, dim)
            elif self.kv == "copy":
                turns = config.layer_types if config.model_type == "gemma3_text" else [""] * config.num_hidden_layers
                below = [j for j in range(band.leave) if turns[j] == turns[number]] or [band.leave - 1]
                source = self.cache.layers[below[-1]]
                self.cache.update(source.keys[:, :, -1:], source.values[:, :, -1:], number)
                continue
            else:
                x = layer.input_layernorm(h) if hasattr(layer, "input_layernorm") else h
                key, value = layer.self_attn.k_proj(x), layer.self_attn.v_proj(x).view(kv_heads, dim)
                norm = getattr(layer.self_attn, "k_norm", None)
                if norm is not None and config.model_type == "olmo2":
                    key = norm(key)
                key = key.view(kv_heads, dim)
                if norm is not None and config.model_type != "olmo2":
                    key = norm(key)
            cos, sin = self.angles(number, position, h[None])
            self.cache.update(turned(key, cos[0, 0], sin[0, 0])[None, :, None], value[None, :, None], number)
