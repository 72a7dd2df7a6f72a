"""ragged_linear on the CPU with many rows, which are cut into blocks: no bit may tell."""

from __future__ import annotations

import op_harness
import pytest
import torch

from dyndepth.op import backend
from dyndepth.ops import project_qkv
from dyndepth.testing import assert_as_exact_as, assert_same
from dyndepth.testing.cases import Arguments, widened
from dyndepth.testing.linear_cases import linear

OP = "ragged_linear"
pytestmark = pytest.mark.skipif("cpp" not in op_harness.providers(OP), reason="the C++ extension is missing")

#: Panels in pairs, one over, a rest of 8; few and many channels.
SHAPES = {
    "pairs": linear(300, 352, 64, bias=True),
    "one panel over": linear(300, 576, 48, residual=True),
    "a rest": linear(300, 576, 40, bias=True, residual=True),
    "gated": linear(300, 576, 48, gated="silu", bias=True, gate_bias=True),
    "gated, residual": linear(300, 352, 32, gated="gelu_tanh", residual=True),
    "many channels": linear(300, 1536, 32, residual=True),
}


def _rows(arguments: Arguments, rows: slice) -> Arguments:
    own = {name: arguments[name][rows] for name in ("x", "residual") if arguments[name] is not None}
    return {**arguments, **own}


@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_the_same_bits_in_any_block(shape: str, dtype: torch.dtype) -> None:
    """A tile, two, three, a block of eight and one more, two blocks: every row as in the whole; some alone."""
    arguments = SHAPES[shape](dtype, torch.Generator().manual_seed(11))
    whole = op_harness.outcome(OP, arguments, "cpp")["out"]
    for count in (1, 2, 16, 17, 32, 33, 48, 49, 127, 128, 129, 160, 161, 256, 257):
        for part in (slice(0, count), slice(300 - count, 300)):
            found = op_harness.outcome(OP, _rows(arguments, part), "cpp")["out"]
            assert_same(found, whole[part], f"{count} rows")
    for row in (15, 16, 31, 32, 127, 128, 255, 256):
        assert_same(op_harness.outcome(OP, _rows(arguments, slice(row, row + 1)), "cpp")["out"][0], whole[row], f"row {row}")


@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_pytorch(shape: str, dtype: torch.dtype) -> None:
    arguments = SHAPES[shape](dtype, torch.Generator().manual_seed(12))
    found = op_harness.outcome(OP, arguments, "cpp")["out"]
    reference, truth = op_harness.outcome(OP, arguments)["out"], op_harness.outcome(OP, widened(arguments))["out"]
    assert_as_exact_as(found, reference, truth, what=f"{shape}, {dtype}")


@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
def test_products_of_fewer_rows_than_were_packed(dtype: torch.dtype) -> None:
    """Queries of 130 rows beside keys and values of 200: the second block of one product is the others' too."""
    draw = torch.Generator().manual_seed(13)

    def some(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=draw).to(dtype)

    rows, live, heads, head_dim = 200, 130, 2, 32
    x, weights = some(rows, 96), [some(heads * head_dim, 96) for _ in range(3)]
    pos, slots = torch.zeros(rows, dtype=torch.int32), torch.arange(rows, dtype=torch.int32)

    def projected(part: slice, count: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        pages = torch.zeros(2, 13, 16, heads, head_dim, dtype=dtype)
        counter = None if count is None else torch.tensor([count], dtype=torch.int32)
        with backend("cpp"):
            q = project_qkv(x[part], *weights, cos=None, sin=None, pos=pos[part], slots=slots[part], pages=pages, live=counter)
        return q, pages

    q, pages = projected(slice(0, rows), live)
    alone, _ = projected(slice(0, live), None)
    assert_same(q[:live], alone)
    assert_same(pages, projected(slice(0, rows), None)[1])
