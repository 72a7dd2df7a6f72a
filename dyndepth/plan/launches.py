"""Kernels that a pass in graph style starts, by name: the same number whoever leaves, as its shapes are.

dyndepth/runtime/graph.py makes the calls, kernels/counts.py says what each starts; tests/test_launches.py counts both in a
pass. Left out are what modules do beside products (norms, casts) and the bookkeeping of rows: PyTorch's own small kernels.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dyndepth.plan.graph_passes import carried
from dyndepth.plan.leaving import Leaving, by_boundary
from dyndepth.plan.sizes import Sizes

#: Bytes of a row of what moves at a boundary beside the residual: sequence, position, slot, step, index, resume, left at
#: (int32), may leave (bool).
_FACTS = (4, 4, 4, 4, 4, 4, 4, 1)


def graph_launches(
    sizes: Sizes, rows: int, reach: int, exits: Sequence[Leaving] = (), *, kv: str = "predict", device: Any = None,
    item: int = 2, compact: str = "triton",
) -> Counter[str]:  # fmt: skip
    """Kernels of one pass of `rows` rows (a bucket's), by name; `library` are the library's products.

    Args:
        reach: positions that the block table reaches.
        exits: open bands; how many rows leave there changes nothing.
        device: kernels.launch.Device; None: an H100's.
        compact: provider of compact_rows, `triton` or `cuda`.
    """
    counts: Any = importlib.import_module("dyndepth.kernels.counts")
    launch: Any = importlib.import_module("dyndepth.kernels.launch")
    device = launch.Device() if device is None else device
    s, found = sizes, Counter[str]()

    def attention(window: int) -> None:
        seen = min(reach, window) if window else reach
        found.update(counts.project_qkv(rows))
        found.update(counts.ragged_attention(rows, s.kv_heads, s.heads // s.kv_heads, s.head_dim, seen, device, item))

    def moved(judged: list[int]) -> None:
        move = counts.compact_rows if compact == "triton" else counts.compact_rows_by_cuda
        found.update(move(rows, (s.width * item, *_FACTS, *carried(s, bands.values(), judged, item))))

    for window in s.windows or (0,) * s.layers:
        attention(window)
        for outputs in (s.width, s.inner, s.width):  # output projection, gate and up in one, down projection
            found.update(counts.ragged_linear(rows, outputs))
    bands = by_boundary(s, rows, exits)
    for boundary in {one.resume for one in bands.values() if one.resume is not None}:
        for one in bands.values():
            found["library"] += _of_jump(one) if one.resume == boundary else 0
        moved([leave for leave in bands if leave < boundary])
    for leave, one in bands.items():
        if one.words:
            found.update(counts.exit_stats(rows, one.words))
        if one.routed and not (one.previous and leave == min(bands)):
            found.update(counts.router_score(rows))
        if one.head == "block":  # everybody's K,V, then the layer of those that ask for its head
            found.update(counts.project_qkv(rows))
            attention(s.windows[one.source] if s.windows else 0)
        found["library"] += 0 if one.resume is not None else _of_head(one)
        moved([judged for judged in bands if judged <= leave])
        if kv == "predict":
            found.update(counts.backfill_kv(rows, (s.layers if one.resume is None else one.resume) - leave))
            found.update(counts.ragged_linear(rows, one.kv_rank))
    return +found  # names that nothing starts are not there


def _of_head(one: Leaving) -> int:
    """Products of the library in a head: modules run them."""
    rank = one.inner if one.head == "translator" else one.readout
    translated = 0 if rank is None or one.head == "norm" else 1 + (rank > 0)
    return translated + {"mlp": 2, "block": 4}.get(one.head, 0)


def _of_jump(one: Leaving) -> int:
    alone = 3 * ((one.resume or 0) - one.leave)
    return {"linear": 1, "mlp": 3, "adapter": 1 + alone, "adapter alone": alone}.get(one.jump, 0)
