"""Invariant 9: a pass in graph style looks at no value on the host, and says what the pass of slices says."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
from graph_starts import exits_of, start
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.proxy_tensor import make_fx

from dyndepth.errors import ExitsError
from dyndepth.exits import Exits
from dyndepth.op import backend
from dyndepth.runtime.bind import bind
from dyndepth.runtime.forward import forward
from dyndepth.runtime.graph import forward_graph, why_not
from dyndepth.runtime.layer import Context
from dyndepth.runtime.rows import Rows
from dyndepth.runtime.session import Session

FAMILIES = ["llama", "llama_bias", "qwen3", "gemma3", "olmo2", "phi3", "gpt2", "gpt_neox"]


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("kind", ["mixed", "jumps", "saturation", "probability"])
@pytest.mark.parametrize("family", FAMILIES)
def test_says_what_the_pass_of_slices_says(family: str, kind: str, kv: str) -> None:
    """Same decisions, residuals, K,V and counts, with the reference providers. Products of other row counts round otherwise."""
    exits = exits_of(family, kind)
    (eager, arguments), (graph, _) = start(family, exits, kv), start(family, exits, kv)
    with backend("torch"):
        wanted = eager.run(arguments["seq"], arguments["pos"], tokens=arguments["tokens"], step=arguments["step"])
        found = graph.run_graph(arguments["seq"], arguments["pos"], tokens=arguments["tokens"], step=arguments["step"])
    assert found.exit_layer.tolist() == wanted.exit_layer.tolist()
    assert found.layers_run.tolist() == wanted.layers_run.tolist()
    assert found.bands_taken.tolist() == wanted.bands_taken.tolist()
    assert found.work.tolist() == wanted.work
    torch.testing.assert_close(found.ready, wanted.ready, rtol=1e-4, atol=1e-5)
    slots = eager.pages.slots(arguments["seq"], arguments["pos"]).long()
    mine, theirs = (session.pages.kv[:6].flatten(2, 3)[:, :, slots] for session in (graph, eager))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    if kind == "mixed":
        assert len(set(wanted.layers_run.tolist())) > 1, "rows must take several ways for this to test anything"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("real", [0, 1, 5, 9])
def test_one_shape_serves_smaller_batches(family: str, real: int) -> None:
    """Rows past the count are padding: they write no K,V and change nobody."""
    exits = exits_of(family, "mixed")
    (eager, arguments), (graph, _) = start(family, exits, "predict"), start(family, exits, "predict")
    part = {name: value[:real] for name, value in arguments.items()}
    with backend("torch"):
        rows, context = graph.rows(arguments["seq"], arguments["pos"], tokens=arguments["tokens"], step=arguments["step"])
        rows.slots[real:] = -1
        before = graph.pages.kv.view(torch.int32).clone()
        found = forward_graph(graph.plan, rows, context, torch.tensor([real], dtype=torch.int32))
        assert found.work[0] == real
        if real:
            wanted = eager.run(part["seq"], part["pos"], tokens=part["tokens"], step=part["step"])
            assert found.exit_layer[:real].tolist() == wanted.exit_layer.tolist()
            assert found.work.tolist() == wanted.work
            torch.testing.assert_close(found.ready[:real], wanted.ready, rtol=1e-4, atol=1e-5)
    written = (graph.pages.kv.view(torch.int32) != before).flatten(4).any(-1).any(0).any(0).flatten().nonzero()[:, 0].tolist()
    mine = graph.pages.slots(part["seq"], part["pos"]).tolist()
    assert set(written) <= set(mine)


def _traced(session: Session, arguments: dict[str, Any], run: Any) -> Any:
    rows, context = session.rows(arguments["seq"], arguments["pos"], tokens=arguments["tokens"], step=arguments["step"])
    names = ["hidden", "seq", "pos", "slots", "step", "may_leave"]

    def step(pages: torch.Tensor, block_table: torch.Tensor, *buffers: torch.Tensor) -> Any:
        return run(session.plan, Rows(*buffers), Context(pages, block_table, context.cos, context.sin))

    inputs = [getattr(rows, name) for name in names]
    return make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(context.pages, context.block_table, *inputs)


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("kind", ["mixed", "probability", "saturation", "patience", "block"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_traces_under_fake_tensors(family: str, kind: str, kv: str) -> None:
    """Nothing reads a value: a fake tensor has none, and raises when asked. The trace runs, and is the pass."""

    def run(*parts: Any) -> Any:
        result = forward_graph(*parts)
        return result.ready, result.exit_layer, result.layers_run, result.work

    exits = exits_of(family, kind)
    session, arguments = start(family, exits, kv)
    with backend("torch"):
        traced = _traced(session, arguments, run)
        rows, context = session.rows(arguments["seq"], arguments["pos"], tokens=arguments["tokens"], step=arguments["step"])
        buffers = (rows.hidden, rows.seq, rows.pos, rows.slots, rows.step, rows.may_leave)
        replayed = traced(context.pages, context.block_table, *buffers)
        again, _ = start(family, exits, kv)
        wanted = again.run_graph(arguments["seq"], arguments["pos"], tokens=arguments["tokens"], step=arguments["step"])
    ours = {node.target for node in traced.graph.nodes if "dyndepth" in str(node.target)}
    assert any("compact_rows" in str(target) for target in ours)
    assert any("ragged_attention" in str(target) for target in ours)
    for mine, other in zip(replayed[1:], (wanted.exit_layer, wanted.layers_run, wanted.work), strict=True):
        assert torch.equal(mine, other)
    # A trace takes linear layers apart into products and sums, which round otherwise.
    torch.testing.assert_close(replayed[0], wanted.ready, rtol=1e-4, atol=1e-5)
    slots = session.pages.slots(arguments["seq"], arguments["pos"]).long()
    pages = [each.pages.kv[:6].flatten(2, 3)[:, :, slots] for each in (session, again)]
    torch.testing.assert_close(*pages, rtol=1e-4, atol=1e-5)


def test_the_pass_of_slices_does_not_trace() -> None:
    """It reads the counters on the host at every boundary: the test above can fail."""
    session, arguments = start("llama", exits_of("llama", "mixed"), "predict")
    with backend("torch"), pytest.raises((DataDependentOutputException, RuntimeError)):
        _traced(session, arguments, lambda *parts: forward(*parts).ready)


def test_closed_bands_that_resume_at_one_place() -> None:
    model = tiny_models.shared("llama")
    closed = {"threshold": float("inf")}
    exits = tiny_exits.exits_of(
        model, tiny_exits.band(model, 1, 4, **closed), tiny_exits.band(model, 2, 4, **closed), tiny_exits.band(model, 4, 6)
    )
    (eager, arguments), (graph, _) = start("llama", exits, "predict"), start("llama", exits, "predict")
    wanted = eager.run(arguments["seq"], arguments["pos"], tokens=arguments["tokens"], step=arguments["step"])
    found = graph.run_graph(arguments["seq"], arguments["pos"], tokens=arguments["tokens"], step=arguments["step"])
    assert found.exit_layer.tolist() == wanted.exit_layer.tolist()


def test_refusals() -> None:
    model = tiny_models.shared("llama")
    for kv in ("recompute", "release", "copy"):
        session, arguments = start("llama", tiny_exits.exits_of(model, tiny_exits.band(model, 2, 6)), kv)
        with pytest.raises(ExitsError, match=f"graph style: kv='{kv}' takes rows up that waited"):
            session.run_graph(arguments["seq"], arguments["pos"], tokens=arguments["tokens"])
    watched = Session(bind(model), [4], tiny_exits.mixed(model), observed=True)
    assert why_not(watched.plan) == "an observer is told of rows by name, which is the host's work"


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_patience_counts_over_boundaries(family: str, kv: str) -> None:
    """Boundaries where the arg max did not change, rows that resume in between included."""
    wanted, found = _both(family, exits_of(family, "patience"), kv)
    assert found.exit_layer.tolist() == wanted.exit_layer.tolist()
    assert found.bands_taken.tolist() == wanted.bands_taken.tolist()
    assert len(set(wanted.exit_layer.tolist())) > 1, "some must be patient enough and some not"


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("kind", ["block", "block_probability", "block_always"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_block_heads(family: str, kind: str, kv: str) -> None:
    """One more layer at an exit, with its own K,V: everybody's are stored, heads are those of the pass of slices."""
    exits = exits_of(family, kind)
    (eager, arguments), (graph, _) = start(family, exits, kv), start(family, exits, kv)
    wanted, found = _both(family, exits, kv, eager, graph)
    assert found.exit_layer.tolist() == wanted.exit_layer.tolist()
    torch.testing.assert_close(found.ready, wanted.ready, rtol=1e-4, atol=1e-5)
    slots = eager.pages.slots(arguments["seq"], arguments["pos"]).long()
    mine, theirs = (session.pages.kv.flatten(2, 3)[:, :, slots] for session in (graph, eager))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    ran = [wanted.block_work.get(leave, 0) for leave in (2, 4)]
    assert all(ours >= theirs for ours, theirs in zip(found.block_work.tolist(), ran, strict=True))
    assert (found.block_work.tolist() == ran) == (kind != "block")
    assert (len(set(wanted.exit_layer.tolist())) > 1) == (kind != "block_always")


def _both(family: str, exits: Exits, kv: str, eager: Session | None = None, graph: Session | None = None) -> Any:
    """The pass of slices and the pass in graph style, with the reference providers."""
    arguments = start(family, exits, kv)[1]
    results = []
    for session, name in ((eager, "run"), (graph, "run_graph")):
        session = start(family, exits, kv)[0] if session is None else session
        with backend("torch"):
            given = {"tokens": arguments["tokens"], "step": arguments["step"]}
            results.append(getattr(session, name)(arguments["seq"], arguments["pos"], **given))
    return results
