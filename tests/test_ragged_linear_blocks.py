"""ragged_linear on the CPU with many rows: they are cut into blocks and channels into stretches, and no bit may tell."""

from __future__ import annotations

import op_harness
import pytest
import torch

from dyndepth.testing import assert_as_exact_as, assert_same
from dyndepth.testing.cases import Arguments, widened
from dyndepth.testing.linear_cases import linear

OP = "ragged_linear"
pytestmark = pytest.mark.skipif("cpp" not in op_harness.providers(OP), reason="the C++ extension is missing")

#: 11, 18 and 48 tiles of channels: two stretches, two, and five; panels in pairs, one over, a rest of 8.
SHAPES = {
    "two stretches": linear(300, 352, 64, bias=True),
    "one panel over": linear(300, 576, 48, residual=True),
    "a rest": linear(300, 576, 40, bias=True, residual=True),
    "gated": linear(300, 576, 48, gated="silu", bias=True, gate_bias=True),
    "gated, residual": linear(300, 352, 32, gated="gelu_tanh", residual=True),
    "five stretches": linear(300, 1536, 32, residual=True),
}


def _rows(arguments: Arguments, rows: slice) -> Arguments:
    own = {name: arguments[name][rows] for name in ("x", "residual") if arguments[name] is not None}
    return {**arguments, **own}


@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_the_same_bits_in_any_block(shape: str, dtype: torch.dtype) -> None:
    """A tile, two, three, a block of eight and one more, two blocks: every row as in the whole, and as alone."""
    arguments = SHAPES[shape](dtype, torch.Generator().manual_seed(11))
    whole = op_harness.outcome(OP, arguments, "cpp")["out"]
    for count in (1, 2, 16, 17, 32, 33, 48, 49, 127, 128, 129, 160, 161, 256, 257):
        for part in (slice(0, count), slice(300 - count, 300)):
            found = op_harness.outcome(OP, _rows(arguments, part), "cpp")["out"]
            assert_same(found, whole[part], f"{count} rows")


@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_pytorch(shape: str, dtype: torch.dtype) -> None:
    arguments = SHAPES[shape](dtype, torch.Generator().manual_seed(12))
    found = op_harness.outcome(OP, arguments, "cpp")["out"]
    reference, truth = op_harness.outcome(OP, arguments)["out"], op_harness.outcome(OP, widened(arguments))["out"]
    assert_as_exact_as(found, reference, truth, what=f"{shape}, {dtype}")
