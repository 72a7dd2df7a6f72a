"""Triton's kernels compile without a GPU for what we say they run on, and fit into its shared memory."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dyndepth import ops  # noqa: F401  (registers the ops)
from dyndepth.op import REGISTRY
from dyndepth.testing import CASES

ROOT = Path(__file__).parent.parent
TARGETS = ("sm_86", "gfx942")  # the two with the least shared memory; `make static-report` does all of them
launch: Any = importlib.import_module("dyndepth.kernels.launch")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A process of its own: the report replaces Triton's driver."""
    output = tmp_path_factory.mktemp("report") / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "static_report.py"), "--dtypes", "bfloat16", "--output", str(output),
         "--targets", *TARGETS],
        capture_output=True, text=True, timeout=800, env=environment | {"PYTHONPATH": str(ROOT / "benchmarks")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return json.loads(output.read_text())["rows"]


def test_every_op_compiles_and_fits(rows: list[dict[str, Any]]) -> None:
    with_triton = {name for name, op in REGISTRY.items() if "triton" in op.providers}
    for target in TARGETS:
        assert {row["op"] for row in rows if row["target"] == target} == with_triton
    assert all(row["registers"] > 0 and row["warps"] > 0 for row in rows)
    assert max(row["shared"] for row in rows if row["target"] == "gfx942") <= 65536
    assert max(row["shared"] for row in rows if row["target"] == "sm_86") <= 101376
    idle, nobody = ("compact_rows", "store_kv"), ("llama64_none_live",)
    assert all(row["bytes"] > 0 and (row["flops"] > 0) == (row["op"] not in idle) for row in rows if row["case"] not in nobody)
    products = [row for row in rows if row["op"] == "ragged_linear"]
    assert all(row["matrix"] > 0 and row["load"] >= 16 and row["spilled"] == 0 for row in products)
    report = importlib.import_module("static_report")
    multiply = {row["kernel"] for row in rows if row["matrix"]}
    assert multiply == set(report._PRODUCTS), "kernels that multiply matrices, and are held to what those must do"


def test_every_kernel_that_takes_a_counter_compiles_with_and_without(rows: list[dict[str, Any]]) -> None:
    """What passes in graph style launch, and what passes in slices do: as the launches themselves said."""
    found: dict[tuple[str, str], set[bool | None]] = defaultdict(set)
    for row in rows:
        found[row["target"], row["kernel"]].add(row["counter"])
        assert row["figures_of"] == "call"
    none = ("partition", "move")
    assert found == {(target, kernel): {None} if kernel in none else {False, True} for target, kernel in found}
    assert {kernel for _, kernel in found} > {"block_stats", "logit_stats", "fold", "attend", "combine", "backfill_kv"}


def test_bytes_and_flops_of_a_call_by_hand() -> None:
    """From shapes alone, however large: 32 rows at 8192 tokens of 8 K,V heads; 512 rows through two weights."""
    report = importlib.import_module("static_report")
    half = torch.bfloat16

    def of(op: str, name: str) -> dict[str, int]:
        return report.figures(op, next(case for case in CASES[op] if case.name == name), half)

    seen = 32 * 8192
    kv, row = seen * 2 * 8 * 128 * 2, 32 * (2 * 32 * 128 * 2 + 8 + 4 * 8192 // 16)
    assert of("ragged_attention", "llama32_8192") == {"bytes": kv + row, "flops": 4 * seen * 32 * 128}
    weights, rows = 2 * 4096 * 14336 * 2, 512 * (4096 + 14336) * 2
    assert of("ragged_linear", "llama512_gated") == {"bytes": weights + rows, "flops": 4 * 512 * 4096 * 14336}
    assert of("ragged_linear", "llama64_none_live") == {"bytes": 4, "flops": 0}


def test_a_kernel_that_does_not_fit_is_a_fault() -> None:
    report = importlib.import_module("static_report")
    row = {"target": "sm_86", "dtype": "float32", "kernel": "fold", "shared": 101377, "spilled": 0}
    assert "asks for 101377 bytes of shared memory, sm_86 has 101376" in report.wrong(row)
    assert report.wrong(row | {"shared": 101376}) is None
    assert report.wrong(row | {"shared": 0, "spilled": 25}) == "spills 25 bytes per thread"
    half = row | {"dtype": "float16", "kernel": "fold", "shared": 0}
    assert report.wrong(half) is None
    assert report.wrong(half | {"spilled": 1}) == "spills 1 bytes per thread"
    product = half | {"kernel": "ragged_linear", "matrix": 4, "load": 16, "wide": 1.0}
    assert report.wrong(product) is None
    assert "without matrix instructions" in report.wrong(product | {"matrix": 0})
    assert "loads 8 bytes per lane in its loop, wanted 16" in report.wrong(product | {"load": 8})
    assert "loads None bytes" in report.wrong(product | {"load": None})
    attention = product | {"kernel": "attend", "load": 4, "wide": 0.8}
    assert report.wrong(attention) is None
    assert "loads 69% of its operands 16 bytes per lane at a time, wanted 70%" in report.wrong(attention | {"wide": 0.69})
    assert "loads 0% of its operands" in report.wrong(attention | {"wide": None})
    assert report.wrong(product | {"dtype": "float32", "matrix": 0, "load": None, "wide": None, "spilled": 24}) is None


_PTX = """
$L__BB0_1:
    ld.global.b32 %r1, [%rd1];
    cp.async.ca.shared.global [ %r9 + 0 ], [ %rd2 + 0 ], 0x8, %r3;
$L__BB0_2:
    {load}
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{ %r1 }};
waitLoop:
    @!complete bra.uni waitLoop;
    @%p1 bra $L__BB0_2;
    st.global.b32 [%rd3], %r1;
    @%p2 bra $L__BB0_1;
"""
_AMD = """
.LBB0_1:
    buffer_load_ushort v1, v2, s[8:11], 0 offen
.LBB0_2:                                ; in Loop
    {load}
    ds_read_b64 v[2:3], v4
    v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
    s_cbranch_scc1 .LBB0_2
    s_cbranch_scc0 .LBB0_1
"""


@pytest.mark.parametrize(
    ("code", "load", "size"),
    [
        (_PTX, "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r3;", 16),
        (_PTX, "cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r3;", 4),
        (_PTX, "ld.global.v4.b32 {{ %r1, %r2, %r3, %r4 }}, [ %rd1 + 0 ];", 16),
        (_PTX, "@%p3 ld.global.L1::evict_last.v2.b64 {{ %rd1, %rd2 }}, [ %rd1 ];", 16),
        (_PTX, "ld.global.b16 %rs1, [ %rd1 + 0 ];", 2),
        (_PTX, "", 4),  # the loop around it
        (_AMD, "buffer_load_dwordx4 v0, s[8:11], 0 offen lds", 16),
        (_AMD, "global_load_dwordx2 v[0:1], v2, s[0:1]", 8),
        (_AMD, "global_load_lds_dword v0, v1, off", 4),
        (_AMD, "", 2),
    ],
)
def test_the_smallest_load_of_a_loop_is_found(code: str, load: str, size: int) -> None:
    report = importlib.import_module("static_report")
    assert min(report.loads(code.format(load=load))) == size
    assert report.loads("add.s32 %r1, %r2, %r3;") == []


def test_where_a_loop_was_unrolled_all_loads_count() -> None:
    report = importlib.import_module("static_report")
    unrolled = "ld.global.v4.b32 {%r1}, [%rd1];\nmma.sync.aligned %r1;\nld.global.b32 %r1, [%rd1];"
    assert report.loads(unrolled) == [16, 4]
    assert report.loads(unrolled.replace("mma.sync", "add")) == []


@pytest.mark.parametrize("shared", [65536, 101376, 163840, 232448])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_choices_shrink_with_shared_memory_and_never_below_what_a_tile_needs(shared: int, itemsize: int) -> None:
    device = launch.Device(132, shared)
    for rows_ in (1, 16, 64, 100):
        for width in (64, 576, 4096, 16384):
            config = launch.exit_stats(rows_, width, 128256, device, itemsize)
            bytes_ = config.num_stages * (config.block_rows + config.block_columns) * config.block_inner * itemsize
            assert bytes_ <= shared or config.block_inner == 16
            assert config.block_inner >= 16
            assert config.num_stages >= 2
    small, large = (launch.exit_stats(64, 4096, 128256, launch.Device(132, s), 2) for s in (65536, 232448))
    assert small.block_inner * small.num_stages < large.block_inner * large.num_stages
