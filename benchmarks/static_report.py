"""`make static-report`: every Triton kernel compiled for every target without a GPU; registers, spills, shared memory.

The host functions run as they would on a GPU, on the benchmark cases (tensors without memory), but their launches only
compile: what is reported is what they would launch there. Cases without a counter on the device are compiled with one too, as
passes in graph style launch them. Writes build/static_report.json; status 1 if a kernel does not
compile, asks for more shared memory than the target has, spills (in half precision at all, in float32 more than a few bytes),
or multiplies half precision without matrix instructions or with most operands loaded in pieces of less than 16 bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from occupancy import occupancy
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import dyndepth.ops  # noqa: F401  (registers the ops)
from dyndepth.files import replacing
from dyndepth.op import REGISTRY
from dyndepth.plan.of_call import of_call
from dyndepth.plan.traffic import Traffic
from dyndepth.testing import CASES
from dyndepth.testing.cases import Case

#: name -> target, processors, bytes of shared memory a program can have (CUDA C++ Programming Guide, table of compute
#: capabilities; CDNA3 and CDNA4 ISA guides).
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 108, 166912),
    "sm_86": (GPUTarget("cuda", 86, 32), 84, 101376),
    "sm_89": (GPUTarget("cuda", 89, 32), 142, 101376),
    "sm_90": (GPUTarget("cuda", 90, 32), 132, 232448),
    "sm_100": (GPUTarget("cuda", 100, 32), 148, 232448),
    "sm_120": (GPUTarget("cuda", 120, 32), 170, 101376),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 304, 65536),
    "gfx950": (GPUTarget("hip", "gfx950", 64), 256, 163840),
}
#: Bytes of stack per thread that a kernel in float32 may have: index arithmetic that the assembler parked. In halves none.
_SPILL = 24
#: Kernels that multiply matrices: in half precision on matrix instructions, and of the bytes that their innermost loop over
#: operands loads at least this share comes 16 bytes a lane at a time (the rest are gains and page numbers).
_PRODUCTS, _LOAD, _SHARE = ("attend", "backfill_kv", "block_stats", "project_qkv", "ragged_linear"), 16, 0.7
#: Of these all of it does.
_WHOLE = ("ragged_linear",)
#: In PTX and AMD's assembly: matrix instructions, loads from memory with what tells their size, labels, jumps to them.
_MATRIX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)")
_LOADS = re.compile(
    r"\bcp\.async\.c[ag]\.shared\.global.*?\], (?P<copied>0x\w+)"
    r"|\bld\.global\S*?(?:\.v(?P<vector>[248]))?\.[bsuf](?P<bits>\d+)\s"
    r"|\b(?:buffer|global|flat)_load_(?:lds_)?[su]?(?P<amd>dwordx[234]|dword|short|byte)"
)
#: Counters on the device by argument, and how many int32 they are.
_COUNTERS = {"live": 1, "section": 2}
_AMD_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
_LABEL, _JUMP = re.compile(r"^\s*(\$?[.\w$]+):", re.MULTILINE), re.compile(r"\b(?:bra(?:\.uni)?|s_c?branch\w*)\s+(\$?[.\w$]+)")
launch: Any = importlib.import_module("dyndepth.kernels.launch")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Offline:
    """What Triton asks a driver for, answered for a device that is not there."""

    def __init__(self, target: GPUTarget, number: int) -> None:
        self.target, self.number = target, number

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compiled(targets: list[str], ops: list[str], dtypes: list[torch.dtype]) -> list[dict[str, Any]]:
    """One entry per target, op, case, dtype, kernel that the op's host function would launch, and whether with a counter."""
    rows: list[dict[str, Any]] = []
    now: dict[str, Any] = {}

    def seen(name: str, found: dict[str, Any]) -> None:
        entry = now | {"kernel": name, **found}
        if entry not in rows:
            rows.append(entry)

    for name in targets:
        with offline(name, seen):
            for op in ops:
                host = getattr(importlib.import_module(f"dyndepth.kernels.{op}"), op)
                for case in CASES[op]:
                    for dtype in dtypes if case.bench else ():
                        figured = figures(op, case, dtype)
                        for arguments, more in both_ways(without_memory(case, dtype)):
                            now = {"target": name, "op": op, "case": case.name, "dtype": str(dtype).removeprefix("torch.")}
                            now |= figured | {"bytes": figured["bytes"] + more, "figures_of": "call"}
                            host(**arguments)
    return rows


def both_ways(arguments: dict[str, Any]) -> list[tuple[dict[str, Any], int]]:
    """As the case has them; and, if it has no counter though the op takes one, with one. Bytes of the counter beside each."""
    return [(arguments, 0)] + [
        (arguments | {name: torch.empty(size, dtype=torch.int32, device="meta")}, 4 * size)
        for name, size in _COUNTERS.items()
        if name in arguments and arguments[name] is None
    ]


@contextlib.contextmanager
def offline(name: str, seen: Callable[[str, dict[str, Any]], None]) -> Iterator[Any]:
    """Inside, launches of Triton kernels only compile, for a target; `seen` gets names and facts. Yields its launch.Device."""
    run, known = JITFunction.run, launch.Device.of
    target, processors, shared = TARGETS[name]

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        given = dict(zip(self.arg_names, arguments, strict=False)) | options
        seen(self.__name__.lstrip("_"), held(name, facts(kernel, name)) | {"counter": _counted(given)})
        return kernel

    JITFunction.run = compile_only
    driver.set_active(Offline(target, list(TARGETS).index(name)))
    here = launch.Device(processors, shared, target.warp_size, name)
    launch.Device.of = staticmethod(lambda tensor: here)
    try:
        yield here
    finally:
        JITFunction.run = run
        launch.Device.of = known


