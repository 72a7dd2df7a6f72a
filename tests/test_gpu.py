"""The same cases on hardware (`make test-gpu`): every GPU provider against the oracle, without a host read, in a graph."""

from __future__ import annotations

from typing import Any

import graph_bodies
import op_harness
import pytest
import tiny_exits
import tiny_models
import torch

import dyndepth
from dyndepth.op import REGISTRY, backend
from dyndepth.runtime.cuda_graphs import CudaCapture, no_conditions
from dyndepth.runtime.graph_pool import GraphPool
from dyndepth.testing import CASES, Case, assert_as_exact_as, assert_same
from dyndepth.testing.cases import Arguments, widened
from dyndepth.testing.linear_cases import linear

pytestmark = pytest.mark.gpu

PROVIDERS = ["cuda", "triton"]
PAIRS = [(op, provider) for op in sorted(REGISTRY) for provider in PROVIDERS if provider in REGISTRY[op].providers]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
#: Cases sized for a GPU take seconds to build: once, in the dtype people run.
ALL = [
    pytest.param(op, provider, case, dtype, id=f"{op}-{provider}-{case.name}-{dtype}")
    for op, provider in PAIRS
    for case in CASES[op]
    for dtype in (FLOATS[:1] if op == "accept_drafts" else FLOATS[1:2] if case.gpu else FLOATS)
]
#: Every bit of these is the reference's.
EXACT = ("accept_drafts", "compact_rows")


@pytest.fixture(autouse=True)
def _no_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def _call(op: str, arguments: Arguments, provider: str) -> list[torch.Tensor]:
    """Outputs, then pages; rows at or past live cut off."""
    own = op_harness.copied(arguments)
    with backend(provider):
        found = REGISTRY[op](**own)
    flat = op_harness._flat(found)
    live = own.get("live")
    flat = flat if live is None else [value[: int(live)] for value in flat]
    return [*flat, own["pages"]] if "pages" in own and op != "ragged_attention" else flat


@pytest.mark.parametrize(("op", "provider", "case", "dtype"), ALL)
def test_against_the_oracle(op: str, provider: str, case: Case, dtype: torch.dtype) -> None:
    assert REGISTRY[op].providers[provider].missing() is None
    arguments = case.build(dtype, "cuda")
    actual = _call(op, arguments, provider)
    if op in EXACT:
        for mine, reference in zip(actual, op_harness._flat(REGISTRY[op].reference(**arguments)), strict=True):
            assert_same(mine, reference.contiguous(), case.name)
        return
    truth = list(op_harness.outcome(op, widened(arguments)).values())
    reference = _call(op, arguments, "torch")
    names = [*op_harness.OUTPUTS[op], "pages"]
    for name, mine, theirs, exact in zip(names, actual, reference, truth, strict=False):
        if mine.dtype.is_floating_point:
            assert_as_exact_as(mine, theirs, exact, what=f"{op} {case.name} {provider}: {name}", working=dtype)
        elif dtype == torch.float32:
            assert_same(mine, exact, f"{op} {case.name}: {name}")


@pytest.mark.parametrize(("op", "provider"), PAIRS)
def test_no_host_read_and_capturable(op: str, provider: str) -> None:
    """An op inside a pass must not wait for the device: an error under sync-debug mode, and impossible in a graph."""
    case = next(case for case in CASES[op] if case.bench)
    arguments = case.build(torch.bfloat16, "cuda")
    eager = _call(op, arguments, provider)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with backend(provider):
            REGISTRY[op](**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    own = op_harness.copied(arguments)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), backend(provider):
        REGISTRY[op](**own)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph), backend(provider):
        captured = REGISTRY[op](**own)
    graph.replay()
    torch.cuda.synchronize()
    replayed = [*op_harness._flat(captured), *([own["pages"]] if "pages" in own and op != "ragged_attention" else [])]
    for one, other in zip(replayed, eager, strict=True):
        assert_same(one, other, f"{op} replayed")


