"""Speech encoders: wav2vec 2.0, HuBERT, WavLM and the Conformer of wav2vec 2.0. A sample's tokens are its frames.

A sample's answer is that of the sample alone. transformers' own batches are not so exact: the group norm of the feature
encoder counts padding, and the convolutions of Conformer layers read it. Here statistics are taken over each sample's own
frames, and convolutions see zeros past its end, as they do when it is alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dyndepth.encoders.attention import segments
from dyndepth.encoders.family import Embedded, EncoderFamily, head_of, output_width, plain, register
from dyndepth.encoders.samples import Samples
from dyndepth.errors import ArgumentError, UnsupportedModelError


class SpeechFamily(EncoderFamily):
    """What speech encoders share: raw audio in, a stack of convolutions, CTC or a classifier of the mean frame.

    `attention_mask` [n, samples] is 1 for audio and 0 for the padding after it. A feature extractor of another kind serves as
    well if it makes [n, channels, frames] of [n, samples], each frame from samples of its own, as many as the configuration
    says (`_get_feat_extract_output_lengths`).
    """

    arguments: ClassVar[tuple[str, ...]] = ("input_values", "attention_mask")
    #: What transformers calls its classes: `<prefix>Model`, `<prefix>ForCTC`, `<prefix>ForSequenceClassification`.
    prefix = ""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        heads = {f"{self.prefix}ForCTC": self._ctc, f"{self.prefix}ForSequenceClassification": self._classify}
        self._head = head_of(model, heads, f"{self.prefix}Model")
        self.per_token = type(model).__name__.endswith("ForCTC")
        for name in ("add_adapter", "use_weighted_layer_sum"):
            if getattr(self.config, name, False):
                raise UnsupportedModelError(
                    f"DynamicEncoder: {type(model).__name__} with {name} reads all layers, or after them"
                )

    def layer_modules(self) -> Sequence[nn.Module]:
        return self.base.encoder.layers

    @property
    def classes(self) -> int | None:
        if self._head is None:
            return None
        return output_width(self.model.lm_head if self.per_token else self.model.classifier)

    @property
    def final_norm(self) -> bool:
        """The encoder's norm stands after its layers; elsewhere before them."""
        return bool(self.config.do_stable_layer_norm)

    # Before the layers.

    def frames(self, lengths: Tensor) -> Tensor:
        """int64 [n]: frames of samples of audio, 0 where there is too little for one."""
        return self.base._get_feat_extract_output_lengths(lengths).to(torch.int64).clamp_min(0)

    def embed(self, attention_mask: Tensor | None = None, **inputs: Tensor) -> Embedded:
        values = inputs["input_values"]
        lengths = self._lengths(values, attention_mask)
        frames = self.frames(lengths)
        if int(frames.min()) == 0:
            short = int(frames.argmin())
            raise ArgumentError(
                f"DynamicEncoder: every sample must be long enough for a frame, sample {short} has {int(lengths[short])} values"
            )
        values = values[:, : int(lengths.max())].to(next(self.base.feature_projection.parameters()).dtype)
        ragged = bool((lengths < values.shape[1]).any())
        if ragged:  # padding may hold anything, NaN too
            values = values.masked_fill(~_kept(lengths, values.shape[1], values.device), 0)
        features = self._features(values, lengths, ragged).transpose(1, 2)
        hidden = plain(self.base.feature_projection(features))
        keep = _kept(frames, hidden.shape[1], hidden.device) if bool((frames < hidden.shape[1]).any()) else None
        return Embedded(self.placed(hidden, keep), keep)

    def _lengths(self, values: Tensor, attention_mask: Tensor | None) -> Tensor:
        if values.dim() != 2:
            raise ArgumentError(f"DynamicEncoder: input_values must be [n, samples], got {list(values.shape)}")
        if attention_mask is None:
            return torch.full((len(values),), values.shape[1])
        if attention_mask.shape != values.shape:
            raise ArgumentError(
                f"DynamicEncoder: attention_mask must be {list(values.shape)}, got {list(attention_mask.shape)}"
            )
        keep = attention_mask != 0
        lengths = keep.sum(1)
        if not torch.equal(keep, _kept(lengths, values.shape[1], values.device)):
            raise ArgumentError("DynamicEncoder: attention_mask must be ones and then zeros, for audio is padded at its end")
        return lengths.cpu()

    def _features(self, values: Tensor, lengths: Tensor, ragged: bool) -> Tensor:
        """[n, samples] -> [n, channels, frames]."""
        extractor = self.base.feature_extractor
        layers = getattr(extractor, "conv_layers", None)
        if not ragged or layers is None or not isinstance(getattr(layers[0], "layer_norm", None), nn.GroupNorm):
            return extractor(values)
        first = layers[0]
        widths = torch.div(lengths - first.conv.kernel_size[0], first.conv.stride[0], rounding_mode="floor") + 1
        hidden = first.activation(_group_norm(first.layer_norm, first.conv(values[:, None]), widths))
        for layer in layers[1:]:
            hidden = layer(hidden)
        return hidden

    def placed(self, hidden: Tensor, keep: Tensor | None) -> Tensor:
        """With positions, by a convolution along time that sees zeros past a sample's end."""
        encoder, place = self.base.encoder, self.base.encoder.pos_conv_embed
        hidden = _silenced(hidden, keep)
        seen = hidden
        if getattr(place, "batch_norm", None) is not None:
            seen = _silenced(place.batch_norm(seen.transpose(1, 2)).transpose(1, 2), keep)
        hidden = hidden + place.activation(place.padding(place.conv(seen.transpose(1, 2)))).transpose(1, 2)
        return encoder.dropout(hidden if self.final_norm else encoder.layer_norm(hidden))

    # After them.

    def normed(self, hidden: Tensor) -> Tensor:
        return self.base.encoder.layer_norm(hidden) if self.final_norm else hidden

    def finish(self, samples: Samples) -> Tensor:
        if self._head is None:
            raise ArgumentError(f"DynamicEncoder: {type(self.model).__name__} has no head of its own")
        return self._head(samples, self.normed(samples.tokens()))

    def _ctc(self, samples: Samples, tokens: Tensor) -> Tensor:
        return self.model.lm_head(self.model.dropout(tokens))

    def _classify(self, samples: Samples, tokens: Tensor) -> Tensor:
        pooled = samples.reduce(self.model.projector(tokens)).to(tokens.dtype)
        return self.model.classifier(pooled)


