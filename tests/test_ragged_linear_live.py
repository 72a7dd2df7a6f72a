"""ragged_linear at the edges of its tiles: row counts, live rows, sizes, addresses; and nothing but what is promised."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import op_harness
import pytest
import torch

from dyndepth.op import REGISTRY, backend
from dyndepth.ops import ragged_linear
from dyndepth.testing import assert_same
from dyndepth.testing.cases import Arguments
from dyndepth.testing.linear_cases import linear

OP = "ragged_linear"
PROVIDERS = op_harness.providers(OP)
TRITON_MISSING = REGISTRY[OP].providers["triton"].missing()
needs_triton = pytest.mark.skipif(TRITON_MISSING is not None, reason=str(TRITON_MISSING))
launch: Any = importlib.import_module("dyndepth.kernels.launch")
#: Around every height of a tile, and a little more than two of the tallest.
ROWS = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 259)


def _arguments(rows: int, width: int = 70, outputs: int = 37, dtype: torch.dtype = torch.float32, **options: Any) -> Arguments:
    options = {"gated": "silu", "bias": True, "gate_bias": True, "residual": True, **options}
    return linear(rows, width, outputs, **options)(dtype, torch.Generator().manual_seed(rows + width + outputs))


def _check(arguments: Arguments, provider: str, what: str) -> None:
    """Under poison: all rows right; the same bits below `live`, and nothing past it."""
    live = arguments["live"]
    with backend(provider):
        whole = ragged_linear(**{**arguments, "live": None})
        found = ragged_linear(**arguments)
    op_harness.check_exact(OP, {**arguments, "live": None}, whole, what)
    live = len(found) if live is None else min(max(int(live), 0), len(found))
    assert_same(found[:live], whole[:live], what)
    assert bool(found[live:].isnan().all()), f"{what}: written past live"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_rows_and_live(rows: int, dtype: torch.dtype, provider: str) -> None:
    """Every element of the live rows and no other; widths and outputs are no multiples of a tile."""
    for live in sorted({live for live in (-3, 0, 1, rows - 1, rows, rows + 5) if live >= 0 or live == -3}):
        _check(_arguments(rows, dtype=dtype, live=live), provider, f"{rows} rows, live {live}")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("gated", ["", "gelu_tanh"])
def test_widths_and_outputs(gated: str, dtype: torch.dtype, provider: str) -> None:
    for width in (0, 1, 2, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200):
        _check(_arguments(19, width, 40, dtype, gated=gated, gate_bias=bool(gated)), provider, f"width {width}")
    for outputs in (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300):
        _check(_arguments(70, 24, outputs, dtype, gated=gated, gate_bias=bool(gated)), provider, f"{outputs} outputs")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 70])
def test_any_address(width: int, dtype: torch.dtype, provider: str) -> None:
    """Tensors that begin one element past where vectors begin, inside others full of NaN: the same bits."""
    arguments = _arguments(33, width, dtype=dtype, live=20)
    with backend(provider):
        expected = ragged_linear(**arguments)
        for shift in (1, 3):
            moved = dict(arguments)
            for name, value in arguments.items():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    larger = torch.full((value.numel() + 8,), torch.nan, dtype=dtype)
                    moved[name] = larger[shift : shift + value.numel()].view(value.shape)
                    moved[name].copy_(value)
            assert_same(ragged_linear(**moved)[:20], expected[:20], f"shifted by {shift}")


# -- Triton's tiles --------------------------------------------------------------------------------------------------------


@pytest.fixture
def walled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """The kernel's output stands between two walls of numbers; the list has every such piece of memory."""
    made: list[torch.Tensor] = []
    empty = torch.empty

    def between(*size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        count = torch.Size(size).numel()
        made.append(torch.full((count + 2 * 4096,), 7.25, dtype=dtype, device=device))
        return made[-1][4096 : 4096 + count].view(size)

    module: Any = importlib.import_module("dyndepth.kernels.ragged_linear")
    monkeypatch.setattr(module, "torch", _With(torch, empty=between))
    yield made
    assert torch.empty is empty


class _With:
    """A module, some of its names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__.update(vars(module) | names)


@needs_triton
@pytest.mark.parametrize("gated", ["", "silu"])
@pytest.mark.parametrize("rows", [1, 17, 33, 65, 130])
def test_triton_writes_nothing_else(rows: int, gated: str, walled: list[torch.Tensor]) -> None:
    """Not a number before the output, past its end, or in a row that is not live: what stood there stands there still."""
    for live in {0, 1, rows - 1, rows}:
        for outputs in (16, 37, 130):
            arguments = _arguments(rows, 40, outputs, gated=gated, gate_bias=bool(gated), live=live)
            with backend("triton"):
                ragged_linear(**arguments)
            memory = walled.pop()
            assert memory.numel() == rows * outputs + 2 * 4096
            written = memory[4096 : 4096 + live * outputs]
            assert bool((memory[:4096] == 7.25).all())
            assert bool((memory[4096 + live * outputs :] == 7.25).all())
            reference = REGISTRY[OP].reference(**arguments)[:live].flatten()
            torch.testing.assert_close(written, reference, rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("gated", ["", "silu"])
def test_triton_programs_walk_over_all_tiles(gated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One processor or many, and more rows than a group of tiles has: each tile once, whoever takes it."""
    for rows, live in ((33, None), (300, 171), (1100, 1090), (2200, 1030)):
        arguments = _arguments(rows, 16, 150, torch.float16, gated=gated, gate_bias=bool(gated), live=live)
        for processors in (1, 3, 132):
            device = launch.Device(processors)
            monkeypatch.setattr(launch.Device, "of", staticmethod(lambda tensor, device=device: device))
            _check(arguments, "triton", f"{rows} rows on {processors} processors")


# -- launch choice ---------------------------------------------------------------------------------------------------------

DEVICES = [
    launch.Device(132, 232448), launch.Device(108, 166912), launch.Device(84, 101376), launch.Device(304, 65536, 64),
    launch.Device(256, 163840, 64),
]  # fmt: skip
SIZES = [(576, 1536), (1536, 576), (4096, 4096), (4096, 14336), (14336, 4096), (70, 37), (64, 128256)]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"{device.processors}")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_launch_fits_and_loads_by_sixteen_bytes(itemsize: int, gated: bool, device: Any) -> None:
    for width, outputs in SIZES:
        for rows in (1, 16, 17, 64, 65, 128, 500, 4096):
            config = launch.ragged_linear(rows, outputs, width, gated, device, itemsize)
            operands = config.block_rows + (2 if gated else 1) * config.block_columns
            assert config.num_stages * operands * config.block_inner * itemsize <= device.shared_bytes
            assert min(config.block_rows, config.block_columns, config.block_inner) >= 16
            tiles = -(-rows // config.block_rows) * -(-outputs // config.block_columns)
            assert 0 < config.grid[0] <= tiles
            if width * itemsize % 16 == 0:
                smaller = min(config.block_rows, config.block_columns) * config.block_inner * itemsize
                assert smaller // (config.num_warps * device.lanes) >= 16, (rows, width, outputs, config)


def test_launch_splits_weights_over_the_machine_for_few_rows() -> None:
    """Decode: one short tile of rows, and no processor without weights to read if the weights are large."""
    for rows in range(1, 17):
        config = launch.ragged_linear(rows, 14336, 4096, False, launch.Device())
        assert config.block_rows == 16
        assert config.grid[0] >= 2 * 132
    assert launch.ragged_linear(512, 14336, 4096, False, launch.Device()).block_rows == 128
    assert launch.ragged_linear(512, 14336, 4096, False, launch.Device()).grid[0] == 132


def test_launch_depends_on_buckets_of_rows() -> None:
    """No kernel is compiled for a number of rows: those that round up to one power of two share one, as do all long ones."""
    for width, outputs in SIZES:
        kernels: dict[int, set[Any]] = {}
        for rows in [*range(1, 300), 511, 512, 700, 1023, 1024, 1025, 5000, 70_000]:
            config = launch.ragged_linear(rows, outputs, width, False, launch.Device())
            kernels.setdefault(min(1024, launch.power_of_two(rows, 16)), set()).add(dataclasses.replace(config, grid=()))
        assert all(len(found) == 1 for found in kernels.values())


@pytest.mark.parametrize("itemsize", [2, 4])
def test_launch_sums_in_the_same_order_for_any_number_of_rows(itemsize: int) -> None:
    for width, outputs in SIZES:
        steps = {
            launch.ragged_linear(rows, outputs, width, gated, launch.Device(), itemsize).block_inner
            for rows in (1, 20, 64, 65, 500, 5000)
            for gated in (False, True)
        }
        assert len(steps) == 1
