"""Padded batches to sequences of real tokens: padding never becomes a row."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError


def real_tokens(call: str, content: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Per sequence its ids [t] or embeddings [t, d], and the mask bool [batch, width] on the CPU.

    `content` is [batch, width] or [batch, width, d]; masked columns are dropped. `position_ids` are accepted if they count
    each sequence's tokens from 0, as transformers' own do.
    """
    shape = list(content.shape[:2])
    kept = torch.ones(shape, dtype=torch.bool) if mask is None else mask.cpu().bool()
    if list(kept.shape) != shape:
        raise ArgumentError(f"{call}: attention_mask must be {shape}, got {list(kept.shape)}")
    if position_ids is not None:
        counted = (kept.long().cumsum(-1) - 1).clamp_min(0)
        given = position_ids.cpu()
        if given.shape[-1] != shape[1] or not torch.equal(given.expand_as(counted)[kept], counted[kept]):
            raise ArgumentError(f"{call}: position_ids other than 0, 1, 2, ... over each sequence's tokens are not supported")
    return [content[row][kept[row].to(content.device)] for row in range(shape[0])], kept
