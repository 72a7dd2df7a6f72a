"""CUDA providers whole, on the CPU: their own host code and their kernels by fibers, held to what other providers must pass."""

from __future__ import annotations

import functools
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_programs
import op_harness
import pytest
import test_accept_drafts
import test_store_kv
import torch
from kernel_cases import by_fibers, cuda_kernels

from dyndepth.cuda import accept_drafts, compact_rows, store_kv
from dyndepth.op import REGISTRY
from dyndepth.testing import Case, assert_same

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

#: Every op with a CUDA provider.
OPS = ["accept_drafts", "compact_rows", "store_kv"]


def cases(*ops: str) -> list[Any]:
    """All that a fiber per thread can afford; tests/test_edges.py says what is among them."""
    return [pytest.param(op, case, id=f"{op}-{case.name}") for op in ops for case in by_fibers(op)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture
def kernels(folder: Path, request: pytest.FixtureRequest) -> Iterator[cuda_programs.Library]:
    with cuda_programs.cuda_provider(request.getfixturevalue("op"), folder) as found:
        yield found


def test_these_are_all() -> None:
    assert sorted(op for op in REGISTRY if "cuda" in REGISTRY[op].providers) == OPS


@pytest.mark.parametrize(("op", "case"), cases("accept_drafts", "compact_rows"))
def test_every_bit(kernels: cuda_programs.Library, op: str, case: Case) -> None:
    """Which kernel, how wide, and its arguments as bytes."""
    arguments = case.build()
    expected = op_harness._flat(REGISTRY[op].reference(**arguments))
    found = op_harness._flat(REGISTRY[op](**op_harness.copied(arguments)))
    assert Counter(function for function, _, _ in kernels.launched) == cuda_kernels(op, arguments)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other.contiguous(), f"{op} {case.name}")


@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), cases("store_kv"))
def test_as_exact_as_pytorch(kernels: cuda_programs.Library, op: str, case: Case, dtype: torch.dtype) -> None:
    op_harness.check_against_oracle(op, case, dtype, "cuda")
    assert Counter(function for function, _, _ in kernels.launched) == cuda_kernels(op, case.build(dtype))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("op", "check"),
    [
        ("accept_drafts", test_accept_drafts.test_greedy_by_hand),
        ("accept_drafts", test_accept_drafts.test_a_draft_is_judged_without_rounding),
        ("accept_drafts", functools.partial(test_accept_drafts.test_a_refused_certain_draft_wherever_it_lies, width=40)),
        ("accept_drafts", test_accept_drafts.test_a_residual_that_rounding_left_empty),
        ("accept_drafts", test_accept_drafts.test_no_word_without_mass),
        ("accept_drafts", test_accept_drafts.test_what_is_no_distribution),
        *(
            ("accept_drafts", functools.partial(check, name=name))
            for name in ("greedy_long", "odd", "certain")
            for check in (test_accept_drafts.test_any_strides, test_accept_drafts.test_what_does_not_count_is_not_looked_at)
        ),
        ("store_kv", test_store_kv.test_by_hand),
        ("store_kv", test_store_kv.test_every_promised_element_is_written),
        ("store_kv", test_store_kv.test_padding_next_to_slot_zero),
        ("store_kv", test_store_kv.test_queries_past_live_are_not_rotated),
        *(
            ("store_kv", functools.partial(test_store_kv.test_values_move_bit_for_bit, name, dtype))
            for name in ("no_rotary", "padding", "fused")
            for dtype in op_harness.DTYPES
        ),
    ],
)
def test_what_other_providers_must_pass(kernels: cuda_programs.Library, op: str, check: Callable[..., None]) -> None:
    check(provider="cuda")
    assert all(function.startswith(op) for function, _, _ in kernels.launched)
    assert kernels.launched


def test_drafts_python_knows_the_kernel_s_width() -> None:
    assert re.findall(r"constexpr int kWarps = (\d+);", cuda_programs.source("accept_drafts")) == [str(accept_drafts._WARPS)]


def layout(folder: Path, op: str) -> list[int]:
    done = cuda_programs.run(cuda_programs.build(folder, op, "-O0"), "layout")
    return [int(number) for number in done.stdout.split()]


def test_rows_python_fills_the_structures_that_the_kernel_reads(tmp_path: Path) -> None:
    payload, payloads = compact_rows._PAYLOAD, compact_rows._PAYLOADS
    offsets = [payload.fields[name][1] for name in ("source", "target", "stride", "row_bytes", "unit")]
    assert layout(tmp_path, "compact_rows") == [payload.itemsize, *offsets, payloads.itemsize, payloads.fields["count"][1]]
    limits = dict(re.findall(r"constexpr int (kBlockRows|kMaxPayloads) = (\d+);", cuda_programs.source("compact_rows")))
    assert limits == {"kBlockRows": str(compact_rows._BLOCK), "kMaxPayloads": str(compact_rows._MAX_PAYLOADS)}


