"""Small random models of every supported family, in odd shapes: head_dim unlike width / heads, 3 query heads per K,V head,
a vocabulary that is no multiple of 64."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers as t

VOCABULARY = 203
LAYERS = 6

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Families without grouped-query attention or a free head_dim.
_PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "hidden_size": 42,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LAYER_TYPES = ["sliding_attention", "full_attention"] * (LAYERS // 2)

CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (t.LlamaConfig, _COMMON),
    "llama_bias": (t.LlamaConfig, _COMMON | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": (t.MistralConfig, _COMMON | {"sliding_window": 9}),
    "qwen2": (
        t.Qwen2Config,
        _COMMON | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3, "layer_types": _LAYER_TYPES},
    ),
    "qwen3": (t.Qwen3Config, _COMMON),
    "gemma2": (
        t.Gemma2Config,
        _COMMON
        | {"sliding_window": 7, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3": (t.Gemma3TextConfig, _COMMON | {"sliding_window": 7, "query_pre_attn_scalar": 20, "layer_types": _LAYER_TYPES}),
    "phi3": (t.Phi3Config, _COMMON | {"sliding_window": 11}),
    "olmo2": (t.Olmo2Config, _COMMON),
    "gpt2": (t.GPT2Config, _PLAIN | {"n_inner": 60}),
    "opt": (t.OPTConfig, _PLAIN | {"ffn_dim": 60, "word_embed_proj_dim": 42}),
    "opt_post_norm": (t.OPTConfig, _PLAIN | {"ffn_dim": 60, "word_embed_proj_dim": 30, "do_layer_norm_before": False}),
    "gpt_neox": (t.GPTNeoXConfig, _PLAIN | {"intermediate_size": 60, "rotary_pct": 0.5}),
    "gpt_neox_serial": (t.GPTNeoXConfig, _PLAIN | {"intermediate_size": 60, "use_parallel_residual": False}),
}
FAMILIES = list(CONFIGS)


def tiny(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A fresh model with fixed weights: unlike the usual initialisation they are large enough to make a peaked softmax."""
    kind, settings = CONFIGS[name]
    torch.manual_seed(7)
    model = t.AutoModelForCausalLM.from_config(kind(**(settings | changes)), attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(11)
    for key, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        elif "embed" in key or "wte" in key or "lm_head" in key or "wpe" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator)
        else:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 1.2 / parameter.shape[-1] ** 0.5
    model.generation_config.pad_token_id = 0
    return model.to(dtype)


@functools.cache
def shared(name: str) -> Any:
    """The same model for tests that do not change it."""
    return tiny(name)


def prompts(batch: int, longest: int = 13, seed: int = 3) -> dict[str, torch.Tensor]:
    """Ragged prompts, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (batch,), generator=generator)
    lengths[0] = longest
    ids = torch.randint(3, VOCABULARY, (batch, longest), generator=generator)
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}
