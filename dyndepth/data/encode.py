"""Texts to token ids, and names of documents by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError


def encode(texts: Sequence[str | Tensor], tokenizer: Any, name: str = "texts", *, special: bool = False) -> list[Tensor]:
    """Strings to int64 [t]; tensors pass through.

    `special` adds the tokenizer's special tokens (BOS) to strings that do not bring it, as generation's callers do.
    """
    if isinstance(texts, str | Tensor):
        raise ArgumentError(f"{name} must be a sequence of strings or int64 [t] tensors, got one {type(texts).__name__}")
    encoded = []
    for number, text in enumerate(texts):
        if isinstance(text, Tensor):
            if text.dim() != 1 or text.is_floating_point():
                raise ArgumentError(f"{name}[{number}] must be a string or int64 [t], got {text.dtype} {list(text.shape)}")
            encoded.append(text.long().cpu())
            continue
        if tokenizer is None:
            raise ArgumentError(f"{name}[{number}] is a string, so a tokenizer is needed")
        begins = getattr(tokenizer, "bos_token", None)
        ids = tokenizer(text, add_special_tokens=special and not (begins and text.startswith(begins)))["input_ids"]
        end = getattr(tokenizer, "eos_token_id", None)
        if special and len(ids) > 1 and ids[-1] == end and not text.endswith(str(getattr(tokenizer, "eos_token", None))):
            ids = ids[:-1]  # some tokenizers close what they are given; a prompt must stay open
        encoded.append(torch.tensor(ids, dtype=torch.int64))
    return encoded


def check_ids(sequences: Iterable[Tensor], words: int, name: str) -> None:
    """Raise ArgumentError unless every sequence holds token ids in [0, words); `name` is the argument's."""
    for number, ids in enumerate(sequences):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < words:
            raise ArgumentError(
                f"{name}[{number}] must hold token ids in [0, {words}), got {int(ids.min())} to {int(ids.max())}; was it "
                "encoded by the tokenizer of another model?"
            )


def document(tokens: Tensor) -> str:
    """Name of a text: sixteen digits of the SHA-256 of its token ids."""
    return hashlib.sha256(tokens.long().cpu().numpy().tobytes()).hexdigest()[:16]
