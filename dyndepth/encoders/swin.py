"""Swin: blocks are layers, in stages of their own width. Patches are merged between stages, by those that still run.

A boundary counts blocks, so the last boundary of a stage still has that stage's width and number of tokens, and samples that
leave there do not pay for merging. Attention runs in windows of the image, hence the padded layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.encoders.family import Embedded, EncoderFamily, head_of, output_width, plain, register
from dyndepth.encoders.samples import Samples
from dyndepth.errors import ArgumentError


@dataclass(frozen=True)
class _Place:
    """Where a block stands."""

    width: int
    #: Patches (height, width) that it sees.
    grid: tuple[int, int]
    #: Patch merging that runs before it, with the grid that this reads.
    merge: nn.Module | None
    before: tuple[int, int]


@register
class Swin(EncoderFamily):
    """SwinModel and SwinForImageClassification, for images of the configured size."""

    model_types = ("swin",)
    arguments = ("pixel_values",)
    packs = False
    uniform = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        known = {"SwinForImageClassification": lambda pooled: model.classifier(pooled)}
        self._head = head_of(model, known, "SwinModel")
        self.places: list[_Place] = []
        grid = before = tuple(self.base.embeddings.patch_grid)
        merge: nn.Module | None = None
        for number, stage in enumerate(self.base.encoder.layers):
            for _ in stage.blocks:
                self.places.append(_Place(self.config.embed_dim * 2**number, grid, merge, before))
                merge = None
            merge, before = stage.downsample, grid
            grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)

    def layer_modules(self) -> Sequence[nn.Module]:
        return [block for stage in self.base.encoder.layers for block in stage.blocks]

    @property
    def width(self) -> int:
        return int(self.base.num_features)

    def width_at(self, boundary: int) -> int:
        return self.places[boundary - 1].width

    @property
    def classes(self) -> int | None:
        return None if self._head is None else output_width(self.model.classifier)

    def embed(self, **inputs: Tensor) -> Embedded:
        pixels = inputs["pixel_values"]
        size = self.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != (self.config.num_channels, height, width):
            raise ArgumentError(
                f"DynamicEncoder: pixel_values must be [n, {self.config.num_channels}, {height}, {width}], got "
                f"{list(pixels.shape)}"
            )
        dtype = self.base.embeddings.patch_embeddings.projection.weight.dtype
        return Embedded(plain(self.base.embeddings(pixels.to(dtype))))

    def step(self, layer: int, samples: Samples) -> Samples:
        place = self.places[layer]
        hidden = samples.hidden
        lengths = samples.lengths
        if place.merge is not None:
            hidden = place.merge(hidden, place.before)
            lengths = torch.full_like(lengths, hidden.shape[1])
        return replace(samples, hidden=plain(self.modules[layer](hidden, place.grid)), lengths=lengths)

    def run(self, layer: int, samples: Samples) -> Tensor:
        return self.step(layer, samples).hidden

    def normed(self, hidden: Tensor) -> Tensor:
        return self.base.layernorm(hidden)

    def finish(self, samples: Samples) -> Tensor:
        if self._head is None:
            raise ArgumentError(f"DynamicEncoder: {type(self.model).__name__} has no head of its own")
        if samples.hidden.shape[-1] != self.width:
            raise ArgumentError(
                f"DynamicEncoder: the model's own head reads {self.width} channels, at boundary {samples.boundary} there are "
                f"{samples.hidden.shape[-1]}"
            )
        return self._head(self.normed(samples.hidden).mean(1))
