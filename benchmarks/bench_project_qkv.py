"""project_qkv: the three weights are read once; rows in and out are small."""

from __future__ import annotations

from typing import Any

import torch
from harness import cases, run, size

from dyndepth.testing import Case
from dyndepth.testing.cases import Arguments

OP = "project_qkv"


def moved(arguments: Arguments) -> int:
    names = ("q_weight", "k_weight", "v_weight")
    rows = len(arguments["x"]) * sum(arguments[name].shape[0] for name in names) * arguments["x"].element_size()
    return size(arguments["x"], *(arguments[name] for name in names)) + rows


@cases(OP)
def bench_project_qkv(benchmark: Any, case: Case, dtype: torch.dtype, provider: str, copy_roof: float, evict: Any) -> None:
    run(benchmark, OP, case, dtype, provider, copy_roof, evict, moved)
