"""Kernels against what one would write without them, and what a second thread gives. Interleaved, medians.

PYTHONPATH=benchmarks python benchmarks/kernel_ratios.py build
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dyndepth import info, ops
from dyndepth.encoders.attention import Packing, packed_attention
from dyndepth.files import replacing
from dyndepth.op import backend

_ROUNDS = 15
_DTYPE = torch.bfloat16


def medians(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds per call, in turn, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for run in calls.values():
        run()
    for _ in range(_ROUNDS):
        for name, run in calls.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(_DTYPE)


def attention() -> dict[str, Callable[[], object]]:
    """16 rows at context 1024, SmolLM2's heads; ten layers' pages in turn, so that caches do not hold them."""
    rows, context, page = 16, 1024, 16
    layers = [normal(2, rows * context // page, page, 3, 64) for _ in range(10)]
    table = torch.randperm(rows * context // page, dtype=torch.int32).view(rows, -1)
    query, seq = normal(rows, 9, 64), torch.arange(rows, dtype=torch.int32)
    pos = torch.full((rows,), context - 1, dtype=torch.int32)

    def run(provider: str) -> Callable[[], object]:
        def call() -> None:
            with backend(provider):
                for pages in layers:
                    ops.ragged_attention(query, pages, table, seq, pos, scale=0.125)

        return call

    return {"ours": run("cpp"), "theirs": run("torch")}


def samples() -> dict[str, Callable[[], object]]:
    """32 texts of 8 to 64 tokens, all-MiniLM's heads: one call, or one per run of equal lengths."""
    lengths = torch.randint(8, 65, (32,)).sort().values
    q, k, v = (normal(1, int(lengths.sum()), 12, 32).transpose(1, 2) for _ in range(3))
    packing = Packing(lengths)

    def run(provider: str) -> Callable[[], object]:
        def call() -> None:
            with backend(provider):
                packed_attention(None, q, k, v, None, packing=packing)

        return call

    return {"ours": run("cpp"), "theirs": run("torch")}


def backfill() -> dict[str, Callable[[], object]]:
    """16 rows, 15 layers: one product, or two and a store per layer."""
    rows, layers = 16, 15
    hidden, maps = normal(rows, 576), normal(layers, 2, 192, 576, scale=0.04)
    pages, at = torch.zeros(layers, 2, 4, 16, 3, 64, dtype=_DTYPE), torch.arange(rows, dtype=torch.int32)
    angles, none = torch.randn(1, rows, 32), torch.zeros(0, 3, 64, dtype=_DTYPE)

    def loop() -> None:
        for layer in range(layers):
            key, value = (torch.nn.functional.linear(hidden, maps[layer, part]).view(rows, 3, 64) for part in (0, 1))
            ops.store_kv(none, key, value, at, at, pages[layer], cos=angles[0], sin=angles[0])

    return {"ours": lambda: ops.backfill_kv(hidden, maps, at, at, pages, 0, cos=angles, sin=angles), "theirs": loop}


def head() -> dict[str, Callable[[], object]]:
    """32 rows through an LM head of 49152 words."""
    hidden, weight = normal(32, 576), normal(49152, 576, scale=0.04)

    def theirs() -> object:
        return torch.log_softmax(torch.nn.functional.linear(hidden, weight).float(), -1).topk(2, -1)

    return {"ours": lambda: ops.exit_stats(hidden, weight), "theirs": theirs}


CASES = {
    "ragged_attention, 16 rows, context 1024, against gathering and SDPA": attention,
    "packed_attention, 32 texts of 8 to 64 tokens, against SDPA for every length": samples,
    "backfill_kv, 16 rows, 15 layers, against a loop over layers": backfill,
    "exit_stats, 32 rows, against linear, log-softmax and top-2": head,
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    threads, rows = torch.get_num_threads(), []
    for name, make in CASES.items():
        torch.manual_seed(20503005)
        calls = make()
        found = medians(calls)
        torch.set_num_threads(1)
        alone = medians({"ours": calls["ours"]})["ours"]
        torch.set_num_threads(threads)
        rows.append({"case": name, "ours_s": found["ours"], "theirs_s": found["theirs"], "one_thread_s": alone})
        print(f"{name}: {found['theirs'] / found['ours']:.2f} times as fast, {alone / found['ours']:.2f} from 1 to {threads}")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "kernel_ratios.json") as temporary:
        temporary.write_text(json.dumps({"machine": info.collect(), "threads": threads, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
