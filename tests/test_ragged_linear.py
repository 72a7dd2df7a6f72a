"""ragged_linear: a linear layer over the live prefix, gated and added to a residual if asked."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import op_harness
import pytest
import torch

from dyndepth.errors import ArgumentError
from dyndepth.op import backend
from dyndepth.ops import ragged_linear
from dyndepth.testing import CASES, Case, assert_as_exact_as, assert_same
from dyndepth.testing.cases import Arguments, widened
from dyndepth.testing.linear_cases import linear

OP = "ragged_linear"
PROVIDERS = op_harness.providers(OP)
#: Matrix tiles alone, tiles and a rest of outputs, no tiles (width no multiple of 32), scalar rests, several chunks.
SHAPES = {
    "tiles": linear(40, 64, 48),
    "rest": linear(40, 96, 37, bias=True, residual=True),
    "vectors": linear(40, 48, 32, residual=True),
    "odd": linear(40, 37, 23),
    "gated": linear(40, 96, 37, gated="silu", gate_bias=True, residual=True),
    "gated_odd": linear(40, 50, 20, gated="gelu", bias=True),
    "chunks": linear(40, 576, 208, gated="gelu_tanh"),
}


def _case(name: str) -> Case:
    return next(case for case in CASES[OP] if case.name == name)


def _of_rows(arguments: Arguments, rows: Any) -> Arguments:
    """The same call with some of the rows."""
    own = {name: arguments[name][rows] for name in ("x", "residual") if arguments[name] is not None}
    return {**arguments, **own}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("case", "dtype"), op_harness.cases_in_dtypes(OP))
def test_as_exact_as_pytorch(case: Case, dtype: torch.dtype, provider: str) -> None:
    op_harness.check_against_oracle(OP, case, dtype, provider)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_by_hand(provider: str) -> None:
    """[3 4; 5 6] (1, 2) = (11, 17); silu(ln 3) = 3/4 ln 3, silu(0) = 0."""
    x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    bias, gate = torch.tensor([0.5, -1.0]), torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    residual = torch.tensor([[100.0, 200.0]])
    with backend(provider):
        assert ragged_linear(x, weight).tolist() == [[11.0, 17.0]]
        assert ragged_linear(x, weight, bias=bias).tolist() == [[11.5, 16.0]]
        assert ragged_linear(x, weight, bias=bias, residual=residual).tolist() == [[111.5, 216.0]]
        gated = ragged_linear(x, weight, bias=bias, gate_weight=gate, residual=residual)
        opened = ragged_linear(x, weight, gate_weight=gate, gate_bias=torch.tensor([0.0, math.log(3.0)]))
    assert gated[0].tolist() == pytest.approx([100 + 0.75 * math.log(3.0) * 11.5, 200.0])
    assert opened[0].tolist() == pytest.approx([0.75 * math.log(3.0) * 11, 0.75 * math.log(3.0) * 17])


_IN_PYTHON: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu_tanh": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))),
}


def _in_python(arguments: Arguments, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """One number at a time, rounded to the dtype after each module of a decoder layer; and the magnitudes added last."""

    def rounded(value: float) -> float:
        return float(torch.tensor(value).to(dtype))

    def product(row: list[float], weight: list[list[float]], bias: list[float] | None, at: int) -> float:
        return rounded(sum(a * b for a, b in zip(row, weight[at], strict=True)) + (0.0 if bias is None else bias[at]))

    plain = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    found, added = [], []
    for place, row in enumerate(plain["x"]):
        for at in range(len(plain["weight"])):
            y = product(row, plain["weight"], plain["bias"], at)
            if plain["gate_weight"] is not None:
                opened = rounded(_IN_PYTHON[plain["activation"]](product(row, plain["gate_weight"], plain["gate_bias"], at)))
                y = rounded(opened * y)
            found.append(rounded(plain["residual"][place][at] + y))
            added.append(abs(plain["residual"][place][at]) + abs(y))
    shape = arguments["residual"].shape
    return torch.tensor(found).view(shape).to(dtype), torch.tensor(added).view(shape)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["", "silu", "gelu_tanh", "gelu"])
def test_equals_plain_python(activation: str, dtype: torch.dtype, provider: str) -> None:
    """A second witness for the steps and where they round: nearly all entries are equal bit for bit in half precision.

    The bound is relative to what was added, not to the sum: a residual that cancels the product keeps the product's error.
    """
    make = linear(9, 32, 21, gated=activation, bias=True, gate_bias=bool(activation), residual=True)
    arguments = make(dtype, torch.Generator().manual_seed(3))
    found, (told, added) = op_harness.outcome(OP, arguments, provider)["out"], _in_python(arguments, dtype)
    off = (found.float() - told.float()).abs() / (torch.finfo(dtype).eps * (1 + added))
    assert float(off.max()) <= 2
    if provider != "triton":  # whose fp32 GELU is a bit farther off where the residual cancels the product
        epsilon = torch.finfo(dtype).eps
        torch.testing.assert_close(found, told, rtol=4 * epsilon, atol=8 * epsilon)
    assert dtype == torch.float32 or float((found == told).float().mean()) > 0.98


# -- a row does not depend on the others ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_batch_invariance(provider: str, shape: str, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """Alone, in batches of every size, shuffled, under one thread or two: the same bits.

    Triton promises it for row counts that share tiles, those that round up to one power of two.
    """
    arguments = SHAPES[shape](dtype, torch.Generator().manual_seed(5))
    rows = len(arguments["x"])

    @functools.cache
    def together(size: int) -> torch.Tensor:
        """All rows, from batches as large as those of `size` rows may get."""
        most = rows if provider == "cpp" else min(rows, max(16, 1 << (size - 1).bit_length()))
        whole = torch.empty(rows, len(arguments["weight"]), dtype=dtype)
        for first in (*range(0, rows - most, most), rows - most):
            part = slice(first, first + most)
            whole[part] = op_harness.outcome(OP, _of_rows(arguments, part), provider)["out"]
        return whole

    threads(1)
    order, expected = torch.randperm(rows), together(rows)
    sizes = range(1, rows + 1) if provider == "cpp" else (1, 2, 15, 16, 17, 31, 32, 33, rows - 1)
    for count in (1, 2) if provider == "cpp" else (1,):
        threads(count)
        for size in sizes:
            first, last = slice(0, size), slice(rows - size, rows)
            for part in (first, last):
                found = op_harness.outcome(OP, _of_rows(arguments, part), provider)["out"]
                assert_same(found, together(size)[part], f"{size} rows, {count} threads")
            alone = op_harness.outcome(OP, _of_rows(arguments, slice(size - 1, size)), provider)["out"]
            assert_same(alone[0], together(1)[size - 1], f"row {size - 1} alone, {count} threads")
        found = op_harness.outcome(OP, _of_rows(arguments, order), provider)["out"]
        assert_same(found, expected[order], f"shuffled, {count} threads")


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_wrong_rows_do_not_spread(provider: str, shape: str, dtype: torch.dtype, wrong: float) -> None:
    arguments = SHAPES[shape](dtype, torch.Generator().manual_seed(5))
    clean = op_harness.outcome(OP, arguments, provider)["out"]
    hit = torch.arange(40) % 3 == 1
    arguments["x"][hit] = wrong
    if arguments["residual"] is not None:
        arguments["residual"][hit] = wrong
    found = op_harness.outcome(OP, arguments, provider)["out"]
    assert_same(found[~hit], clean[~hit])
    assert not bool(torch.isfinite(found[hit]).any())


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dead_rows_change_nothing(shape: str, provider: str) -> None:
    """Rows past `live`: whatever they hold, live rows are the same bits; counters out of range are cut."""
    for dtype in op_harness.DTYPES:
        arguments = SHAPES[shape](dtype, torch.Generator().manual_seed(6))
        together = op_harness.outcome(OP, arguments, provider)["out"]
        for live in (1, 17, 39, 40, 99):
            arguments["live"] = torch.tensor([live], dtype=torch.int32)
            arguments["x"][live:] = torch.nan
            assert_same(op_harness.outcome(OP, arguments, provider)["out"], together[:live])
            arguments = {**SHAPES[shape](dtype, torch.Generator().manual_seed(6))}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", ["live", "none_live", "everything"])
def test_rows_past_live_are_not_computed(name: str, provider: str) -> None:
    op_harness.assert_only_live_rows_are_written(OP, _case(name), provider)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_promised_element_is_written(shape: str, dtype: torch.dtype, provider: str) -> None:
    arguments = SHAPES[shape](dtype, torch.Generator().manual_seed(6))
    assert bool(torch.isfinite(op_harness.outcome(OP, arguments, provider)["out"]).all())


_GUARDED = """
import ctypes, mmap, sys, torch
if sys.argv[1] == "triton":  # its interpreter copies the arguments of a launch onto themselves afterwards
    from triton.runtime.interpreter import GridExecutor
    GridExecutor._restore_args_dev = lambda *_: None
    sys.path.insert(0, "tests")
    import interpreted_bfloat16
    interpreted_bfloat16.install()
