"""What tests/interpreted_bfloat16.py makes of Triton's interpreter, against PyTorch: all numbers, not the kernels'."""

from __future__ import annotations

from typing import Any

import op_harness  # noqa: F401  (installs it)
import pytest
import torch
from torch import Tensor

from dyndepth import env
from dyndepth.testing import assert_same

pytestmark = pytest.mark.skipif(not env.triton_interpret(), reason="runs under TRITON_INTERPRET=1 (make test-interpreted)")

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def _converted(source, target, count, block: tl.constexpr):
    lane = tl.program_id(0) * block + tl.arange(0, block)
    value = tl.load(source + lane, mask=lane < count, other=1.0)
    tl.store(target + lane, value.to(target.dtype.element_ty), mask=lane < count)


@triton.jit
def _product(a, b, out, rows: tl.constexpr, wide: tl.constexpr, columns: tl.constexpr):
    row, inner, column = tl.arange(0, rows), tl.arange(0, wide), tl.arange(0, columns)
    left = tl.load(a + row[:, None] * wide + inner[None, :])
    right = tl.load(b + column[:, None] * wide + inner[None, :])
    sums = tl.full((rows, columns), 0.5, tl.float32)
    tl.store(out + row[:, None] * columns + column[None, :], tl.dot(left, tl.trans(right), sums))


@triton.jit
def _computed(source, target, what: tl.constexpr):
    value = tl.load(source + tl.arange(0, 4))
    if what == "sum":
        value = value + value
    elif what == "scaled":
        value = value * 2.0
    elif what == "compared":
        value = (value > 0.0).to(tl.float32)
    elif what == "negative":
        value = -value
    elif what == "abs":
        value = tl.abs(value)
    elif what == "reduced":
        value = value - tl.sum(value, axis=0)
    elif what == "chosen":
        value = tl.where(tl.arange(0, 4) < 2, value, tl.full((4,), 7.0, tl.bfloat16))
    elif what == "widened":
        value = value.to(tl.float32) * 3.0 + 1.0
    tl.store(target + tl.arange(0, 4), value.to(tl.bfloat16))


def _to(source: Tensor, dtype: torch.dtype) -> Tensor:
    target = torch.empty(source.shape, dtype=dtype)
    _converted[(triton.cdiv(len(source), 1024),)](source, target, len(source), block=1024)
    return target


def _every() -> Tensor:
    """All bfloat16 numbers, infinities and NaNs included."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_number_widens(dtype: torch.dtype) -> None:
    found, wanted = _to(_every(), dtype), _every().to(dtype)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert_same(found.nan_to_num(nan=0.0), wanted.nan_to_num(nan=0.0), "converted")


def test_every_tie_and_its_neighbours_narrow() -> None:
    """Around each bfloat16 number and half way to the next: subnormals, the largest, infinity."""
    upper = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    source = (upper + lower).flatten().to(torch.uint32).view(torch.float32)
    found, wanted = _to(source, torch.bfloat16), source.bfloat16()
    assert torch.equal(found.isnan(), source.isnan())
    assert_same(found.nan_to_num(nan=0.0), wanted.nan_to_num(nan=0.0), "rounded")


def test_a_product_is_that_of_the_numbers() -> None:
    """Products of whole numbers, which no order of sums rounds, and of others as exactly as fp32 sums are."""
    generator = torch.Generator().manual_seed(2)
    whole = [torch.randint(-64, 65, (16, 32), generator=generator).bfloat16() for _ in range(2)]
    others = [torch.randn(16, 32, generator=generator).bfloat16() for _ in range(2)]
    for (a, b), bound in ((whole, 0.0), (others, 1e-5)):
        out = torch.empty(16, 16)
        _product[(1,)](a, b, out, rows=16, wide=32, columns=16)
        torch.testing.assert_close(out.double(), a.double() @ b.double().T + 0.5, rtol=0, atol=bound)


@pytest.mark.parametrize("what", ["sum", "scaled", "compared", "negative", "abs", "reduced"])
def test_arithmetic_in_bfloat16_is_refused(what: str) -> None:
    """A kernel that forgot to widen, which float16 does not show. Functions such as exp Triton itself refuses."""
    source: dict[str, Any] = {"target": torch.empty(4, dtype=torch.bfloat16), "what": what}
    with pytest.raises(Exception, match="bfloat16 arithmetic in a kernel"):
        _computed[(1,)](torch.ones(4, dtype=torch.bfloat16), **source)
    _computed[(1,)](torch.ones(4, dtype=torch.float16), **source)


def test_moves_and_widened_arithmetic_pass() -> None:
    source, target = torch.tensor([1.0, -2.0, 3.0, 4.0]).bfloat16(), torch.empty(4, dtype=torch.bfloat16)
    _computed[(1,)](source, target, what="chosen")
    assert target.tolist() == [1.0, -2.0, 7.0, 7.0]
    _computed[(1,)](source, target, what="widened")
    assert target.tolist() == [4.0, -5.0, 10.0, 13.0]
