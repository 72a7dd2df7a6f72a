"""MuE (arXiv 2211.11152): an encoder whose image and text tokens stop at layers of their own, and a decoder that exits too.

No exit has a head. A stream of the encoder stops where its tokens have stopped changing: the cosine of each token's residual
with the layer before, averaged over the stream's tokens, exceeds the stream's threshold. What the streams became is joined by
concatenation and read by the decoder's cross-attention. A decoder token stops by the same measure; the layers above it get its
residual as it is (copied), and with that their keys and values of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.encoders import Samples
from dyndepth.encoders import bind as bind_encoder
from dyndepth.encoders.family import EncoderFamily, pack
from dyndepth.errors import ArgumentError
from dyndepth.recipes.gradient import Epoch, descend
from dyndepth.recipes.mue_decoder import Decoded, Decoder
from dyndepth.runtime.session import Work

Inputs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Joined:
    """What the decoder reads: every sample's tokens of all streams, one stream after the other."""

    #: [n, T, d], the caller's order, left-aligned; zero past a sample's end.
    hidden: Tensor
    #: int64 [n], tokens per sample, on the CPU.
    lengths: Tensor
    #: int32 [n] per stream: layers that ran.
    exit_layers: dict[str, Tensor]
    #: Samples x layers per stream.
    work: dict[str, Work]

    @property
    def mask(self) -> Tensor:
        """int64 [n, T]: 1 where a token is."""
        return (torch.arange(self.hidden.shape[1]) < self.lengths[:, None]).long().to(self.hidden.device)