@register
class Wav2Vec2(SpeechFamily):
    model_types = ("wav2vec2",)
    prefix = "Wav2Vec2"


@register
class Hubert(SpeechFamily):
    model_types = ("hubert",)
    prefix = "Hubert"


@register
class WavLM(SpeechFamily):
    """Its attention adds a bias of relative positions, made by the first layer and gated by every frame in every layer.

    transformers' module makes all samples as long as the longest, and keeps their attention weights; here each has its own.
    """

    model_types = ("wavlm",)
    prefix = "WavLM"

    def run(self, layer: int, samples: Samples) -> Tensor:
        module: Any = self.modules[layer]
        hidden = samples.tokens()
        bias = _toeplitz(self.modules[0].attention, int(samples.lengths.max()))
        if self.config.do_stable_layer_norm:
            attended = _gated_attention(module.attention, module.layer_norm(hidden), samples.lengths, bias)
            hidden = hidden + module.dropout(attended)
            hidden = hidden + module.feed_forward(module.final_layer_norm(hidden))
        else:
            attended = _gated_attention(module.attention, hidden, samples.lengths, bias)
            hidden = module.layer_norm(hidden + module.dropout(attended))
            hidden = module.final_layer_norm(hidden + module.feed_forward(hidden))
        return hidden if samples.packed else Slabs(samples)(hidden)


def _toeplitz(attention: Any, longest: int) -> Tensor:
    """[heads, longest, longest]: what the first layer's table says of key position minus query position."""
    away = torch.arange(1 - longest, longest, device=attention.rel_attn_embed.weight.device)
    values = attention.rel_attn_embed(attention._relative_positions_bucket(away))  # [2 * longest - 1, heads]
    return values.T.unfold(1, longest, 1).flip(1)


def _gated_attention(attention: Any, hidden: Tensor, lengths: Tensor, bias: Tensor) -> Tensor:
    """WavLM's attention (Chen et al. 2022, sec. 3.2) of packed frames [tokens, d] to those of their own sample."""
    heads = attention.num_heads
    gates = attention.gru_rel_pos_linear(hidden.unflatten(1, (heads, -1))).unflatten(-1, (2, 4)).sum(-1)
    a, b = torch.sigmoid(gates).chunk(2, dim=-1)
    gate = a * (b * attention.gru_rel_pos_const.view(heads, 1) - 1.0) + 2.0  # [tokens, heads, 1]
    projected = [p(hidden).unflatten(1, (heads, -1)) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    dropout = attention.dropout if attention.training else 0.0
    parts, at = [], 0
    for count, length in segments(lengths):
        q, k, v, g = (t[at : at + count * length].unflatten(0, (count, length)).transpose(1, 2) for t in (*projected, gate))
        own = g * bias[:, :length, :length]
        seen = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=own, dropout_p=dropout)
        parts.append(seen.transpose(1, 2).flatten(2).flatten(0, 1))
        at += count * length
    return attention.out_proj(torch.cat(parts))


