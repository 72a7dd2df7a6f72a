"""Exit heads: what turns the residual at an exit point into a row the LM head can read.

Every head is called as `head(hidden, finish)` with residuals [n, d] and the model's own `finish` (final norm), and returns
head-ready rows [n, ready]. `BlockHead` also needs attention, so the runtime runs its layer (dyndepth/runtime/block.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.exits.products import linear, normed

Finish = Callable[[Tensor], Tensor]


class NormHead(nn.Module):
    """The final norm alone (logit lens; CALM, FREE, LayerSkip)."""

    kind = "norm"

    def forward(self, hidden: Tensor, finish: Finish) -> Tensor:
        return finish(hidden)


class TranslatorHead(nn.Module):
    """`finish(h) + up @ down @ rms_norm(h) + bias`: a correction of the final normed state (tuned lens).

    `rank` None keeps the whole matrix in `up` [ready, width] and has no `down`.
    """

    kind = "translator"

    def __init__(self, width: int, ready: int, rank: int | None) -> None:
        super().__init__()
        self.down = None if rank is None else nn.Parameter(torch.zeros(rank, width), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(ready, width if rank is None else rank), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(ready), requires_grad=False)

    def forward(self, hidden: Tensor, finish: Finish) -> Tensor:
        x = normed(hidden)
        if self.down is not None:
            x = linear(x, self.down)
        return linear(x, self.up, self.bias, finish(hidden))


class MlpHead(nn.Module):
    """`read(h + down @ silu(up @ rms_norm(h)))`: one feed-forward block, no attention (EE-LLM's `exit-use-mlp`).

    `read` is `finish`, or a translator if there is a `readout`: closed form starts there, and gradients add the rest.
    """

    kind = "mlp"

    def __init__(self, width: int, inner: int, readout: TranslatorHead | None = None) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(inner, width), requires_grad=False)
        self.down = nn.Parameter(torch.zeros(width, inner), requires_grad=False)
        self.readout = readout

    def stream(self, hidden: Tensor) -> Tensor:
        """The residual after the feed-forward block."""
        x = normed(hidden)
        return linear(nn.functional.silu(linear(x, self.up)), self.down, residual=hidden)

    def forward(self, hidden: Tensor, finish: Finish) -> Tensor:
        return read(self.stream(hidden), finish, self.readout)


class BlockHead(nn.Module):
    """Balcony: one decoder layer of the model's own kind with a K,V slot of its own, then a norm; the LM head is shared.

    `layer` and `norm` are copies of modules of the model: by default its last decoder layer, and the input norm of the
    layer after the exit (the final norm for the last boundary or a family without input norms), as Balcony
    (arXiv 2503.05005) initialises them. `source` is the number of the layer copied: it says whether the block attends
    to a window and which rotary angles it uses. `readout` corrects the normed result, as a translator does.
    """

    kind = "block"

    def __init__(self, layer: nn.Module, norm: nn.Module, source: int, readout: TranslatorHead | None = None) -> None:
        super().__init__()
        self.source = source
        self.layer = layer
        self.norm = norm
        self.readout = readout

    def forward(self, hidden: Tensor, finish: Finish) -> Tensor:
        raise RuntimeError("a block head attends to other rows; the runtime runs it (dyndepth/runtime/block.py)")


class StoredBlock(nn.Module):
    """A block head's weights before they meet a model: the runtime builds the modules and loads these into them."""

    kind = "block"

    def __init__(self, tensors: dict[str, Tensor], source: int) -> None:
        super().__init__()
        self.source = source
        self.tensors = tensors

    def forward(self, hidden: Tensor, finish: Finish) -> Tensor:
        raise RuntimeError("a stored block head needs a model; dyndepth.runtime.block.restore builds it")

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        prefix = kwargs.get("prefix", "")
        into = kwargs.get("destination", {})
        into.update({prefix + name: value for name, value in self.tensors.items()})
        return into


def read(stream: Tensor, finish: Finish, readout: TranslatorHead | None) -> Tensor:
    """Head-ready rows of residuals."""
    return finish(stream) if readout is None else readout(stream, finish)


HEADS = ("norm", "translator", "mlp", "block")
Head = NormHead | TranslatorHead | MlpHead | BlockHead | StoredBlock
