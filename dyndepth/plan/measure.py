"""Measuring this machine: products with cold weights, reads, copies, the cost of an op. Kept in the cache folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dyndepth import env
from dyndepth.errors import ArgumentError
from dyndepth.exits.products import linear
from dyndepth.files import replacing
from dyndepth.plan.machine import ITEM, Machine, Timing

VERSION = 2
#: Weights are views of one pool, taken in turn, so that none is in a cache when its turn comes again.
_POOL_BYTES = 512 * 2**20
#: (outputs, columns): what projections of small and of large models are like, and an LM head.
_SIZES = ((256, 512), (1536, 576), (2048, 2048), (8192, 2048))
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_ROUNDS = 7
#: Weights of products that are timed together.
_BURST = 2**22
_READ_BYTES = 64 * 2**20


def cpu_name() -> str:
    """As Linux tells it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def here(dtype: str = "bfloat16", *, again: bool = False) -> Machine:
    """This machine, measured once per CPU, thread count, torch version and dtype. A damaged file is measured anew."""
    if dtype not in ITEM:
        raise ArgumentError(f"machine: dtype must be one of {', '.join(ITEM)}, got {dtype!r}")
    path = cache_file(dtype)
    machine = None if again else _kept(path, dtype)
    if machine is None:
        machine = measure(dtype)
        kept = {"version": VERSION, "key": _key(dtype), "machine": machine.to_json()}
        # A cache that cannot be written costs the next call seconds, and this one nothing.
        with contextlib.suppress(OSError), replacing(path) as temporary:
            temporary.write_text(json.dumps(kept) + "\n")
    return machine


def cache_file(dtype: str) -> Path:
    """Where this machine's figures are kept."""
    digest = hashlib.sha256("\n".join(_key(dtype)).encode()).hexdigest()
    return env.cache_folder() / f"machine-{dtype}-{digest[:12]}.json"


def _key(dtype: str) -> list[str]:
    return [cpu_name(), f"{torch.get_num_threads()} threads", torch.__version__, dtype]


def _kept(path: Path, dtype: str) -> Machine | None:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        if entry["version"] != VERSION or entry["key"] != _key(dtype):
            return None
        machine = Machine.from_json(entry["machine"])
    except (OSError, ValueError, KeyError, TypeError):  # ArgumentError is a ValueError
        return None
    return machine if machine.table and machine.dtype == dtype else None


@torch.no_grad()
def measure(dtype: str, *, pool_bytes: int = _POOL_BYTES, read_bytes: int = _READ_BYTES, rounds: int = _ROUNDS) -> Machine:
    """Time this machine now: medians of interleaved rounds after one that does not count. Seconds of work."""
    kind: torch.dtype = getattr(torch, dtype)
    pool = _Pool(torch.full((pool_bytes // ITEM[dtype],), 0.01, dtype=kind))
    products: dict[tuple[int, int, int], list[float]] = {}
    reads, copies, ops = [], [], []
    inputs = {(columns, rows): torch.full((rows, columns), 0.01, dtype=kind) for _, columns in _SIZES for rows in _ROWS}
    count = read_bytes // ITEM[dtype]
    target, small = torch.empty(count, dtype=kind), torch.zeros(1, 64, dtype=kind)
    for _ in range(rounds + 1):
        for (outputs, columns), rows in itertools.product(_SIZES, _ROWS):
            weights = [pool.take(outputs * columns).view(outputs, columns) for _ in range(1 + _burst(outputs * columns))]
            products.setdefault((outputs, columns, rows), []).append(_products(inputs[columns, rows], weights))
        # As int64, so that the maximum waits for memory and not for arithmetic in a narrow type.
        reads.append(_timed(pool.take(count).view(torch.int64).max))
        copies.append(_timed(functools.partial(target.copy_, pool.take(count))))
        ops.append(_timed(lambda: [small.add(small) for _ in range(100)]) / 100)
    table = tuple(Timing(*sizes, statistics.median(times[1:])) for sizes, times in products.items())
    largest = max(table, key=lambda timing: timing.outputs * timing.columns * timing.rows)
    return Machine(
        name=cpu_name(),
        dtype=dtype,
        bandwidth=read_bytes / statistics.median(reads[1:]),
        flops=2 * largest.outputs * largest.columns * largest.rows / largest.seconds,
        copy=read_bytes / statistics.median(copies[1:]),
        op_s=statistics.median(ops[1:]),
        table=table,
        source=f"measured with {torch.get_num_threads()} threads, torch {torch.__version__}",
    )


class _Pool:
    """Hands out views of one buffer in turn, so that what is handed out was not touched for a long time."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.at = buffer, 0

    def take(self, count: int) -> Tensor:
        begin = self.at if self.at + count <= self.buffer.numel() else 0
        self.at = begin + count
        return self.buffer[begin : self.at]


def _burst(size: int) -> int:
    """How many products of so many weights are timed together: a decode step repeats shapes, and small ones are over soon."""
    return max(1, _BURST // size)


def _products(x: Tensor, weights: list[Tensor]) -> float:
    """Seconds of one product as a pass makes it; the shape was met right before, the weights come from memory."""
    with torch.no_grad():
        linear(x, weights[0])
        return _timed(lambda: [linear(x, weight) for weight in weights[1:]]) / (len(weights) - 1)


def _timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - begin) / 1e9
