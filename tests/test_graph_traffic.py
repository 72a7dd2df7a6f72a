"""Bytes of a pass in graph style: the planner's calls against passes that count, whoever leaves, padding included."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
from counting import counting
from graph_starts import exits_of
from test_roofline import planned, routed

from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits, TopProbability
from dyndepth.op import backend
from dyndepth.plan import Leaving, Sizes, calls, graph_calls, leavings
from dyndepth.plan.passes import total
from dyndepth.runtime.bind import bind
from dyndepth.runtime.graph import GRAPH_POLICIES, GraphResult, forward_graph
from dyndepth.runtime.session import Session

CONTEXT, PAGE = 11, 4


def counted(
    model: Any, rows: int, real: int, exits: Exits | None, kv: str | None
) -> tuple[Counter[tuple[str, int]], GraphResult]:
    """One pass over buffers of `rows`, of which `real` are, and its LM head: its calls, and what it made."""
    tokens = torch.randint(3, tiny_models.VOCABULARY, (rows, CONTEXT), generator=torch.Generator().manual_seed(5))
    bound = bind(model)
    session = Session(bound, [CONTEXT] * rows, exits, kv=kv, page_size=PAGE)
    session.prefill(list(tokens[:, :-1]), session.work())
    count = torch.tensor([real], dtype=torch.int32)

    def run() -> Any:
        buffers, context = session.rows(range(rows), [CONTEXT - 1] * rows, tokens=tokens[:, -1], step=range(rows))
        buffers.slots[real:] = -1
        return forward_graph(session.plan, buffers, context, count)

    with backend("torch"):  # what is made on first use is made
        run()
    with counting(model, moves=True) as mode:
        result = run()
        bound.logits(result.ready)
    return mode.seen, result


def gone(result: GraphResult, exits: Exits, real: int) -> dict[int, int]:
    """How many rows took each band, by the boundary where they left."""
    return {band.leave: int((result.bands_taken[:real] >> at & 1).sum()) for at, band in enumerate(exits)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama_bias", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize(("rows", "real"), [(1, 1), (5, 5), (8, 5), (4, 0)])
def test_a_full_pass_is_counted(name: str, rows: int, real: int, dtype: torch.dtype) -> None:
    """Every call and every byte of it; rows behind the count cost what fixed shapes cost, and no weight is read for nobody."""
    model = tiny_models.tiny(name, dtype)
    seen, _ = counted(model, rows, real, None, None)
    item = torch.empty(0, dtype=dtype).element_size()
    found = graph_calls(Sizes.of(model), rows, CONTEXT, count=real, item=item, page_size=PAGE)
    assert planned(found) == seen
    number, moved = total(found)
    assert number == sum(seen.values())
    assert moved.bytes == sum(size * count for (_, size), count in seen.items())


@pytest.mark.parametrize("name", ["llama", "llama_bias", "qwen3"])
@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("judge", ["router", "statistics"])
@pytest.mark.parametrize("leaves", ["some", "everybody", "nobody"])
def test_a_pass_with_exits_is_counted(name: str, kv: str, judge: str, leaves: str) -> None:
    """Two boundaries; the same calls whoever leaves, of bytes that follow who does."""
    model, rows, real = tiny_models.shared(name), 16, 12
    first, last = {"some": (0.5, 0.5), "everybody": (0.5, 0.0), "nobody": (2.0, 2.0)}[leaves]
    exits = routed(model, {2: first, 4: last})
    words = 0
    if judge == "statistics":
        words = tiny_models.VOCABULARY
        bands = [tiny_exits.band(model, 2, 6, TopProbability(), head="norm", threshold=0.98 if first == 0.5 else first)]
        bands.append(tiny_exits.band(model, 4, 6, TopProbability(), head="norm", threshold=2 * last - 0.03))
        exits = tiny_exits.exits_of(model, *bands)
    seen, result = counted(model, rows, real, exits, kv)
    went = result.exit_layer[:real].tolist()
    assert (went.count(6) == 0, went.count(6) == real) == (leaves == "everybody", leaves == "nobody")
    taken = [Leaving(leave, went.count(leave), words) for leave in (2, 4)]
    found = graph_calls(Sizes.of(model), rows, CONTEXT, taken, count=real, kv=kv, item=4, page_size=PAGE)
    assert planned(found) == seen


#: Heads, jumps, criteria and routers of every kind that graph style has.
KINDS = (
    "mixed", "jumps", "maps", "saturation", "probability", "patience", "block", "block_probability", "routers", "schedule",
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "kv"), [(kind, kv) for kind in KINDS for kv in GRAPH_POLICIES if kv != "none" or kind == "schedule"]
)
@pytest.mark.parametrize("name", ["llama_bias", "qwen3", "gemma2", "gemma3"])
def test_every_kind_of_exit_is_counted(name: str, kind: str, kv: str) -> None:
    """Rows that leave, some of them to resume; what the planner makes of the exits themselves finds every call and byte."""
    model, rows, real = tiny_models.shared(name), 12, 9
    exits = exits_of(name, kind)
    if "probability" in kind and name.startswith("gemma"):  # which is sure of everything, or of nothing
        for band in exits:
            band.threshold = 2.0 if band.leave < 4 else 0.02
    seen, result = counted(model, rows, real, exits, kv)
    taken = leavings(exits, tiny_models.VOCABULARY, gone(result, exits, real))
    found = graph_calls(Sizes.of(model), rows, CONTEXT, taken, count=real, kv=kv, item=4, page_size=PAGE)
    assert planned(found) == seen
    assert sum(one.rows for one in taken) > 0, "somebody must leave"


def test_what_exits_save_and_what_fixed_shapes_cost() -> None:
    """Llama-3-8B, 32 rows of 2048 tokens, half leave at half: K,V are read for those that stay; buffers are small beside it."""
    sizes = Sizes.known("Llama-3-8B")
    full = total(graph_calls(sizes, 32, 2048))[1].bytes
    half = total(graph_calls(sizes, 32, 2048, [Leaving(16, 16)], kv="propagate"))[1].bytes
    assert full - half == pytest.approx(16 * 16 * 2048 * 4096, rel=0.02)
    slices = total(calls(sizes, 32, 2048))[1].bytes
    assert 0.99 < full / slices < 1.01
    empty = total(graph_calls(sizes, 32, 2048, count=0))[1].bytes
    assert empty < 2 * (32 * 2 * 1024 * 4096 + 128256 * 4096) * 1.1, "weights of K and V, and the LM head"


def test_rows_that_resumed_may_leave_again() -> None:
    """Half of the rows skip layers 2 to 5; all leave at 8, and at 7 there are as many as at first."""
    sizes = Sizes.demo()
    found = graph_calls(sizes, 4, 5, [Leaving(2, 2, resume=6), Leaving(8, 4)])
    attended = {call.where: call.traffic for call in found if call.op == "ragged_attention"}
    assert attended["layers 2 to 5"].flops * 2 == attended["layers 6 to 7"].flops == attended["layers 0 to 1"].flops
    assert attended["layers 8 to 29"].flops == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 5}, r"a count in \[0, rows\], got 4, 5, 5"),
        ({"count": -1}, r"a count in \[0, rows\], got 4, 5, -1"),
        ({"kv": "copy"}, "kv must be one of predict, propagate, none, got 'copy'"),
        ({"count": 2, "exits": [Leaving(3, 3)]}, r"2 rows cannot leave as \[3\]"),
        ({"exits": [Leaving(3, 2, resume=6), Leaving(5, 3)]}, r"4 rows cannot leave as \[2, 3\]"),
        ({"exits": [Leaving(3, resume=3)]}, r"rows that leave at 3 must resume in \(3, 30\], got 3"),
        ({"exits": [Leaving(3, head="moe")]}, "head must be one of norm, translator, mlp, block and jump .* got 'moe' and ''"),
        ({"exits": [Leaving(3, resume=5, jump="high")]}, "adapter, adapter alone or '', got 'norm' and 'high'"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        graph_calls(Sizes.demo(), 4, 5, **options)
