"""Attention over packed samples, registered with transformers so that a model's own layers run it.

Layers that ask transformers' attention interface for their attention get queries, keys and values `[1, heads, tokens, dim]`
here, all samples in one row of tokens. Samples of equal length that follow each other are one batched product; `Pass` sorts
by length, so there are few products. transformers' FlashAttention path packs in the same way on GPUs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

NAME = "dyndepth_packed"


def segments(lengths: Tensor) -> list[tuple[int, int]]:
    """(samples, length) of each run of samples with equal lengths, in order; lengths int64 [n] on the CPU."""
    return [(sum(1 for _ in run), length) for length, run in itertools.groupby(lengths.tolist())]


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    runs: list[tuple[int, int]],
    **_: Any,
) -> tuple[Tensor, None]:
    """Every token attends to the tokens of its own sample: [1, heads, tokens, dim] -> [1, tokens, heads, dim]."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts, at = [], 0
    for count, length in runs:
        # [heads, count * length, dim] -> [count, heads, length, dim]
        q, k, v = (t[0, :, at : at + count * length].unflatten(1, (count, length)).transpose(0, 1) for t in (query, key, value))
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        parts.append(seen.transpose(1, 2).flatten(0, 1))
        at += count * length
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


@contextmanager
def packed(config: Any) -> Iterator[None]:
    """Within, layers built on `config` run `packed_attention`. Not for one model in several threads at once."""
    _register()
    before = config._attn_implementation_internal
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
