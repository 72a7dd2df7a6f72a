"""Climbing: layers, judgements and rows that leave, in one call of C++, do what calls one by one do, to the bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
from torch import Tensor

from dyndepth.exits import Exits
from dyndepth.exits.criteria import Decay, Entropy, Margin, Patience, RouterScore, Saturation, TopProbability
from dyndepth.exits.router import Router
from dyndepth.op import backend
from dyndepth.runtime.bind import bind
from dyndepth.runtime.climb import apart
from dyndepth.runtime.result import Result
from dyndepth.runtime.session import Session

LENGTHS = [5, 1, 9, 3, 7]
LAYERS = tiny_models.LAYERS
#: Thresholds at which some rows leave at the first exit (and the second, but for Gemma 3, whose heads are always sure), some
#: nowhere.
SOME = {"llama": (0.2, 0.9, 2.0), "gemma2": (0.3, 0.0275, 2.0), "gemma3": (0.15, 2.0, 2.0)}


def bands(model: Any, *thresholds: float, **changes: Any) -> Exits:
    """Three exits with three of the criteria, and the kinds of heads, that a judge knows; one threshold, or one each."""
    width = bind(model).hidden_size
    router = tiny_exits.filled(Router(width, 3, silu=True, stats=True), torch.Generator().manual_seed(11), 2.0)
    ids = torch.tensor([3, 9, 1, 40, 41, 17, 88])
    exits = tiny_exits.exits_of(
        model,
        tiny_exits.band(model, 1, LAYERS, RouterScore(router), **changes),
        tiny_exits.band(model, 3, LAYERS, TopProbability(), head="norm", **changes),
        tiny_exits.band(model, 4, LAYERS, Margin(), head="full", shortlist=ids, **changes),
    )
    return exits.with_thresholds(thresholds[0] if len(thresholds) == 1 else list(thresholds))


def decoded(model: Any, exits: Exits, kv: str, steps: int = 3, **options: Any) -> list[tuple[Result, Tensor]]:
    """Passes over five sequences after their prompts, with the pages after each."""
    session = Session(bind(model), [length + steps for length in LENGTHS], exits, kv=kv, **options)
    session.pages.kv.zero_()  # slots that nobody wrote hold anything
    prompts = [torch.arange(3, 3 + length) for length in LENGTHS]
    session.prefill(prompts, session.work())
    found = []
    for step in range(steps):
        tokens = torch.tensor([20 + 7 * step + number for number in range(len(LENGTHS))])
        at = [length + step for length in LENGTHS]
        result = session.run(range(len(LENGTHS)), at, tokens=tokens, step=[step] * len(LENGTHS))
        found.append((result, session.pages.kv.clone()))
    return found


def same(one: list[tuple[Result, Tensor]], other: list[tuple[Result, Tensor]]) -> None:
    for (mine, my_pages), (theirs, their_pages) in zip(one, other, strict=True):
        for name in ("ready", "exit_layer", "layers_run", "bands_taken"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        assert mine.work == theirs.work
        assert torch.equal(my_pages, their_pages)


def both_ways(model: Any, exits: Exits, kv: str, climbs: list[Any]) -> list[tuple[Result, Tensor]]:
    """What climbs make of it, which is to the bit what calls one by one make of it."""
    together = decoded(model, exits, kv)
    assert climbs
    climbs.clear()
    with apart():
        same(together, decoded(model, exits, kv))
    assert not climbs
    return together


#: K,V policies under which climbs go on or stop, and the rank of the maps.
POLICIES = [("predict", None), ("predict", 7), ("propagate", None), ("copy", None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("who", ["all", "some", "nobody"])
@pytest.mark.parametrize(("kv", "rank"), POLICIES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_the_same_bits(family: str, kv: str, rank: int | None, who: str, dtype: torch.dtype, climbs: list[Any]) -> None:
    model = tiny_models.tiny(family, dtype)
    exits = bands(model, *{"all": (-1.0,), "some": SOME[family], "nobody": (2.0,)}[who], kv_rank=rank)
    together = both_ways(model, exits, kv, climbs)
    left = [bool((result.exit_layer < LAYERS).any()) for result, _ in together]
    stayed = [bool((result.exit_layer == LAYERS).any()) for result, _ in together]
    assert (any(left), any(stayed)) == {"all": (True, False), "some": (True, True), "nobody": (False, True)}[who]


def test_one_call_where_nobody_leaves(climbs: list[Any]) -> None:
    model = tiny_models.shared("llama")
    decoded(model, bands(model, 2.0), "predict", steps=1)
    assert climbs == [(0, 6, [], 6), (0, 6, [1, 3, 4], 6)]  # the prompts, whose exits are closed; then the step


def test_goes_on_behind_rows_that_left(climbs: list[Any]) -> None:
    """In the same call where C++ can give rows their K,V; else Python moves them, and those that are left climb on."""
    model = tiny_models.shared("llama")
    exits = bands(model, 0.25, 2.0, 2.0)
    for kv in ("predict", "propagate", "copy"):
        climbs.clear()
        ((result, _),) = decoded(model, exits, kv, steps=1)
        assert 0 < int((result.exit_layer == 1).sum()) < len(LENGTHS), result.exit_layer
        assert climbs[1:] == ([(0, 6, [1, 3, 4], 1), (1, 6, [3, 4], 6)] if kv == "copy" else [(0, 6, [1, 3, 4], 6)])


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_ends_where_the_last_row_leaves(family: str, kv: str, climbs: list[Any]) -> None:
    """Some leave at 1, the others at 3; whoever comes later reads the same K,V."""
    model = tiny_models.shared(family)
    exits = bands(model, {"llama": 0.25, "gemma3": 0.15}[family], -1.0, 2.0)
    together = decoded(model, exits, kv)
    assert {reached for begin, _, stops, reached in climbs if stops} == {3}
    assert {depth for result, _ in together for depth in result.exit_layer.tolist()} == {1, 3}
    assert all(result.work[3:] == [0, 0, 0] for result, _ in together)
    with apart():
        same(together, decoded(model, exits, kv))


def test_what_rows_carry_moves_in_python(climbs: list[Any]) -> None:
    """Patience below counts per row: rows that leave above it take their counts with them."""
    model = tiny_models.shared("llama")
    exits = tiny_exits.exits_of(
        model, tiny_exits.band(model, 1, LAYERS, Patience(), threshold=3.0), *list(bands(model, 0.25, 0.9, 2.0))[1:]
    )
    together = decoded(model, exits, "predict")
    left = {depth for result, _ in together for depth in result.exit_layer.tolist()}
    assert {3, 6} <= left, left
    assert any(stops == [3, 4] and reached == 3 for _, _, stops, reached in climbs)
    with apart():
        same(together, decoded(model, exits, "predict"))


def test_callers_tensors_are_left_alone() -> None:
    """Rows move in buffers of the pass: the steps that somebody gave, which it takes as they are, stay as they were."""
    model = tiny_models.shared("llama")
    session = Session(bind(model), [4, 4, 4], bands(model, -1.0), kv="predict")
    for number, step in enumerate((torch.arange(3).int(), torch.tensor([[0, 9], [1, 9], [2, 9]]).int()[:, 0])):
        may_leave = torch.tensor([False, True, True])
        result = session.run([0, 1, 2], [number] * 3, tokens=torch.tensor([5, 6, 7]), step=step, may_leave=may_leave)
        assert result.exit_layer.tolist() == [6, 1, 1]
        assert step.tolist() == [0, 1, 2]


@pytest.mark.parametrize("op", ["compact_rows", "backfill_kv"])
def test_an_op_that_somebody_forced_runs_where_rows_leave(op: str, climbs: list[Any]) -> None:
    """Its own provider is asked, and says the same: layers and judges climb to where rows leave."""
    model = tiny_models.shared("llama")
    exits = bands(model, *SOME["llama"])
    alone = decoded(model, exits, "predict")
    climbs.clear()
    with backend(f"{op}=torch"):
        forced = decoded(model, exits, "predict")
    assert {reached for _, _, stops, reached in climbs if stops} == {1, 3, 6}
    for (mine, _), (theirs, _) in zip(alone, forced, strict=True):
        assert torch.equal(mine.exit_layer, theirs.exit_layer)
        torch.testing.assert_close(mine.ready, theirs.ready)


@pytest.mark.parametrize("why", ["decay", "depth", "another head", "closed", "recompute", "release"])
def test_what_python_must_see(why: str, climbs: list[Any]) -> None:
    """Boundaries that no judge can take end a climb; those that are closed do not."""
    model = tiny_models.shared("llama")
    options: dict[str, Any] = {"depth": [3, None, 6, None, 1]} if why == "depth" else {}
    exits = bands(model, *SOME["llama"], **({"decay": Decay(4.0, 10)} if why == "decay" else {}))
    if why == "another head":
        exits = tiny_exits.exits_of(model, *list(exits)[:2], tiny_exits.band(model, 4, LAYERS, head="mlp"))
    if why == "closed":
        exits = exits.with_thresholds([math.inf, 2.0, math.inf])
    kv = why if why in ("recompute", "release") else "predict"
    together = decoded(model, exits, kv, **options)
    step = [seen for seen in climbs if seen[:2] != (0, 6) or seen[2]]
    assert {stop for *_, stops, _ in step for stop in stops} == {
        "decay": set(), "depth": set(), "another head": {1, 3}, "closed": {3}, "recompute": {1, 3, 4},
        "release": {1, 3, 4},
    }[why]  # fmt: skip
    with apart():
        same(together, decoded(model, exits, kv, **options))


def test_forced_providers_and_modules_do_not_climb(climbs: list[Any]) -> None:
    model = tiny_models.shared("llama")
    exits = bands(model, 2.0)
    for forced in ("torch", "exit_stats=torch", "ragged_attention=torch"):
        with backend(forced):
            decoded(model, exits, "predict", steps=1)
    assert not climbs
    decoded(tiny_models.shared("gpt2"), tiny_exits.exits_of(tiny_models.shared("gpt2")), "predict", steps=1)
    assert not climbs


def test_rows_that_may_not_leave(climbs: list[Any]) -> None:
    """A row that may not leave goes on where another one does."""
    model = tiny_models.shared("llama")
    exits = bands(model, -1.0)
    session = Session(bind(model), [4, 4], exits, kv="predict")
    tokens = torch.tensor([5, 6])
    result = session.run([0, 1], [0, 0], tokens=tokens, may_leave=torch.tensor([False, True]))
    assert result.exit_layer.tolist() == [6, 1]
    assert result.work == [2, 1, 1, 1, 1, 1]
    assert climbs == [(0, 6, [1, 3, 4], 6)]


CRITERIA = {"router": RouterScore, "probability": TopProbability, "margin": Margin, "entropy": Entropy}


@pytest.mark.parametrize("head", ["norm", "full"])
@pytest.mark.parametrize("kind", CRITERIA)
def test_every_criterion_decides_inside_a_climb(kind: str, head: str, climbs: list[Any]) -> None:
    """As the third of three boundaries, at the threshold that splits the rows best."""
    model = tiny_models.shared("llama")
    router = tiny_exits.filled(
        Router(bind(model).hidden_size, 3, silu=False, stats=True), torch.Generator().manual_seed(12), 2.0
    )
    criterion = RouterScore(router) if kind == "router" else CRITERIA[kind]()
    first = list(bands(model, 2.0))[:2]

    def at(threshold: float) -> Exits:
        last = tiny_exits.band(model, 4, LAYERS, criterion, head=head, threshold=threshold)
        return tiny_exits.exits_of(model, *first, last).with_thresholds([2.0, 2.0, threshold])

    def left(found: list[tuple[Result, Tensor]]) -> int:
        return sum(int((result.exit_layer == 4).sum()) for result, _ in found)

    low, high = -8.0, 2.0  # entropy's score is minus its nats
    with apart():
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if left(decoded(model, at(middle), "predict", steps=1)) > 2 else (low, middle)
        found = decoded(model, at(high), "predict")
    assert 0 < left(found) < 3 * len(LENGTHS)
    assert not climbs
    same(decoded(model, at(high), "predict"), found)
    assert {(begin, end) for begin, end, stops, _ in climbs if stops} == {(0, 6)}  # C++ decided at 4: nothing begins there


def test_thresholds_and_heads_are_read_in_every_pass(climbs: list[Any]) -> None:
    """A session lives long (an engine has one): what its own bands are told between passes counts, climbing or not."""
    model = tiny_models.shared("llama")
    exits = bands(model, 2.0)
    session = Session(bind(model), [4, 4], exits, kv="predict")

    def depths(step: int) -> list[int]:
        result = session.run([0, 1], [step, step], tokens=torch.tensor([5 + step, 6]), step=[step, step])
        return result.exit_layer.tolist()

    assert depths(0) == [6, 6]
    own = session.plan.bands
    own[3].threshold = -1.0
    assert depths(1) == [3, 3]
    own[1].threshold, own[3].threshold = -math.inf, math.inf
    assert depths(2) == [1, 1]
    own[1].threshold = math.inf
    assert depths(3) == [6, 6]
    assert [stops for *_, stops, _ in climbs] == [[1, 3, 4], [1, 3, 4], [1, 4], [4]]


def test_residuals_that_a_higher_boundary_compares_with(climbs: list[Any]) -> None:
    """Saturation above a judged boundary wants the residuals there: nothing climbs past it."""
    model = tiny_models.shared("llama")
    exits = tiny_exits.exits_of(
        model,
        tiny_exits.band(model, 2, LAYERS, TopProbability(), threshold=2.0),
        tiny_exits.band(model, 4, LAYERS, Saturation(), threshold=0.5),
    )
    together = decoded(model, exits, "predict")
    assert not climbs
    with apart():
        same(together, decoded(model, exits, "predict"))
    assert {4} <= {depth for result, _ in together for depth in result.exit_layer.tolist()}
