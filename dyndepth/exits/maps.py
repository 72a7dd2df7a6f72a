"""Linear maps of a band: the residual where rows resume, and the K,V of the layers they skip."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dyndepth.ops._math import rms_normalise

#: Epsilon of the gain-free RMSNorm in front of every fitted map.
EPS = 1e-6


class JumpMap(nn.Module):
    """Residual at `resume` from the residual h at `leave`: `h + weight @ rms_norm(h) + bias`.

    The layers in between read h through norms too, so what they add is a function of rms_norm(h) in all but the attention
    to other tokens; regressing the difference, not the residual, leaves the identity as the map of no data.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(width), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        x = rms_normalise(hidden, EPS).to(hidden.dtype)
        return hidden + nn.functional.linear(x, self.weight, self.bias)


class KVMap(nn.Module):
    """K (before rotation) and V of layers `[leave, resume)` from rms_norm of the residual at `leave` (policy `predict`).

    weight [layers, 2, kv_heads * head_dim, width], bias [layers, 2, kv_heads * head_dim]: what ops.backfill_kv takes.
    """

    def __init__(self, layers: int, kv_width: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers, 2, kv_width, width), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(layers, 2, kv_width), requires_grad=False)
