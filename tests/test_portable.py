"""What is written for one family of processors has an else for all others, and it compiles."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).resolve().parent.parent / "csrc"
#: Files with intrinsics: the others are vector types, which any GCC or clang lowers.
SOURCES = sorted(path for path in CSRC.glob("cpu/*.cpp") if "DYN_AVX512" in path.read_text() or "DYN_AMX" in path.read_text())


def test_there_are_such_files() -> None:
    assert {"amx.cpp", "attend_tiles.cpp"} <= {path.name for path in SOURCES}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_intrinsics(source: Path) -> None:
    """Without `__linux__`, on which they depend, nothing x86 is left of these files."""
    includes = [f"-I{path}" for path in [str(CSRC), *include_paths()]]
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    run = subprocess.run(
        ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unused-parameter",
         "-U__linux__", "-U__linux", "-Ulinux", target, *includes, str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
