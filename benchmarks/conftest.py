"""The copy roof, measured in the same run, and a table that says bytes and shares of it."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

torch.set_grad_enabled(False)
_ROWS: list[tuple[str, ...]] = []


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
    """Writes more than the last-level cache holds, so that the next call starts cold."""
    ballast = torch.zeros(96 * 2**20, dtype=torch.uint8)
    return lambda: ballast.add_(1)


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [bench for bench in getattr(session, "benchmarks", []) if "bytes" in bench.extra_info]
    if not rows:
        return
    roof = rows[0].extra_info["copy_roof"]
    terminalreporter.write_line("")
    terminalreporter.write_line(
        f"cold cache, {torch.get_num_threads()} threads; copy roof measured in this run: {roof / 1e9:.1f} GB/s (read + write)"
    )
    terminalreporter.write_line(
        f"{'op':<17}{'case':<18}{'dtype':<10}{'provider':<9}{'median us':>10}{'p90 us':>9}{'KiB':>9}{'GB/s':>7}{'of roof':>9}"
    )
    for bench in sorted(
        rows, key=lambda b: (b.extra_info["op"], b.extra_info["case"], b.extra_info["dtype"], b.extra_info["provider"])
    ):
        info, times = bench.extra_info, sorted(bench.stats.data)
        rate = info["bytes"] / bench.stats.median
        p90 = times[min(len(times) - 1, int(0.9 * len(times)))]
        terminalreporter.write_line(
            f"{info['op']:<17}{info['case']:<18}{info['dtype']:<10}{info['provider']:<9}{bench.stats.median * 1e6:>10.1f}"
            f"{p90 * 1e6:>9.1f}{info['bytes'] / 1024:>9.0f}{rate / 1e9:>7.1f}{rate / roof:>9.1%}"
        )
