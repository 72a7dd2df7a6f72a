"""Argument checks shared by the ops. Each raises ArgumentError: `op: argument must be <wanted>, got <what came>`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32 = (torch.float32,)
INT8 = (torch.int8,)
INT32 = (torch.int32,)
INT64 = (torch.int64,)


def describe(tensor: object) -> str:
    """`float32 [4, 8] on cpu` for a tensor, the type's name for anything else."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def fail(op: str, argument: str, wanted: str, got: object) -> None:
    raise ArgumentError(f"{op}: {argument} must be {wanted}, got {describe(got) if isinstance(got, Tensor) else got}")


def tensor(
    op: str,
    argument: str,
    value: Tensor,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    layout: str = "",
) -> None:
    """Checks dtype, device, rank and every size that is not None. `layout` names the axes in the message."""
    actual = value.shape
    if (
        value.dtype in dtypes
        and value.device == device
        and len(actual) == len(shape)
        and all(want is None or want == have for want, have in zip(shape, actual, strict=True))
    ):
        return
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    sizes = ", ".join("any" if want is None else str(want) for want in shape)
    named = f" ({layout})" if layout else ""
    fail(op, argument, f"{kinds} [{sizes}]{named} on {device}", value)


def contiguous(op: str, argument: str, value: Tensor) -> None:
    if not value.is_contiguous():
        fail(op, argument, "contiguous", f"strides {list(value.stride())} for shape {list(value.shape)}")


def in_range(op: str, argument: str, value: Tensor, low: int, high: int, why: str = "") -> None:
    """Every value in [low, high). Looks only where looking is free: on the CPU."""
    if value.device.type != "cpu" or value.numel() == 0:
        return
    wrong = (value < low) | (value >= high)
    if bool(wrong.any()):
        at = int(wrong.flatten().to(torch.int8).argmax())
        fail(op, argument, f"in [{low}, {high}){why}", f"{int(value.flatten()[at])} at {at}")


def positive(op: str, argument: str, value: float) -> None:
    if not value > 0:
        fail(op, argument, "positive", value)


def live(op: str, value: Tensor | None, device: torch.device, argument: str = "live", size: int = 1) -> None:
    """A device-side counter: int32 with one element (or `size`), contiguous."""
    if value is None:
        return
    if value.dtype != torch.int32 or value.numel() != size or value.device != device:
        fail(op, argument, f"int32 with {size} element{'s' if size > 1 else ''} on {device}", value)
    contiguous(op, argument, value)