def test_kv_python_fills_the_structures_that_the_kernel_reads(tmp_path: Path) -> None:
    arguments = store_kv._ARGUMENTS
    names = ("rotated", "pages", "cos", "sin", "pos", "slots", "live", "q_rows", "plane")
    offsets = [
        arguments.fields[name][1] for name in (*names, "heads", "kv_heads", "head_dim", "rotary", "wide_turn", "wide_copy")
    ]
    assert layout(tmp_path, "store_kv") == [store_kv._HEADS.itemsize, arguments.itemsize, *offsets]
    text = cuda_programs.source("store_kv")
    assert re.findall(r"constexpr int kPieceBytes = (\d+);", text) == [str(store_kv._PIECE_BYTES)]
    assert set(re.findall(r"__launch_bounds__\((\d+)\)", text)) == {str(store_kv._MOST_THREADS)}


def test_rows_the_widest_word_that_everything_allows_is_chosen() -> None:
    base = torch.zeros(4096, dtype=torch.uint8)
    first = -base.data_ptr() % 16  # a place on a 16 byte boundary

    def unit(row_bytes: int, stride: int, offset: int) -> int:
        source = torch.as_strided(base, (3, row_bytes), (stride, 1), first + offset)
        table = compact_rows.describe([source], [torch.zeros(64 * 3, dtype=torch.uint8)[: 3 * row_bytes].view(3, row_bytes)])
        assert int(table["count"]) == 1
        entry = table["item"][0]
        assert (int(entry["source"]), int(entry["stride"]), int(entry["row_bytes"])) == (source.data_ptr(), stride, row_bytes)
        return int(entry["unit"])

    assert unit(32, 48, 0) == 16
    assert unit(32, 40, 0) == 4
    assert unit(32, 48, 4) == 4
    assert unit(32, 48, 1) == 1
    assert unit(7, 16, 0) == 1
    assert unit(12, 12, 0) == 4
    empty = compact_rows.describe([torch.zeros(3, 0)], [torch.zeros(3, 0)])
    assert int(empty["count"]) == 0


def _aligned(*shape: int, dtype: torch.dtype, offset: int = 0, gap: int = 0, apart: int = 0) -> torch.Tensor:
    """The first element lies `offset` elements past a 16 byte boundary; rows are `gap`, heads `apart` elements apart."""
    strides = list(torch.empty(shape, device="meta").stride())
    if len(shape) == 3:
        strides[:2] = shape[1] * (shape[2] + apart) + gap, shape[2] + apart
    memory = torch.zeros(shape[0] * strides[0] + offset + 16, dtype=dtype)
    return memory.as_strided(shape, strides, -memory.data_ptr() % 16 // memory.element_size() + offset)


def _kv(*, dim: int = 16, rotary: int = 8, **changes: dict[str, int]) -> tuple[bool, bool, int]:
    """wide_turn, wide_copy and the threads for bfloat16, 4 heads over 2."""
    bf16 = torch.bfloat16

    def heads(name: str, *shape: int) -> torch.Tensor:
        return _aligned(*shape, dtype=bf16, **changes.get(name, {}))

    tables = [_aligned(5, rotary, dtype=torch.float32, **changes.get(name, {})) if rotary else None for name in ("cos", "sin")]
    rows = torch.zeros(3, dtype=torch.int32)
    q, k, v = heads("q", 3, 4, dim), heads("k", 3, 2, dim), heads("v", 3, 2, dim)
    found = store_kv.describe(q, k, v, *tables, rows, rows, heads("pages", 2, 1, 4, 2, dim), None, heads("rotated", 3, 4, dim))
    assert (int(found["k"]["row"]), int(found["k"]["head"])) == k.stride()[:2]
    return bool(found["wide_turn"]), bool(found["wide_copy"]), store_kv.threads(found, 2)


def test_kv_moves_16_bytes_where_everything_allows_it() -> None:
    assert _kv() == (True, True, 32)  # (4 + 2) heads of a pair of pieces each, 2 heads of 2 pieces
    assert _kv(dim=128, rotary=64) == (True, True, 96)  # 6 * 8 + 2 * 16 = 80 pieces
    assert _kv(rotary=4) == (False, True, 96)  # 6 * 12 + 2 * 2
    assert _kv(rotary=0) == (True, True, 32)
    assert _kv(dim=20) == (False, False, 128)  # 6 * 12 + 2 * 20
    for name in ("q", "k"):
        assert _kv(**{name: {"offset": 1}})[:2] == (False, True), name
        assert _kv(**{name: {"gap": 4}})[:2] == (False, True), name
        assert _kv(**{name: {"apart": 2}})[:2] == (False, True), name  # rows still lie on boundaries
        assert _kv(**{name: {"gap": 8, "apart": 8}})[:2] == (True, True), name
    assert _kv(rotated={"offset": 4})[:2] == (False, True)
    assert _kv(v={"offset": 1})[:2] == (True, False)
    assert _kv(v={"gap": 4})[:2] == (True, False)
    assert _kv(v={"apart": 4})[:2] == (True, False)
    assert _kv(pages={"offset": 4})[:2] == (False, False)
    for name in ("cos", "sin"):
        assert _kv(**{name: {"offset": 1}})[:2] == (False, True), name
    assert _kv(dim=512, rotary=1) == (False, True, 512)  # more pieces than a block has threads
