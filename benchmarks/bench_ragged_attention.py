"""ragged_attention: every visible key and value is read once per row (sequences do not share pages here), q and out once."""

from __future__ import annotations

from typing import Any

import torch
from harness import cases, run, size

from dyndepth.testing import Case
from dyndepth.testing.cases import Arguments

OP = "ragged_attention"


def moved(arguments: Arguments) -> int:
    pages, pos = arguments["pages"], arguments["pos"]
    window = arguments["window"]
    visible = sum(min(p + 1, window) if window else p + 1 for p in pos.tolist())
    return 2 * visible * pages.shape[3] * pages.shape[4] * pages.element_size() + 2 * size(arguments["q"])


@cases(OP)
def bench_ragged_attention(benchmark: Any, case: Case, dtype: torch.dtype, provider: str, copy_roof: float, evict: Any) -> None:
    run(benchmark, OP, case, dtype, provider, copy_roof, evict, moved)
