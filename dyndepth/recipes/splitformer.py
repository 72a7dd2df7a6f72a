"""Splitformer (EUSIPCO 2025, arXiv 2506.18035): beside the first and the last exit block of a Conformer, a layer at half rate.

The block's input is padded to an even length, every second frame of it goes through one more Conformer layer, each of the
results is repeated twice, cropped, and added to what the block gives. Exits are those of early-exit ASR.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForCTC
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerEncoderLayer

from dyndepth.encoders import SampleExits, Samples, bind, register
from dyndepth.encoders.ctc import ctc_losses
from dyndepth.encoders.family import pack
from dyndepth.encoders.speech import Conformer, Slabs
from dyndepth.errors import ArgumentError
from dyndepth.recipes import asr

#: Where the half-rate layer's frames wait for the end of their block.
_WAITING = "splitformer_parallel"


class SplitformerConfig(Wav2Vec2ConformerConfig):
    """A Wav2Vec2-Conformer's, and the number of layers between two exits."""

    model_type = "splitformer"
    block_layers: int = 2


class SplitformerForCTC(Wav2Vec2ConformerForCTC):
    """A Wav2Vec2-Conformer with CTC and two half-rate layers (one where there is but one block).

    `forward` runs all layers. Its answers do not depend on padding, unlike those of transformers' Conformer.
    """

    config_class = SplitformerConfig

    def __init__(self, config: SplitformerConfig) -> None:
        super().__init__(config)
        blocks = _blocks(config)
        self.parallel = nn.ModuleList(Wav2Vec2ConformerEncoderLayer(config) for _ in {0, blocks - 1})
        self.post_init()

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        """`logits` [n, frames, symbols], zero past a sample's end; `labels` int64 [n, longest], -100 past a text's end."""
        family = bind(self)
        samples = pack(
            family.embed(**family.given({"input_values": input_values, "attention_mask": attention_mask})), packed_layout=True
        )
        for layer in range(family.depth):
            samples = family.step(layer, samples)
        logits = family.finish(samples)
        loss = None
        if labels is not None:
            texts = [labels[i][labels[i] >= 0] for i in samples.ids.tolist()]
            losses = ctc_losses(
                logits, samples.lengths, texts, self.config.pad_token_id or 0, zero_infinity=self.config.ctc_zero_infinity
            )
            sizes = torch.tensor([max(len(text), 1) for text in texts]).to(losses.device)
            loss = losses.sum() if self.config.ctc_loss_reduction == "sum" else (losses / sizes).mean()
        home = torch.argsort(samples.ids).to(logits.device)
        return CausalLMOutput(loss=loss, logits=Slabs(samples)(logits)[home])


def _blocks(config: Any) -> int:
    if config.block_layers < 1 or config.num_hidden_layers % config.block_layers:
        raise ArgumentError(
            f"splitformer: block_layers must divide the {config.num_hidden_layers} layers, got {config.block_layers}"
        )
    return int(config.num_hidden_layers // config.block_layers)


@register
class Splitformer(Conformer):
    """Layers of `SplitformerForCTC`. Between a block's first and last layer the half-rate frames travel with the samples."""

    model_types = ("splitformer",)
    prefix = "Splitformer"

    def _beside(self, layer: int) -> tuple[int | None, int]:
        """(which half-rate layer runs beside the block of layer `layer`, if any; the layer's place in its block)."""
        block, place = divmod(layer, self.config.block_layers)
        return {0: 0, _blocks(self.config) - 1: len(self.model.parallel) - 1}.get(block), place

    def inputs_at(self, boundary: int) -> dict[str, tuple[torch.dtype, tuple[int | None, ...]]]:
        if boundary == self.depth:
            return {}
        beside, place = self._beside(boundary)
        if beside is None or place == 0:
            return {}
        return {_WAITING: (next(self.model.parallel.parameters()).dtype, (None, self.width))}

    def step(self, layer: int, samples: Samples) -> Samples:
        size = self.config.block_layers
        beside, place = self._beside(layer)
        inputs = dict(samples.inputs)
        if beside is not None and place == 0:
            inputs[_WAITING] = self._halved(self.model.parallel[beside], samples)
        tokens = self.conformer_layer(self.modules[layer], samples)
        if beside is not None and place == size - 1:
            tokens = tokens + _doubled(inputs.pop(_WAITING), samples)
        return replace(samples, hidden=tokens if samples.packed else Slabs(samples)(tokens), inputs=inputs)

    def _halved(self, module: Any, samples: Samples) -> Tensor:
        """[n, ceil(T / 2), d]: the extra layer on frames 0, 2, 4, ... of every sample, zero past its end.

        The frame that makes an odd length even would stand at an odd place and is never kept.
        """
        places = torch.arange(samples.total) - torch.repeat_interleave(samples.starts, samples.lengths)
        even = (places % 2 == 0).to(samples.hidden.device)
        half = Samples(samples.tokens()[even], (samples.lengths + 1) // 2, samples.ids)
        return Slabs(half)(self.conformer_layer(module, half))


def _doubled(slab: Tensor, samples: Samples) -> Tensor:
    """[tokens, d]: each frame twice, cropped to the samples' lengths."""
    longest = int(samples.lengths.max())
    return Slabs(samples).tokens(slab.repeat_interleave(2, 1)[:, :longest])


def of(model: Any, *, block_layers: int = 2) -> SplitformerForCTC:
    """A Splitformer that says what a `Wav2Vec2ConformerForCTC` says: its weights, and half-rate layers that start by adding 0.

    Each half-rate layer begins as the first layer of its block, its last norm with weights of 0, which training moves.
    """
    if type(model) is not Wav2Vec2ConformerForCTC:
        raise ArgumentError(f"splitformer.of: model must be Wav2Vec2ConformerForCTC, got {type(model).__name__}")
    settings = {name: value for name, value in model.config.to_dict().items() if name != "model_type"}
    made: Any = SplitformerForCTC(SplitformerConfig(**settings | {"block_layers": block_layers}))
    # It may be of another kind than the configuration's. A copy: the two models must not move or train each other.
    made.wav2vec2_conformer.feature_extractor = copy.deepcopy(model.wav2vec2_conformer.feature_extractor)
    made.load_state_dict(model.state_dict(), strict=False)
    layers = made.wav2vec2_conformer.encoder.layers
    for number, module in enumerate(made.parallel):
        module.load_state_dict(layers[0 if number == 0 else len(layers) - block_layers].state_dict())
        norm = cast("nn.LayerNorm", module.final_layer_norm)
        nn.init.zeros_(norm.weight)
        nn.init.zeros_(norm.bias)
    some = next(model.parameters())
    return made.to(some.device, some.dtype).train(model.training)


def exits(model: SplitformerForCTC, **options: Any) -> SampleExits:
    """`asr.exits` at the end of every block but the last; `options` are those of it."""
    found = asr.exits(model, every=model.config.block_layers, **options)
    wrong = [point.leave for point in found if point.leave % model.config.block_layers]
    if wrong:
        raise ArgumentError(
            f"splitformer.exits: leave must be ends of blocks of {model.config.block_layers} layers, got {wrong}"
        )
    return found
