"""CALM's state propagation when no live row reads a layer's weights any more: the exit residual through the skipped layers'
own norms and K,V projections, folded into one product where they are linear."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dyndepth.ops import backfill_kv
from dyndepth.runtime.bind import Model
from dyndepth.runtime.bind_layer import foldable_kv
from dyndepth.runtime.layer import Context


@dataclass
class Propagation:
    """Folded K,V projections of a model, made on first use: a second copy of W_k, W_v of the layers asked for."""

    model: Model
    #: False runs the modules layer by layer even where folding would do (the reference, and a switch for tests).
    fold: bool = True
    _folded: dict[tuple[int, int], tuple[Tensor, Tensor | None] | None] = field(default_factory=dict)
    _variants: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)

    def store(self, hidden: Tensor, pos: Tensor, slots: Tensor, begin: int, end: int, context: Context) -> None:
        """K,V of layers [begin, end) for all rows of `hidden`, each as `W norm(hidden)`, rotated."""
        maps = self._maps(begin, end) if self.fold else None
        if maps is not None:
            norm = self.model.layers[begin].input_norm
            assert norm is not None
            backfill_kv(
                hidden, maps[0], pos, slots, context.pages, begin, bias=maps[1], norm=norm.kind, eps=norm.eps,
                cos=context.cos, sin=context.sin, variant=self.variants(begin, end),
            )  # fmt: skip
            return
        for layer in self.model.layers[begin:end]:
            layer.keys_values(hidden, 0, pos, slots, context)

    def variants(self, begin: int, end: int) -> Tensor | None:
        """int32 rotary table number of layers [begin, end), None when the model has one table."""
        if not self.model.family.rotary_by_layer_type:
            return None
        if (begin, end) not in self._variants:
            numbers = [layer.variant for layer in self.model.layers[begin:end]]
            self._variants[begin, end] = torch.tensor(numbers, dtype=torch.int32, device=self.model.device)
        return self._variants[begin, end]

    def _maps(self, begin: int, end: int) -> tuple[Tensor, Tensor | None] | None:
        if (begin, end) not in self._folded:
            self._folded[begin, end] = self._fold(begin, end)
        return self._folded[begin, end]

    def _fold(self, begin: int, end: int) -> tuple[Tensor, Tensor | None] | None:
        layers = self.model.layers[begin:end]
        parts = [foldable_kv(layer, self.model.family) for layer in layers]
        norms = {(layer.input_norm.kind, layer.input_norm.eps) for layer in layers if layer.input_norm is not None}
        if len(norms) != 1 or any(part is None for part in parts):
            return None
        weights, biases, biased = [], [], False
        for part in parts:
            assert part is not None
            key, key_bias, value, value_bias = part
            weights.append(torch.stack([key, value]))
            biased = biased or key_bias is not None or value_bias is not None
            biases.append(torch.stack([_or_zeros(key_bias, key), _or_zeros(value_bias, value)]))
        weight = torch.stack(weights).to(self.model.dtype).contiguous()
        return weight, torch.stack(biases).to(self.model.dtype).contiguous() if biased else None


def _or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias.float()
