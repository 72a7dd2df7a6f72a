"""The bodies of tests/test_gpu.py on the CPU: reference providers, a recorder for CUDA's graphs."""

from __future__ import annotations

from typing import Any

import graph_bodies
import pytest
import tiny_models
from recorder import Recorder

from dyndepth.op import backend
from dyndepth.runtime import session
from dyndepth.runtime.graph_pool import GraphPool


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("kind", graph_bodies.KINDS)
def test_a_pass_in_graph_style_says_the_same_again(kind: str, kv: str) -> None:
    with backend("torch"):
        graph_bodies.reads_nothing_on_the_host(tiny_models.shared("llama"), kind, kv)


@pytest.mark.parametrize("conditions", [False, True])
@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("kind", graph_bodies.KINDS)
def test_replays_are_passes_of_slices(kind: str, kv: str, conditions: bool) -> None:
    with backend("torch"):
        graph_bodies.replays_are_passes_of_slices(tiny_models.shared("llama"), kind, kv, lambda: Recorder(conditions))


@pytest.mark.parametrize("kind", graph_bodies.KINDS)
def test_generation_by_graphs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[GraphPool] = []

    def pool(graphs: Any, plan: Any, sequences: int) -> GraphPool | None:
        pools.extend([GraphPool(plan, Recorder, sequences)] if graphs else [])
        return pools[-1] if graphs else None

    monkeypatch.setattr(session, "pool_of", pool)
    with backend("torch"):
        graph_bodies.generation_by_graphs(tiny_models.shared("qwen3"), kind)
    assert pools[0].captured >= 1
