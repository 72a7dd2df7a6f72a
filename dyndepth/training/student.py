"""The part of an exit that learns: heads with fp32 weights, run on cached residuals."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dyndepth.exits import BlockHead, MlpHead
from dyndepth.exits.heads import Head, read
from dyndepth.runtime.bind import Model
from dyndepth.runtime.bind_layer import bind_layer, optional
from dyndepth.runtime.block import Block
from dyndepth.runtime.layer import Layer
from dyndepth.training.batches import Batch
from dyndepth.training.stack import run_layer


class Student(nn.Module):
    """Heads of several exits; `forward` gives the head-ready rows of each.

    The model's own modules (final norm, rotary tables) are used, never owned: they are in no state dict and get no gradient.
    """

    def __init__(self, model: Model, heads: dict[int, Head]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({str(leave): head for leave, head in heads.items()})
        self.to(device=model.device, dtype=torch.float32).requires_grad_(True)
        self._model = [model]  # in a list, so that it does not become a submodule
        self._layers: dict[str, Layer] = {}
        for leave, head in self.heads.items():
            if isinstance(head, BlockHead):
                self._layers[leave] = bind_layer(head.layer, 0, head.source, model.config, model.family)

    @property
    def model(self) -> Model:
        return self._model[0]

    def rows(self, batch: Batch, step: int) -> tuple[Tensor]:
        """bool [rows]: which rows are judged at a step."""
        return (batch.judged,)

    def forward(self, batch: Batch, which: Tensor) -> dict[int, Tensor]:
        """Per exit, head-ready rows [count, ready] of the rows where `which` (bool [rows]) is true."""
        return {int(leave): self.ready(int(leave), batch, which) for leave in self.heads}

    def stream(self, leave: int, batch: Batch, which: Tensor) -> Tensor:
        """[count, d]: what the head's readout reads: the exit residual, or what its MLP or block makes of it."""
        head = self.heads[str(leave)]
        if isinstance(head, BlockHead):
            longest = max(batch.lengths)
            cos, sin = self.model.rotary_tables(longest)
            return batch.unpadded(run_layer(self._layers[str(leave)], batch.padded(leave), cos, sin))[which]
        residual = batch.residual[leave][which]
        return head.stream(residual) if isinstance(head, MlpHead) else residual

    def finish(self, leave: int, stream: Tensor) -> Tensor:
        """The norm that the exit ends with."""
        head = self.heads[str(leave)]
        if not isinstance(head, BlockHead):
            return self.model.finish(stream)
        project_out = optional(self.model.decoder, self.model.family.project_out)
        return Block(self._layers[str(leave)], head.norm, project_out).finish(stream)

    def ready(self, leave: int, batch: Batch, which: Tensor) -> Tensor:
        head = self.heads[str(leave)]
        stream = self.stream(leave, batch, which)

        def finish(x: Tensor) -> Tensor:
            return self.finish(leave, x)

        if isinstance(head, BlockHead | MlpHead):
            return read(stream, finish, head.readout)
        return head(stream, finish)


def released(head: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The head as exits keep it: the model's dtype, no gradients, and no graph of the training behind it."""
    return head.to(dtype).requires_grad_(False).eval()
