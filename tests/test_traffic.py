"""Bytes and FLOPs of ops: by hand, and against the tensors of real calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting import declared

from dyndepth.plan import traffic
from dyndepth.plan.of_call import of_call
from dyndepth.plan.traffic import Traffic
from dyndepth.testing import CASES

OPS = (
    "project_qkv", "store_kv", "ragged_attention", "ragged_linear", "exit_stats", "router_score", "compact_rows", "backfill_kv",
)  # fmt: skip


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        # 3 rows of width 10 in bf16, 2 of them with queries of 8 numbers, k and v of 2 each: 12 columns of weights;
        # 60 in, 24 + 32 out; angles 3 x 2 x 1 x 4, positions and slots 3 x 8; FLOPs 2 x 10 x (2 x 8 + 3 x 4).
        (traffic.project_qkv(3, 2, 10, 8, 4, 1, 2), Traffic(240 + 60 + 24 + 32 + 24 + 24, 560)),
        # With biases 12 numbers more, gains of 2 for q and k, and the counter.
        (
            traffic.project_qkv(3, 2, 10, 8, 4, 1, 2, bias=True, gains=2, counter=True),
            Traffic(404 + 24 + 16 + 4, 560),
        ),
        # Nobody asks: neither the weight of q nor its gain is read.
        (traffic.project_qkv(3, 0, 10, 8, 4, 1, 2, gains=2), Traffic(80 + 60 + 24 + 24 + 24 + 8, 240)),
        # 2 rows' q of 8 and 3 rows' k,v of 4, in and out; angles 24; positions and slots 24.
        (traffic.store_kv(3, 2, 8, 4, 1, 2), Traffic(2 * 28 * 2 + 48)),
        # 2 of the 3 rows have a slot, and the third of them no query either: it needs no angle.
        (traffic.store_kv(3, 2, 8, 4, 1, 2, stored=2, turned=2), Traffic(2 * 24 * 2 + 16 + 24)),
        # 2 rows of 4 heads x 5, 7 tokens seen in 2 K,V heads: 2 x (40 + 140) numbers; seq, pos and 2 pages of 4 positions.
        (traffic.ragged_attention(2, 7, 4, 2, 5, 2, page_size=4), Traffic(2 * (360 + 16), 2 * 4 * 7 * 20)),
        # A window of 3 sees positions 4, 5, 6: one page.
        (traffic.ragged_attention(2, 7, 4, 2, 5, 2, page_size=4, window=3), Traffic(2 * (200 + 12), 2 * 4 * 3 * 20)),
        # 3 rows from 10 to 6: weight 60, rows 30 + 18.
        (traffic.ragged_linear(3, 6, 10, 2), Traffic(2 * 108, 360)),
        (traffic.ragged_linear(3, 6, 10, 2, biases=2, gated=True, residual=True), Traffic(2 * (132 + 66), 720)),
        (traffic.ragged_linear(0, 6, 10, 2), Traffic(0)),
        # 3 rows of 10 against 7 words; an int64 and five floats out each.
        (traffic.exit_stats(3, 7, 10, 2), Traffic(140 + 60 + 84, 420)),
        (traffic.exit_stats(3, 7, 10, 2, bias=True, gain=True, listed=True), Traffic(284 + 14 + 40 + 56, 420)),
        # 2 neurons of 10, their biases and outputs, one more bias, in fp32; 3 rows of 10 in, a float out each.
        (traffic.router_score(3, 2, 10, 2), Traffic(4 * 25 + 60 + 12, 2 * 3 * 2 * 11)),
        # The cosine reads the rows again (three sums of 10 products), 4 features are fp32.
        (
            traffic.router_score(3, 2, 10, 2, cosine=True, extra=4),
            Traffic(4 * (25 + 2 + 8) + 120 + 48 + 12, 2 * 3 * (2 * 15 + 30)),
        ),
        # 3 rows of 10 to k,v of 4 in 5 layers; angles and ids as above; two tables with a number per layer.
        (traffic.backfill_kv(3, 5, 10, 4, 1, 2), Traffic(400 + 60 + 120 + 24 + 24, 1200)),
        (traffic.backfill_kv(3, 5, 10, 4, 1, 2, bias=True, variants=2), Traffic(628 + 40 + 24 + 20, 1200)),
        # 1 of the 3 has a slot: 20 numbers written and two angles; all are multiplied.
        (traffic.backfill_kv(3, 5, 10, 4, 1, 2, stored=1), Traffic(400 + 60 + 40 + 8 + 24, 1200)),
        # 3 rows of 9 bytes, moved, with a state and a place each; two counts.
        (traffic.compact_rows(3, 9), Traffic(54 + 3 + 12 + 8)),
        (traffic.elementwise(3, 10, 2, read=2, gain=True), Traffic(180 + 20)),
        (traffic.embedding(3, 10, 2), Traffic(3 * 48)),
    ],
)  # fmt: skip
def test_by_hand(found: Traffic, wanted: Traffic) -> None:
    assert found == wanted


def test_traffic_adds_up() -> None:
    assert (Traffic(3, 5) + Traffic(1, 2)) * 2 == Traffic(8, 14)


def has_rows(given: dict[str, Any]) -> bool:
    return len(next(given[name] for name in ("x", "k", "q", "hidden", "state", "residual") if name in given)) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_bytes_are_those_of_the_tensors(op: str, dtype: torch.dtype) -> None:
    """Every case of the op's own tests, counters, sections and rows without a slot included."""
    func = getattr(torch.ops.dyndepth, op).default
    defaults = {a.name: a.default_value if a.has_default_value() else None for a in func._schema.arguments}
    seen = 0
    for case in CASES[op]:
        if case.large or case.gpu or not has_rows(given := case.build(dtype)):
            continue
        seen += 1
        out = func(**given)
        assert of_call(op, given).bytes == declared(defaults | given, out, op), case.name
    assert seen >= 9
