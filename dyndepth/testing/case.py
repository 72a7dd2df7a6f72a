"""A case: a name, how to make the arguments, and who can afford it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Arguments of an op.

    `build(dtype, device)` makes those of the dispatcher (`torch.ops.dyndepth.<op>`), fresh and from a fixed seed. `bench`
    marks the shapes worth timing (a decode pass of SmolLM2-135M or Llama-3-8B); tests run them too unless they are `large`.
    """

    name: str
    make: Callable[[torch.dtype, torch.Generator], Arguments]
    bench: bool = False
    #: Too slow for the tests of a small machine.
    large: bool = False
    #: Sized for a GPU: a small machine neither tests nor times it.
    gpu: bool = False
    #: Small numbers in so many programs that Triton's interpreter runs them in float32 and bfloat16 alone.
    many: bool = False

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Arguments:
        generator = torch.Generator().manual_seed(20503005)
        return {name: _to(value, device) for name, value in self.make(dtype, generator).items()}


def _to(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value if value.device == torch.device(device) else duplicate(value, device)
    if isinstance(value, list):
        return [_to(item, device) for item in value]
    return value


def duplicate(value: Tensor, device: torch.device | str | None = None) -> Tensor:
    """A copy at the same place of a memory of its own: strides and alignment stay, as `clone` and `to` do not promise."""
    whole = torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.untyped_storage())
    whole = whole.clone() if device is None else whole.to(device, copy=True)
    empty = torch.empty(0, dtype=value.dtype, device=whole.device)
    return empty.set_(whole.untyped_storage(), value.storage_offset(), value.shape, value.stride())
