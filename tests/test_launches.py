"""Kernels are counted where they start: every op's cases, CUDA's own, and whole passes, against what pure functions say."""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import op_harness
import pytest
import tiny_exits
import tiny_models
import torch
from counting import Counting
from graph_starts import exits_of
from kernel_cases import composed, said

from dyndepth import env
from dyndepth.exits import Router, RouterScore, TopProbability
from dyndepth.op import REGISTRY, backend
from dyndepth.plan import Leaving, Sizes, leavings
from dyndepth.plan.launches import graph_launches
from dyndepth.runtime.bind import bind
from dyndepth.runtime.session import Session
from dyndepth.testing import CASES

#: By op all that its provider may launch.
KERNELS = {
    "compact_rows": {"partition", "move"}, "exit_stats": {"block_stats", "logit_stats", "fold"},
    "ragged_attention": {"attend", "combine"},
    **{op: {op} for op in ("router_score", "ragged_linear", "store_kv", "project_qkv")},
    "backfill_kv": {"backfill_kv", "ragged_linear"},  # the second for maps of low rank
}  # fmt: skip
counts: Any = importlib.import_module("dyndepth.kernels.counts")
launch: Any = importlib.import_module("dyndepth.kernels.launch")
interpreted = pytest.mark.skipif(not env.triton_interpret(), reason="runs under TRITON_INTERPRET=1 (make test-interpreted)")


@contextlib.contextmanager
def _counted(run: bool = True) -> Iterator[Counter[str]]:
    """Launches of Triton's kernels by name, in Triton's interpreter; `run` False starts them and leaves it at that."""
    from triton.runtime import interpreter

    seen: Counter[str] = Counter()
    call = interpreter.GridExecutor.__call__

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen[self.fn.__name__.lstrip("_")] += 1
        return call(self, *args, **kwargs) if run else None

    interpreter.GridExecutor.__call__ = counting
    try:
        yield seen
    finally:
        interpreter.GridExecutor.__call__ = call


@interpreted
@pytest.mark.parametrize("op", sorted(name for name, op in REGISTRY.items() if "triton" in op.providers))
def test_launches_of_every_case_triton(op: str) -> None:
    """Those of more than a thousand rows too."""
    seen: set[str] = set()
    for case in [case for case in CASES[op] if not (case.large or case.gpu or case.bench)]:
        given = case.build(torch.float32)
        if op in ("project_qkv", "backfill_kv") and composed(op, given):
            continue  # the library's products, then store_kv
        with _counted(run=False) as found, backend("triton"):  # how many a host function starts is no kernel's affair
            REGISTRY[op](**op_harness.copied(given))
        assert found == Counter({name: count for name, count in said(op, given).items() if name != "library"}), case.name
        seen |= set(found)
    assert seen == KERNELS[op]


@interpreted
@pytest.mark.parametrize(("judge", "kv"), [("router", "predict"), ("statistics", "propagate"), ("none", "predict")])
def test_launches_of_a_pass_triton(judge: str, kv: str) -> None:
    """The number is exact, the same whoever leaves, and no product is the library's."""
    model, rows, page = tiny_models.shared("llama"), 3, 4
    sizes = Sizes.of(model)
    bands, boundaries = [], []
    for leave in (2, 4) if judge != "none" else ():
        words = tiny_models.VOCABULARY if judge == "statistics" else 0
        router = tiny_exits.filled(Router(sizes.width), torch.Generator().manual_seed(leave), 30.0)
        criterion = TopProbability() if words else RouterScore(router)
        bands.append(tiny_exits.band(model, leave, 6, criterion, head="norm", threshold=0.5))
        boundaries.append(Leaving(leave, words=words))
    exits = tiny_exits.exits_of(model, *bands) if bands else None
    session = Session(bind(model), [9] * rows, exits, kv=kv, page_size=page)
    prompts = [torch.arange(3, 7) for _ in range(rows)]
    session.prefill(prompts, session.work())
    for token in (5, 11) if judge == "router" else (5,):
        with _counted() as found, backend("triton"), Counting() as calls:
            session.run_graph(range(rows), [4] * rows, tokens=torch.tensor([token, 9, 30]))
        assert found == graph_launches(sizes, rows, 2 * page, boundaries, kv=kv, item=4)
        assert not [name for name, _ in calls.seen if name == "product"]


