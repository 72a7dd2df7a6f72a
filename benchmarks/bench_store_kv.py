"""store_kv: q, k, v are read and written once, two rows of angles read per row."""

from __future__ import annotations

from typing import Any

import torch
from harness import cases, run, size

from dyndepth.testing import Case
from dyndepth.testing.cases import Arguments

OP = "store_kv"


def moved(arguments: Arguments) -> int:
    cos = arguments["cos"]
    angles = 0 if cos is None else 8 * cos.shape[1] * len(arguments["pos"])
    return 2 * size(arguments["q"], arguments["k"], arguments["v"]) + angles


@cases(OP)
def bench_store_kv(benchmark: Any, case: Case, dtype: torch.dtype, provider: str, copy_roof: float, evict: Any) -> None:
    run(benchmark, OP, case, dtype, provider, copy_roof, evict, moved)
