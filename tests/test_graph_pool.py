"""Buckets: choice, padding, inputs copied in, results copied out, memory that moves. A recorder stands for CUDA's graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_exits
import tiny_models
import torch
from recorder import Recorder

import dyndepth
from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits, TopProbability
from dyndepth.op import backend
from dyndepth.runtime import cuda_graphs, session
from dyndepth.runtime.bind import bind
from dyndepth.runtime.graph_pool import GraphPool, pool_of, row_bucket, unknown_module
from dyndepth.runtime.session import Session

Make = Callable[[], Recorder]


def _session(family: str, exits: Exits | None, kv: str | None, lengths: list[int], **options: Any) -> Session:
    """Prompts in the pages."""
    made = Session(bind(tiny_models.shared(family)), [length + 12 for length in lengths], exits, kv=kv, **options)
    generator = torch.Generator().manual_seed(2)
    made.prefill([torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator) for length in lengths], made.work())
    return made


def _pooled(made: Session, make: Make = Recorder, most: int = 8) -> GraphPool:
    made.graphs = GraphPool(made.plan, make, most)
    return made.graphs


def test_buckets_by_hand() -> None:
    assert [row_bucket(rows, 24) for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 24)] == [1, 2, 4, 4, 8, 8, 16, 16, 24, 24]


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("conditions", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_passes_of_changing_rows_are_those_of_slices(family: str, conditions: bool, kv: str) -> None:
    """Eight passes, rows of the batch coming and going: one graph a bucket, and every pass what the pass of slices makes."""
    model, lengths = tiny_models.shared(family), [3, 9, 1, 12, 5, 7, 2]
    exits = tiny_exits.mixed(model)
    recorders: list[Recorder] = []

    def make() -> Recorder:
        recorders.append(Recorder(conditions))
        return recorders[-1]

    eager, replayed = (_session(family, exits, kv, lengths) for _ in range(2))
    pool = _pooled(replayed, make, most=6)
    generator = torch.Generator().manual_seed(8)
    at = np.array(lengths)
    with backend("torch"):
        for count in (6, 5, 3, 6, 1, 4, 2, 7):
            seq = np.sort(torch.randperm(len(lengths), generator=generator)[:count].numpy())
            tokens = torch.randint(3, tiny_models.VOCABULARY, (count,), generator=generator)
            may_leave = torch.rand(count, generator=generator) < 0.8
            given: dict[str, Any] = {"tokens": tokens, "step": at[seq], "may_leave": may_leave}
            wanted, found = (each.run(seq, at[seq], **given) for each in (eager, replayed))
            assert found.exit_layer.tolist() == wanted.exit_layer.tolist()
            assert found.layers_run.tolist() == wanted.layers_run.tolist()
            assert found.bands_taken.tolist() == wanted.bands_taken.tolist()
            assert (found.work, found.block_work) == (wanted.work, wanted.block_work)
            torch.testing.assert_close(found.ready, wanted.ready, rtol=1e-4, atol=1e-5)
            at[seq] += 1
    slots = eager.pages.slots(*_written(at))
    mine, theirs = (each.pages.kv.flatten(2, 3)[:, :, slots.long()] for each in (replayed, eager))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert pool.buckets == [1, 2, 4, 6], "seven rows are more than the largest bucket holds, and run in slices"
    assert pool.captured == 4
    assert len(recorders) == 1
    assert (sum(recorders[0].taken) > 0) == conditions


def _written(lengths: Any) -> tuple[list[int], list[int]]:
    """Every sequence and position that holds K,V."""
    pairs = [(sequence, pos) for sequence, length in enumerate(lengths) for pos in range(length)]
    return [sequence for sequence, _ in pairs], [pos for _, pos in pairs]


def test_bits_do_not_depend_on_the_bucket() -> None:
    """fp32 with the CPU's kernels, whose rows do not depend on their neighbours: the same bits in 3 rows as in 8.

    Jumps included; not the mlp head, whose silu is PyTorch's: rows of 20 leave a tail, which it rounds otherwise than vectors.
    """
    model = tiny_models.shared("llama")
    exits = tiny_exits.exits_of(model, *(tiny_exits.band(model, *at) for at in ((1, 3), (2, 5), (3, 6), (5, 6))))
    eager, replayed = (_session("llama", exits, "predict", [4, 6, 2]) for _ in range(2))
    pool = _pooled(replayed)
    arguments = ([0, 1, 2], [4, 6, 2])
    tokens = torch.tensor([5, 9, 11])
    for _ in range(2):
        found = replayed.run(*arguments, tokens=tokens)
        wanted = eager.run_graph(*arguments, tokens=tokens)
        assert torch.equal(found.ready, wanted.ready)
    assert pool.buckets == [4]


def test_nobody_left_runs_no_layer() -> None:
    """Conditions: everybody leaves at 2, so the layers above are passed over, or write K,V alone under propagate."""
    model = tiny_models.shared("llama")
    always = tiny_exits.exits_of(model, *(tiny_exits.band(model, leave, 6, threshold=-1.0) for leave in (2, 4)))
    for kv, taken in (("predict", [0, 2]), ("propagate", [2, 2])):
        eager, replayed = (_session("llama", always, kv, [4, 6, 2]) for _ in range(2))
        recorder = Recorder(conditions=True)
        _pooled(replayed, lambda recorder=recorder: recorder)
        wanted, found = (each.run([0, 1, 2], [4, 6, 2], tokens=torch.tensor([5, 9, 11])) for each in (eager, replayed))
        assert recorder.taken == taken
        assert found.work == wanted.work == [3, 3, 0, 0, 0, 0]
        torch.testing.assert_close(found.ready, wanted.ready, rtol=1e-4, atol=1e-5)
        slots = eager.pages.slots([0, 1, 2], [4, 6, 2]).long()
        mine, theirs = (each.pages.kv.flatten(2, 3)[:, :, slots] for each in (replayed, eager))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_results_outlive_the_next_replay() -> None:
    replayed = _session("llama", tiny_exits.mixed(tiny_models.shared("llama")), "predict", [4, 6])
    _pooled(replayed)
    first = replayed.run([0, 1], [4, 6], tokens=torch.tensor([5, 9]))
    kept = first.ready.clone()
    second = replayed.run([0, 1], [5, 7], tokens=torch.tensor([30, 2]))
    assert torch.equal(first.ready, kept)
    assert not torch.equal(second.ready, kept)


@pytest.mark.parametrize("kv", ["predict", "propagate"])
def test_padding_writes_nothing(kv: str) -> None:
    replayed = _session("llama", None, kv, [4, 6, 2])
    _pooled(replayed)
    replayed.run([0, 1, 2], [4, 6, 2], tokens=torch.tensor([5, 9, 11]))
    replayed.pages.kv.zero_()
    replayed.run([0, 1, 2], [5, 7, 3], tokens=torch.tensor([8, 8, 8]))
    changed = (replayed.pages.kv != 0).flatten(4).any(-1).any(0).any(0).flatten().nonzero()[:, 0].tolist()
    assert set(changed) == set(replayed.pages.slots([0, 1, 2], [5, 7, 3]).tolist())


def test_what_grows_is_captured_anew() -> None:
    """Pages and rotary tables that move take the graphs with them; a page more in the table does not."""
    exits = tiny_exits.mixed(tiny_models.shared("llama"))
    eager, replayed = (_session("llama", exits, "predict", [3, 3], page_size=2, first=[4, 4]) for _ in range(2))
    pool, captured = _pooled(replayed), []
    for pos in range(3, 14):
        given = {"tokens": torch.tensor([pos, pos + 1])}
        wanted, found = (each.run([0, 1], [pos, pos], **given) for each in (eager, replayed))
        assert found.exit_layer.tolist() == wanted.exit_layer.tolist()
        torch.testing.assert_close(found.ready, wanted.ready, rtol=1e-4, atol=1e-5)
        captured.append(pool.captured)
    assert captured[0] == 1
    assert 2 <= captured[-1] < len(captured), "some passes moved pages, some did not"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("given", [{}, {"depth": [2, None, 5]}, {"kv": "propagate"}])
def test_generation_replays(family: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through transformers: the same tokens, depths and work, sequences that end early included."""
    model = tiny_models.shared(family)
    exits = tiny_exits.exits_of(
        model, *(tiny_exits.band(model, leave, 6, TopProbability(), threshold=0.05, head="norm") for leave in (2, 5))
    )
    options: dict[str, Any] = {
        "custom_generate": dyndepth.generate, "exits": exits, "max_new_tokens": 9, "do_sample": False, "eos_token_id": 7,
        "pad_token_id": 0, "return_dict_in_generate": True, **given,
    }  # fmt: skip
    inputs = tiny_models.prompts(3)
    pools: list[GraphPool] = []

    def pool(graphs: Any, plan: Any, sequences: int) -> GraphPool:
        assert graphs is True
        pools.append(GraphPool(plan, Recorder, sequences))
        return pools[-1]

    with backend("torch"):
        wanted = model.generate(**inputs, **options)
        monkeypatch.setattr(session, "pool_of", pool)
        found = model.generate(**inputs, **options, graphs=True)
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(found.bands_taken, wanted.bands_taken)
    assert found.work == wanted.work
    assert pools[0].captured >= 1