from dyndepth import ops
from dyndepth.op import REGISTRY, backend
from dyndepth.testing import CASES
libc = ctypes.CDLL(None, use_errno=True)
kept = []
def placed(tensor, forbidden=False):
    "A copy that ends where memory that nobody may touch begins; all of it is such memory if `forbidden`."
    page, size = mmap.PAGESIZE, max(tensor.nbytes, 1)
    own = -(-size // page) * page
    memory = mmap.mmap(-1, own + page)
    kept.append(memory)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    at = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=own - tensor.nbytes) if tensor.numel() \\
        else tensor
    copy = at.view(tensor.shape) if tensor.numel() else tensor
    if tensor.numel():
        copy.copy_(tensor)
    start, length = (base, own + page) if forbidden else (base + own, page)
    assert libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(length), 0) == 0
    return copy
for case in CASES["ragged_linear"]:
    if case.large or case.gpu or case.bench and sys.argv[1] == "triton" or case.name == "smol512":
        continue
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = case.build(dtype)
        forbidden = ("weight", "gate_weight", "x") if case.name == "none_live" else ()
        guarded = {k: placed(v, k in forbidden) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        with backend(sys.argv[1]):
            found, expected = REGISTRY["ragged_linear"](**guarded), REGISTRY["ragged_linear"](**given)
        live = len(found) if given["live"] is None else int(given["live"])
        assert torch.equal(found[:live], expected[:live]), case.name
print("guarded")
"""


@pytest.mark.parametrize("provider", PROVIDERS)
def test_nothing_is_read_past_the_end_nor_for_nobody(provider: str) -> None:
    """Every argument ends at a page that must not be touched; with `live` 0 not even the weights may be."""
    done = subprocess.run([sys.executable, "-c", _GUARDED, provider], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "guarded"), done.stderr


# -- numbers at the edges ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("width", [2, 16, 32, 48])
@pytest.mark.parametrize("dtype", op_harness.DTYPES[1:], ids=str)
def test_stores_round_as_pytorch(dtype: torch.dtype, width: int, provider: str) -> None:
    """Products that fp32 holds exactly: overflow to inf, subnormals, ties to even, NaN as in `.to(dtype)`.

    Matrix tiles take bfloat16 subnormals for 0, as PyTorch's own bfloat16 product does on such machines.
    """
    bits = torch.randint(0, 2**16, (3000,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    x = torch.zeros(3003, width, dtype=dtype)
    x[:3000, 0], x[:, 1] = bits.to(torch.int16).view(dtype), 1.0
    x[3000:, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    weight = torch.zeros(16, width, dtype=dtype)
    weight[:, 0] = 2.0 ** torch.arange(-8, 8)
    weight[::2, 1] = 2.0 ** torch.arange(-16, 0, 2)  # ends between two values of the dtype, often half way
    exact = x.double() @ weight.double().T
    held = (exact.float().double() == exact) | exact.isnan()
    if dtype == torch.bfloat16:
        held &= (x[:, :1].abs() >= torch.finfo(dtype).tiny) & (exact.abs() >= torch.finfo(dtype).tiny) | exact.isnan()
    with backend(provider):
        found = ragged_linear(x, weight)
    expected = exact.float().to(dtype)
    assert torch.equal(found.isnan()[held], expected.isnan()[held])
    assert torch.equal(found.nan_to_num(nan=1.5)[held], expected.nan_to_num(nan=1.5)[held])
    seen, tiny = expected[held], torch.finfo(dtype).tiny
    assert bool(seen.isinf().any())
    assert bool(seen.isnan().any())
    assert dtype == torch.bfloat16 or bool(((seen.abs() < tiny) & (seen != 0)).any())
    last, where = expected.view(torch.int16) & 1, held & (exact.abs() > 2 * tiny) & (exact.abs() < torch.finfo(dtype).max / 2)
    step = 2.0 ** (torch.frexp(exact.nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)).exponent - 1) * torch.finfo(dtype).eps
    ties = where & ((exact - expected.double()).abs() * 2 == step)
    assert int(ties.sum()) > 20
    assert not bool(last[ties].any()), "ties go to even"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["", "silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("width", [32, 37])
def test_infinities_and_nans(width: int, activation: str, dtype: torch.dtype, provider: str) -> None:
    """In x, in either weight, in biases and in the residual, against zeros too: those of float64, or of PyTorch in the dtype
    (whose gelu(inf) is NaN, whose bfloat16 products sometimes are, and where a gate that underflows to 0 meets an infinity)."""
    arguments = linear(40, width, 37, gated=activation, bias=True, gate_bias=bool(activation), residual=True)(
        dtype, torch.Generator().manual_seed(9)
    )
    wrong = torch.tensor([torch.nan, torch.inf, -torch.inf])
    arguments["x"][:3, 1], arguments["x"][3:6, width - 1], arguments["x"][6] = wrong, wrong, 0
    arguments["weight"][:5, 1], arguments["weight"][5:8, 2] = 0, wrong
    arguments["residual"][8:11, 3], arguments["bias"][9:12] = wrong, wrong
    if activation:
        arguments["gate_weight"][12:15, 1], arguments["gate_bias"][16:19] = 0, wrong
        arguments["gate_weight"][20:23, width - 1] = wrong

    def kinds(y: torch.Tensor) -> torch.Tensor:
        return y.isposinf() + 2 * y.isneginf() + 3 * y.isnan()

    found = op_harness.outcome(OP, arguments, provider)["out"]
    truth, reference = op_harness.outcome(OP, widened(arguments))["out"], op_harness.outcome(OP, arguments)["out"]
    assert bool(((kinds(found) == kinds(truth)) | (kinds(found) == kinds(reference))).all())
    assert int((kinds(found) != kinds(truth)).sum()) <= 1
    for seen in (found.isnan(), found.isinf(), torch.isfinite(found)):
        assert int(seen.sum()) > 10


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_activations_far_from_zero(activation: str, provider: str) -> None:
    """Gates from -1e30 to 1e30: no overflow on the way, the same limits as PyTorch's."""
    x = torch.cat([-torch.logspace(30, -30, 61), torch.zeros(1), torch.logspace(-30, 30, 61), torch.linspace(-120, 120, 97)])
    one = torch.ones(1, 1)
    with backend(provider):
        found = ragged_linear(x[:, None], torch.zeros(1, 1), bias=torch.ones(1), gate_weight=one, activation=activation)
    gate = torch.nn.functional.silu(x) if activation == "silu" else torch.nn.functional.gelu(
        x, approximate="tanh" if activation == "gelu_tanh" else "none"
    )  # fmt: skip
    torch.testing.assert_close(found[:, 0], gate, rtol=1e-5, atol=3e-7)


# -- memory, sizes, arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_views_into_larger_tensors(provider: str, dtype: torch.dtype) -> None:
    """Rows of a fused weight, of a bias and of a buffer of rows are as good as tensors of their own, at any address."""
    names = ("x", "weight", "bias", "gate_weight", "gate_bias", "residual")
    for width in (64, 37):
        arguments = linear(19, width, 37, gated="silu", bias=True, gate_bias=True, residual=True)(
            dtype, torch.Generator().manual_seed(2)
        )
        expected = op_harness.outcome(OP, arguments, provider)["out"]
        views = dict(arguments)
        for name in names:
            value = arguments[name]
            larger = torch.full((value.shape[0] + 4, *value.shape[1:]), torch.nan, dtype=dtype)
            larger[1 : 1 + value.shape[0]] = value
            views[name] = larger[1 : 1 + value.shape[0]]
        with backend(provider):
            assert_same(ragged_linear(**views), expected)


@pytest.mark.parametrize("shape", [(3, 2), (32, 17)], ids=str)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_many_rows(provider: str, shape: tuple[int, int]) -> None:
    for dtype in op_harness.DTYPES:
        arguments = linear(70_000, *shape, bias=True)(dtype, torch.Generator().manual_seed(8))
        found = op_harness.outcome(OP, arguments, provider)["out"]
        reference, truth = op_harness.outcome(OP, arguments)["out"], op_harness.outcome(OP, widened(arguments))["out"]
        assert_as_exact_as(found, reference, truth, what=str(dtype))
        last = slice(70_000 - (10 if provider == "cpp" else 1025), 70_000)
        assert_same(op_harness.outcome(OP, _of_rows(arguments, last), provider)["out"], found[last])


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_arguments_stay_as_they_were(provider: str) -> None:
    given = SHAPES["gated"](torch.bfloat16, torch.Generator().manual_seed(5))
    before = op_harness.copied(given)
    with backend(provider):
        ragged_linear(**given)
    for name in ("x", "weight", "gate_weight", "gate_bias", "residual"):
        assert_same(given[name], before[name], name)


@pytest.mark.parametrize("name", ["odd", "bias", "gated_gelu", "gate_bias", "residual", "empty", "no_channels"])
def test_contract(name: str) -> None:
    op_harness.check_contract(OP, _case(name).build())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 3).T}, "ragged_linear: x must be contiguous"),
        ({"x": torch.zeros(3)}, r"ragged_linear: x must be .* \[any, any\] \(n, k\)"),
        ({"x": torch.zeros(3, 5, dtype=torch.float64)}, "ragged_linear: x must be float32 or bfloat16 or float16"),
        ({"weight": torch.zeros(8, 6)}, r"ragged_linear: weight must be float32 \[any, 5\]"),
        ({"weight": torch.zeros(5, 8).T}, "ragged_linear: weight must be contiguous"),
        ({"weight": torch.zeros(8, 5, dtype=torch.float16)}, "ragged_linear: weight must be float32"),
        ({"bias": torch.zeros(5)}, r"ragged_linear: bias must be float32 \[8\]"),
        ({"bias": torch.zeros(16)[::2]}, "ragged_linear: bias must be contiguous"),
        ({"gate_weight": torch.zeros(7, 5)}, r"ragged_linear: gate_weight must be float32 \[8, 5\]"),
        ({"gate_weight": torch.zeros(5, 8).T}, "ragged_linear: gate_weight must be contiguous"),
        ({"gate_bias": torch.zeros(8)}, "ragged_linear: gate_bias must be given with gate_weight only"),
        ({"gate_weight": torch.zeros(8, 5), "gate_bias": torch.zeros(7)}, r"ragged_linear: gate_bias must be float32 \[8\]"),
        ({"activation": "relu"}, "ragged_linear: activation must be one of silu, gelu_tanh, gelu, got 'relu'"),
        ({"residual": torch.zeros(3, 5)}, r"ragged_linear: residual must be float32 \[3, 8\]"),
        ({"residual": torch.zeros(8, 3).T}, "ragged_linear: residual must be contiguous"),
        ({"live": torch.zeros(1, dtype=torch.int64)}, "ragged_linear: live must be int32 with 1 element"),
    ],
)
def test_wrong_arguments(change: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ragged_linear(**{"x": torch.zeros(3, 5), "weight": torch.zeros(8, 5), **change})
