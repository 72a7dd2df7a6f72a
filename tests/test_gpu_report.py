"""`make gpu-report`: both providers' kernels in one list, from the results in docs and from rows with faults."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FIELDS = {
    "kernel", "provider", "shape", "arch", "registers", "spills", "shared_bytes", "occupancy", "limiter", "bytes", "flops",
    "load_bytes_per_lane", "matrix_instructions", "ok",
}  # fmt: skip


def _rows(name: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "docs" / "results" / name).read_text())["rows"]


def _report(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_report.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_is_in_docs_keeps_the_budget(tmp_path: Path) -> None:
    """All targets, all kernels, and every entry has every field."""
    for name in ("static_report.json", "nvcc_check.json"):
        (tmp_path / name).write_text((ROOT / "docs" / "results" / name).read_text())
    done = _report(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_report.json").read_text())
    assert len(found) == len(_rows("static_report.json")) + len(_rows("nvcc_check.json"))
    assert all(set(entry) == FIELDS and entry["ok"] for entry in found)
    targets = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"}
    assert {entry["arch"] for entry in found if entry["provider"] == "triton"} == targets
    assert {entry["arch"] for entry in found if entry["provider"] == "cuda"} == {"sm_80", "sm_90", "sm_100"}
    assert all(entry["registers"] > 0 for entry in found)


def test_every_dtype_was_compiled_for_every_target_in_one_run() -> None:
    """Nothing was left out, and nothing compiled twice: the file is what one run wrote."""
    rows = _rows("static_report.json")
    keys = [(row["target"], row["op"], row["kernel"], row["case"], row["dtype"], row["counter"]) for row in rows]
    by_dtype = {dtype: {key[:2] for key in keys if key[4] == dtype} for dtype in ("bfloat16", "float16", "float32")}
    assert by_dtype["bfloat16"] == by_dtype["float16"] == by_dtype["float32"]
    assert len(by_dtype["bfloat16"]) == 8 * 8
    order = [(row["target"], row["op"]) for row in rows]
    assert [one for at, one in enumerate(order) if at == 0 or order[at - 1] != one] == list(dict.fromkeys(order))


def test_a_spill_of_either_provider_is_over_budget(tmp_path: Path) -> None:
    report = importlib.import_module("gpu_report")
    half = next(row for row in _rows("static_report.json") if row["dtype"] == "bfloat16")
    own = _rows("nvcc_check.json")[0]
    found = report.joined([half, half | {"spilled": 8}], [own, own | {"spilled": 8}])
    assert [entry["ok"] for entry in found] == [True, False, True, False]
    for name, rows in (("static_report.json", [half | {"spilled": 8}]), ("nvcc_check.json", [own])):
        (tmp_path / name).write_text(json.dumps({"rows": rows}))
    done = _report(tmp_path)
    assert done.returncode == 1
    assert "2 entries, 1 over budget" in done.stdout


def test_a_report_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = _report(tmp_path)
    assert done.returncode == 1
    assert "static_report.json; `make static-report` writes it" in done.stderr
