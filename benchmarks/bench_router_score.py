"""router_score: weights and residuals are read once."""

from __future__ import annotations

from typing import Any

import torch
from harness import cases, run, size

from dyndepth.testing import Case
from dyndepth.testing.cases import Arguments

OP = "router_score"


def moved(arguments: Arguments) -> int:
    return size(*(value for value in arguments.values() if hasattr(value, "numel"))) + 4 * len(arguments["hidden"])


@cases(OP)
def bench_router_score(benchmark: Any, case: Case, dtype: torch.dtype, provider: str, copy_roof: float, evict: Any) -> None:
    run(benchmark, OP, case, dtype, provider, copy_roof, evict, moved)
