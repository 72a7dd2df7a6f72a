"""A model as the planner sees it: how many weights its layers and head read, and how much K,V a row reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dyndepth.errors import ArgumentError, UnsupportedModelError

_T = TypeVar("_T")

#: Products of attention and of the MLP by `config.model_type`; three for an MLP means a gated one. Families of
#: dyndepth/runtime/families.py (a test holds that none is missing).
_PRODUCTS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2"), (4, 3)),
    "phi3": (2, 2),
    "opt": (4, 2),
    "gpt2": (2, 2),
    "gpt_neox": (2, 2),
}
_GATED_IN_ONE = ("phi3",)
#: `config.sliding_window` holds for every layer; elsewhere `config.layer_types` decides.
_WINDOW_EVERYWHERE = ("mistral", "phi3")

#: SmolLM2-135M: the demo's model, known without its weights.
_DEMO = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; norms and biases are left out (less than a thousandth of a layer).

    Args:
        layer: weights of one decoder layer.
        products: matrix products a layer runs.
        kv: numbers of K and V that one token keeps per layer.
        head: weights of the LM head, and of the projection before it if there is one.
        ready: width of a head-ready row.
        windows: per layer how many tokens it attends to; 0 is all of them.
    """

    name: str
    layers: int
    width: int
    layer: int
    products: int
    kv: int
    head: int
    ready: int
    vocab: int
    windows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("layers", "width", "layer", "products", "kv", "head", "ready", "vocab"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ArgumentError(f"shape: {name} must be a positive integer, got {value!r}")
        if self.windows and len(self.windows) != self.layers:
            raise ArgumentError(f"shape: windows must name {self.layers} layers, got {len(self.windows)}")

    def reach(self, context: int, first: int = 0, last: int | None = None) -> int:
        """Tokens that layers [first, last) read K,V of, summed, for one row with this context."""
        last = self.layers if last is None else last
        if not self.windows:
            return (last - first) * context
        return sum(min(context, window or context) for window in self.windows[first:last])

    @classmethod
    def demo(cls) -> Shape:
        """The demo's model; needs transformers, not the weights."""
        return _from_settings(_DEMO, "SmolLM2-135M", cls.of)

    @classmethod
    def of(cls, model: Any, name: str = "") -> Shape:
        """Of a transformers config, or of a model that has one. UnsupportedModelError for a family that dyndepth lacks."""
        config = getattr(model, "config", model)
        kind = getattr(config, "model_type", None)
        if kind not in _PRODUCTS:
            raise UnsupportedModelError(
                f"plan: model type {kind!r} is not supported; supported: {', '.join(sorted(_PRODUCTS))}"
            )
        width, heads = config.hidden_size, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or width // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        inner = getattr(config, "ffn_dim", None) or getattr(config, "n_inner", None)
        inner = inner or getattr(config, "intermediate_size", None) or 4 * width  # GPT-2's default
        attention, mlp = _PRODUCTS[kind]
        gated = 3 if mlp == 3 or kind in _GATED_IN_ONE else 2
        query, kv = heads * head_dim, 2 * kv_heads * head_dim
        ready = getattr(config, "word_embed_proj_dim", None) or width
        return cls(
            name=name or str(getattr(config, "name_or_path", "") or kind),
            layers=config.num_hidden_layers,
            width=width,
            layer=width * (2 * query + kv) + gated * width * inner,
            products=attention + mlp,
            kv=kv,
            head=config.vocab_size * ready + (0 if ready == width else width * ready),
            ready=ready,
            vocab=config.vocab_size,
            windows=windows_of(config, kind),
        )

    @classmethod
    def read(cls, path: str | Path) -> Shape:
        """Of a config.json, or of the one in a folder; weights are not looked at."""
        return read(path, cls.of)


def read(path: str | Path, of: Callable[[Any, str], _T]) -> _T:
    """`of(config, name)` with the transformers config of a config.json, or of the one in a folder."""
    path = Path(path).expanduser()
    path = path / "config.json" if path.is_dir() else path
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArgumentError(f"config: there is no file {path}") from None
    except ValueError as error:
        raise ArgumentError(f"config: {path} is no JSON: {error}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise ArgumentError(f"config: {path} must be a JSON object with a key `model_type`")
    return _from_settings(settings, path.parent.name, of)


def _from_settings(settings: dict[str, Any], name: str, of: Callable[[Any, str], _T]) -> _T:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    kind = settings["model_type"]
    if kind not in _PRODUCTS:
        raise UnsupportedModelError(f"plan: model type {kind!r} is not supported; supported: {', '.join(sorted(_PRODUCTS))}")
    rest = {key: value for key, value in settings.items() if key not in ("model_type", "transformers_version")}
    try:
        return of(AutoConfig.for_model(kind, **rest), name)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError, StrictDataclassError) as error:
        if isinstance(error, ArgumentError | UnsupportedModelError):
            raise
        raise ArgumentError(f"config: {name}: {' '.join(str(error).split())}") from error


def windows_of(config: Any, kind: str) -> tuple[int, ...]:
    """Per layer how many tokens it attends to, 0 for all; empty where none has a window."""
    window = getattr(config, "sliding_window", None) or 0
    if not window:
        return ()
    if kind in _WINDOW_EVERYWHERE:
        return (window,) * config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ()
    return tuple(window if kind == "sliding_attention" else 0 for kind in types) if any("sliding" in t for t in types) else ()
