"""exit_stats: the head (or its shortlist) is read once; rows and statistics are small."""

from __future__ import annotations

from typing import Any

import torch
from harness import cases, run, size

from dyndepth.testing import Case
from dyndepth.testing.cases import Arguments

OP = "exit_stats"


def moved(arguments: Arguments) -> int:
    head, ids = arguments["head_weight"], arguments["vocab_ids"]
    words = head.shape[0] if ids is None else ids.numel()
    return (
        words * head.shape[1] * head.element_size()
        + size(arguments["hidden"], arguments["norm_gain"], ids)
        + 28 * len(arguments["hidden"])
    )


@cases(OP)
def bench_exit_stats(benchmark: Any, case: Case, dtype: torch.dtype, provider: str, copy_roof: float, evict: Any) -> None:
    run(benchmark, OP, case, dtype, provider, copy_roof, evict, moved)