@pytest.mark.parametrize("op", ["exit_stats", "router_score", "ragged_attention", "ragged_linear", "project_qkv"])
def test_live_is_read_on_the_device(op: str) -> None:
    """One captured graph, the counter changed between replays: the rows below it are right every time."""
    case = next(case for case in CASES[op] if case.bench and case.build()[_rows_of(op)].shape[0] == 16)
    arguments = case.build(torch.bfloat16, "cuda")
    arguments["live"] = torch.tensor([16], dtype=torch.int32, device="cuda")
    whole = _call(op, arguments, "triton")
    own = op_harness.copied(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), backend("triton"):
        captured = op_harness._flat(REGISTRY[op](**own))
    for live in (16, 0, 1, 7, 15):
        own["live"].fill_(live)
        for value in captured:
            value.fill_(-1)
        graph.replay()
        torch.cuda.synchronize()
        for one, other in zip(captured, whole, strict=False):
            assert_same(one[:live], other[:live], f"{op} at live {live}")


def _rows_of(op: str) -> str:
    return {"exit_stats": "hidden", "router_score": "hidden", "ragged_attention": "q"}.get(op, "x")


def _poisoned(arguments: Arguments) -> torch.Tensor:
    """ragged_linear into memory full of NaN. (Around the call alone: cuBLAS refuses to be deterministic just like that.)"""
    torch.use_deterministic_algorithms(True)
    try:
        with backend("triton"):
            return REGISTRY["ragged_linear"](**arguments)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 33, 64, 65, 129, 300, 2100])
def test_ragged_linear_at_any_size(rows: int, dtype: torch.dtype) -> None:
    """Rows, live rows, widths and outputs around tiles: as exact as PyTorch, nothing past live, the same bits in any order."""
    for width, outputs, gated in ((64, 48, "silu"), (70, 37, ""), (576, 300, "gelu"), (1001, 130, "gelu_tanh")):
        make = linear(rows, width, outputs, gated=gated, bias=True, gate_bias=bool(gated), residual=True)
        arguments = {
            name: value.cuda() if isinstance(value, torch.Tensor) else value
            for name, value in make(dtype, torch.Generator().manual_seed(rows)).items()
        }
        whole = _poisoned(arguments)
        op_harness.check_exact("ragged_linear", arguments, whole, f"{rows} x {width} x {outputs}")
        for live in sorted({0, 1, rows - 1, rows}):
            found = _poisoned({**arguments, "live": torch.tensor([live], dtype=torch.int32, device="cuda")})
            assert_same(found[:live], whole[:live], f"live {live}")
            assert bool(found[live:].isnan().all())
        turned = {name: arguments[name].flip(0) for name in ("x", "residual")}
        assert_same(_poisoned({**arguments, **turned}).flip(0), whole, "rows in another order")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("rows", [0, 1, 2, 31, 32, 33, 1023, 1024, 1025, 4097, 70_000])
