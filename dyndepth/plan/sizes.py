"""A decoder's sizes as the calls of a pass need them: of Llama's kind, or of Gemma's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyndepth.errors import ArgumentError, UnsupportedModelError
from dyndepth.plan.shape import read, windows_of

#: Families whose layers are those of Llama: q, k, v, RMSNorms, a gated MLP. Gemma's have norms behind attention and MLP too.
KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
_SANDWICH = ("gemma2", "gemma3_text")

#: Sizes from the models' published config.json.
_KNOWN: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "layers": 30, "width": 576, "heads": 9, "kv_heads": 3, "head_dim": 64, "inner": 1536, "vocab": 49152,
    },
    "Llama-3-8B": {
        "layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "inner": 14336, "vocab": 128256,
    },
    "Qwen3-8B": {
        "layers": 36, "width": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "inner": 12288, "vocab": 151936,
        "qk_norm": True,
    },
    "Gemma-2-2B": {
        "layers": 26, "width": 2304, "heads": 8, "kv_heads": 4, "head_dim": 256, "inner": 9216, "vocab": 256000,
        "sandwich": True, "softcap": True, "scaled": True, "windows": (4096, 0) * 13,
    },
    "Gemma-3-4B": {
        "layers": 34, "width": 2560, "heads": 8, "kv_heads": 4, "head_dim": 256, "inner": 10240, "vocab": 262208,
        "sandwich": True, "qk_norm": True, "scaled": True, "windows": ((1024,) * 5 + (0,)) * 5 + (1024,) * 4,
        "variants": ((1,) * 5 + (0,)) * 5 + (1,) * 4,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """A decoder of Llama's kind.

    Args:
        sandwich: norms behind attention and MLP as well as before (Gemma).
        softcap: logits are capped, `cap * tanh(logit / cap)` (Gemma 2).
        scaled: embeddings are multiplied by a number (Gemma).
        windows: per layer the tokens it attends to, 0 for all; empty where none has a window.
        variants: per layer which rotary table it uses; empty where there is one (Gemma 3 has two).
    """

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich: bool = False
    softcap: bool = False
    scaled: bool = False
    windows: tuple[int, ...] = ()
    variants: tuple[int, ...] = ()

    @property
    def query(self) -> int:
        """Numbers of q per token."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Numbers of k and v per token and layer."""
        return 2 * self.kv_heads * self.head_dim

    def tables(self, begin: int, end: int) -> int:
        """Rotary tables that layers [begin, end) use together; 0 where the model has one."""
        return len(set(self.variants[begin:end]))

    @property
    def rotary(self) -> int:
        """Pairs of channels that are rotated."""
        return self.head_dim // 2

    @classmethod
    def known(cls, name: str) -> Sizes:
        """SmolLM2-135M, Llama-3-8B, Qwen3-8B, Gemma-2-2B or the text model of Gemma-3-4B, without any file."""
        if name not in _KNOWN:
            raise ArgumentError(f"plan: wanted one of {', '.join(_KNOWN)}, got {name!r}")
        return cls(name, **_KNOWN[name])

    @classmethod
    def demo(cls) -> Sizes:
        """The demo's model."""
        return cls.known("SmolLM2-135M")

    @classmethod
    def of(cls, model: Any, name: str = "") -> Sizes:
        """Of a transformers config, or a model that has one; UnsupportedModelError for layers that are not Llama's."""
        config = getattr(model, "config", model)
        kind = getattr(config, "model_type", None)
        if kind not in KINDS:
            raise UnsupportedModelError(f"plan: the roofline knows layers of {', '.join(KINDS)}, got model type {kind!r}")
        attention_bias = bool(getattr(config, "attention_bias", False))
        return cls(
            name=name or str(getattr(config, "name_or_path", "") or kind),
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            inner=config.intermediate_size,
            vocab=config.vocab_size,
            qkv_bias=kind == "qwen2" or attention_bias,  # Qwen 2 has them without saying so
            out_bias=attention_bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=kind in ("qwen3", "gemma3_text"),
            sandwich=kind in _SANDWICH,
            softcap=kind in _SANDWICH and bool(getattr(config, "final_logit_softcapping", None)),
            scaled=kind in _SANDWICH,
            windows=windows_of(config, kind),
            variants=_variants(config) if kind == "gemma3_text" else (),
        )

    @classmethod
    def read(cls, path: str | Path) -> Sizes:
        """Of a config.json, or of the one in a folder."""
        return read(path, cls.of)


def _variants(config: Any) -> tuple[int, ...]:
    kinds = sorted(set(config.layer_types))
    return tuple(kinds.index(kind) for kind in config.layer_types)
