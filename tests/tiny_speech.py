"""Small random speech encoders of every family, audio of mixed lengths with poisoned padding, and CTC exits."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import transformers as t
from torch import Tensor

from dyndepth.encoders import CtcHead, SampleExit, SampleExits, facts_of
from dyndepth.exits import Criterion, Never

LAYERS, WIDTH, SYMBOLS, CLASSES = 4, 24, 17, 3
#: Values of audio; 40 make one frame.
LENGTHS = [400, 90, 233, 400, 40, 310, 95, 141]
EXITS = (1, 2, 3)
KINDS = ("ForCTC", "ForSequenceClassification")

_COMMON: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 3, "intermediate_size": 40,
    "conv_dim": [12, 12, 12], "conv_kernel": [10, 3, 3], "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 6, "num_conv_pos_embedding_groups": 4, "vocab_size": SYMBOLS, "num_labels": CLASSES,
    "classifier_proj_size": 10, "num_buckets": 12, "max_bucket_distance": 20, "conv_depthwise_kernel_size": 5,
}  # fmt: skip
_STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2": ("Wav2Vec2", {}),
    "wav2vec2_stable": ("Wav2Vec2", _STABLE | {"adapter_attn_dim": 4}),
    "hubert": ("Hubert", {}),
    "hubert_stable": ("Hubert", _STABLE | {"feat_proj_layer_norm": False}),
    "hubert_batch_norm": ("Hubert", {"conv_pos_batch_norm": True}),
    "wavlm": ("WavLM", {}),
    "wavlm_stable": ("WavLM", _STABLE),
    "conformer": ("Wav2Vec2Conformer", {}),
    "conformer_rotary": ("Wav2Vec2Conformer", _STABLE | {"position_embeddings_type": "rotary"}),
    "conformer_without_places": ("Wav2Vec2Conformer", {"position_embeddings_type": None}),
}


@functools.cache
def model(name: str, kind: str = "ForCTC", layers: int = LAYERS) -> Any:
    torch.manual_seed(3)
    prefix, extra = MODELS[name]
    config = getattr(t, f"{prefix}Config")(**_COMMON | extra | {"num_hidden_layers": layers})
    made = getattr(t, prefix + kind)(config).eval()
    shake(made)
    return made


def shake(made: Any) -> None:
    """Weights and statistics far from where they start, so that nothing is zero or one by accident."""
    for part, value in made.named_parameters():
        value.data = torch.randn_like(value) * 0.3 + (1 if "norm" in part and part.endswith("weight") else 0)
    for part, value in made.named_buffers():
        if part.endswith("running_mean"):
            value.data = torch.randn_like(value) * 0.3
        elif part.endswith("running_var"):
            value.data = torch.rand_like(value) + 0.5


def inputs(lengths: list[int] = LENGTHS, poison: float = math.nan) -> dict[str, Tensor]:
    """Audio, and in its padding `poison`: no value of it may reach an answer."""
    generator = torch.Generator().manual_seed(8)
    values = torch.randn(len(lengths), max(lengths) + 13, generator=generator)
    keep = torch.arange(values.shape[1]) < torch.tensor(lengths)[:, None]
    return {"input_values": values.masked_fill(~keep, poison), "attention_mask": keep.long()}


def alone(batch: dict[str, Tensor], row: int) -> Tensor:
    """[1, samples] of one sample without padding."""
    return batch["input_values"][row : row + 1, : int(batch["attention_mask"][row].sum())]


def exits(name: str, criterion: Criterion | None = None, threshold: float = math.inf) -> SampleExits:
    torch.manual_seed(12)
    points = []
    for at in EXITS:  # alike in sureness, so that samples spread over the exits
        head = CtcHead(WIDTH, SYMBOLS, norm=True)
        for value in head.parameters():
            value.data = torch.randn_like(value) * 0.3
        points.append(SampleExit(at, head, criterion or Never(), threshold))
    return SampleExits(points, facts_of(model(name)))


def states(made: Any, values: Tensor) -> tuple[list[Tensor], Tensor]:
    """Residuals [T, d] before the final norm at every boundary of one sample alone, and the logits, by transformers."""
    kept: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _a, out: kept.append((out if isinstance(out, Tensor) else out[0])[0]))
        for layer in made.base_model.encoder.layers
    ]
    with torch.no_grad():
        out = made(values)
    for hook in hooks:
        hook.remove()
    return kept, out.logits[0]


def head_logits(head: CtcHead, hidden: Tensor) -> Tensor:
    """[T, symbols] of an exit, by hand."""
    x = hidden
    if head.norm is not None:
        x = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, unbiased=False, keepdim=True) + head.norm.eps)
        x = x * head.norm.weight + head.norm.bias
    return (x @ head.out.weight.T + head.out.bias).detach()


def frame_entropy(logits: Tensor) -> float:
    """xi of the paper: mean entropy of the frames over the number of symbols."""
    p = torch.softmax(logits.double(), -1)
    return float(-(p * p.log()).sum()) / logits.numel()
