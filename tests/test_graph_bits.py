"""Graph style says bit for bit, in fp32 and with the reference providers, what the pass of slices says."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
from graph_starts import exits_of, start
from row_by_row import RowByRow
from torch import Tensor

from dyndepth.exits import Always, Criterion, Exits, Never
from dyndepth.op import backend
from dyndepth.runtime import graph as graph_style
from dyndepth.runtime.graph import GraphResult
from dyndepth.runtime.result import Result
from dyndepth.runtime.session import Session
from dyndepth.testing import assert_same

FAMILIES = ["llama", "qwen3", "gemma3"]
KINDS = [
    "mixed",
    "low_rank",
    "jumps",
    "saturation",
    "probability",
    "patience",
    "block",
    "block_probability",
    "block_always",
    "named",
    "schedule",
]
#: Policies by kind of exits: `none` leaves holes, so it is for rows that read none.
PASSES = [
    (kind, kv) for kind in KINDS for kv in graph_style.GRAPH_POLICIES if kv != "none" or kind in ("named", "schedule")
]  # fmt: skip


def _both(
    family: str, exits: Exits, kv: str, kind: str = "", mode: Any = RowByRow
) -> tuple[tuple[Session, Result], tuple[Session, GraphResult]]:
    """The pass of slices and the pass in graph style, from the same pages, with the reference providers and under a mode.

    The pass of slices runs CALM's propagation layer by layer, which is its reference (docs/design.md, `backfill_kv`). By
    default it folds norm and projections of the layers that nobody is left for into one product: another order of sums, which
    tests/test_invariants.py judges by itself.
    """
    depth: list[int | None] | None = [2, None, 3, 5, 6, 2, 5, None, 3] if kind == "named" else None
    (eager, arguments), (graph, _) = (start(family, exits, kv, depth=depth) for _ in range(2))
    graph.pages.kv.copy_(eager.pages.kv)  # what nobody wrote yet too
    eager.plan.propagation.fold = False
    given = {"tokens": arguments["tokens"], "step": list(range(9)) if kind == "schedule" else arguments["step"]}
    with backend("torch"), mode():
        wanted = eager.run(arguments["seq"], arguments["pos"], **given)
        return (eager, wanted), (graph, graph.run_graph(arguments["seq"], arguments["pos"], **given))


@pytest.mark.parametrize(("kind", "kv"), PASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits(family: str, kind: str, kv: str) -> None:
    """Rows that leave at several depths: with no sum that knows how many rows there are, no bit of any result, page or count
    differs, in layers that nobody is left for neither."""
    (eager, wanted), (graph, found) = _both(family, exits_of(family, kind), kv, kind)
    assert found.exit_layer.tolist() == wanted.exit_layer.tolist()
    assert found.layers_run.tolist() == wanted.layers_run.tolist()
    assert found.bands_taken.tolist() == wanted.bands_taken.tolist()
    assert found.work.tolist() == wanted.work
    assert len(set(wanted.layers_run.tolist())) > (kind != "block_always"), "rows must take several ways"
    assert_same(found.ready, wanted.ready, "head-ready rows")
    assert_same(graph.pages.kv, eager.pages.kv, "pages")


@pytest.mark.parametrize("kv", graph_style.GRAPH_POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_where_nobody_is_left(family: str, kv: str) -> None:
    """Everybody leaves at 2: five layers that only propagation writes to, or nobody."""
    exits = tiny_exits.exits_of(tiny_models.shared(family), tiny_exits.band(tiny_models.shared(family), 2, 6, Always()))
    (eager, wanted), (graph, found) = _both(family, exits, kv)
    assert wanted.work == [9, 9, 0, 0, 0, 0]
    assert_same(found.ready, wanted.ready, "head-ready rows")
    assert_same(graph.pages.kv, eager.pages.kv, "pages")


@pytest.mark.parametrize("kv", graph_style.GRAPH_POLICIES)
@pytest.mark.parametrize("criterion", [Always(), Never()], ids=lambda criterion: criterion.kind)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_where_both_ways_run_as_many_rows(family: str, criterion: Criterion, kv: str) -> None:
    """PyTorch's products, and the tails of its vectors, round by the number of rows; as many rows leave no excuse."""
    model = tiny_models.shared(family)
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 1, 3, criterion), tiny_exits.band(model, 4, 6, criterion))
    (eager, wanted), (graph, found) = _both(family, exits, kv, mode=contextlib.nullcontext)
    assert torch.equal(found.ready, wanted.ready)
    assert torch.equal(found.exit_layer, wanted.exit_layer)
    assert set(wanted.exit_layer.tolist()) == {4 if criterion.kind == "always" else 6}
    assert_same(graph.pages.kv, eager.pages.kv, "pages")


@pytest.mark.parametrize("op", ["project_qkv", "ragged_attention", "ragged_linear"])
def test_a_counter_one_too_small_shows(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A live row that nobody computed is seen: what an op leaves unspecified is spoilt."""
    right = getattr(graph_style, op)

    def fewer(*args: Any, live: Tensor, **options: Any) -> Tensor:
        return right(*args, live=(live - 1).clamp_min(0), **options)

    monkeypatch.setattr(graph_style, op, fewer)
    session, arguments = start("llama", exits_of("llama", "mixed"), "predict")
    with backend("torch"), RowByRow():
        found = session.run_graph(arguments["seq"], arguments["pos"], tokens=arguments["tokens"], step=arguments["step"])
    assert bool(found.ready.isnan().any())
