"""Timing launches on a GPU, and the table that is made of it."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dyndepth.errors import BackendError
from dyndepth.ops import _triton
from dyndepth.tuning.problems import Problem
from dyndepth.tuning.search import Found, search

_REPLAYS = 20
#: More than any L2 holds.
_BALLAST = 256 << 20


def missing() -> str | None:
    """Why nothing can be timed here, or None."""
    if not torch.cuda.is_available():
        return "torch sees no GPU, and launches are timed on one"
    return _triton.missing()


def seconds(call: Callable[[], Any], ballast: torch.Tensor) -> float:
    """Median of replays of a graph of `call`, caches cold."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(_REPLAYS):
        ballast.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def tune(wanted: Sequence[Problem], dtype: torch.dtype) -> Iterator[tuple[Problem, Found | None]]:
    """Searches every problem on the current GPU and writes what was found to the user's table as it goes.

    Raises BackendError where there is no GPU.
    """
    reason = missing()
    if reason is not None:
        raise BackendError(f"tune: {reason}")
    launch: Any = importlib.import_module("dyndepth.kernels.launch")
    tables: Any = importlib.import_module("dyndepth.kernels.tables")
    ballast = torch.empty(_BALLAST, dtype=torch.int8, device="cuda")
    device, itemsize = launch.Device.of(ballast), torch.empty(0, dtype=dtype).element_size()
    file = tables.path(device.architecture, tables.MEASURED)
    for problem in wanted:
        call, key = problem.call("cuda", dtype), problem.key(device, itemsize)

        def cost(tiles: Any, call: Callable[[], Any] = call, key: Any = key) -> float | None:
            with tables.pinned(key, tiles):
                try:
                    return seconds(call, ballast)
                except Exception:  # Triton has many for tiles that do not fit; such tiles are no choice
                    return None

        found = search(problem.op, problem.chosen(device, itemsize)[0], cost)
        if found is not None:
            facts = {"seconds": found.cost, "before_s": found.start, "device": torch.cuda.get_device_name()}
            tables.write(file, device.architecture, tables.MEASURED, {str(key): tables.entry(found.tiles, **facts)})
        yield problem, found
