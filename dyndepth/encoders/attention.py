"""Attention over packed samples, registered with transformers so that a model's own layers run it.

Layers that ask transformers' attention interface for their attention get queries, keys and values `[1, heads, tokens, dim]`
here, all samples in one row of tokens. There are two ways to run them:

- the kernel of `ragged_attention`, where it multiplies bfloat16 on tiles (csrc/cpu/packed_attention.cpp): one call for the
  whole batch, in which all tokens see their sample to its end. A token's bits do not depend on the other samples.
- PyTorch's attention, a call for every run of samples of equal length (`pack` sorts by length, so there are few): for other
  dtypes and devices, and where gradients are wanted (forward mode, too).

transformers' FlashAttention path packs in the same way on GPUs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyndepth.op import cpp_allowed
from dyndepth.ops import _cpp

NAME = "dyndepth_packed"


def segments(lengths: Tensor) -> list[tuple[int, int]]:
    """(samples, length) of each run of samples with equal lengths, in order; lengths int64 [n] on the CPU."""
    return [(sum(1 for _ in run), length) for length, run in itertools.groupby(lengths.tolist())]


@dataclass(frozen=True)
class Packing:
    """Where samples lie among packed tokens, for all layers that they pass."""

    #: int64 [n] on the CPU.
    lengths: Tensor

    @functools.cached_property
    def runs(self) -> list[tuple[int, int]]:
        """`segments` of the lengths."""
        return segments(self.lengths)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing,
    **_: Any,
) -> tuple[Tensor, None]:
    """Every token attends to the tokens of its own sample: [1, heads, tokens, dim] -> [1, tokens, heads, dim]."""
    wanted = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    wanted = wanted or _cpp.drops_tangents()
    alike = query.dtype == key.dtype == value.dtype  # under autocast they may not be, and PyTorch's casts them
    if dropout == 0 and not wanted and alike and in_one_call(query.dtype, query.device, query.shape[-1]):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
        return torch.ops.dyndepth_cpp.packed_attention(q, k, v, packing.lengths, scale)[None], None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts, at = [], 0
    for count, length in packing.runs:
        # [heads, count * length, dim] -> [count, heads, length, dim]
        q, k, v = (t[0, :, at : at + count * length].unflatten(1, (count, length)).transpose(0, 1) for t in (query, key, value))
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        parts.append(seen.transpose(1, 2).flatten(0, 1))
        at += count * length
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def in_one_call(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Whether `ragged_attention`'s kernel is the faster way for such heads (docs/encoders.md has the measurement)."""
    if dtype != torch.bfloat16 or device.type != "cpu" or head_dim % 32 or torch.compiler.is_compiling():
        return False
    return cpp_allowed("ragged_attention") and _cpp.multiplies_bfloat16()


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
