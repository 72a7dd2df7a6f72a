"""Part of `make policies`: requests that arrive at once over so many slots, their tokens per second and completion times."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from dyndepth.engine import Engine, Request
from dyndepth.exits import Exits

#: Slots, requests and repetitions; twice as many requests as slots, so that the second half waits for the first.
CELLS = {1: (4, 3), 4: (8, 3), 16: (32, 3), 64: (128, 2)}
DRAFTS = 2


def completion(bench: Any, low: Exits, slots: int, tokens: int, *, quick: bool = False) -> list[dict[str, Any]]:
    """Rows per system at one number of slots. `low` are the exits with the threshold that drafts are let through at.

    transformers' own generate has no slots; at one slot it answers one request after the other, self-speculation included.
    """
    requests, repetitions = (2 * slots, 1) if quick else CELLS[slots]
    systems: dict[str, Callable[[], dict[str, Any]]] = {
        "full depth": lambda: _served(bench, None, None, "dynamic", slots, requests, tokens),
        "dynamic, predict": lambda: _served(bench, bench.exits, "predict", "dynamic", slots, requests, tokens),
        "dynamic, propagate": lambda: _served(bench, bench.exits, "propagate", "dynamic", slots, requests, tokens),
        "dynamic, recompute": lambda: _served(bench, bench.exits, "recompute", "dynamic", slots, requests, tokens),
        "lossless, shipped threshold": lambda: _served(bench, bench.exits, "recompute", "lossless", slots, requests, tokens),
        "lossless, threshold 0.4": lambda: _served(bench, low, "recompute", "lossless", slots, requests, tokens),
    }
    if slots == 1:
        leave = next(iter(bench.exits)).leave
        systems["transformers"] = lambda: _theirs(bench, requests, tokens)
        systems["transformers, assistant_early_exit"] = lambda: _theirs(bench, requests, tokens, assistant_early_exit=leave)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    _served(bench, bench.exits, "recompute", "lossless", slots, min(requests, slots), 8)  # to be warm
    for _ in range(repetitions):
        for name, run in systems.items():
            runs[name].append(run())
    rows = []
    for name, found in runs.items():
        ends = sorted(end for one in found for end in one["ends"])
        rows.append({"slots": slots, "system": name, "requests": requests, "tokens": tokens, "repetitions": repetitions,
                     "tokens_per_s": requests * tokens / statistics.median(one["ends"][-1] for one in found),
                     "p50_s": ends[math.ceil(0.5 * len(ends)) - 1], "p99_s": ends[math.ceil(0.99 * len(ends)) - 1],
                     **{key: found[0].get(key) for key in ("rows_x_layers", "drafted", "accepted")}})  # fmt: skip
        print(f"{slots} slots, {name}: {rows[-1]['tokens_per_s']:.1f} tok/s, p50 {rows[-1]['p50_s']:.2f} s", flush=True)
    return rows


def _served(
    bench: Any, exits: Exits | None, kv: str | None, mode: str, slots: int, requests: int, tokens: int
) -> dict[str, Any]:
    machine = Engine(bench.model, exits, kv=kv, slots=slots, longest=512)
    begin = time.perf_counter()
    asked = [
        machine.add_request(Request(_row(bench, at), max_new_tokens=tokens, mode=mode, drafts=DRAFTS)) for at in range(requests)
    ]
    ends = [time.perf_counter() - begin for event in machine.stream() if event.last]
    found: dict[str, Any] = {"ends": ends, "rows_x_layers": machine.work.fraction}
    if mode == "lossless":
        found |= {name: sum(getattr(request, name) for request in asked) for name in ("drafted", "accepted")}
    return found


def _theirs(bench: Any, requests: int, tokens: int, **options: Any) -> dict[str, Any]:
    begin, ends = time.perf_counter(), []
    for at in range(requests):
        row = _row(bench, at)[None]
        inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        bench.call(inputs, tokens, theirs=True, **options)
        ends.append(time.perf_counter() - begin)
    return {"ends": ends}


def _row(bench: Any, at: int) -> torch.Tensor:
    row: torch.Tensor = bench.rows[at % len(bench.rows)]
    return row
