"""Prompts of a wanted length: the demo's questions after other prompts as filling, every row of different content."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyndepth.demo import chat
from dyndepth.demo.prompts import SHOWN, calibrating

#: Rows of a cell, prompts that fill up, prompts that a threshold is chosen on: apart, so that nothing is tuned on what it
#: is measured on.
ROWS = (*SHOWN, *calibrating()[:112])
_FILLING = calibrating()[112:284]
TUNING = calibrating()[284:]
_MARK = "@@@"


def prompts(tokenizer: Any, batch: int, width: int) -> dict[str, Tensor]:
    """input_ids and attention_mask [batch, width]: half of the rows are full, the others are an eighth or a quarter shorter."""
    if batch > len(ROWS):
        raise ValueError(f"prompts: wanted at most {len(ROWS)} rows, got {batch}")
    shorter = (0, 0, width // 8, width // 4)
    rows = [_prompt(tokenizer, number, width - shorter[number % 4]) for number in range(batch)]
    return padded(rows, width, 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def padded(rows: list[list[int]], width: int, pad: int) -> dict[str, Tensor]:
    """Token ids of every row behind padding."""
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _prompt(tokenizer: Any, number: int, length: int) -> list[int]:
    """Exactly `length` tokens of a chat turn: filling, then the question; a question that is too long loses its end."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    before, after = (encode(part) for part in chat(tokenizer, _MARK).split(_MARK))
    room = length - len(before) - len(after)
    if room < 1:
        raise ValueError(f"prompts: wanted more than {len(before) + len(after)} tokens, the chat template's own, got {length}")
    question = encode(ROWS[number])[:room]
    filling: list[int] = []
    at = 7 * number
    while len(filling) < room - len(question):
        filling += encode(_FILLING[at % len(_FILLING)] + "\n")
        at += 1
    return before + filling[: room - len(question)] + question + after
