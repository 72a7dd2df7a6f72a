"""`make gpu-report`: what compiling says of every GPU kernel, Triton's and CUDA C++, as one list.

Joins build/static_report.json (`make static-report`) and build/nvcc_check.json (`make nvcc-check`) into build/gpu_report.json:
per kernel, shape and architecture its registers per thread, bytes spilled per thread and shared per program, the share of a
processor's warps that it can occupy and what limits it, bytes and FLOPs that the planner declares for the whole call (none for
CUDA C++, whose sources are compiled for no shape), the least bytes that a lane loads at a time in the loop over operands, how
many matrix instructions there are, and whether it keeps the budget (static_report.wrong; CUDA C++ spills nothing). Status 1 if
one does not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from static_report import wrong

from dyndepth.files import replacing


def joined(triton: list[dict[str, Any]], cuda: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of both in one form. `shape` is the benchmark case, its dtype, and "live" with a counter on the device."""
    found = []
    for row in triton:
        shape = f"{row['case']} {row['dtype']}" + (" live" if row.get("counter") else "")
        more = {
            "bytes": row["bytes"], "flops": row["flops"], "load_bytes_per_lane": row["load"],
            "matrix_instructions": row["matrix"], "ok": wrong(row) is None,
        }  # fmt: skip
        found.append(_entry(row, "triton", shape) | more)
    for row in cuda:
        none = dict.fromkeys(("bytes", "flops", "load_bytes_per_lane"))
        found.append(_entry(row, "cuda", "any") | none | {"matrix_instructions": 0, "ok": row["spilled"] == 0})
    return found


def _entry(row: dict[str, Any], provider: str, shape: str) -> dict[str, Any]:
    return {
        "kernel": row["kernel"], "provider": provider, "shape": shape, "arch": row["target"], "registers": row["registers"],
        "spills": row["spilled"], "shared_bytes": row["shared"], "occupancy": row["occupancy"], "limiter": row["limiter"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build"))
    folder = parser.parse_args().folder
    rows = []
    for name, target in (("static_report.json", "static-report"), ("nvcc_check.json", "nvcc-check")):
        if not (folder / name).exists():
            sys.exit(f"gpu-report: there is no {folder / name}; `make {target}` writes it")
        rows.append(json.loads((folder / name).read_text())["rows"])
    found = joined(*rows)
    with replacing(folder / "gpu_report.json") as temporary:
        temporary.write_text(json.dumps(found, indent=0) + "\n")
    faults = [entry for entry in found if not entry["ok"]]
    print(f"{folder / 'gpu_report.json'}: {len(found)} entries, {len(faults)} over budget")
    for entry in faults:
        print(f"{entry['arch']} {entry['provider']} {entry['kernel']} {entry['shape']}: {entry}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
