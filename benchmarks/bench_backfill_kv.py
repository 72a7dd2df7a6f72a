"""backfill_kv: the stacked maps are read once, the entries written once."""

from __future__ import annotations

from typing import Any

import torch
from harness import cases, run, size

from dyndepth.testing import Case
from dyndepth.testing.cases import Arguments

OP = "backfill_kv"


def moved(arguments: Arguments) -> int:
    weight, rows = arguments["weight"], len(arguments["residual"])
    return size(weight, arguments["bias"], arguments["residual"]) + rows * weight[..., 0].numel() * weight.element_size()


@cases(OP)
def bench_backfill_kv(benchmark: Any, case: Case, dtype: torch.dtype, provider: str, copy_roof: float, evict: Any) -> None:
    run(benchmark, OP, case, dtype, provider, copy_roof, evict, moved)
