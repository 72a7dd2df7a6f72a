"""project_qkv: the weights of what is wanted are read once; rows in and out are small."""

from __future__ import annotations

from typing import Any

import torch
from harness import cases, run, size

from dyndepth.testing import Case
from dyndepth.testing.cases import Arguments

OP = "project_qkv"


def moved(arguments: Arguments) -> int:
    """Queries are wanted for live rows only: without any, their weight need not be read."""
    x, live = arguments["x"], arguments["live"]
    wanted = len(x) if live is None else int(live)
    q, kv = arguments["q_weight"], (arguments["k_weight"], arguments["v_weight"])
    out = (wanted * q.shape[0] + len(x) * sum(weight.shape[0] for weight in kv)) * x.element_size()
    return size(x, *kv) + (size(q) if wanted else 0) + out


@cases(OP)
def bench_project_qkv(benchmark: Any, case: Case, dtype: torch.dtype, provider: str, copy_roof: float, evict: Any) -> None:
    run(benchmark, OP, case, dtype, provider, copy_roof, evict, moved)
