"""Prompts of exactly so many tokens: a text, behind as much of the following texts as fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError


def prompts(tokenizer: Any, texts: Sequence[str], filling: Sequence[str], batch: int, tokens: int) -> list[Tensor]:
    """int64 [tokens] per row: row i ends with text i (texts come again when they run out) and begins with `filling`.

    A text that is too long loses its beginning.
    """
    if not texts or not filling or batch < 1 or tokens < 2:
        raise ArgumentError(f"profile: wanted texts, a batch of at least 1 and at least 2 tokens, got {batch} and {tokens}")

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    rows = []
    for number in range(batch):
        ids = encode(texts[number % len(texts)])[-tokens:]
        before: list[int] = []
        at = 7 * number  # rows of different content
        while len(before) < tokens - len(ids):
            more = encode(filling[at % len(filling)] + "\n")
            if not more:
                raise ArgumentError("profile: the tokenizer makes no tokens of the prompts")
            before += more
            at += 1
        rows.append(torch.tensor(before[: tokens - len(ids)] + ids))
    return rows
