"""What dyndepth.generate returns beside Hugging Face's own fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput


@dataclass
class DynamicDepthOutput(GenerateDecoderOnlyOutput):
    """GenerateDecoderOnlyOutput with where tokens left and what was run.

    Rows of a sequence that has ended are not computed: its `scores` and `logits` are zero from there on, where
    transformers goes on running the model on padding.
    """

    #: int32 [batch, new_tokens]: boundary where the row that produced the token left for good; the number of layers if it
    #: reached the top; -1 after the end of a sequence.
    exit_layers: Tensor | None = None
    #: int32 [batch, new_tokens]: layers that row ran; -1 after the end of a sequence.
    layers_run: Tensor | None = None
    #: int64 [batch, new_tokens]: bit i is set if that row took the i-th band of the exits; 0 after the end of a sequence.
    bands_taken: Tensor | None = None
    #: dyndepth.runtime.session.Work of the decode passes: rows x layers run, per layer, of how many.
    work: Any = None
    #: The same for the prompt.
    prompt_work: Any = None
    #: K,V policy that was used.
    kv: str | None = None
    #: int64 [batch], with mode="lossless": tokens that early exits drafted, and how many of them the full model accepted.
    drafted: Tensor | None = None
    accepted: Tensor | None = None
