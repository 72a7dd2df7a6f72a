"""ragged_linear: every weight is read once if a row is live; x, the residual and the output of live rows are small."""

from __future__ import annotations

from typing import Any

import torch
from harness import cases, run, size

from dyndepth.testing import Case
from dyndepth.testing.cases import Arguments

OP = "ragged_linear"


def moved(arguments: Arguments) -> int:
    """Without a live row nothing need be read."""
    x, weight, live = arguments["x"], arguments["weight"], arguments["live"]
    wanted = len(x) if live is None else int(live)
    weights = size(*(arguments[name] for name in ("weight", "bias", "gate_weight", "gate_bias"))) if wanted else 0
    per_row = x.shape[1] + weight.shape[0] * (1 if arguments["residual"] is None else 2)
    return weights + wanted * per_row * x.element_size()


@cases(OP)
def bench_ragged_linear(benchmark: Any, case: Case, dtype: torch.dtype, provider: str, copy_roof: float, evict: Any) -> None:
    run(benchmark, OP, case, dtype, provider, copy_roof, evict, moved)
