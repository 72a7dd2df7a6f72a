"""Heads that read a sample's patches as a map: LGViT's local perception and global aggregation (Xu et al. 2023).

A sample's tokens are `specials` special ones (class, distillation) and then the patches of a grid, row by row. Both heads make
new patch tokens from the old, average them to `g`, and classify `g + s` for every special token s: with two of them (DeiT) the
logits are the mean of two classifiers, which is one linear on both sums side by side, halved. Without any (Swin) it reads g.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.encoders.heads import HEADS, SampleHead
from dyndepth.encoders.samples import Samples
from dyndepth.errors import ArgumentError, ExitsError


class GridHead(SampleHead):
    """What both share. `refined` makes the tokens that are averaged.

    Args:
        width, classes: of the residuals and the answers.
        grid: (height, width) of the map, in patches.
        specials: tokens before the patches.
    """

    def __init__(self, width: int, classes: int, grid: tuple[int, int], specials: int) -> None:
        super().__init__()
        if min(grid) < 1 or specials < 0:
            raise ExitsError(f"{self.kind} head: grid must be positive and specials not negative, got {grid} and {specials}")
        self.grid = (int(grid[0]), int(grid[1]))
        self.specials = specials
        self.channels = width
        self.out = nn.Linear(width * max(1, specials), classes)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "width": self.channels, "classes": self.out.out_features, "grid": list(self.grid), "specials": self.specials,
        }  # fmt: skip

    @property
    def classes(self) -> int:
        return self.out.out_features

    @property
    def width(self) -> int:
        return self.channels

    @property
    def tokens(self) -> int:
        return self.specials + self.grid[0] * self.grid[1]

    @property
    def pooling(self) -> str:
        return "first" if self.specials else "mean"

    @property
    def last(self) -> nn.Linear:
        return self.out

    def refined(self, image: Tensor) -> Tensor:
        """[n, d, height, width] -> [n, tokens, d]."""
        raise NotImplementedError

    def parts(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Special tokens [n, specials, d] and the map [n, d, height, width]."""
        tokens = samples.padded()
        height, width = self.grid
        wanted = self.specials + height * width
        if tokens.shape[1] != wanted or int(samples.lengths.min()) != wanted:
            raise ArgumentError(
                f"{self.kind} head: samples must have {self.specials} + {height} x {width} tokens, got {tokens.shape[1]}"
            )
        image = tokens[:, self.specials :].transpose(1, 2).unflatten(2, self.grid)
        return tokens[:, : self.specials], image

    def joined(self, refined: Tensor, specials: Tensor) -> Tensor:
        """The last linear's input: averages of the refined tokens with the special ones added."""
        pooled = refined.mean(1)
        return (pooled[:, None] + specials).flatten(1) / self.specials if self.specials else pooled

    def features(self, samples: Samples) -> Tensor:
        specials, image = self.parts(samples)
        return self.joined(self.refined(image), specials)


class LocalPerceptionHead(GridHead):
    """Convolutions on the map, and the map added back: for early exits, whose tokens have seen little of their surroundings.

    1 x 1 convolution, GELU, batch norm; with `depthwise` a 3 x 3 depth-wise convolution, GELU, batch norm; 1 x 1 convolution,
    batch norm; plus the map. Batch norms use their running statistics: the head must be in eval mode to answer.
    """

    kind = "local_perception"

    def __init__(self, width: int, classes: int, *, grid: tuple[int, int], specials: int = 1, depthwise: bool = True) -> None:
        super().__init__(width, classes, grid, specials)
        steps: list[nn.Module] = [nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width)]
        if depthwise:
            steps += [nn.Conv2d(width, width, 3, padding=1, groups=width), nn.GELU(), nn.BatchNorm2d(width)]
        self.body = nn.Sequential(*steps, nn.Conv2d(width, width, 1), nn.BatchNorm2d(width))
        self.depthwise = depthwise

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "depthwise": self.depthwise}

    def refined(self, image: Tensor) -> Tensor:
        return (image + self.body(image)).flatten(2).transpose(1, 2)


class GlobalAggregationHead(GridHead):
    """Self-attention among every `stride`-th patch of both directions: for late exits, whose tokens know their surroundings."""

    kind = "global_aggregation"

    def __init__(
        self, width: int, classes: int, *, grid: tuple[int, int], specials: int = 1, heads: int = 8, stride: int = 2
    ) -> None:
        super().__init__(width, classes, grid, specials)
        if heads < 1 or width % heads or stride < 1:
            raise ExitsError(f"{self.kind} head: heads must divide {width} and stride be at least 1, got {heads} and {stride}")
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width)
        self.heads, self.stride = heads, stride

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "heads": self.heads, "stride": self.stride}

    def strided(self, image: Tensor) -> Tensor:
        """The patches that are left, [n, d, height, width] -> [n, tokens, d]."""
        return image[:, :, :: self.stride, :: self.stride].flatten(2).transpose(1, 2)

    def refined(self, image: Tensor) -> Tensor:
        tokens = self.strided(image)
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return self.project(seen.transpose(1, 2).flatten(2))


HEADS.update({head.kind: head for head in (LocalPerceptionHead, GlobalAggregationHead)})
