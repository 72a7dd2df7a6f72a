"""Small random encoders of every supported family, inputs of mixed lengths, and exits for them."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import transformers as t

from dyndepth.encoders import (
    ExitGate,
    LambdaHead,
    LinearHead,
    PonderDraw,
    QExit,
    RegressionPatience,
    SampleExit,
    SampleExits,
    facts_of,
)
from dyndepth.exits import Always, Entropy, FixedDepth, Margin, Never, Patience, Saturation, TopProbability

LAYERS, WIDTH, CLASSES = 5, 24, 3
#: Of "bert_wide", whose two heads have 32 channels: in bfloat16 such attend by dyndepth's own kernel.
WIDE = 64
LENGTHS = [9, 2, 5, 9, 1, 5, 7, 3]
EXITS = (1, 2, 3, 4)

_TEXT = {
    "vocab_size": 61,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "num_labels": CLASSES,
}
_IMAGE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 12,
    "patch_size": 4,
    "num_labels": CLASSES,
}
MODELS: dict[str, tuple[Any, Any]] = {
    "bert": (t.BertForSequenceClassification, t.BertConfig(**_TEXT)),
    "roberta": (t.RobertaForSequenceClassification, t.RobertaConfig(**_TEXT)),
    "xlm_roberta": (t.XLMRobertaForSequenceClassification, t.XLMRobertaConfig(**_TEXT)),
    "albert": (t.AlbertForSequenceClassification, t.AlbertConfig(**_TEXT, embedding_size=14, num_hidden_groups=2)),
    "distilbert": (
        t.DistilBertForSequenceClassification,
        t.DistilBertConfig(
            vocab_size=61, dim=WIDTH, n_layers=LAYERS, n_heads=3, hidden_dim=40, max_position_embeddings=40, num_labels=CLASSES
        ),
    ),
    "bert_wide": (
        t.BertForSequenceClassification,
        t.BertConfig(**{**_TEXT, "hidden_size": WIDE, "num_attention_heads": WIDE // 32}),
    ),
    "vit": (t.ViTForImageClassification, t.ViTConfig(**_IMAGE)),
    "deit": (t.DeiTForImageClassification, t.DeiTConfig(**_IMAGE)),
    "deit_teacher": (t.DeiTForImageClassificationWithTeacher, t.DeiTConfig(**_IMAGE)),
}
TEXT = tuple(name for name in MODELS if name not in ("vit", "deit", "deit_teacher"))


@functools.cache
def model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, config = MODELS[name]
    torch.manual_seed(7)
    made = kind(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # transformers begins so small that layers hardly differ
            parameter.copy_(torch.randn_like(parameter) * (0.35 if parameter.dim() > 1 else 0.2))
        for module in made.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.add_(1)
    return made.to(dtype)


def inputs(name: str, lengths: list[int] | None = None, left: bool = False) -> dict[str, torch.Tensor]:
    """A batch of `lengths` (images: as many of them, all alike long)."""
    lengths = LENGTHS if lengths is None else lengths
    torch.manual_seed(3)
    if name not in TEXT:
        return {"pixel_values": torch.randn(len(lengths), 3, 12, 12)}
    longest = max(lengths)
    ids = torch.randint(3, 61, (len(lengths), longest))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, longest - length :] = 1 if left else 0
        if not left:
            mask[row, :length] = 1
    # Past a sample's end anything may stand, but padding ids (RoBERTa counts its positions by them).
    return {"input_ids": torch.where(mask == 1, ids, 0), "attention_mask": mask}


def alone(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One sample of a batch without its padding."""
    if "pixel_values" in batch:
        return {"pixel_values": batch["pixel_values"][row : row + 1]}
    length = int(batch["attention_mask"][row].sum())
    return {name: value[row : row + 1, :length] for name, value in batch.items()}


def heads(pooling: str = "first", classes: int = CLASSES, width: int = WIDTH) -> list[LinearHead]:
    torch.manual_seed(11)
    made = []
    for number in range(len(EXITS)):
        head = LinearHead(width, classes, pooling=pooling, dense=number % 2 == 0, norm=number > 1)
        for parameter in head.parameters():
            parameter.data = torch.randn_like(parameter) * 0.3
        if made:  # alike enough for neighbouring exits to agree at times
            head.out.weight.data = made[0].out.weight.data + 0.15 * head.out.weight.data
        made.append(head)
    return made


def judge(seed: int = 5, width: int = WIDTH) -> LambdaHead:
    torch.manual_seed(seed)
    made = LambdaHead(width, 10)
    for parameter in made.parameters():
        parameter.data *= 4
    return made


def gates() -> list[torch.nn.Linear]:
    torch.manual_seed(6)
    made = [torch.nn.Linear(4, 1) for _ in EXITS]
    for gate in made:
        gate.weight.data *= 3
        gate.bias.data -= 1
    return made


def criteria(width: int = WIDTH) -> dict[str, list[Any]]:
    """Criterion per exit, by name. q_exit shares its lambda head, the gates are one per exit."""
    shared = judge(width=width)
    return {
        "top_probability": [TopProbability()] * 4,
        "margin": [Margin()] * 4,
        "entropy": [Entropy()] * 4,
        "saturation": [Saturation()] * 4,
        "patience": [Patience()] * 4,
        "regression_patience": [RegressionPatience(tolerance=0.6)] * 4,
        "q_exit": [QExit(module=shared)] * 4,
        "ponder_draw": [PonderDraw(module=shared, seed=4)] * 4,
        "exit_gate": [ExitGate(module=gate) for gate in gates()],
        "fixed_depth": [FixedDepth()] * 4,
        "always": [Never(), Never(), Always(), Never()],
        "never": [Never()] * 4,
    }


def exits(name: str, criterion: str, threshold: float = math.inf, pooling: str = "first", **options: Any) -> SampleExits:
    width = WIDE if name == "bert_wide" else WIDTH
    places = zip(EXITS, heads(pooling, width=width), criteria(width)[criterion], strict=True)
    return SampleExits([SampleExit(at, head, c, threshold) for at, head, c in places], facts_of(model(name)), **options)