@register
class Conformer(SpeechFamily):
    """Wav2Vec2-Conformer. What looks at one frame runs on packed frames; attention and convolutions look at slabs."""

    model_types = ("wav2vec2-conformer",)
    prefix = "Wav2Vec2Conformer"

    @property
    def final_norm(self) -> bool:
        return True

    def placed(self, hidden: Tensor, keep: Tensor | None) -> Tensor:
        return self.base.encoder.dropout(hidden)

    def run(self, layer: int, samples: Samples) -> Tensor:
        tokens = self.conformer_layer(self.modules[layer], samples)
        return tokens if samples.packed else Slabs(samples)(tokens)

    def conformer_layer(self, module: Any, samples: Samples) -> Tensor:
        """[tokens, d] after one Conformer layer (Gulati et al. 2020) of samples in either layout."""
        slabs = Slabs(samples)
        x = samples.tokens()
        x = x + module.ffn1(module.ffn1_layer_norm(x)) * 0.5
        slab = slabs(module.self_attn_layer_norm(x))
        places = self.base.encoder.embed_positions
        attended = module.self_attn(
            hidden_states=slab,
            attention_mask=self.mask(replace(samples, hidden=slab)),
            relative_position_embeddings=None if places is None else places(slab),
        )
        x = x + module.self_attn_dropout(slabs.tokens(plain(attended)))
        x = x + _convolved(module.conv_module, x, slabs)
        x = x + module.ffn2(module.ffn2_layer_norm(x)) * 0.5
        return module.final_layer_norm(x)


def _convolved(module: Any, tokens: Tensor, slabs: Slabs) -> Tensor:
    """A Conformer's convolution module on packed frames; the depthwise convolution sees zeros past a sample's end.

    The batch norm is given real frames only, so that in training its statistics hold no padding.
    """
    x = module.layer_norm(tokens).T[None]  # [1, d, tokens]: one position per frame
    x = module.glu(module.pointwise_conv1(x))[0].T
    x = module.depthwise_conv(slabs(x).transpose(1, 2)).transpose(1, 2)
    x = slabs.tokens(x).T[None]
    x = module.pointwise_conv2(module.activation(module.batch_norm(x)))[0].T
    return module.dropout(x)


class Slabs:
    """Between packed frames [tokens, d] and slabs [n, T, d] that are zero past each sample's end."""

    def __init__(self, samples: Samples) -> None:
        self.count, self.longest = samples.count, int(samples.lengths.max())
        self.uniform = bool((samples.lengths == self.longest).all())
        if not self.uniform:
            self.at = _kept(samples.lengths, self.longest, samples.hidden.device).nonzero(as_tuple=True)

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.uniform:
            return tokens.unflatten(0, (self.count, self.longest))
        return tokens.new_zeros(self.count, self.longest, tokens.shape[1]).index_put(self.at, tokens)

    def tokens(self, slab: Tensor) -> Tensor:
        return slab.flatten(0, 1) if self.uniform else slab[self.at]


def _kept(lengths: Tensor, longest: int, device: torch.device) -> Tensor:
    """bool [n, longest]: positions before each length."""
    return torch.arange(longest, device=device) < lengths[:, None].to(device)


def _silenced(hidden: Tensor, keep: Tensor | None) -> Tensor:
    return hidden if keep is None else hidden.masked_fill(~keep[..., None], 0)


def _group_norm(norm: nn.GroupNorm, hidden: Tensor, widths: Tensor) -> Tensor:
    """Group norm of [n, channels, t] with statistics of each sample's first `widths` positions, in fp32."""
    keep = _kept(widths, hidden.shape[2], hidden.device)[:, None, None]
    groups = hidden.float().unflatten(1, (norm.num_groups, -1))
    count = widths.to(hidden.device).view(-1, 1, 1, 1) * groups.shape[2]
    mean = groups.masked_fill(~keep, 0).sum((2, 3), keepdim=True) / count
    centred = (groups - mean).masked_fill(~keep, 0)
    variance = centred.square().sum((2, 3), keepdim=True) / count
    normed = (centred * torch.rsqrt(variance + norm.eps)).flatten(1, 2).to(hidden.dtype)
    return normed if norm.weight is None else normed * norm.weight[:, None] + norm.bias[:, None]
