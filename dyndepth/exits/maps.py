"""Maps of a band: the residual where rows resume, and the K,V of the layers they skip."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dyndepth.errors import ExitsError
from dyndepth.exits.products import linear, normed


class JumpMap(nn.Module):
    """The linear jump: residual at `resume` from the residual h at `leave`: `h + weight @ rms_norm(h) + bias`.

    The layers in between read h through norms too, so what they add is a function of rms_norm(h) in all but the attention
    to other tokens; regressing the difference, not the residual, leaves the identity as the map of no data.
    """

    kind = "linear"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(width), requires_grad=False)

    def change(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """What is added to the residual; with `residual`, their sum."""
        return linear(normed(hidden), self.weight, self.bias, residual)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.change(hidden, hidden)


class MlpJump(nn.Module):
    """A linear jump and one feed-forward block beside it: `linear(h) + down @ silu(up @ rms_norm(h))`.

    Where `down` is zero this is the linear jump, so closed form starts here too and gradients add the rest.
    """

    kind = "mlp"

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.linear = JumpMap(width)
        self.up = nn.Parameter(torch.zeros(inner, width), requires_grad=False)
        self.down = nn.Parameter(torch.zeros(width, inner), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        x = normed(hidden)
        return self.linear(hidden) + linear(nn.functional.silu(linear(x, self.up)), self.down)


class AdapterJump(nn.Module):
    """FlexiDepth's light skip path (arXiv 2503.23798): per skipped layer no attention and a narrow gated feed-forward block.

    `h <- h + down[j] @ (silu(gate[j] @ rms_norm(h)) * (up[j] @ rms_norm(h)))` for each of the band's layers; with `linear`, the
    linear jump's correction, read from the residual the band starts with, is added at the end. In FlexiDepth skipped rows give
    K,V of what the path holds at each layer; here K,V are the policy's affair, as for every jump.
    """

    kind = "adapter"

    def __init__(self, width: int, layers: int, inner: int, linear: bool = True) -> None:
        super().__init__()
        self.linear = JumpMap(width) if linear else None
        self.gate = nn.Parameter(torch.zeros(layers, inner, width), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(layers, inner, width), requires_grad=False)
        self.down = nn.Parameter(torch.zeros(layers, width, inner), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        stream = hidden
        for gate, up, down in zip(self.gate, self.up, self.down, strict=True):
            x = normed(stream)
            stream = stream + linear(nn.functional.silu(linear(x, gate)) * linear(x, up), down)
        return stream if self.linear is None else stream + self.linear.change(hidden)


Jump = JumpMap | MlpJump | AdapterJump
JUMPS = (JumpMap.kind, MlpJump.kind, AdapterJump.kind)


def jump_width(jump: Jump) -> int:
    """Width of the residuals that a jump maps."""
    return jump.weight.shape[0] if isinstance(jump, JumpMap) else jump.up.shape[-1]


class KVMap(nn.Module):
    """K (before rotation) and V of layers `[leave, resume)` from rms_norm of the residual at `leave` (policy `predict`).

    weight [layers, 2, kv_heads * head_dim, rank], bias [layers, 2, kv_heads * head_dim], down [rank, width]: what
    ops.backfill_kv takes. `rank` None has no `down`: maps read all of the residual, [..., width]. Maps of a low rank hold
    `(layers * 2 * kv_width + width) * rank` numbers instead of `layers * 2 * kv_width * width`, and K,V of skipped layers are
    that much cheaper and less exact.
    """

    def __init__(self, layers: int, kv_width: int, width: int, rank: int | None = None) -> None:
        super().__init__()
        if rank is not None and rank < 1:
            raise ExitsError(f"K,V maps: rank must be at least 1, got {rank}")
        self.down = None if rank is None else nn.Parameter(torch.zeros(rank, width), requires_grad=False)
        self.weight = nn.Parameter(torch.zeros(layers, 2, kv_width, width if rank is None else rank), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(layers, 2, kv_width), requires_grad=False)

    @property
    def width(self) -> int:
        """Width of the residuals that the maps read."""
        return self.weight.shape[3] if self.down is None else self.down.shape[1]

    @property
    def rank(self) -> int | None:
        return None if self.down is None else self.down.shape[0]
