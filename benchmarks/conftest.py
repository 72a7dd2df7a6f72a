"""The copy roof, measured in the same run, and a table that says bytes and shares of it; also as build/bench.json."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dyndepth.files import replacing

torch.set_grad_enabled(False)


@pytest.fixture(scope="session")
def copy_roof() -> float:
    """Bytes per second of a large copy, read and write counted; median of twenty."""
    source = torch.ones(64 * 2**20, dtype=torch.float32)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(20):
        begin = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - begin)
    return 2 * source.numel() * 4 / statistics.median(seconds)


@pytest.fixture(scope="session")
def evict() -> Any:
    """Writes 96 MiB, more than a core's private caches hold, so that the next call starts cold.

    A server's shared last-level cache may be larger and keep some: rates above the copy roof say so.
    """
    ballast = torch.zeros(96 * 2**20, dtype=torch.uint8)
    return lambda: ballast.add_(1)


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """Prints the table of bytes, rates and shares of the copy roof, and writes it as build/bench.json."""
    session = getattr(config, "_benchmarksession", None)
    timed = [bench for bench in getattr(session, "benchmarks", []) if "bytes" in bench.extra_info]
    if not timed:
        return
    roof = timed[0].extra_info["copy_roof"]
    rows = sorted((_row(bench, roof) for bench in timed), key=lambda r: (r["op"], r["case"], r["dtype"], r["provider"]))
    write = terminalreporter.write_line
    write("")
    write(
        f"cold cache, {torch.get_num_threads()} threads; copy roof measured in this run: {roof / 1e9:.1f} GB/s (read + write)"
    )
    write(
        f"{'op':<17}{'case':<18}{'dtype':<10}{'provider':<9}{'median us':>10}{'p90 us':>9}{'KiB':>9}{'GB/s':>7}{'of roof':>9}"
    )
    for row in rows:
        write(
            f"{row['op']:<17}{row['case']:<18}{row['dtype']:<10}{row['provider']:<9}{row['median_us']:>10.1f}"
            f"{row['p90_us']:>9.1f}{row['bytes'] / 1024:>9.0f}{row['bytes_per_s'] / 1e9:>7.1f}{row['share_of_copy_roof']:>9.1%}"
        )
    path = Path(config.rootpath) / "build" / "bench.json"
    with replacing(path) as temporary:
        found = {"threads": torch.get_num_threads(), "copy_roof_bytes_per_s": roof, "rows": rows}
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    write(f"wrote {path}")


def _row(bench: Any, roof: float) -> dict[str, Any]:
    """One timed case; the keys are those of build/bench_gpu.json."""
    info, times = bench.extra_info, sorted(bench.stats.data)
    rate = info["bytes"] / bench.stats.median
    return {
        "op": info["op"],
        "case": info["case"],
        "dtype": info["dtype"],
        "provider": info["provider"],
        "median_us": bench.stats.median * 1e6,
        "p90_us": times[min(len(times) - 1, int(0.9 * len(times)))] * 1e6,
        "bytes": info["bytes"],
        "bytes_per_s": rate,
        "share_of_copy_roof": rate / roof,
    }
