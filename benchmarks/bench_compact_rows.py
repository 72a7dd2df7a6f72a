"""compact_rows: payloads are read and written once, state read, order and counts written."""

from __future__ import annotations

from typing import Any

import torch
from harness import cases, run, size

from dyndepth.testing import Case
from dyndepth.testing.cases import Arguments

OP = "compact_rows"


def moved(arguments: Arguments) -> int:
    payloads = size(*arguments["payloads"])
    rows = arguments["state"].numel()
    return 2 * payloads + rows + 4 * rows + 8


@cases(OP)
def bench_compact_rows(benchmark: Any, case: Case, dtype: torch.dtype, provider: str, copy_roof: float, evict: Any) -> None:
    run(benchmark, OP, case, dtype, provider, copy_roof, evict, moved)
