"""What graphs must do on hardware, as functions of a device: tests/test_gpu.py runs them on one, tests/test_graph_bodies.py on
the CPU with a recorder in a graph's place, so that none of them is written blind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import test_router_history
import tiny_exits
import tiny_models
import torch

import dyndepth
from dyndepth.exits import Exits, Patience, Saturation, TopProbability
from dyndepth.exits.criteria import Decay, FixedDepth, Schedule
from dyndepth.runtime.bind import bind
from dyndepth.runtime.block import block_head
from dyndepth.runtime.graph import forward_graph
from dyndepth.runtime.graph_pool import Capture, GraphPool
from dyndepth.runtime.session import Session
from dyndepth.testing import assert_same

#: Ways to decide who leaves where. `history`: routers that see which bands a row skipped; `depths`: each sequence its own.
KINDS = ("mixed", "probability", "patience", "block", "history", "saturation", "decay", "schedule", "depths")
_FEW = torch.tensor([3, 9, 20])
_TOP = tiny_models.LAYERS


def exits_of_kind(model: Any, kind: str) -> Exits:
    def bands(leaves: tuple[int, ...], *given: Any, **options: Any) -> Exits:
        return tiny_exits.exits_of(model, *(tiny_exits.band(model, leave, _TOP, *given, **options) for leave in leaves))

    if kind == "mixed":
        return tiny_exits.mixed(model)
    if kind == "block":
        made = [tiny_exits.band(model, leave, _TOP) for leave in (2, 4)]
        for band in made:
            band.head = block_head(bind(model), band.leave)
        return tiny_exits.exits_of(model, *made)
    if kind == "history":
        return test_router_history._exits(model)
    if kind == "patience":
        return bands((2, 4, 5), Patience(), threshold=1.0, shortlist=_FEW)
    if kind == "saturation":
        return bands((2, 3, 5), Saturation(), threshold=0.82)
    if kind == "decay":  # thresholds from 0.64 down to 0.54 within the steps of these tests
        return bands((2, 3, 5), TopProbability(), threshold=0.6, shortlist=_FEW, decay=Decay(tau=4.0, length=12))
    if kind == "schedule":
        return bands((2, 3, 5), Schedule(first=6, last=2, length=10))
    if kind == "depths":
        return bands((2, 3, 5), FixedDepth())
    assert kind == "probability", kind
    return bands((2, 3, 5), TopProbability(), threshold=0.9, shortlist=_FEW)


def depths_of(kind: str, sequences: int) -> list[int | None] | None:
    """What every sequence asks for: an exit, the top, or nothing."""
    return [(2, None, 5, _TOP, 3)[at % 5] for at in range(sequences)] if kind == "depths" else None


def prefilled(model: Any, kind: str, kv: str, lengths: list[int]) -> Session:
    """A session with prompts of these lengths in its pages."""
    made = Session(
        bind(model), [length + 40 for length in lengths], exits_of_kind(model, kind), kv=kv, depth=depths_of(kind, len(lengths))
    )
    generator = torch.Generator().manual_seed(2)
    made.prefill([torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator) for length in lengths], made.work())
    return made


def reads_nothing_on_the_host(model: Any, kind: str, kv: str) -> None:
    """From embedded rows to head-ready ones, outside of any graph; on a CUDA device every synchronisation is an error."""
    lengths, device = [3, 9, 1, 12, 5], model.device
    made = prefilled(model, kind, kv, lengths)
    given: dict[str, Any] = {"tokens": torch.arange(5, 10, device=device), "step": [4] * 5}
    wanted = made.run_graph(range(5), lengths, **given)  # compiles
    rows, context = made.rows(range(5), lengths, **given)
    with no_synchronisation(device):
        found = forward_graph(made.plan, rows, context)
    assert_same(found.ready, wanted.ready, "the same rows again")
    assert_same(found.exit_layer, wanted.exit_layer)


@contextlib.contextmanager
def no_synchronisation(device: torch.device) -> Any:
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replays_are_passes_of_slices(model: Any, kind: str, kv: str, capture: Callable[[], Capture]) -> None:
    """fp32: rows come and go, one graph a bucket; decisions, residuals and pages of the pass in slices."""
    lengths, device = [3, 9, 1, 12, 5, 7, 2], model.device
    eager, replayed = (prefilled(model, kind, kv, lengths) for _ in range(2))
    pool = GraphPool(replayed.plan, capture, most=6)
    replayed.graphs = pool
    generator = torch.Generator().manual_seed(8)
    at = torch.tensor(lengths)
    ways = set()
    for count in (6, 5, 3, 6, 1, 4, 2, 6, 6):
        seq = torch.randperm(len(lengths), generator=generator)[:count].sort().values
        tokens = torch.randint(3, tiny_models.VOCABULARY, (count,), generator=generator)
        wanted, found = (each.run(seq, at[seq], tokens=tokens.to(device), step=at[seq]) for each in (eager, replayed))
        assert found.exit_layer.tolist() == wanted.exit_layer.tolist()
        assert found.bands_taken.tolist() == wanted.bands_taken.tolist()
        assert found.work == wanted.work
        torch.testing.assert_close(found.ready, wanted.ready, rtol=2e-4, atol=2e-5)
        ways |= set(wanted.layers_run.tolist())
        at[seq] += 1
    assert len(ways) > 1, "rows must take several ways for this to test anything"
    sequences = [sequence for sequence, length in enumerate(at.tolist()) for _ in range(length)]
    positions = [pos for length in at.tolist() for pos in range(length)]
    slots = eager.pages.slots(sequences, positions).long()
    mine, theirs = (each.pages.kv.flatten(2, 3)[:, :, slots] for each in (replayed, eager))
    torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-5)
    assert pool.buckets == [1, 2, 4, 6]


def generation_by_graphs(model: Any, kind: str) -> None:
    """`graphs=True` through transformers: tokens, bands and work of `graphs=False`, in fp32."""
    inputs = {name: value.to(model.device) for name, value in tiny_models.prompts(7).items()}
    options: dict[str, Any] = {
        "custom_generate": dyndepth.generate, "exits": exits_of_kind(model, kind), "max_new_tokens": 20, "do_sample": False,
        "return_dict_in_generate": True, "depth": depths_of(kind, len(inputs["input_ids"])),
    }  # fmt: skip
    wanted, found = (model.generate(**inputs, **options, graphs=graphs) for graphs in (False, True))
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(found.bands_taken, wanted.bands_taken)
    assert found.work.layers == wanted.work.layers
