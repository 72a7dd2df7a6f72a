"""Narrower BERTs: fewer heads, fewer neurons, a word embedding of low rank; the layers stay. COST-EFF's slenderisation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dyndepth.encoders import bind
from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.files import replacing

#: transformers families whose layers are BERT's.
FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert")
CONFIG, WEIGHTS = "slender.json", "model.safetensors"


class FactoredEmbedding(nn.Module):
    """A word embedding [V, d] as a product [V, r] [r, d]: the truncated singular value decomposition, the nearest of rank r."""

    def __init__(self, words: int, width: int, rank: int) -> None:
        super().__init__()
        self.low = nn.Embedding(words, rank)
        self.up = nn.Linear(rank, width, bias=False)

    @classmethod
    def of(cls, weight: Tensor, rank: int) -> FactoredEmbedding:
        """From [V, d]; the right singular vectors come from the d x d Gram matrix, in float64."""
        made = cls(weight.shape[0], weight.shape[1], rank)
        wide = weight.detach().double()
        _, vectors = torch.linalg.eigh(wide.T @ wide)
        basis = vectors[:, -rank:].flip(1)
        made.low.weight.data = (wide @ basis).to(weight.dtype)
        made.up.weight.data = basis.to(weight.dtype)
        return made.to(weight.device)

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., d]."""
        return self.up(self.low(ids))


@dataclass(frozen=True)
class Widths:
    """How wide a layer is, and which of the wider layer's heads and neurons it kept, ascending."""

    heads: tuple[int, ...]
    neurons: tuple[int, ...]


def layers_of(model: Any) -> Sequence[Any]:
    """The layers; ArgumentError for families that are built otherwise."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ArgumentError(f"costeff: model must be one of {', '.join(FAMILIES)}, got {kind}")
    return bind(model).modules


def widths(model: Any) -> list[Widths]:
    """All heads and neurons of every layer, as they are now."""
    return [
        Widths(tuple(range(layer.attention.self.num_attention_heads)), tuple(range(layer.intermediate.dense.out_features)))
        for layer in layers_of(model)
    ]


@torch.no_grad()
def prune(model: Any, kept: Sequence[Widths]) -> None:
    """Keep these heads and neurons of every layer, in place; what the others did is gone."""
    layers = layers_of(model)
    if len(kept) != len(layers):
        raise ArgumentError(f"costeff.prune: wanted widths of {len(layers)} layers, got {len(kept)}")
    for layer, which in zip(layers, kept, strict=True):
        attention = layer.attention.self
        if not which.heads or not which.neurons:
            raise ArgumentError("costeff.prune: every layer must keep a head and a neuron")
        size = attention.attention_head_size
        rows = torch.cat([torch.arange(head * size, (head + 1) * size) for head in which.heads])
        neurons = torch.tensor(which.neurons)
        for name in ("query", "key", "value"):
            setattr(attention, name, _rows(getattr(attention, name), rows))
        attention.num_attention_heads, attention.all_head_size = len(which.heads), len(rows)
        layer.attention.output.dense = _columns(layer.attention.output.dense, rows)
        layer.intermediate.dense = _rows(layer.intermediate.dense, neurons)
        layer.output.dense = _columns(layer.output.dense, neurons)


def factor(model: Any, rank: int) -> None:
    """Replace the word embedding by its nearest of this rank, in place."""
    words = model.base_model.embeddings.word_embeddings
    if isinstance(words, FactoredEmbedding):
        raise ArgumentError("costeff.factor: the word embedding is factored already")
    if not 1 <= rank <= words.weight.shape[1]:
        raise ArgumentError(f"costeff.factor: rank must be 1 to {words.weight.shape[1]}, got {rank}")
    model.base_model.embeddings.word_embeddings = FactoredEmbedding.of(words.weight, rank)


def _rows(linear: nn.Linear, at: Tensor) -> nn.Linear:
    made = nn.Linear(linear.in_features, len(at), bias=linear.bias is not None, dtype=linear.weight.dtype)
    made.weight.data = linear.weight[at].clone()
    if linear.bias is not None:
        made.bias.data = linear.bias[at].clone()
    return made


def _columns(linear: nn.Linear, at: Tensor) -> nn.Linear:
    made = nn.Linear(len(at), linear.out_features, bias=linear.bias is not None, dtype=linear.weight.dtype)
    made.weight.data = linear.weight[:, at].clone()
    if linear.bias is not None:
        made.bias.data = linear.bias.clone()
    return made


def multiplications(model: Any) -> int:
    """Products per token of all layers, those with keys and values of other tokens left out: what narrower layers save."""
    return sum(
        module.in_features * module.out_features
        for layer in layers_of(model)
        for module in layer.modules()
        if isinstance(module, nn.Linear)
    )


def save(model: Any, folder: str | Path) -> None:
    """Write a narrowed model: its widths as JSON, its weights as safetensors. transformers' own format has one width."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    words = model.base_model.embeddings.word_embeddings
    about = {
        "class": type(model).__name__, "config": model.config.to_dict(),
        "layers": [[len(each.heads), len(each.neurons)] for each in widths(model)],
        "rank": words.low.embedding_dim if isinstance(words, FactoredEmbedding) else None,
    }  # fmt: skip
    with replacing(place / WEIGHTS) as temporary:
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}, temporary)
    with replacing(place / CONFIG) as temporary:
        temporary.write_text(json.dumps(about, indent=1) + "\n")


def _bare(name: str) -> bool:
    return name in ("BertModel", "RobertaModel", "XLMRobertaModel", "CamembertModel")


def load(folder: str | Path) -> Any:
    """What `save` wrote; ExitsError says what is wrong with it. Never runs code from the files."""
    import transformers

    place = Path(folder)
    try:
        about = json.loads((place / CONFIG).read_text())
        kind = dict(about["config"])["model_type"]
        if kind not in FAMILIES:
            raise ExitsError(f"costeff.load: model_type must be one of {', '.join(FAMILIES)}, got {kind!r}")
        made = getattr(transformers, about["class"], None)
        if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)):
            raise ExitsError(f"costeff.load: {about['class']!r} is no transformers model")
        settings = {key: value for key, value in about["config"].items() if key != "model_type"}
        values = load_file(place / WEIGHTS)
        # A bare model may have been made without its pooler, which its config does not say.
        bare = {"add_pooling_layer": any(name.startswith("pooler.") for name in values)} if _bare(about["class"]) else {}
        model: Any = made(transformers.AutoConfig.for_model(kind, **settings), **bare)
        prune(model, [Widths(tuple(range(heads)), tuple(range(neurons))) for heads, neurons in about["layers"]])
        if about["rank"] is not None:
            factor(model, about["rank"])
        model.load_state_dict(values)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, ExitsError):
            raise
        raise ExitsError(f"costeff.load: {place} is damaged: {type(error).__name__}: {error}") from error
    return model.eval()
