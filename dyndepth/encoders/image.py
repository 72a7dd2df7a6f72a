"""Image encoders whose layers are all of one width: ViT and DeiT. A sample's tokens are its class token(s) and patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dyndepth.encoders.family import Embedded, EncoderFamily, head_of, output_width, register
from dyndepth.encoders.samples import Samples
from dyndepth.errors import ArgumentError


class ImageFamily(EncoderFamily):
    """What ViT and DeiT share: patches in, a final norm, a classifier on the class token."""

    arguments = ("pixel_values",)
    uniform = True
    base_name = ""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._head: Any = head_of(model, self.heads(), self.base_name)

    def heads(self) -> dict[str, Any]:
        """Class name -> (function of the normed first tokens [n, k, d] that gives logits, k, its last linear)."""
        raise NotImplementedError

    def layer_modules(self) -> Sequence[nn.Module]:
        return self.base.layers

    @property
    def classes(self) -> int | None:
        return None if self._head is None else output_width(self._head[2])

    def embed(self, **inputs: Tensor) -> Embedded:
        pixels = inputs["pixel_values"]
        if pixels.dim() != 4 or pixels.shape[1] != self.config.num_channels:
            raise ArgumentError(
                f"DynamicEncoder: pixel_values must be [n, {self.config.num_channels}, height, width], got {list(pixels.shape)}"
            )
        dtype = self.base.embeddings.patch_embeddings.projection.weight.dtype
        return Embedded(self.base.embeddings(pixels.to(dtype)))

    def normed(self, hidden: Tensor) -> Tensor:
        return self.base.layernorm(hidden)

    def finish(self, samples: Samples) -> Tensor:
        if self._head is None:
            raise ArgumentError(f"DynamicEncoder: {type(self.model).__name__} has no head of its own")
        classify, tokens, _ = self._head
        return classify(self.base.layernorm(samples.first(tokens)))


@register
class Vit(ImageFamily):
    model_types = ("vit",)
    base_name = "ViTModel"

    def heads(self) -> dict[str, Any]:
        model = self.model
        return {
            "ViTForImageClassification": (lambda first: model.classifier(first[:, 0]), 1, getattr(model, "classifier", None))
        }


@register
class Deit(ImageFamily):
    model_types = ("deit",)
    base_name = "DeiTModel"

    def heads(self) -> dict[str, Any]:
        model = self.model

        def with_teacher(first: Tensor) -> Tensor:
            return (model.cls_classifier(first[:, 0]) + model.distillation_classifier(first[:, 1])) / 2

        return {
            "DeiTForImageClassification": (lambda first: model.classifier(first[:, 0]), 1, getattr(model, "classifier", None)),
            "DeiTForImageClassificationWithTeacher": (with_teacher, 2, getattr(model, "cls_classifier", None)),
        }
