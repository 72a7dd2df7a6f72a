"""Text encoders: BERT (MiniLM and most sentence encoders are BERTs), RoBERTa, ALBERT, DistilBERT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dyndepth.encoders.family import Embedded, EncoderFamily, head_of, output_width, register
from dyndepth.encoders.samples import Samples
from dyndepth.errors import ArgumentError


class TextFamily(EncoderFamily):
    """What text encoders share. `base_name` is the class without a head, `heads` what the others do with the first token."""

    arguments: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
    base_name = ""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._head = head_of(model, self.heads(), self.base_name)

    def heads(self) -> dict[str, Any]:
        """Class name -> function of the first tokens [n, 1, d] that gives logits."""
        raise NotImplementedError

    @property
    def classes(self) -> int | None:
        return None if self._head is None else output_width(self.model.classifier)

    def embed(self, attention_mask: Tensor | None = None, **inputs: Tensor) -> Embedded:
        if "input_ids" in inputs and "inputs_embeds" in inputs:
            raise ArgumentError("DynamicEncoder: wanted one of input_ids and inputs_embeds, got both")
        words = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"][..., 0]
        if words.dim() != 2:
            raise ArgumentError(f"DynamicEncoder: input_ids must be [n, T], got {list(words.shape)}")
        keep = None
        if attention_mask is not None:
            if attention_mask.shape != words.shape:
                raise ArgumentError(
                    f"DynamicEncoder: attention_mask must be {list(words.shape)}, got {list(attention_mask.shape)}"
                )
            keep = attention_mask != 0
        return Embedded(self.embedding(**inputs), keep)

    def embedding(self, **inputs: Tensor) -> Tensor:
        return self.base.embeddings(**inputs)

    def finish(self, samples: Samples) -> Tensor:
        if self._head is None:
            raise ArgumentError(f"DynamicEncoder: {type(self.model).__name__} has no head of its own")
        return self._head(samples.first())


@register
class Bert(TextFamily):
    model_types = ("bert",)
    base_name = "BertModel"

    def layer_modules(self) -> Sequence[nn.Module]:
        return self.base.encoder.layer

    def heads(self) -> dict[str, Any]:
        return {"BertForSequenceClassification": self._classify}

    def _classify(self, first: Tensor) -> Tensor:
        return self.model.classifier(self.model.dropout(self.base.pooler(first)))


@register
class Roberta(TextFamily):
    model_types = ("roberta", "xlm-roberta", "camembert")

    def __init__(self, model: Any) -> None:
        self.base_name = {"roberta": "RobertaModel", "xlm-roberta": "XLMRobertaModel"}.get(
            model.config.model_type, "CamembertModel"
        )
        super().__init__(model)

    def layer_modules(self) -> Sequence[nn.Module]:
        return self.base.encoder.layer

    def heads(self) -> dict[str, Any]:
        return {f"{self.base_name.removesuffix('Model')}ForSequenceClassification": lambda first: self.model.classifier(first)}


@register
class Albert(TextFamily):
    """ALBERT shares the weights of its layers: the same module stands at many depths."""

    model_types = ("albert",)
    base_name = "AlbertModel"

    def layer_modules(self) -> Sequence[nn.Module]:
        groups = self.base.encoder.albert_layer_groups
        layers = self.config.num_hidden_layers
        return [groups[int(at / (layers / self.config.num_hidden_groups))] for at in range(layers)]

    def embedding(self, **inputs: Tensor) -> Tensor:
        return self.base.encoder.embedding_hidden_mapping_in(self.base.embeddings(**inputs))

    def heads(self) -> dict[str, Any]:
        return {"AlbertForSequenceClassification": self._classify}

    def _classify(self, first: Tensor) -> Tensor:
        pooled = self.base.pooler_activation(self.base.pooler(first[:, 0]))
        return self.model.classifier(self.model.dropout(pooled))


@register
class DistilBert(TextFamily):
    model_types = ("distilbert",)
    arguments = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
    base_name = "DistilBertModel"

    def layer_modules(self) -> Sequence[nn.Module]:
        return self.base.transformer.layer

    @property
    def width(self) -> int:
        return int(self.config.dim)

    def embedding(self, **inputs: Tensor) -> Tensor:
        return self.base.embeddings(inputs.pop("input_ids", None), **inputs)  # it has no default for them

    def heads(self) -> dict[str, Any]:
        return {"DistilBertForSequenceClassification": self._classify}

    def _classify(self, first: Tensor) -> Tensor:
        pooled = torch.relu(self.model.pre_classifier(first[:, 0]))
        return self.model.classifier(self.model.dropout(pooled))
