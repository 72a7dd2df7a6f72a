"""Row counts around every tile, counters, shapes of heads and pages, odd addresses: small numbers, many of them.

tests/test_edges.py says which value every kernel must meet, and finds it among the cases that the interpreter runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyndepth.testing.accept_cases import greedy, sampled
from dyndepth.testing.case import Arguments, Case
from dyndepth.testing.linear_cases import linear
from dyndepth.testing.makers import Paged, attention, backfill, compact, project, router, stats, store

Maker = Callable[[torch.dtype, torch.Generator], Arguments]


def shifted(make: Maker) -> Maker:
    """Every tensor begins one element into memory of its own: dense, and aligned to nothing but its elements."""

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(item) for item in value]
        if not isinstance(value, Tensor) or not value.is_contiguous():
            return value
        return torch.cat([value.flatten()[:1], value.flatten()])[1:].view(value.shape) if value.numel() else value

    return lambda dtype, generator: {name: move(value) for name, value in make(dtype, generator).items()}


def apart(make: Maker, *names: str) -> Maker:
    """Rows of these arguments lie apart, in rows three elements longer, and begin one element in."""

    def spread(value: Tensor) -> Tensor:
        flat = value.flatten(1)
        return torch.nn.functional.pad(flat, (1, 2))[:, 1:-2].unflatten(1, value.shape[1:])

    def made(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        arguments = make(dtype, generator)
        return arguments | {name: spread(arguments[name]) for name in names}

    return made


def at(make: Maker, *contexts: int) -> Maker:
    """Row i sees so many tokens as the i-th says, whatever its sequence could hold."""
    return lambda dtype, generator: make(dtype, generator) | {"pos": torch.tensor(contexts, dtype=torch.int32) - 1}


#: (rows, live): around warps; around a thousand; all rows computed at each, and every counter that is an edge at least once.
_ROWS = (
    (2, 1), (2, 2), (31, 30), (31, 31), (32, 0), (32, 32), (33, 33),
    (1023, 1), (1023, 1023), (1024, 0), (1024, 1024), (1025, 1025),
)  # fmt: skip


def _rows(make: Callable[[int, int], Maker]) -> list[Case]:
    """A case per row count, `rows<n>_live<n>`."""
    return [Case(f"rows{rows}_live{live}", make(rows, live), many=rows > 1000) for rows, live in _ROWS]


def _thin(rows: int) -> Paged:
    """A context of three tokens and, if rows are many, one head of 8 channels: as little as rows can be."""
    heads, kv_heads, dim = (4, 2, 16) if rows < 1000 else (1, 1, 8)
    return Paged(rows, heads, kv_heads, dim, page_size=2, sequences=rows, context=3, decode=True, tight=True)


def _backfill(rows: int, section: tuple[int, int]) -> Maker:
    return backfill(_thin(rows), 16, 2, _thin(rows).head_dim // 2, padding=rows == 33, section=section)


#: head_dim, query heads, K,V heads, page size, tokens of context: all in one list, so that pairs differ between cases.
_SHAPES = ((64, 4, 1, 1, 2), (80, 3, 1, 16, 20), (96, 8, 1, 32, 70), (128, 2, 2, 16, 50), (256, 3, 1, 32, 9))


#: Sequences of which each could be 1248 tokens long: where rows are few, five programs share a row's context.
_LONG = Paged(4, 4, 2, 16, 32, 4, 1248, decode=True, tight=True)


def _shapes(make: Callable[[Paged, bool], Maker]) -> list[Case]:
    """A case per shape of heads and pages; some with rows that have no slot."""
    return [
        Case(f"dim{dim}_heads{heads}_{kv}_page{page}", make(Paged(5, heads, kv, dim, page, context=context), dim != 128))
        for dim, heads, kv, page, context in _SHAPES
    ]


def _contexts(page: int = 16) -> list[Case]:
    """Every row sees so many whole pages and a tail, or none."""
    return [
        Case(f"pages{whole}_tail{tail}", attention(Paged(3, 4, 2, 16, page, 3, whole * page + tail, decode=True)))
        for whole, tail in ((0, 1), (0, 15), (1, 0), (1, 1), (2, 7), (3, 0), (3, 5))
    ]


EDGES: dict[str, list[Case]] = {
    "accept_drafts": [
        *(Case(f"greedy_rows{rows}", greedy(rows, 3)) for rows in (2, 31, 32, 33, 1023, 1024, 1025)),
        *(Case(f"rows{rows}", sampled(rows, 2, 11)) for rows in (2, 31, 32, 33)),
        Case("greedy_shifted", shifted(greedy(9, 7))),
        Case("shifted", shifted(sampled(9, 5, 103))),
    ],
    "compact_rows": [
        *(Case(f"rows{rows}", compact(rows, 5)) for rows in (2, 33)),
        *(Case(f"rows{rows}", compact(rows, 5, most=2), many=True) for rows in (1023, 1024)),
        *(Case(f"rows32_run{run}", compact(32, 3, run=run)) for run in (1, 31)),
        Case("shifted", shifted(compact(9, 6))),
        Case("shifted1025", shifted(compact(1025, 5, most=2)), many=True),
    ],
    "exit_stats": [
        *_rows(lambda rows, live: stats(rows, 16, 70, live=live)),
        *(Case(f"rows129_live{live}", stats(129, 16, 70, live=live)) for live in (0, 128, 129)),
        # Two products of the library, ten programs a row, the last of five words.
        Case("rows129_words18437", stats(129, 8, 18500, bias=True, short=18437, softcap=20.0, live=5)),
        Case("shifted", shifted(stats(9, 24, 515, bias=True, live=4))),
        Case("shifted_shortlist", shifted(stats(9, 23, 515, bias=True, short=77))),
    ],
    "router_score": [
        *_rows(lambda rows, live: router(rows, 16, 2, live=live)),
        Case("shifted", shifted(router(9, 65, 6, cosine=True, extra=3, live=4))),
    ],
    "ragged_attention": [
        *_rows(lambda rows, live: attention(_thin(rows), live=live)),
        *_shapes(lambda p, _: attention(p, live=4)),
        *_contexts(),
        # So far that two programs share a row's context, and another kernel puts their results together.
        *(
            Case(f"split{rows}_live{live}", attention(Paged(rows, 4, 1, 16, 32, rows, 290, decode=True, tight=True), live=live))
            for rows, live in ((1, 1), (2, 1), (2, 2), (31, 30), (31, 31), (32, 0), (32, 32), (33, 1), (33, 33))
        ),
        # A short context leaves most splits empty, a longer one some, the longest none.
        Case("split_ragged", at(attention(_LONG), 3, 150, 290, 1100)),
        Case("split_ragged_window_softcap", at(attention(_LONG, window=600, softcap=5.0), 3, 150, 290, 1100)),
        *(
            Case(f"split_dim{dim}", attention(Paged(2, 2, 1, dim, 32, 2, context, decode=True, tight=True)))
            for dim, context in ((64, 290), (80, 290), (96, 290), (128, 290), (256, 130))
        ),
        Case("shifted", shifted(attention(Paged(9, 4, 2, 16), live=8))),
    ],
    "store_kv": [
        *_rows(lambda rows, live: store(_thin(rows), _thin(rows).head_dim // 2, live=live)),
        *_shapes(lambda p, padding: store(p, p.head_dim // 2, padding=padding, live=4)),
        Case("shifted", shifted(store(Paged(9, 6, 2, 20), 10, live=4))),
        Case("apart", apart(store(Paged(9, 6, 2, 20), 5, fused=True, padding=True), "q", "k", "v")),
    ],
    "project_qkv": [
        *_rows(lambda rows, live: project(_thin(rows), 16, _thin(rows).head_dim // 2, padding=rows == 33, live=live)),
        *_shapes(lambda p, padding: project(p, 24, p.head_dim // 2, bias=True, norm=padding, padding=padding, live=4)),
        Case("shifted", shifted(project(Paged(9, 6, 2, 20), 50, 10, bias=True, norm=True, padding=True, live=4))),
        Case("apart", apart(project(Paged(9, 6, 2, 20), 50, 10, live=4), "q_weight", "k_weight", "v_weight")),
        Case("padding_partial", project(Paged(9, 6, 2, 20), 50, 5, padding=True, live=4)),
    ],
    "ragged_linear": [
        *_rows(lambda rows, live: linear(rows, 16, 24, gated="silu" if rows % 2 else "", residual=True, live=live)),
        Case("shifted", shifted(linear(9, 37, 23, gated="silu", bias=True, gate_bias=True, residual=True, live=4))),
    ],
    "backfill_kv": [
        *(
            Case(f"rows{rows}_section{begin}_{count}", _backfill(rows, (begin, count)), many=rows > 1000)
            for rows, begin, count in (
                (2, 1, 1), (2, 0, 2), (31, 0, 30), (31, 0, 31), (32, 0, 32), (33, 3, 30), (33, 0, 33),
                (1023, 1022, 1), (1023, 0, 1023), (1024, 0, 0), (1024, 0, 1024), (1025, 0, 1025),
            )
        ),
        *_shapes(lambda p, padding: backfill(p, 24, 2, p.head_dim // 2, padding=padding, variants=2)),
        Case("padding_partial", backfill(Paged(7, 4, 2, 20), 50, 3, 5, padding=True)),
        Case("shifted", shifted(backfill(Paged(11, 4, 2, 20), 50, 3, 10, variants=2, section=(4, 3)))),
        Case("shifted_low_rank", shifted(backfill(Paged(11, 4, 2, 20), 50, 3, 10, section=(4, 3), rank=7))),
    ],
}  # fmt: skip