def test_compact_rows_at_any_size(provider: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    state = torch.randint(0, 3, (rows,), generator=generator).to(torch.int8)
    wide = torch.randn(rows, 24, generator=generator)
    payloads = [wide, wide[:, 1:8], torch.arange(rows), (wide[:, 0] > 0), wide[:, :3].to(torch.bfloat16), wide[:, :0]]
    moved, order, counts = REGISTRY["compact_rows"].reference(state, payloads)
    on_device = wide.cuda()
    same = [on_device, on_device[:, 1:8], *(p.cuda() for p in payloads[2:])]
    with backend(provider):
        actual, actual_order, actual_counts = dyndepth.ops.compact_rows(state.cuda(), same)
    assert_same(actual_order, order)
    assert_same(actual_counts, counts)
    for one, other in zip(actual, moved, strict=True):
        assert_same(one, other.contiguous())


@pytest.mark.parametrize("provider", PROVIDERS)
def test_compact_rows_with_many_payloads_and_odd_addresses(provider: str) -> None:
    rows = 300
    state = torch.randint(0, 3, (rows,)).to(torch.int8)
    memory = torch.arange(rows * 40 + 64, dtype=torch.int64).to(torch.uint8).cuda()
    payloads = [
        memory[offset : offset + rows * width].view(rows, width) for offset in (0, 1, 2, 3, 4, 8, 16) for width in (1, 3, 16)
    ]
    with backend(provider):
        actual, order, _ = dyndepth.ops.compact_rows(state.cuda(), payloads)
    for one, payload in zip(actual, payloads, strict=True):
        assert_same(one, payload.cpu()[order.cpu().long()])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma2", "gpt_neox", "gpt2", "phi3", "olmo2"])
def test_full_depth_is_transformers(family: str) -> None:
    model = tiny_models.tiny(family).cuda()
    inputs = {name: value.cuda() for name, value in tiny_models.prompts(7).items()}
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(
        model.generate(**inputs, custom_generate=dyndepth.generate, **options), model.generate(**inputs, **options)
    )


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_dynamic_depth_is_the_cpu_s(family: str, kv: str) -> None:
    """fp32: the bands and tokens that the CPU's tested runtime finds."""
    model = tiny_models.tiny(family)
    exits = tiny_exits.mixed(model)
    inputs = tiny_models.prompts(7)
    options: dict[str, Any] = {
        "custom_generate": dyndepth.generate,
        "exits": exits,
        "kv": kv,
        "max_new_tokens": 10,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    here = model.generate(**inputs, **options)
    there = model.cuda().generate(**{name: value.cuda() for name, value in inputs.items()}, **options)
    assert torch.equal(there.sequences.cpu(), here.sequences)
    assert torch.equal(there.bands_taken, here.bands_taken)
    assert there.work.layers == here.work.layers


# -- passes as graphs -----------------------------------------------------------------------------------------------------


# What these check is run on the CPU too, with a recorder for the graph: tests/test_graph_bodies.py.


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("kind", graph_bodies.KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_pass_in_graph_style_reads_nothing_on_the_host(family: str, kind: str, kv: str) -> None:
    graph_bodies.reads_nothing_on_the_host(tiny_models.tiny(family).cuda(), kind, kv)


@pytest.mark.parametrize("conditional", [False, True], ids=["early return", "conditional nodes"])
@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("kind", graph_bodies.KINDS)
def test_replays_are_passes_of_slices(kind: str, kv: str, conditional: bool) -> None:
    if conditional and (reason := no_conditions(torch.cuda.current_device())) is not None:
        pytest.skip(reason)
    model = tiny_models.tiny("llama").cuda()
    graph_bodies.replays_are_passes_of_slices(model, kind, kv, lambda: CudaCapture(torch.device("cuda"), conditional))


@pytest.mark.parametrize("kv", ["predict", "propagate"])
def test_a_replayed_pass_waits_for_nothing(kv: str) -> None:
    """Inputs copied in, replay, results copied out: no synchronisation, once the bucket is captured."""
    model = tiny_models.tiny("llama").cuda()
    lengths = [3, 9, 1]
    made = graph_bodies.prefilled(model, "mixed", kv, lengths)
    pool = GraphPool(made.plan, lambda: CudaCapture(torch.device("cuda")), most=4)
    seq, pos = torch.arange(3).numpy(), torch.tensor(lengths).numpy()
    made.pages.reserve_rows(seq, pos + 1)
    may = torch.ones(3, dtype=torch.int64).numpy()

    def run(pos: Any, tokens: torch.Tensor) -> Any:
        return pool.run(tokens, seq, pos, pos, may, made.pages, made.reach, made.cos, made.sin)

    run(pos, torch.tensor([5, 9, 11]))
    tokens = torch.tensor([6, 7, 8])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(pos + 1, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    again = run(pos + 1, tokens.cuda())
    assert_same(found.ready, again.ready, "tokens from the host and from the device")
    assert pool.captured == 1


@pytest.mark.parametrize("kind", graph_bodies.KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox"])
def test_generation_by_graphs(family: str, kind: str) -> None:
    graph_bodies.generation_by_graphs(tiny_models.tiny(family).cuda(), kind)
