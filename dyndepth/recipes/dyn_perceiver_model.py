"""Dyn-Perceiver's two branches (arXiv 2306.11248): a convolutional network on features x, and latent codes z that attend to it.

Stage k of four, in the published order (z of the first stage are learned constants, x the stem's features):

    k > 1:   z = expand(mix(z)): half as many tokens, more channels;   x = x + attention of every place of x to z
             z = z + attention of z to x (7 x 7 depth-wise convolution and residual, pooled to a small map, learned bias)
             z = self-attention blocks of z
             exit 1 (k = 3), exit 2 (k = 4): mean of z, linear
             x = convolutions of stage k

Exits 1 and 2 read z alone, before the convolutions of their stage have run. After the last stage exit 3 classifies the average
of x, and exit 4 x (after it has attended to z once more), z and exit 2 together.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.exits import store

FORMAT, VERSION = "dyndepth-dyn-perceiver", 1
STAGES = 4


@dataclass(frozen=True)
class PerceiverConfig:
    """Sizes. Tuples are per stage."""

    classes: int
    #: Channels of the images.
    images: int = 3
    #: Channels of x and z in every stage, and of x after the last.
    channels: tuple[int, ...] = (32, 64, 128, 256, 256)
    #: Tokens of z in the first stage; halved three times.
    latents: int = 32
    #: Stride of the stem, and of the convolutions of every stage.
    stem: int = 2
    strides: tuple[int, ...] = (2, 2, 2, 2)
    #: Residual blocks of convolutions, and self-attention blocks of z.
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    depths: tuple[int, ...] = (3, 3, 9, 3)
    heads: tuple[int, ...] = (1, 2, 4, 8)
    #: Side of the map that z attends to.
    grid: int = 7

    def __post_init__(self) -> None:
        for name, count in (("channels", 5), ("strides", 4), ("blocks", 4), ("depths", 4), ("heads", 4)):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)
            if len(value) != count or min(value) < 1:
                raise ArgumentError(f"PerceiverConfig: {name} must be {count} positive numbers, got {list(value)}")
        if self.latents < 8 or self.latents % 8:
            raise ArgumentError(f"PerceiverConfig: latents must be a multiple of 8, got {self.latents}")
        if any(width % heads for width, heads in zip(self.channels, self.heads, strict=False)):
            raise ArgumentError(f"PerceiverConfig: heads must divide channels, got {self.heads} and {self.channels}")


@dataclass(frozen=True)
class Logits:
    """[n, classes] of every exit, shallowest first."""

    early: Tensor
    latent: Tensor
    features: Tensor
    merged: Tensor

    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.early, self.latent, self.features, self.merged


class Attention(nn.Module):
    """Pre-norm attention of `width` tokens to `source` tokens, and a pre-norm MLP, each added to what came in.

    `inner` channels of queries, keys and values; `places` gives every (query, key) pair a learned bias.
    """

    def __init__(
        self, width: int, source: int, heads: int, inner: int | None = None, places: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        inner = inner or width
        self.heads = heads
        self.norm, self.source_norm = nn.LayerNorm(width), nn.LayerNorm(source)
        self.query, self.key, self.value = nn.Linear(width, inner), nn.Linear(source, inner), nn.Linear(source, inner)
        self.project = nn.Linear(inner, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.bias = None if places is None else nn.Parameter(torch.zeros(heads, *places))

    def forward(self, tokens: Tensor, source: Tensor) -> Tensor:
        """[n, t, width], [n, s, source] -> [n, t, width]."""
        read = self.source_norm(source)
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(self.norm(tokens)), self.key(read), self.value(read))
        )
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias)
        tokens = tokens + self.project(seen.transpose(1, 2).flatten(2))
        return tokens + self.mlp(tokens)


class SelfAttention(Attention):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, width, heads)

    def forward(self, tokens: Tensor, source: Tensor | None = None) -> Tensor:
        return super().forward(tokens, tokens)


class Convolutions(nn.Module):
    """A residual block of two 3 x 3 convolutions with batch norm."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        plain = before == after and stride == 1
        self.short: nn.Module = (
            nn.Identity() if plain else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


class LatentStage(nn.Module):
    """What stage `k` (0-based) does before its convolutions."""

    def __init__(self, config: PerceiverConfig, k: int) -> None:
        super().__init__()
        width, tokens = config.channels[k], config.latents >> k
        self.grid = config.grid
        if k:
            before = config.channels[k - 1]
            self.mix = nn.Sequential(nn.LayerNorm(2 * tokens), nn.Linear(2 * tokens, tokens))
            self.expand = nn.Sequential(nn.LayerNorm(before), nn.Linear(before, width))
            self.to_x = Attention(width, width, 1, inner=max(1, width // 8))
        self.first = k == 0
        self.around = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.to_z = Attention(width, width, 1, places=(tokens, config.grid**2))
        self.blocks = nn.Sequential(*(SelfAttention(width, config.heads[k]) for _ in range(config.depths[k])))

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, c, h, w] and z [n, tokens, c]."""
        if not self.first:
            z = self.expand(self.mix(z.transpose(1, 2)).transpose(1, 2))
            x = attended(self.to_x, x, z)
        read = F.adaptive_avg_pool2d(self.around(x) + x, self.grid)
        return x, self.blocks(self.to_z(z, read.flatten(2).transpose(1, 2)))


def attended(attention: Attention, x: Tensor, z: Tensor) -> Tensor:
    """Every place of the map x [n, c, h, w] attends to z."""
    return attention(x.flatten(2).transpose(1, 2), z).transpose(1, 2).unflatten(2, x.shape[2:])


class DynPerceiver(nn.Module):
    """The model. `forward` gives the logits of all exits; the parts are there for dynamic inference."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.config = config
        width = config.channels
        self.stem = nn.Sequential(
            nn.Conv2d(config.images, width[0], 3, config.stem, 1, bias=False), nn.BatchNorm2d(width[0]), nn.ReLU()
        )
        self.latent = nn.Parameter(0.02 * torch.randn(config.latents, width[0]))
        self.latents = nn.ModuleList(LatentStage(config, k) for k in range(STAGES))
        self.features = nn.ModuleList(
            nn.Sequential(
                *(
                    Convolutions(width[k] if first == 0 else width[k + 1], width[k + 1], config.strides[k] if first == 0 else 1)
                    for first in range(config.blocks[k])
                )
            )
            for k in range(STAGES)
        )
        self.last = Attention(width[4], width[3], 1, inner=max(1, width[4] // 8))
        self.early = nn.Linear(width[2], config.classes)
        self.from_early = nn.Sequential(nn.Linear(config.classes, width[3]), nn.BatchNorm1d(width[3]), nn.ReLU())
        self.late = nn.Linear(2 * width[3], config.classes)
        self.convolutional = nn.Linear(width[4], config.classes)
        self.from_late = nn.Sequential(nn.Linear(config.classes, width[3]), nn.BatchNorm1d(width[3]), nn.ReLU())
        merged = width[4] + 2 * width[3]
        self.merged = nn.Sequential(nn.BatchNorm1d(merged), nn.Linear(merged, config.classes))

    def begin(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """x and z before the first stage; pixels [n, images, h, w]."""
        if pixels.dim() != 4 or pixels.shape[1] != self.config.images or pixels.shape[0] == 0:
            raise ArgumentError(
                f"DynPerceiver: pixels must be [n, {self.config.images}, height, width] with n > 0, got {list(pixels.shape)}"
            )
        return self.stem(pixels), self.latent.expand(len(pixels), -1, -1)

    def exit(self, number: int, z: Tensor, previous: Tensor | None = None) -> Tensor:
        """Logits of exit 1 or, given exit 1's, of exit 2: from z alone."""
        mean = z.mean(1)
        if number == 1:
            return self.early(mean)
        assert previous is not None
        return self.late(torch.cat([mean, self.from_early(previous)], 1))

    def exit_features(self, x: Tensor) -> Tensor:
        """Logits of exit 3."""
        return self.convolutional(x.mean((2, 3)))

    def exit_merged(self, x: Tensor, z: Tensor, late: Tensor) -> Tensor:
        """Logits of exit 4; `late` are exit 2's."""
        read = attended(self.last, x, z).mean((2, 3))
        return self.merged(torch.cat([read, z.mean(1), self.from_late(late)], 1))

    def forward(self, pixels: Tensor) -> Logits:
        x, z = self.begin(pixels)
        found: list[Tensor] = []
        for k in range(STAGES):
            x, z = self.latents[k](x, z)
            if k >= STAGES - 2:
                found.append(self.exit(len(found) + 1, z, found[-1] if found else None))
            x = self.features[k](x)
        early, late = found
        return Logits(early, late, self.exit_features(x), self.exit_merged(x, z, late))

    def save_pretrained(self, folder: str | Path) -> None:
        """Configuration as JSON, weights as safetensors."""
        manifest = {"format": FORMAT, "version": VERSION, "config": dataclasses.asdict(self.config)}
        store.write(Path(folder), manifest, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> DynPerceiver:
        """Read what `save_pretrained` wrote; in eval mode."""
        manifest, tensors = store.read(Path(folder), FORMAT, VERSION)
        try:
            config: dict[str, Any] = manifest["config"]
            model = cls(PerceiverConfig(**config))
            model.load_state_dict(tensors)
        except (KeyError, TypeError, RuntimeError) as error:
            raise ExitsError(f"DynPerceiver: {folder} is damaged: {error}") from error
        return model.eval()
