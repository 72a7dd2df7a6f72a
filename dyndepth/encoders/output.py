"""What DynamicEncoder returns: transformers' output classes with where samples left and what was run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput, ImageClassifierOutput, SequenceClassifierOutput


@dataclass
class DynamicSequenceClassifierOutput(SequenceClassifierOutput):
    """`logits` [n, classes], each from the exit where the sample left."""

    #: int32 [n]: layers below the exit where the sample left; the number of layers if it reached the top.
    exit_layers: Tensor | None = None
    #: dyndepth.runtime.session.Work, samples x layers.
    work: Any = None


@dataclass
class DynamicImageClassifierOutput(ImageClassifierOutput):
    """As DynamicSequenceClassifierOutput."""

    exit_layers: Tensor | None = None
    work: Any = None


@dataclass
class DynamicCTCOutput(CausalLMOutput):
    """`logits` [n, frames, vocabulary]; past a sample's frames they are zero."""

    exit_layers: Tensor | None = None
    work: Any = None
    #: int64 [n]: frames of each sample.
    frames: Tensor | None = None
