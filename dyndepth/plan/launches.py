"""Kernels that a pass in graph style starts, by name: the same number whoever leaves, as its shapes are.

dyndepth/runtime/graph.py makes the calls, kernels/counts.py says what each starts; tests/test_launches.py counts both in a
pass. Left out are what modules do beside products (norms, casts) and the bookkeeping of rows: PyTorch's own small kernels.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dyndepth.plan.passes import Sizes

#: Bytes of a row of what moves at a boundary beside the residual: sequence, position, slot, step, index, resume, left at
#: (int32), may leave (bool).
_FACTS = (4, 4, 4, 4, 4, 4, 4, 1)


@dataclass(frozen=True)
class Boundary:
    """A boundary where rows may leave for good through a norm head.

    Args:
        words: words of the LM head that judging reads; 0: a router judges.
        carried: bytes of a row that criteria carry on, by tensor (the previous residual, what patience counts).
    """

    leave: int
    words: int = 0
    carried: tuple[int, ...] = ()


def graph_launches(
    sizes: Sizes, rows: int, reach: int, boundaries: Sequence[Boundary] = (), *, kv: str = "predict", device: Any = None,
    item: int = 2, compact: str = "triton",
) -> Counter[str]:  # fmt: skip
    """Kernels of one pass of `rows` rows (a bucket's), by name; `library` are the library's products.

    Args:
        reach: positions that the block table reaches.
        device: kernels.launch.Device; None: an H100's.
        compact: provider of compact_rows, `triton` or `cuda`.
    """
    counts: Any = importlib.import_module("dyndepth.kernels.counts")
    launch: Any = importlib.import_module("dyndepth.kernels.launch")
    device = launch.Device() if device is None else device
    s, found = sizes, Counter[str]()
    for window in s.windows or (0,) * s.layers:
        seen = min(reach, window) if window else reach
        found.update(counts.project_qkv(rows))
        found.update(counts.ragged_attention(rows, s.kv_heads, s.heads // s.kv_heads, s.head_dim, seen, device, item))
        for outputs in (s.width, s.inner, s.width):  # output projection, gate and up in one, down projection
            found.update(counts.ragged_linear(rows, outputs))
    for one in boundaries:
        found.update(counts.exit_stats(rows, one.words) if one.words else counts.router_score(rows))
        move = counts.compact_rows if compact == "triton" else counts.compact_rows_by_cuda
        found.update(move(rows, (s.width * item, *_FACTS, *one.carried)))
        if kv == "predict":
            found.update(counts.backfill_kv(rows, s.layers - one.leave))
    return found
