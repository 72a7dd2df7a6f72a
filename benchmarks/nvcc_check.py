"""`make nvcc-check`: the CUDA C++ sources compiled by nvcc and by NVRTC, for every target, without a GPU.

nvcc comes from packages (the make target installs them); NVRTC is the library that users' machines compile with, through CuPy:
here it is called as it is, without any folder of headers, as there. Writes build/nvcc_check.json; status 1 if a source does not
compile or a kernel spills.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from occupancy import occupancy

from dyndepth.files import replacing

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
TARGETS = ("sm_80", "sm_90", "sm_100")
#: Threads of a block, as dyndepth/cuda launches them at the most.
THREADS = {
    "accept_drafts_greedy": 32, "accept_drafts_sampled": 1024, "compact_rows_count": 1024, "compact_rows_move": 1024,
    "compact_rows_once": 1024, "store_kv_bfloat16": 512, "store_kv_float16": 512, "store_kv_float32": 512,
}  # fmt: skip
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def kernels(log: str) -> list[dict[str, Any]]:
    """What ptxas said of every kernel: registers of a thread, bytes of stack and of spills, shared memory of a block."""
    found: list[dict[str, Any]] = []
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            found.append({"kernel": entry[1], "target": entry[2]})
        elif spills := _SPILLS.search(line):
            found[-1] |= {"spilled": sum(map(int, spills.groups()))}
        elif used := _USED.search(line):
            found[-1] |= {"registers": int(used[1]), "shared": int(used[2] or 0)}
    for row in found:
        row["warps"] = THREADS[row["kernel"]] // 32
        row["occupancy"], row["limiter"] = occupancy(row["target"], row["warps"], row["registers"], row["shared"])
    return sorted(found, key=lambda row: row["kernel"])


def by_nvcc(nvcc: Path, source: Path, target: str) -> list[dict[str, Any]]:
    """Kernels of one source; raises with the compiler's log."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(nvcc), "-cubin", f"-arch={target}", "-std=c++17", "-Xptxas", "-v", "-Werror", "all-warnings"]
        done = subprocess.run([*command, "-o", f"{folder}/out.cubin", str(source)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} for {target}: {done.stdout}{done.stderr}")
    return kernels(done.stdout + done.stderr)


def by_nvrtc(library: Path, source: Path, target: str) -> int:
    """Bytes of the cubin that NVRTC makes with the options of dyndepth/cuda/compiler.py; raises with its log."""
    nvrtc = ctypes.CDLL(str(library))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text = source.read_bytes()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.name.encode(), 0, None, None), "create")
    options = [f"--gpu-architecture={target}".encode(), b"--std=c++17"]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    if failed:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{source.name} for {target}: {log.value.decode()}")
    _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "size of the cubin")
    _check(nvrtc.nvrtcDestroyProgram(ctypes.byref(program)), "destroy")
    return size.value


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"NVRTC: {what} failed with status {status}")


def installed(root: Path) -> tuple[Path | None, Path | None]:
    """nvcc and libnvrtc among the packages under `root`."""
    compilers, libraries = sorted(root.rglob("bin/nvcc")), sorted(root.rglob("libnvrtc.so.*"))
    return next(iter(compilers), None), next(iter(libraries), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="a folder to look for nvcc and libnvrtc in")
    parser.add_argument("--output", type=Path, default=Path("build") / "nvcc_check.json")
    wish = parser.parse_args()
    nvcc, library = installed(wish.root)
    if nvcc is None or library is None:
        sys.exit(f"nvcc-check: wanted nvcc and libnvrtc under {wish.root}, found {nvcc} and {library}")
    rows = []
    for source in sorted(SOURCES.glob("*.cu")):
        for target in TARGETS:
            size = by_nvrtc(library, source, target)
            rows += [{"source": source.name, **row} for row in by_nvcc(nvcc, source, target)]
            print(f"{source.name} {target}: NVRTC makes {size} bytes")
    version = subprocess.run([str(nvcc), "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"release (\S+),", version)
    with replacing(wish.output) as temporary:
        temporary.write_text(json.dumps({"nvcc": release[1] if release else "", "rows": rows}, indent=0) + "\n")
    spilled = [row for row in rows if row["spilled"]]
    for row in rows:
        held = f"{row['occupancy']:.0%} of all warps ({row['limiter']})"
        sizes = f"{row['registers']} registers, {row['shared']} bytes shared, {row['spilled']} bytes spilled"
        print(f"{row['target']} {row['kernel']}: {sizes}, {held}")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
