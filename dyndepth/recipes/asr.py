"""Early-exit ASR (Wright et al. 2023, arXiv 2309.09546): CTC exits every few layers of a speech encoder, read by frame entropy
or by the posterior of the best sentence; trained with the plain sum of their CTC losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndepth.encoders import CtcHead, FrameEntropy, SampleExit, SampleExits, SampleHead, Samples, facts_of
from dyndepth.encoders.ctc import SentencePosterior, beam_search, ctc_losses, greedy
from dyndepth.errors import ArgumentError
from dyndepth.exits import Criterion
from dyndepth.training.encoder_trainer import EncoderConfig, train_encoder

CRITERIA = ("frame_entropy", "sentence_posterior")


def exits(
    model: Any,
    *,
    every: int = 2,
    leave: Sequence[int] = (),
    criterion: str = "frame_entropy",
    beam: int = 16,
    blank: int = 0,
    norm: bool = False,
    final: SampleHead | None = None,
    seed: int = 0,
) -> SampleExits:
    """Closed exits with fresh CTC heads, one linear each: train them with `loss`, then open them `with_thresholds`.

    Args:
        model: a speech encoder with CTC (`Wav2Vec2ForCTC`, ...), or a bare one with `final`.
        every: layers between exits; the paper has one every two.
        leave: boundaries instead of `every`.
        criterion: `frame_entropy` (the score is minus the entropy per frame and symbol, so thresholds are negative) or
            `sentence_posterior` (the best sentence's share among the `beam` best).
        beam, blank: of the prefix beam search.
        norm: a LayerNorm before each linear, for models whose residuals grow from layer to layer.
        final: the head at the top of a model without one.
        seed: of the heads' weights.
    """
    facts = facts_of(model, final)
    chosen = sorted(set(leave)) or list(range(every, facts.layers, every))
    judge = _criterion(criterion, beam, blank)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        points = [SampleExit(at, CtcHead(facts.width, facts.vocab_size, norm=norm), judge) for at in chosen]
    record = {"method": "early-exit ASR (arXiv 2309.09546)", "asr": {"criterion": criterion, "beam": beam, "blank": blank}}
    return SampleExits(points, facts, final=final, record=record)


def judged_by(found: SampleExits, criterion: str, threshold: float, *, beam: int = 16, blank: int = 0) -> SampleExits:
    """The same heads under one of the two criteria and one threshold for all exits, as the paper sweeps it."""
    return found.with_criterion(_criterion(criterion, beam, blank), threshold)


def _criterion(name: str, beam: int, blank: int) -> Criterion:
    if name not in CRITERIA:
        raise ArgumentError(f"asr: criterion must be one of {', '.join(CRITERIA)}, got {name!r}")
    return FrameEntropy() if name == "frame_entropy" else SentencePosterior(beam=beam, blank=blank)


def loss(everywhere: Sequence[tuple[Samples, Tensor]], labels: Sequence[Tensor], blank: int = 0) -> Tensor:
    """Sum over exits and the top of the mean CTC loss per symbol, all weights 1. Texts with too few frames count 0.

    Args:
        everywhere: from `DynamicEncoder.everywhere`.
        labels: int64 [symbols] per sample, in the caller's order.
    """
    for samples, _ in everywhere:
        if len(labels) != samples.count:
            raise ArgumentError(f"asr.loss: labels must hold {samples.count} texts, got {len(labels)}")
    return _summed(everywhere, [labels[i] for i in everywhere[0][0].ids.tolist()], blank)


def _summed(everywhere: Sequence[tuple[Samples, Tensor]], texts: Sequence[Tensor], blank: int) -> Tensor:
    """`loss` of texts in the order of the samples, which is the same at all exits."""
    sizes = torch.tensor([max(len(text), 1) for text in texts])
    parts = [ctc_losses(logits, samples.lengths, texts, blank, zero_infinity=True) for samples, logits in everywhere]
    return torch.stack([(part / sizes.to(part.device)).mean() for part in parts]).sum()


def train(
    model: Any,
    exits: SampleExits,
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    *,
    blank: int = 0,
    config: EncoderConfig | None = None,
    validation: tuple[Mapping[str, Tensor], Tensor] | None = None,
    folder: str | Path | None = None,
) -> SampleExits:
    """Train the model and all exits with `loss`.

    Args:
        inputs: `input_values` and `attention_mask` of all utterances, [n, samples].
        labels: int64 [n, longest], -100 past a text's end, as transformers pads them.
        config, validation, folder: of dyndepth.training.train_encoder; `config.base_lr` above 0 trains the model too.
    """
    if labels.dim() != 2 or labels.is_floating_point():
        raise ArgumentError(f"asr.train: labels must be int64 [n, longest], got {labels.dtype} {list(labels.shape)}")
    config = config or EncoderConfig(base_lr=1e-3, lr=1e-3)

    def summed(everywhere: Sequence[tuple[Samples, Tensor]], padded: Tensor) -> Tensor:
        return _summed(everywhere, [row[row >= 0] for row in padded], blank)

    return train_encoder(model, exits, inputs, labels, summed, config=config, validation=validation, folder=folder).exits


def noam(step: int, width: int, warmup: int, scale: float = 1.0) -> float:
    """Learning rate of step 1, 2, ... (Vaswani et al. 2017): rises for `warmup` steps, then falls with the square root."""
    return scale * width**-0.5 * min(step**-0.5, step * warmup**-1.5)


def decode(output: Any, vocabulary: Sequence[str], *, beam: int = 1, blank: int = 0) -> list[str]:
    """Texts of a `DynamicCTCOutput`: the best path's, or with `beam` > 1 the best of a prefix beam search."""
    keep = torch.arange(output.logits.shape[1]) < output.frames[:, None]
    logits = output.logits[keep.to(output.logits.device)]
    if beam > 1:
        found = [texts[0] for texts in beam_search(logits, output.frames, beam, blank).texts]
    else:
        found = greedy(logits, output.frames, blank)
    return ["".join(vocabulary[symbol] for symbol in text) for text in found]


def error_rates(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Word and character error rates over all texts together: edits over the symbols wanted."""
    if len(found) != len(wanted):
        raise ArgumentError(f"asr.error_rates: found and wanted must hold equally many texts, got {len(found)}, {len(wanted)}")
    words = sum(edits(a.split(), b.split()) for a, b in zip(found, wanted, strict=True))
    letters = sum(edits(a, b) for a, b in zip(found, wanted, strict=True))
    return {
        "wer": words / max(sum(len(text.split()) for text in wanted), 1),
        "cer": letters / max(sum(len(text) for text in wanted), 1),
    }


def edits(found: Sequence[Any], wanted: Sequence[Any]) -> int:
    """Fewest insertions, deletions and substitutions that turn one into the other (Levenshtein)."""
    before = list(range(len(wanted) + 1))
    for row, a in enumerate(found, 1):
        now = [row]
        for column, b in enumerate(wanted, 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (a != b)))
        before = now
    return before[-1]
