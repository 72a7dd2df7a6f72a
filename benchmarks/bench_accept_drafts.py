"""accept_drafts: one distribution of p is read, and one of q where a draft was refused; greedy, the drafts and choices."""

from __future__ import annotations

from typing import Any

import torch
from harness import cases, run, size

from dyndepth.op import REGISTRY
from dyndepth.testing import Case
from dyndepth.testing.cases import Arguments

OP = "accept_drafts"


def moved(arguments: Arguments) -> int:
    drafts, target, draft_probs = arguments["drafts"], arguments["target"], arguments["draft_probs"]
    small = size(drafts, arguments["lengths"], arguments["uniforms"]) + 12 * len(drafts)
    if target.dim() == 2:
        return small + size(target)
    accepted, _ = REGISTRY[OP].reference(**{name: value if value is None else value.cpu() for name, value in arguments.items()})
    refused = int((accepted < arguments["lengths"].cpu()).sum())
    return small + 4 * target.shape[2] * (len(drafts) + (0 if draft_probs is None else refused))


@cases(OP)
def bench_accept_drafts(benchmark: Any, case: Case, dtype: torch.dtype, provider: str, copy_roof: float, evict: Any) -> None:
    run(benchmark, OP, case, dtype, provider, copy_roof, evict, moved)
