"""What the compilers say of CUDA kernels is read right, and what they may say is arithmetic done by hand."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

check: Any = importlib.import_module("nvcc_check")
occupancy: Any = importlib.import_module("occupancy")

_LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'compact_rows_once' for 'sm_90'
ptxas info    : Function properties for compact_rows_once
    8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2440 bytes smem
ptxas info    : Compiling entry function 'accept_drafts_greedy' for 'sm_90'
ptxas info    : Function properties for accept_drafts_greedy
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 26 registers, used 0 barriers
"""


def test_a_log_is_read() -> None:
    greedy, once = check.kernels(_LOG)
    assert greedy == {
        "kernel": "accept_drafts_greedy", "target": "sm_90", "spilled": 0, "registers": 26, "shared": 0, "warps": 1,
        "occupancy": 0.5, "limiter": "blocks",
    }  # fmt: skip
    assert (once["spilled"], once["registers"], once["shared"], once["warps"]) == (40, 40, 2440, 32)


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "share", "limiter"),
    [
        ("sm_90", 8, 32, 0, 1.0, "warps"),
        # 40 registers: 1280 a warp, 12 warps in a quarter's 16384, 48 in all: one block of 32.
        ("sm_90", 32, 40, 0, 0.5, "registers"),
        # 255 registers: 8160 round up to 8192, 2 warps a quarter: two blocks of four.
        ("sm_80", 4, 255, 0, 0.125, "registers"),
        # 100 KiB and 1 of the driver's: two in 228, one in 164, none but itself in 100.
        ("sm_90", 4, 32, 100 << 10, 0.125, "shared"),
        ("sm_80", 4, 32, 100 << 10, 0.0625, "shared"),
        ("sm_86", 4, 32, 99 << 10, 4 / 48, "shared"),
        # 128 vector registers of 512: four waves a SIMD, of eight.
        ("gfx942", 4, 128, 0, 0.5, "registers"),
        ("gfx942", 4, 64, 32 << 10, 0.25, "shared"),
        ("gfx950", 4, 64, 32 << 10, 0.5, "shared"),
    ],
)
def test_occupancy_by_hand(target: str, warps: int, registers: int, shared: int, share: float, limiter: str) -> None:
    assert occupancy.occupancy(target, warps, registers, shared) == (pytest.approx(share), limiter)


def test_every_kernel_has_its_threads() -> None:
    sources = "".join(path.read_text() for path in check.SOURCES.glob("*.cu"))
    assert all(f"{name}(" in sources for name in check.THREADS)
    assert sources.count("__global__") == len(check.THREADS)


def test_the_sources_compile() -> None:
    """With the compilers of `make nvcc-check`, where that was run."""
    nvcc, library = check.installed(Path(__file__).parent.parent / "build" / "nvcc")
    if nvcc is None or library is None:
        pytest.skip("no nvcc in build/nvcc (make nvcc-check installs it)")
    for source in sorted(check.SOURCES.glob("*.cu")):
        assert check.by_nvrtc(library, source, "sm_90") > 0
        assert all(row["spilled"] == 0 for row in check.by_nvcc(nvcc, source, "sm_90"))