class MuE(nn.Module):
    """Encoders for several kinds of tokens and one decoder.

    Args:
        streams: name -> transformers encoder without a head (dyndepth.encoders.FAMILIES). One and the same module may serve
            several streams, as in a unified encoder whose attention is split by modality.
        decoder: a BertLMHeadModel with `is_decoder` and `add_cross_attention`.

    Streams whose width is not the decoder's get a linear of their own (`project`), as VisionEncoderDecoder does.
    """

    def __init__(self, streams: Mapping[str, Any], decoder: Any) -> None:
        super().__init__()
        if not streams:
            raise ArgumentError("MuE: wanted at least one stream, got none")
        self.streams = nn.ModuleDict(streams)
        self.decoder = decoder
        self._families: dict[str, EncoderFamily] = {name: bind_encoder(model) for name, model in streams.items()}
        self._decoder = Decoder(decoder)
        width = self._decoder.width
        self.project = nn.ModuleDict(
            {name: nn.Linear(family.width, width) for name, family in self._families.items() if family.width != width}
        )

    @torch.no_grad()
    def encode(self, inputs: Inputs, thresholds: Mapping[str, float] | None = None) -> Joined:
        """Every stream to the layer where each sample's tokens saturate.

        Args:
            inputs: stream -> what its encoder takes; all streams must have equally many samples.
            thresholds: stream -> cosine above which a sample stops; streams that are not named run all layers.
        """
        self._check(inputs, {} if thresholds is None else thresholds)
        parts, layers, work = [], {}, {}
        for name, family in self._families.items():
            limit = math.inf if thresholds is None else thresholds.get(name, math.inf)
            samples, layers[name], work[name] = saturate(family, inputs[name], limit)
            parts.append(self._read(name, samples))
        joined = join(parts)
        return Joined(joined.padded(), joined.lengths, layers, work)

    def generate(
        self,
        inputs: Inputs | Joined,
        thresholds: Mapping[str, float] | None = None,
        *,
        decoder_threshold: float = math.inf,
        max_new_tokens: int = 20,
        start: int | Tensor | None = None,
        end: int | None = None,
    ) -> Decoded:
        """Greedy decoding, every token to the layer where it saturates; rows of a batch do not wait for each other.

        Args:
            inputs, thresholds: as `encode` takes them, or what it returned.
            decoder_threshold: cosine above which a token stops.
            max_new_tokens: at most.
            start: first token, or int64 [n, t] tokens of equal length; the decoder config's bos token by default.
            end: a sequence ends with it; the decoder config's eos token by default, -1 for none.
        """
        joined = inputs if isinstance(inputs, Joined) else self.encode(inputs, thresholds)
        config = self.decoder.config
        start = config.bos_token_id if start is None else start
        if start is None:
            raise ArgumentError("MuE.generate: the decoder's config has no bos_token_id; give start")
        end = config.eos_token_id if end is None else end
        return self._decoder.generate(
            joined.hidden,
            joined.lengths,
            start if isinstance(start, Tensor) else torch.full((len(joined.lengths), 1), start),
            threshold=decoder_threshold,
            max_new_tokens=max_new_tokens,
            end=-1 if end is None else end,
        )

    def forward(self, inputs: Inputs, tokens: Tensor) -> list[Tensor]:
        """Logits [n, t, vocabulary] after every decoder layer for given tokens [n, t], all layers run; differentiable."""
        self._check(inputs, {})
        parts = []
        for name, family in self._families.items():
            samples = pack(family.embed(**family.given(inputs[name])), packed_layout=family.packs)
            for layer in range(family.depth):
                samples = family.step(layer, samples)
            parts.append(self._read(name, _ordered(_packed(samples))))
        joined = join(parts)
        read = Joined(joined.padded(), joined.lengths, {}, {})
        out = self.decoder(
            input_ids=tokens,
            encoder_hidden_states=read.hidden,
            encoder_attention_mask=read.mask,
            output_hidden_states=True,
            use_cache=False,
        )
        return [self.decoder.cls(state) for state in out.hidden_states[1:]]

    def _read(self, name: str, samples: Samples) -> Samples:
        """Packed samples of a stream as the decoder reads them: after the encoder's own last norm, in the decoder's width."""
        tokens = self._families[name].normed(samples.tokens())
        return replace(samples, hidden=self.project[name](tokens) if name in self.project else tokens)

    def _check(self, inputs: Inputs, thresholds: Mapping[str, float]) -> None:
        for said, given in (("inputs", inputs), ("thresholds", thresholds)):
            unknown = sorted(set(given) - set(self._families))
            if unknown:
                raise ArgumentError(f"MuE: {said} must be of streams {', '.join(self._families)}, got {', '.join(unknown)}")
        missing = sorted(set(self._families) - set(inputs))
        if missing:
            raise ArgumentError(f"MuE: inputs must have streams {', '.join(self._families)}, {', '.join(missing)} is missing")
        wrong = {name: limit for name, limit in thresholds.items() if math.isnan(limit)}
        if wrong:
            raise ArgumentError(f"MuE: thresholds must be numbers, got {wrong}")
        for name, limit in thresholds.items():
            family = self._families[name]
            if limit < math.inf and any(family.width_at(at) != family.width for at in range(1, family.depth)):
                raise ArgumentError(
                    f"MuE: a stream with a threshold must have one width at all layers, the width of {name} "
                    f"({type(family.model).__name__}) changes; leave it without a threshold"
                )
        counts = {name: next(iter(family.given(inputs[name]).values())).shape[0] for name, family in self._families.items()}
        if len(set(counts.values())) > 1:
            raise ArgumentError(f"MuE: all streams must have equally many samples, got {counts}")


