"""A small diffusion transformer in the manner of diffusers (patches, timestep and class embeddings, adaLN-zero), and DDIM."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (Peebles and Xie 2023, adaLN-zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU("tanh"), nn.Linear(2 * width, width))
        self.condition = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(nn.functional.silu(c))[:, None].chunk(6, -1)
        q, k, v = self.qkv(self.norm1(x) * (1 + scale1) + shift1).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.out(seen)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class TinyDiT(nn.Module):
    """`forward(hidden_states, timestep, class_labels)`: noise [n, 1, size, size] of pictures [n, 1, size, size]."""

    def __init__(
        self, size: int = 8, patch: int = 2, width: int = 64, layers: int = 4, heads: int = 4, classes: int = 10
    ) -> None:
        super().__init__()
        self.patch, self.width, self.side = patch, width, size // patch
        self.embed = nn.Conv2d(1, width, patch, patch)
        self.register_buffer("position", torch.randn(1, self.side**2, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, patch * patch)

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        half = self.width // 2
        angles = timestep[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        c = self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.label(class_labels)
        x = self.embed(hidden_states).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, c)
        x = self.head(self.norm(x)).unflatten(1, (self.side, self.side)).unflatten(-1, (self.patch, self.patch))
        return x.permute(0, 1, 3, 2, 4).flatten(1, 2).flatten(2)[:, None]


class Ddim:
    """Deterministic DDIM (Song et al. 2021) on a cosine schedule of 1000 times."""

    def __init__(self, steps: int) -> None:
        at = torch.arange(1001) / 1000
        self.kept = (torch.cos((at + 0.008) / 1.008 * math.pi / 2) ** 2).clamp(1e-4, 0.9999)
        self.timesteps = torch.linspace(999, 0, steps + 1).round().long()[:-1]
        self.following = torch.linspace(999, 0, steps + 1).round().long()[1:]

    def noised(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        kept = self.kept[timestep].view(-1, 1, 1, 1)
        return kept.sqrt() * clean + (1 - kept).sqrt() * noise

    def step(self, noise: Tensor, step: int, x: Tensor) -> Tensor:
        now, then = self.kept[self.timesteps[step]], self.kept[self.following[step]]
        clean = (x - (1 - now).sqrt() * noise) / now.sqrt()
        return then.sqrt() * clean.clamp(-1.5, 1.5) + (1 - then).sqrt() * noise
