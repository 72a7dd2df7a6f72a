"""bfloat16 in Triton's interpreter, which keeps such numbers as bits (uint16) and mostly leaves it at that; and its products.

It loads, stores and moves them rightly. What else the kernels do it does wrongly (triton 3.9), and this puts right:

- casts from float32 cut the low half off, where GPUs round to the nearest, ties to even; casts either way lose subnormals;
- `tl.dot` multiplies the bits as integers. Here operands are widened, as matrix units do;
- every `tl.dot` of floating point is summed in float64 and rounded once. numpy's own product sums in an order that depends on
  the shape of the tile (OpenBLAS on AMD's processors does), which a matrix unit's does not;
- sums, comparisons and functions are those of the bits. Kernels compute in float32, so here they raise: a kernel that does
  arithmetic in bfloat16 is told so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle


def wide(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 numbers that have these upper halves."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even; what is too large is infinite, NaN is quiet."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), (bits >> 16) | 0x40, nearest).astype(np.uint16)


def install() -> None:
    """From now on in this process."""
    cast, convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    dot = InterpreterBuilder.create_dot

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if _is(source):
            source = TensorHandle(wide(source.data), tl.float32)
        if target.scalar != tl.bfloat16:
            return cast(self, source, target)
        return TensorHandle(narrow(cast(self, source, tl.float32).data), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, sums: Any, *rest: Any) -> Any:
        if not (a.dtype.scalar.is_floating() and a.dtype.primitive_bitwidth in (16, 32)):
            return dot(self, a, b, sums, *rest)
        first, second = ((wide(each.data) if _is(each) else each.data).astype(np.float64) for each in (a, b))
        with np.errstate(all="ignore"):  # what overflows or is no number is the kernels' to handle
            return TensorHandle((first @ second).astype(sums.data.dtype) + sums.data, sums.dtype.scalar)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if not _is(source) and target.scalar != tl.bfloat16:
            return convert(self, source, target, rounding)
        assert rounding == ir.ROUNDING_MODE.RTNE, f"bfloat16 rounded by {rounding}"
        return self.cast_impl(source, target)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_fabs", "create_atomic_rmw"):
        setattr(InterpreterBuilder, name, _refusing(name, getattr(InterpreterBuilder, name)))
    ReduceScanOpInterface.apply = _refusing_tensors(ReduceScanOpInterface.apply)


def _is(value: Any) -> bool:
    # Most have other data: those are told first.
    return isinstance(value, TensorHandle) and value.data.dtype.type is np.uint16 and value.dtype.scalar == tl.bfloat16


def _refusing(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, of anything but bfloat16. Choosing between numbers (`tl.where`) is a move."""

    def refused(self: Any, *given: Any) -> Any:
        for each in given:
            if _is(each) and given[-1] is not np.where:
                raise TypeError(f"bfloat16 arithmetic in a kernel: {name}")
        return method(self, *given)

    return refused


def _refusing_tensors(method: Callable[..., Any]) -> Callable[..., Any]:
    def refused(self: Any, given: Any) -> Any:
        if any(_is(each.handle) for each in (given if isinstance(given, tuple) else (given,))):
            raise TypeError("bfloat16 arithmetic in a kernel: a reduction or scan")
        return method(self, given)

    return refused