def saturate(family: EncoderFamily, inputs: Mapping[str, Any], threshold: float) -> tuple[Samples, Tensor, Work]:
    """One stream: samples leave where the mean cosine of their tokens with the layer before exceeds `threshold`.

    Returns all samples in the caller's order, each with the residuals of its last layer (packed), int32 [n] layers run, and
    the work. Those that left are compacted away; the others run on.
    """
    if family.model.training:
        raise ArgumentError("MuE: the encoders must be in eval mode, got training mode (call .eval())")
    samples = pack(family.embed(**family.given(inputs)), packed_layout=family.packs)
    n = samples.count
    work, stopped = Work([0] * family.depth, n), []
    layers = torch.full((n,), family.depth, dtype=torch.int32)
    for layer in range(family.depth):
        before = samples.tokens()
        work.layers[layer] = samples.count
        samples = family.step(layer, samples)
        if threshold == math.inf or layer + 1 == family.depth:
            continue
        if samples.total != len(before):
            raise ArgumentError(
                f"MuE: a stream with a threshold must keep its tokens, layer {layer + 1} of {type(family.model).__name__} made "
                f"{samples.total} of {len(before)}"
            )
        leaves = similarity(samples, before) > threshold
        if bool(leaves.any()):
            stopped.append(_packed(samples.taken(leaves.nonzero()[:, 0])))
            layers[samples.ids[leaves]] = layer + 1
            samples, _ = samples.split(leaves)
            if samples.count == 0:
                break
    if samples.count:
        stopped.append(_packed(samples))
    return _ordered(Samples.concatenate(stopped)), layers, work


def similarity(samples: Samples, before: Tensor) -> Tensor:
    """fp32 [n] on the CPU: the mean over each sample's tokens of the cosine of their residual with `before` [tokens, d]."""
    cosines = torch.nn.functional.cosine_similarity(samples.tokens().float(), before.float(), dim=-1, eps=1e-20)
    return samples.reduce(cosines).cpu()


def _packed(samples: Samples) -> Samples:
    return replace(samples, hidden=samples.tokens())


def _ordered(samples: Samples) -> Samples:
    """In the caller's order."""
    return samples.taken(torch.argsort(samples.ids))


def join(parts: list[Samples]) -> Samples:
    """Packed samples of several streams as one, stream after stream within each sample."""
    lengths = torch.stack([part.lengths for part in parts], 1)
    streams, n = lengths.shape[1], lengths.shape[0]
    tokens = torch.cat([part.hidden for part in parts])
    # Sorting tokens by (sample, stream) is stable, so each run keeps its order.
    owner = torch.cat([torch.repeat_interleave(torch.arange(n) * streams + at, lengths[:, at]) for at in range(streams)])
    order = torch.argsort(owner, stable=True).to(tokens.device)
    return Samples(tokens[order], lengths.sum(1), parts[0].ids)


def loss(logits: list[Tensor], labels: Tensor) -> Tensor:
    """The paper's loss: the cross-entropy after every decoder layer, summed without weights.

    logits: of `MuE.forward`, [n, t, vocabulary] each. labels: int64 [n, t], the token after each position; -100 counts not.
    """
    if not logits or any(part.shape[:2] != labels.shape for part in logits):
        shapes = [list(part.shape) for part in logits]
        raise ArgumentError(f"mue.loss: labels must be int64 [n, t] of the logits {shapes}, got {list(labels.shape)}")
    parts = [torch.nn.functional.cross_entropy(part.flatten(0, 1).float(), labels.flatten()) for part in logits]
    return torch.stack(parts).sum()


def train(
    system: MuE,
    epochs: Epoch,
    *,
    count: int,
    rate: float = 1e-3,
    decay: float = 0.02,
    advance: Callable[[], None] = lambda: None,
) -> MuE:
    """Train all of it in place with `loss`, for `count` epochs; returns the system, in eval mode.

    Args:
        epochs: called with 0, 1, ..., gives that epoch's batches of (streams, tokens): the arguments of every stream, and int64
            [n, t], the texts with their beginning and end, -100 past it.
        rate, decay: of AdamW; the rate falls as a cosine.
        advance: called after every epoch.
    """

    def summed(inputs: Inputs, tokens: Tensor, step: int) -> Tensor:
        return loss(system(inputs, tokens[:, :-1].clamp_min(0)), tokens[:, 1:])

    system.train()
    try:
        descend(list(system.parameters()), summed, epochs, range(count), rate=rate, decay=decay, advance=advance)
    finally:
        system.eval()
    return system
