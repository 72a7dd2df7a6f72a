"""`make prompt-parts`: where the time of a prompt's layer goes, part by part, beside the library's way to do each.

Parts are timed alone, over the weights of ten layers in turn, with the model's shapes; a whole layer is timed in the pass, in
the same rounds. The library's products are PyTorch's (oneDNN, weights as they lie, and packed beforehand, which doubles the
weights' memory), without the sums and activations that ours do in the same call; its attention has keys and values side by
side, ours reads pages.

    PYTHONPATH=benchmarks python benchmarks/prompt_parts.py build
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from dyndepth import info, ops
from dyndepth.demo.weights import load_model
from dyndepth.files import replacing
from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.session import Session

_LAYERS, _ROUNDS = 10, 25
#: (prompts, tokens of each)
SHAPES = ((1, 1024), (16, 128))
Calls = dict[str, Callable[[], object]]


def parts(model: Model, prompts: int, tokens: int) -> dict[str, tuple[float, Calls]]:
    """Per part of a layer its operations (2 per multiplication and addition; 0 where they are not what costs), and calls of ten
    layers: ours, the library's, the library's with packed weights."""
    rows, layers = prompts * tokens, model.layers[:_LAYERS]
    modules: list[Any] = [layer.module for layer in layers]
    first = layers[0]
    width, heads, kv_heads, dim = model.hidden_size, first.heads, first.kv_heads, first.head_dim
    inner = modules[0].mlp.gate_proj.weight.shape[0]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float32).to(model.dtype)

    x, wide, other = normal(rows, width), normal(rows, inner), normal(rows, width)

    def products(given: Tensor, *named: Callable[[Any], Any]) -> Calls:
        weights = [module(layer).weight.detach() for layer in modules for module in named]
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in weights]
        return {
            "library": lambda: [linear(given, weight) for weight in weights],
            "packed": lambda: [torch.ops.mkldnn._linear_pointwise(given, weight, None, "none", [], "") for weight in packed],
        }

    def ours(given: Tensor, name: str, **epilogue: Any) -> Callable[[], object]:
        weights = [layer.get_submodule(name).weight.detach() for layer in modules]
        return lambda: [ops.ragged_linear(given, weight, **epilogue) for weight in weights]

    ups = [(layer.mlp.up_proj.weight.detach(), layer.mlp.gate_proj.weight.detach()) for layer in modules]
    qkv = [[getattr(layer.self_attn, f"{name}_proj").weight.detach() for name in "qkv"] for layer in modules]
    page = 16
    pages = [normal(2, rows // page, page, kv_heads, dim) for _ in layers]
    table = torch.arange(rows // page, dtype=torch.int32).view(prompts, -1)
    seq = torch.arange(prompts, dtype=torch.int32).repeat_interleave(tokens)
    pos = torch.arange(tokens, dtype=torch.int32).repeat(prompts)
    query = normal(rows, heads, dim)
    q, k, v = (normal(prompts, count, tokens, dim) for count in (heads, kv_heads, kv_heads))
    gain = modules[0].input_layernorm.weight.detach()
    eps = modules[0].input_layernorm.variance_epsilon
    return {
        "q, k and v": (2.0 * rows * width * (heads + 2 * kv_heads) * dim, {
            "ours": lambda: [ops.ragged_linear(x, weight) for weights in qkv for weight in weights],
            **products(x, *(lambda layer, name=name: getattr(layer.self_attn, f"{name}_proj") for name in "qkv")),
        }),
        "attention": (2.0 * prompts * tokens * (tokens + 1) * heads * dim, {
            "ours": lambda: [ops.ragged_attention(query, each, table, seq, pos, scale=dim**-0.5) for each in pages],
            "library": lambda: [scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for _ in layers],
        }),
        "out": (2.0 * rows * heads * dim * width, {
            "ours": ours(normal(rows, heads * dim), "self_attn.o_proj", residual=other),
            **products(normal(rows, heads * dim), lambda layer: layer.self_attn.o_proj),
        }),
        "gate and up": (4.0 * rows * width * inner, {
            "ours": lambda: [ops.ragged_linear(x, up, gate_weight=gate, activation="silu") for up, gate in ups],
            **products(x, lambda layer: layer.mlp.gate_proj, lambda layer: layer.mlp.up_proj),
        }),
        "down": (2.0 * rows * inner * width, {
            "ours": ours(wide, "mlp.down_proj", residual=other),
            **products(wide, lambda layer: layer.mlp.down_proj),
        }),
        "two norms": (0.0, {
            "ours": lambda: [torch.ops.dyndepth_cpp.rms_norm(x, gain, 0, eps) for _ in range(2 * _LAYERS)],
            "library": lambda: [torch.nn.functional.rms_norm(x, (width,), gain, eps) for _ in range(2 * _LAYERS)],
        }),
    }  # fmt: skip


def medians(calls: dict[tuple[str, str], Callable[[], object]]) -> dict[tuple[str, str], float]:
    """Seconds per call, in turn, after one that is not counted."""
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    for round_number in range(_ROUNDS + 1):
        for name, run in calls.items():
            begin = time.perf_counter()
            run()
            if round_number:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def whole(model: Model, prompts: int, tokens: int) -> Callable[[], object]:
    """All layers of the pass, on a session's own pages."""
    session = Session(model, [tokens] * prompts)
    ids = torch.randint(0, model.vocab_size, (prompts, tokens))
    return lambda: session.prefill(list(ids), session.work())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.manual_seed(20503005)
    model = bind(load_model()[0])
    found: list[dict[str, Any]] = []
    for prompts, tokens in SHAPES:
        made = parts(model, prompts, tokens)
        calls = {("layer", "ours"): whole(model, prompts, tokens)}
        calls |= {(name, who): run for name, (_, own) in made.items() for who, run in own.items()}
        seconds = medians(calls)
        shape: dict[str, Any] = {"prompts": prompts, "tokens": tokens, "layer_s": seconds["layer", "ours"] / model.depth}
        shape["parts"] = [
            {"part": name, "operations": operations, "seconds": {who: seconds[name, who] / _LAYERS for who in own}}
            for name, (operations, own) in made.items()
        ]
        for part in shape["parts"]:
            said = ", ".join(f"{who} {1e3 * taken:.3f} ms" for who, taken in part["seconds"].items())
            print(f"{prompts} x {tokens}, {part['part']}: {said}", flush=True)
        found.append(shape)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"machine": info.collect(), "threads": torch.get_num_threads(), "dtype": "bfloat16", "shapes": found}
    with replacing(folder / "prompt_parts.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
