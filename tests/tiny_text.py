"""A text task that small encoders learn in seconds: which of three groups of words a text has more of; lengths vary."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t
from torch import Tensor

CLASSES, WORDS, LAYERS = 3, 30, 4


def bert(seed: int = 0, *, dropout: float = 0.0, head: bool = False, **changes: Any) -> Any:
    """A small BERT without a head of its own, or with one."""
    torch.manual_seed(seed)
    config = t.BertConfig(
        vocab_size=WORDS + 1, hidden_size=24, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=16, pad_token_id=0, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        num_labels=CLASSES, initializer_range=0.2, **changes,
    )  # fmt: skip
    return (t.BertForSequenceClassification(config) if head else t.BertModel(config, add_pooling_layer=False)).eval()


def task(count: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and int64 labels. Word w belongs to group w mod 3; a text's label is its commonest group."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (count,), generator=generator)
    group = torch.randint(CLASSES, (count, 1), generator=generator)
    word = torch.randint(WORDS // CLASSES, (count, 12), generator=generator) * CLASSES
    stray = torch.rand((count, 12), generator=generator) < 0.4
    kind = torch.where(stray, torch.randint(CLASSES, (count, 12), generator=generator), group)
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = (word + kind + 1) * mask
    counts = torch.stack([((kind == k) * mask).sum(1) for k in range(CLASSES)], 1)
    return {"input_ids": ids, "attention_mask": mask}, counts.argmax(1)


def alone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sample without padding."""
    length = int(inputs["attention_mask"][row].sum())
    return {name: value[row : row + 1, :length] for name, value in inputs.items()}


def states(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """transformers' own residuals after every layer, of one sample: [T, d] each."""
    with torch.no_grad():
        found = model.base_model(**inputs, output_hidden_states=True).hidden_states[1:]
    return [each[0] for each in found]