def _counted(given: dict[str, Any]) -> bool | None:
    """Whether a launch reads a counter on the device; None of a kernel that knows none."""
    for name in ("HAS_LIVE", "HAS_SECTION"):
        if name in given:
            return bool(given[name])
    return given["live"] is not None if "live" in given else None


def without_memory(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """A case's arguments on the meta device: shapes and strides alone."""

    def emptied(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return [emptied(item) for item in value] if isinstance(value, list) else value

    if not case.gpu:
        return {name: emptied(value) for name, value in case.build(dtype).items()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        arguments = case.build(dtype)
    return {name: emptied(value) for name, value in arguments.items()}


class _OnMeta(TorchFunctionMode):
    """Random floats have a shape and no memory; integers, drawn or not, keep their values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.randn, torch.rand):
            return func(*args, device="meta")
        return func(*args, **(kwargs or {}))


@functools.cache
def _figures(op: str, name: str, dtype: torch.dtype) -> Traffic:
    case = next(case for case in CASES[op] if case.name == name)
    with _OnMeta():
        return of_call(op, case.make(dtype, torch.Generator().manual_seed(1)))


def figures(op: str, case: Case, dtype: torch.dtype) -> dict[str, int]:
    """Bytes and FLOPs that the planner declares for the whole call, whichever of its kernels the entry is of."""
    moved = _figures(op, case.name, dtype)
    return {"bytes": moved.bytes, "flops": moved.flops}


def facts(kernel: Any, target: str) -> dict[str, Any]:
    """Warps, shared memory, registers per thread, registers spilled, matrix instructions, the smallest load of the
    loop over operands and which share of its bytes comes 16 at a time."""
    code = kernel.asm["ptx" if target.startswith("sm_") else "amdgcn"]
    sizes = loads(code)
    found = {
        "warps": kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        "matrix": len(_MATRIX.findall(code)),
        "load": min(sizes, default=None),
        "wide": round(sum(size for size in sizes if size >= _LOAD) / sum(sizes), 4) if sizes else None,
    }
    if target.startswith("sm_"):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [str(_TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        return found | {"registers": numbers["REG"], "spilled": numbers["LOCAL"] + numbers["STACK"]}
    text = kernel.asm["amdgcn"]
    numbers = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", text)}
    return found | {"registers": numbers["vgpr_count"], "spilled": numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]}


def held(target: str, found: dict[str, Any]) -> dict[str, Any]:
    """The facts, and how many of a processor's warps may run it, and what keeps the others away."""
    share, limiter = occupancy(target, found["warps"], found["registers"], found["shared"])
    return found | {"occupancy": round(share, 4), "limiter": limiter}


def loads(code: str) -> list[int]:
    """Bytes that a lane loads at a time, by instruction: of the innermost loop that loads and multiplies by matrix
    instructions; of all the code where a loop of known length was unrolled."""
    labels = {match[1]: match.start() for match in _LABEL.finditer(code)}
    loops = [
        code[labels[jump[1]] : jump.end()] for jump in _JUMP.finditer(code) if labels.get(jump[1], len(code)) < jump.start()
    ]
    inner = min((loop for loop in loops if _MATRIX.search(loop) and _LOADS.search(loop)), key=len, default="")
    whole = code if _MATRIX.search(code) and not inner else inner
    return [_bytes(load) for load in _LOADS.finditer(whole)]


def _bytes(load: re.Match[str]) -> int:
    """`0x10` of an asynchronous copy, `.v4.b32` of PTX, `dwordx4` of AMD: 16 each."""
    if load["copied"]:
        return int(load["copied"], 16)
    return _AMD_BYTES[load["amd"]] if load["amd"] else int(load["vector"] or 1) * int(load["bits"]) // 8


def wrong(row: dict[str, Any]) -> str | None:
    """What is wrong with a kernel, or None."""
    if row["shared"] > TARGETS[row["target"]][2]:
        return f"asks for {row['shared']} bytes of shared memory, {row['target']} has {TARGETS[row['target']][2]}"
    half = row["dtype"] != "float32"
    if row["spilled"] > (0 if half else _SPILL):
        return f"spills {row['spilled']} bytes per thread"
    if not half or row["kernel"] not in _PRODUCTS:
        return None
    if row["matrix"] == 0:
        return "multiplies without matrix instructions"
    if row["kernel"] in _WHOLE and (row["load"] or 0) < _LOAD:
        return f"loads {row['load']} bytes per lane in its loop, wanted {_LOAD}"
    if (row["wide"] or 0) < _SHARE:
        return f"loads {row['wide'] or 0:.0%} of its operands {_LOAD} bytes per lane at a time, wanted {_SHARE:.0%}"
    return None


def main() -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("static-report: compiles, so TRITON_INTERPRET must not be set")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    with_triton = sorted(name for name, op in REGISTRY.items() if "triton" in op.providers)
    parser.add_argument("--ops", nargs="*", default=with_triton, choices=with_triton)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--output", type=Path, default=Path("build") / "static_report.json")
    wish = parser.parse_args()
    rows = compiled(wish.targets, wish.ops, [getattr(torch, name) for name in wish.dtypes])
    result = {"triton": triton.__version__, "rows": rows}
    with replacing(wish.output) as temporary:
        temporary.write_text(json.dumps(result, indent=0) + "\n")
    faults = [(row, why) for row in rows if (why := wrong(row))]
    print(f"{len(rows)} kernels for {len(wish.targets)} targets; {len(faults)} at fault")
    for row, why in faults:
        print(f"{row['target']} {row['op']} {row['case']} {row['dtype']} {row['kernel']}: {why}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