def test_what_cannot_be_captured_says_why() -> None:
    model = tiny_models.tiny("llama")  # shared ones may carry other tests' hooks
    inputs = tiny_models.prompts(2)
    with pytest.raises(ArgumentError, match="graphs=True: graphs are captured on CUDA devices, the model is on cpu; graphs='a"):
        model.generate(**inputs, custom_generate=dyndepth.generate, graphs=True, max_new_tokens=2)
    with pytest.raises(ArgumentError, match="graphs must be True, False or 'auto', got 'yes'"):
        model.generate(**inputs, custom_generate=dyndepth.generate, graphs="yes", max_new_tokens=2)
    plan = Session(bind(model), [4]).plan
    assert pool_of("auto", plan, 1) is None
    assert unknown_module(plan) is None


def test_modules_of_others_are_not_captured_unasked() -> None:
    class Own(torch.nn.Linear):
        pass

    for change in ("type", "hook"):
        model = tiny_models.tiny("llama")
        up = model.model.layers[3].mlp.up_proj
        if change == "type":
            up.__class__ = Own
        else:
            up.register_forward_hook(lambda *_: None)
        reason = unknown_module(Session(bind(model), [4]).plan)
        assert reason is not None
        assert reason.startswith("module model.layers.3.mlp.up_proj (")


def test_conditions_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    cuda_graphs.no_conditions.cache_clear()
    assert "has no CUDAGraph.begin_capture_to_if_node" in (cuda_graphs.no_conditions(0) or "")
    cuda_graphs.no_conditions.cache_clear()


def test_a_pool_made_in_inference_mode_serves_outside_it() -> None:
    tokens = torch.tensor([[5, 9]])
    wanted, pooled = (_session("llama", None, None, [8, 8]) for _ in range(2))
    pooled.graphs = _pooled(pooled)
    for step, inference in enumerate([True, False, True]):
        with torch.inference_mode(inference):
            found = pooled.run([0, 1], [step, step], tokens=tokens[0], may_leave=True)
        want = wanted.run([0, 1], [step, step], tokens=tokens[0], may_leave=True)
        torch.testing.assert_close(found.ready, want.ready)