@interpreted
@pytest.mark.parametrize(
    ("name", "kind", "kv"),
    [
        ("llama", "patience", "predict"), ("llama", "routers", "propagate"), ("qwen3", "block_probability", "predict"),
        ("gemma2", "maps", "predict"), ("gemma3", "mixed", "propagate"), ("gemma3", "schedule", "none"),
    ],
)  # fmt: skip
def test_launches_of_a_pass_with_exits_of_every_kind_triton(name: str, kind: str, kv: str) -> None:
    """Heads, jumps, bands that resume, criteria that carry, windows and norms of Gemma: kernels, and the library's products."""
    model, rows, page = tiny_models.shared(name), 3, 4
    sizes, exits = Sizes.of(model), exits_of(name, kind)
    session = Session(bind(model), [9] * rows, exits, kv=kv, page_size=page)
    session.prefill([torch.arange(3, 7) for _ in range(rows)], session.work())
    with _counted() as found, backend("triton"), Counting() as calls:
        session.run_graph(range(rows), [4] * rows, tokens=torch.tensor([5, 9, 30]), step=range(rows))
    products = sum(count for (called, _), count in calls.seen.items() if called == "product")
    wanted = graph_launches(sizes, rows, 2 * page, leavings(exits, sizes.vocab), kv=kv, item=4)
    assert found + Counter({"library": products}) == wanted


def test_counts_by_hand() -> None:
    """Llama-3-8B on an H100, 32 rows, 2048 tokens: 5 kernels a layer and a sixth where the context is split."""
    sizes = Sizes.known("Llama-3-8B")
    plain = graph_launches(sizes, 32, 2048)
    assert plain == {"project_qkv": 32, "attend": 32, "combine": 32, "ragged_linear": 96}
    exits = graph_launches(sizes, 32, 2048, [Leaving(16), Leaving(24, words=128256)])
    assert exits - plain == {"router_score": 1, "block_stats": 1, "fold": 1, "partition": 2, "move": 18, "backfill_kv": 2}
    with_cuda = graph_launches(sizes, 32, 2048, [Leaving(16)], kv="propagate", compact="cuda")
    assert with_cuda - plain == {"router_score": 1, "compact_rows_once": 1}
    assert graph_launches(sizes, 256, 128)["combine"] == 0
    resuming = graph_launches(sizes, 32, 2048, [Leaving(8, resume=12, jump="mlp")])
    assert resuming - plain == {"router_score": 1, "partition": 2, "move": 18, "backfill_kv": 1, "library": 3}
    block = graph_launches(sizes, 32, 2048, [Leaving(8, head="block", readout=64)], kv="propagate")
    layer = {"project_qkv": 2, "attend": 1, "combine": 1, "library": 6}
    assert block - plain == {"router_score": 1, "partition": 1, "move": 9, **layer}
    assert counts.exit_stats(129, 128256, gained=True) == {"library": 9, "logit_stats": 8, "fold": 1}


@pytest.mark.parametrize(("rows", "payloads"), [(0, 3), (1, 0), (5, 3), (1024, 16), (1024, 17), (1025, 33), (4000, 1)])
def test_launches_of_compact_rows_by_cuda(rows: int, payloads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from dyndepth.cuda import compact_rows, compiler

    seen: Counter[str] = Counter()
    monkeypatch.setattr(compiler, "launch", lambda name, function, *_: seen.update([function]))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    compact_rows.compact_rows(torch.zeros(rows, dtype=torch.int8), [torch.zeros(rows, 2) for _ in range(payloads)])
    assert seen == counts.compact_rows_by_cuda(rows, [8] * payloads)
