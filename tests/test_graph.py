"""Invariant 9: a pass in graph style looks at no value on the host, and says what the pass of slices says."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
from row_by_row import RowByRow
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.proxy_tensor import make_fx

from dyndepth.errors import ExitsError
from dyndepth.exits import Always, Criterion, Exits, Never, Patience, Saturation, TopProbability
from dyndepth.op import backend
from dyndepth.runtime import graph as graph_style
from dyndepth.runtime.bind import bind
from dyndepth.runtime.block import block_head
from dyndepth.runtime.forward import forward
from dyndepth.runtime.graph import forward_graph, why_not
from dyndepth.runtime.layer import Context
from dyndepth.runtime.rows import Rows
from dyndepth.runtime.session import Session
from dyndepth.testing import assert_same

FAMILIES = ["llama", "llama_bias", "qwen3", "gemma3", "olmo2", "phi3", "gpt2", "gpt_neox"]

#: With these some rows of the tiny models leave at each of several boundaries, and not all.
THRESHOLDS = {
    ("llama", "saturation"): 0.82, ("qwen3", "saturation"): 0.82, ("gemma3", "saturation"): 0.98,
    ("llama", "probability"): 0.95, ("qwen3", "probability"): 0.95, ("gemma3", "probability"): 0.999999,
}  # fmt: skip


def _start(family: str, exits: Exits | None, kv: str, rows: int = 9) -> tuple[Session, dict[str, Any]]:
    """A session with prompts in its pages, and the arguments of a decode step of `rows` sequences."""
    model = bind(tiny_models.shared(family))
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 14, (rows,), generator=generator).tolist()
    session = Session(model, [length + 4 for length in lengths], exits, kv=kv)
    prompts = [torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator) for length in lengths]
    session.prefill(prompts, session.work())
    tokens = torch.randint(3, tiny_models.VOCABULARY, (rows,), generator=generator)
    return session, {"seq": list(range(rows)), "pos": lengths, "tokens": tokens, "step": [3] * rows}


def _exits(family: str, kind: str) -> Exits:
    model = tiny_models.shared(family)
    if kind == "mixed":
        return tiny_exits.mixed(model)
    if kind == "jumps":  # two bands that resume at one place, with jumps of their own
        return tiny_exits.exits_of(
            model, tiny_exits.band(model, 1, 4), tiny_exits.band(model, 2, 4), tiny_exits.band(model, 4, 6)
        )
    criterion = Saturation() if kind == "saturation" else TopProbability()
    options: dict[str, Any] = {"criterion": criterion, "threshold": THRESHOLDS.get((family, kind), 0.8)}
    return tiny_exits.exits_of(model, *(tiny_exits.band(model, point, 6, **options) for point in (2, 3, 5)))


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("kind", ["mixed", "jumps", "saturation", "probability"])
@pytest.mark.parametrize("family", FAMILIES)
def test_says_what_the_pass_of_slices_says(family: str, kind: str, kv: str) -> None:
    """Same decisions, residuals, K,V and counts, with the reference providers. Products of other row counts round otherwise."""
    exits = _exits(family, kind)
    (eager, arguments), (graph, _) = _start(family, exits, kv), _start(family, exits, kv)
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


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("kind", ["mixed", "jumps", "saturation", "probability"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_the_same_bits_as_the_pass_of_slices(family: str, kind: str, kv: str) -> None:
    """fp32, reference providers, rows that leave at several depths: with no sum that knows how many rows there are, no bit
    of any result, page or count differs.

    But for K,V in layers that nobody is left for, under `propagate`: there the pass of slices folds norm and projection of all
    layers into one product, which is another sum.
    """
    exits = _exits(family, kind)
    (eager, arguments), (graph, _) = _start(family, exits, kv), _start(family, exits, kv)
    graph.pages.kv.copy_(eager.pages.kv)  # what nobody wrote yet too
    given = {"tokens": arguments["tokens"], "step": arguments["step"]}
    with backend("torch"), RowByRow():
        wanted = eager.run(arguments["seq"], arguments["pos"], **given)
        found = graph.run_graph(arguments["seq"], arguments["pos"], **given)
    assert found.exit_layer.tolist() == wanted.exit_layer.tolist()
    assert found.layers_run.tolist() == wanted.layers_run.tolist()
    assert found.bands_taken.tolist() == wanted.bands_taken.tolist()
    assert found.work.tolist() == wanted.work
    assert len(set(wanted.layers_run.tolist())) > 1, "rows must take several ways for this to test anything"
    assert_same(found.ready, wanted.ready, "head-ready rows")
    mine, theirs = graph.pages.kv, eager.pages.kv
    ran = [layer for layer in range(len(mine)) if kv == "predict" or layer >= len(wanted.work) or wanted.work[layer]]
    assert_same(mine[ran], theirs[ran], "pages")
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("op", ["project_qkv", "ragged_attention", "ragged_linear"])
def test_a_counter_one_too_small_shows(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above sees a live row that nobody computed: what an op leaves unspecified is spoilt."""
    right = getattr(graph_style, op)

    def fewer(*args: Any, live: torch.Tensor, **options: Any) -> torch.Tensor:
        return right(*args, live=(live - 1).clamp_min(0), **options)

    monkeypatch.setattr(graph_style, op, fewer)
    session, arguments = _start("llama", _exits("llama", "mixed"), "predict")
    with backend("torch"), RowByRow():
        found = session.run_graph(arguments["seq"], arguments["pos"], tokens=arguments["tokens"], step=arguments["step"])
    assert bool(found.ready.isnan().any())


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("criterion", [Always(), Never()], ids=lambda criterion: criterion.kind)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_the_same_bits_where_both_ways_run_as_many_rows(family: str, criterion: Criterion, kv: str) -> None:
    """PyTorch's products, and the tails of its vectors, round by the number of rows; as many rows leave no excuse."""
    model = tiny_models.shared(family)
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 1, 3, criterion), tiny_exits.band(model, 4, 6, criterion))
    (eager, arguments), (graph, _) = _start(family, exits, kv), _start(family, exits, kv)
    with backend("torch"):
        wanted = eager.run(arguments["seq"], arguments["pos"], tokens=arguments["tokens"], step=arguments["step"])
        found = graph.run_graph(arguments["seq"], arguments["pos"], tokens=arguments["tokens"], step=arguments["step"])
    assert torch.equal(found.ready, wanted.ready)
    assert torch.equal(found.exit_layer, wanted.exit_layer)
    assert set(wanted.exit_layer.tolist()) == {4 if criterion.kind == "always" else 6}
    slots = eager.pages.slots(arguments["seq"], arguments["pos"]).long()
    mine, theirs = (session.pages.kv[:6].flatten(2, 3)[:, :, slots] for session in (graph, eager))
    if kv == "predict" or criterion.kind == "never":  # of rows that all left, the pass of slices folds norm and projection
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("real", [0, 1, 5, 9])
def test_one_shape_serves_smaller_batches(family: str, real: int) -> None:
    """Rows past the count are padding: they write no K,V and change nobody."""
    exits = _exits(family, "mixed")
    (eager, arguments), (graph, _) = _start(family, exits, "predict"), _start(family, exits, "predict")
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
@pytest.mark.parametrize("kind", ["mixed", "probability", "saturation"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_traces_under_fake_tensors(family: str, kind: str, kv: str) -> None:
    """Nothing reads a value: a fake tensor has none, and raises when asked. The trace runs, and is the pass."""

    def run(*parts: Any) -> Any:
        result = forward_graph(*parts)
        return result.ready, result.exit_layer, result.layers_run, result.work

    exits = _exits(family, kind)
    session, arguments = _start(family, exits, kv)
    with backend("torch"):
        traced = _traced(session, arguments, run)
        rows, context = session.rows(arguments["seq"], arguments["pos"], tokens=arguments["tokens"], step=arguments["step"])
        buffers = (rows.hidden, rows.seq, rows.pos, rows.slots, rows.step, rows.may_leave)
        replayed = traced(context.pages, context.block_table, *buffers)
        again, _ = _start(family, exits, kv)
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
    session, arguments = _start("llama", _exits("llama", "mixed"), "predict")
    with backend("torch"), pytest.raises((DataDependentOutputException, RuntimeError)):
        _traced(session, arguments, lambda *parts: forward(*parts).ready)


def test_closed_bands_that_resume_at_one_place() -> None:
    model = tiny_models.shared("llama")
    closed = {"threshold": float("inf")}
    exits = tiny_exits.exits_of(
        model, tiny_exits.band(model, 1, 4, **closed), tiny_exits.band(model, 2, 4, **closed), tiny_exits.band(model, 4, 6)
    )
    (eager, arguments), (graph, _) = _start("llama", exits, "predict"), _start("llama", exits, "predict")
    wanted = eager.run(arguments["seq"], arguments["pos"], tokens=arguments["tokens"], step=arguments["step"])
    found = graph.run_graph(arguments["seq"], arguments["pos"], tokens=arguments["tokens"], step=arguments["step"])
    assert found.exit_layer.tolist() == wanted.exit_layer.tolist()


def test_refusals() -> None:
    model = tiny_models.shared("llama")
    for kv in ("recompute", "release", "copy"):
        session, arguments = _start("llama", tiny_exits.exits_of(model, tiny_exits.band(model, 2, 6)), kv)
        with pytest.raises(ExitsError, match=f"graph style: kv='{kv}' takes rows up that waited"):
            session.run_graph(arguments["seq"], arguments["pos"], tokens=arguments["tokens"])
    watched = Session(bind(model), [4], tiny_exits.mixed(model), observed=True)
    assert why_not(watched.plan) == "an observer is told of rows by name, which is the host's work"


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_patience_counts_over_boundaries(family: str, kv: str) -> None:
    """Boundaries where the arg max did not change, rows that resume in between included."""
    model = tiny_models.shared(family)
    few = torch.tensor([3, 9, 20])  # so few words that random heads agree now and then
    patient = [tiny_exits.band(model, leave, 6, Patience(), threshold=1.0, shortlist=few) for leave in (2, 4, 5)]
    resuming = tiny_exits.band(model, 3, 4)
    wanted, found = _both(family, tiny_exits.exits_of(model, patient[0], resuming, *patient[1:]), kv)
    assert found.exit_layer.tolist() == wanted.exit_layer.tolist()
    assert found.bands_taken.tolist() == wanted.bands_taken.tolist()
    assert len(set(wanted.exit_layer.tolist())) > 1, "some must be patient enough and some not"


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("criterion", ["router", "top_probability", "always"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_block_heads(family: str, criterion: str, kv: str) -> None:
    """One more layer at an exit, with its own K,V: everybody's are stored, heads are those of the pass of slices."""
    model = tiny_models.shared(family)
    bands = []
    for leave in (2, 4):
        judge = {"router": None, "top_probability": TopProbability(), "always": Always()}[criterion]
        threshold = 0.1 if criterion == "top_probability" else 0.5
        one = tiny_exits.band(model, leave, 6, judge, threshold=threshold)
        one.head = block_head(bind(model), leave)
        bands.append(one)
    exits = tiny_exits.exits_of(model, *bands)
    (eager, arguments), (graph, _) = _start(family, exits, kv), _start(family, exits, kv)
    wanted, found = _both(family, exits, kv, eager, graph)
    assert found.exit_layer.tolist() == wanted.exit_layer.tolist()
    torch.testing.assert_close(found.ready, wanted.ready, rtol=1e-4, atol=1e-5)
    slots = eager.pages.slots(arguments["seq"], arguments["pos"]).long()
    mine, theirs = (session.pages.kv.flatten(2, 3)[:, :, slots] for session in (graph, eager))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    ran = [wanted.block_work.get(leave, 0) for leave in (2, 4)]
    assert all(ours >= theirs for ours, theirs in zip(found.block_work.tolist(), ran, strict=True))
    assert (found.block_work.tolist() == ran) == (criterion in ("top_probability", "always"))


def _both(family: str, exits: Exits, kv: str, eager: Session | None = None, graph: Session | None = None) -> Any:
    """The pass of slices and the pass in graph style, with the reference providers."""
    arguments = _start(family, exits, kv)[1]
    results = []
    for session, name in ((eager, "run"), (graph, "run_graph")):
        session = _start(family, exits, kv)[0] if session is None else session
        with backend("torch"):
            given = {"tokens": arguments["tokens"], "step": arguments["step"]}
            results.append(getattr(session, name)(arguments["seq"], arguments["pos"], **given))
    return results
