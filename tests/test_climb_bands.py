"""Rows that leave and come back inside a climb, judges that read no head, and criteria that are known before the pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny_exits
import tiny_models
import torch
from test_climb import LAYERS, LENGTHS, POLICIES, both_ways, decoded, same
from torch import Tensor

from dyndepth.closed_form.measure import Lottery
from dyndepth.exits import Always, Criterion, Exits, FixedDepth, MlpJump, Never, Schedule, TopProbability
from dyndepth.exits.criteria import View
from dyndepth.ops import _cpp
from dyndepth.runtime.bind import bind
from dyndepth.runtime.climb import Climb, apart
from dyndepth.runtime.result import Result

Made = Callable[..., Exits]


@dataclass(frozen=True)
class By(Criterion):
    """Sequences leave by number, whatever the token: a group of one's own making."""

    kind: ClassVar[str] = "by"
    scored: ClassVar[bool] = False
    known: ClassVar[bool] = True
    sequences: tuple[int, ...] = ()

    def leaves(self, view: View, threshold: Tensor) -> Tensor:
        return torch.isin(view.seq, torch.tensor(self.sequences, dtype=torch.int32))


@dataclass(frozen=True)
class Bright(By):
    """Derived from what is known before the pass, and decides by the residual."""

    def leaves(self, view: View, threshold: Tensor) -> Tensor:
        return view.hidden[:, 0] > 0


def routed(model: Any, **options: Any) -> Exits:
    """Overlapping bands that resume and exits, by routers that see the residual alone."""
    return tiny_exits.exits_of(
        model,
        tiny_exits.band(model, 1, 4, **options),
        tiny_exits.band(model, 2, 5, **options),
        tiny_exits.band(model, 3, LAYERS, **options),
        tiny_exits.band(model, 4, 5, **options),
        tiny_exits.band(model, 5, LAYERS, head="whole", **options),
    )


def crossing(model: Any, **options: Any) -> Exits:
    """Groups that lie in another order than they come back in: 1 and 3 are away first, then 0 for good, then 4."""
    return tiny_exits.exits_of(
        model,
        tiny_exits.band(model, 1, 4, By((1, 3)), **options),
        tiny_exits.band(model, 2, LAYERS, By((0,)), **options),
        tiny_exits.band(model, 3, 5, By((4,)), **options),
        tiny_exits.band(model, 4, LAYERS, By((1,)), head="norm", **options),
    )


def meeting(model: Any, **options: Any) -> Exits:
    """Groups that come back at one boundary, where some leave at once; jumps of every kind that climbs know."""
    bands = [
        tiny_exits.band(model, 1, 4, By((1, 3)), **options),
        tiny_exits.band(model, 2, 3, By((0, 2)), **options),
        tiny_exits.band(model, 3, 4, By((2, 4)), **options),
        tiny_exits.band(model, 4, LAYERS, By((2, 3)), **options),
    ]
    bands[0].jump = None
    return tiny_exits.exits_of(model, *bands)


def emptied(model: Any, **options: Any) -> Exits:
    """Everybody is away at 3 and comes back at 4 or 5."""
    return tiny_exits.exits_of(
        model,
        tiny_exits.band(model, 1, 5, By((0, 1)), **options),
        tiny_exits.band(model, 3, 4, **options | {"threshold": -1.0}),
    )


def by_lot(model: Any, **options: Any) -> Exits:
    return tiny_exits.exits_of(
        model,
        tiny_exits.band(model, 1, 3, Lottery(0.4), **options),
        tiny_exits.band(model, 2, LAYERS, Lottery(0.3, 1), **options),
        tiny_exits.band(model, 4, LAYERS, Lottery(0.2, 2), head="norm", **options),
    )


def scheduled(model: Any, **options: Any) -> Exits:
    return tiny_exits.exits_of(
        model, *(tiny_exits.band(model, at, LAYERS, Schedule(5, 2, 3), head="norm", **options) for at in (2, 3, 4, 5))
    )


def beside(model: Any, **options: Any) -> Exits:
    """Judges of all kinds in one call."""
    ids = torch.tensor([3, 9, 1, 40, 41, 17, 88])
    return tiny_exits.exits_of(
        model,
        tiny_exits.band(model, 1, 4, **options),
        tiny_exits.band(model, 2, LAYERS, TopProbability(), shortlist=ids, **options | {"threshold": 0.95}),
        tiny_exits.band(model, 3, 5, By((2,)), **options),
        tiny_exits.band(model, 5, LAYERS, Always(), **options),
    )


KINDS: dict[str, Made] = {
    made.__name__: made for made in (routed, crossing, meeting, emptied, by_lot, scheduled, beside)
}  # fmt: skip


def ways(found: list[tuple[Result, Tensor]]) -> set[int]:
    return {taken for result, _ in found for taken in result.bands_taken.tolist()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kv", "rank"), POLICIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_same_bits(family: str, kind: str, kv: str, rank: int | None, dtype: torch.dtype, climbs: list[Any]) -> None:
    """Head-ready rows, depths, bands, counts of work and every page are those of calls one by one."""
    model = tiny_models.tiny(family, dtype)
    together = both_ways(model, KINDS[kind](model, kv_rank=rank), kv, climbs)
    assert len(ways(together)) > 1, "rows must take several ways"


@pytest.mark.parametrize(("kind", "seen"), [
    ("routed", {(0, 6, (1, 2, 3, 4, 5))}), ("crossing", {(0, 6, (1, 2, 3, 4))}), ("meeting", {(0, 6, (1, 2, 3, 4))}),
    ("by_lot", {(0, 6, (1, 2, 4))}), ("scheduled", {(0, 6, (2, 3, 4, 5))}), ("beside", {(0, 6, (1, 2, 3, 5))}),
])  # fmt: skip
def test_one_call(kind: str, seen: set[Any], climbs: list[Any]) -> None:
    """Whoever leaves and comes back, a step is one call of C++."""
    decoded(tiny_models.shared("llama"), KINDS[kind](tiny_models.shared("llama")), "predict", steps=2)
    assert {(begin, end, tuple(stops)) for begin, end, stops, _ in climbs if stops} == seen


def test_where_groups_go() -> None:
    """By hand: bands, layers and counts of rows, of the step after the prompts."""
    model = tiny_models.shared("llama")
    ((result, _),) = decoded(model, crossing(model), "predict", steps=1)
    assert result.bands_taken.tolist() == [2, 1 + 8, 0, 1, 4]
    assert result.exit_layer.tolist() == [2, 4, 6, 6, 6]
    assert result.layers_run.tolist() == [2, 1, 6, 3, 4]
    assert result.work == [5, 3, 2, 1, 2, 3]
    ((result, _),) = decoded(model, meeting(model), "predict", steps=1)
    assert result.bands_taken.tolist() == [2, 1, 2 + 4 + 8, 1 + 8, 4]
    assert result.layers_run.tolist() == [5, 3, 2, 1, 5]
    assert result.work == [5, 3, 1, 1, 3, 3]


@pytest.mark.parametrize("kv", ["predict", "propagate"])
def test_everybody_is_away(kv: str, climbs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ waits for those who come first; under `propagate` Python brings them, and the rest climbs on from there."""
    model, homes = tiny_models.shared("llama"), list[bool]()
    watched = Climb.run

    def run(self: Climb, *given: Any) -> Any:
        climbed = watched(self, *given)
        homes.append(climbed.home is not None)
        return climbed

    monkeypatch.setattr(Climb, "run", run)
    ((result, _),) = decoded(model, emptied(model), kv, steps=1)
    assert homes[1:] == {"predict": [True], "propagate": [False] * 3}[kv], "head-ready rows of everybody, or of nobody"
    assert [seen for seen in climbs if seen[2] or seen[0]] == {
        "predict": [(0, 6, [1, 3], 6)], "propagate": [(0, 6, [1, 3], 3), (4, 5, [], 5), (5, 6, [], 6)]
    }[kv]  # fmt: skip
    assert result.work == [5, 3, 3, 0, 3, 5]
    assert result.layers_run.tolist() == [2, 2, 5, 5, 5]


@pytest.mark.parametrize("kv", ["predict", "propagate"])
def test_requests_that_name_their_depth(kv: str, climbs: list[Any]) -> None:
    """Under fixed depths a step is one call; what a request names counts beside every known criterion."""
    model, depth = tiny_models.shared("llama"), [3, None, 6, None, 1]
    exits = tiny_exits.exits_of(model, *(tiny_exits.band(model, at, LAYERS, FixedDepth()) for at in (1, 3)))
    together = decoded(model, exits, kv, depth=depth)
    assert {tuple(result.exit_layer.tolist()) for result, _ in together} == {(3, 6, 6, 6, 1)}
    assert {(begin, end) for begin, end, stops, _ in climbs if stops} == {(0, 6)}
    with apart():
        same(together, decoded(model, exits, kv, depth=depth))
    exits = tiny_exits.exits_of(
        model, tiny_exits.band(model, 1, 4, Always()), tiny_exits.band(model, 3, LAYERS, By((1,))),
        tiny_exits.band(model, 5, LAYERS, Never()),
    )  # fmt: skip
    depth = [5, None, 6, None, 5]
    together = decoded(model, exits, kv, depth=depth)
    assert {tuple(result.exit_layer.tolist()) for result, _ in together} == {(5, 6, 6, 6, 5)}
    assert {tuple(result.layers_run.tolist()) for result, _ in together} == {(5, 3, 6, 3, 5)}
    with apart():
        same(together, decoded(model, exits, kv, depth=depth))


def test_rows_that_may_not_leave() -> None:
    """What is known of a row counts only where it may leave: rows of a prompt stay whatever their sequence does."""
    model = tiny_models.shared("llama")
    for result, _ in decoded(model, by_lot(model), "predict", steps=1):
        assert len(set(result.bands_taken.tolist())) > 1
    session_rows = decoded(model, tiny_exits.exits_of(model, tiny_exits.band(model, 1, 3, Always())), "predict", steps=1)
    assert session_rows[0][0].layers_run.tolist() == [4] * len(LENGTHS)


def test_what_derives_from_known_criteria_is_not_known(climbs: list[Any]) -> None:
    model = tiny_models.shared("llama")
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 2, 4, Bright()), tiny_exits.band(model, 5, LAYERS, By((1,))))
    together = decoded(model, exits, "predict")
    assert {stop for _, _, stops, _ in climbs for stop in stops} == {5}
    assert len(ways(together)) > 2
    with apart():
        same(together, decoded(model, exits, "predict"))


def test_jumps_that_climbs_do_not_know(climbs: list[Any]) -> None:
    model = tiny_models.shared("llama")
    exits = crossing(model)
    next(iter(exits)).jump = tiny_exits.filled(MlpJump(48, 7), torch.Generator().manual_seed(1))
    together = decoded(model, exits, "predict")
    assert 1 not in {stop for _, _, stops, _ in climbs for stop in stops}
    with apart():
        same(together, decoded(model, exits, "predict"))


def test_jumps_and_maps_are_read_in_every_pass() -> None:
    """As thresholds and heads are: a session lives long."""
    model = tiny_models.shared("llama")
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 1, 4, Always()))
    before = decoded(model, exits, "predict", steps=1)[0][0].ready
    (band,) = exits
    assert band.jump is not None
    band.jump.bias.data = band.jump.bias.data + 1.0
    after = decoded(model, exits, "predict", steps=1)[0][0].ready
    assert not torch.equal(before, after)
    with apart():
        assert torch.equal(decoded(model, exits, "predict", steps=1)[0][0].ready, after)


def test_a_row_alone_gives_the_same_bits() -> None:
    """Alone it is away alone, and Python brings it back; in a batch C++ does."""
    model = tiny_models.shared("llama")
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 1, 4, By((2,))))
    together = decoded(model, exits, "predict", steps=1)[0][0]
    from dyndepth.runtime.session import Session

    session = Session(bind(model), [12], tiny_exits.exits_of(model, tiny_exits.band(model, 1, 4, By((0,)))), kv="predict")
    session.prefill([torch.arange(3, 3 + LENGTHS[2])], session.work())
    alone = session.run([0], [LENGTHS[2]], tokens=torch.tensor([22]), step=[0])
    assert alone.layers_run.tolist() == [3]
    assert torch.equal(alone.ready[0], together.ready[2])


def test_wrong_facts() -> None:
    """The checks of climb_layers itself; the runtime never gives it these."""
    assert _cpp.missing() is None
    model = tiny_models.shared("llama")
    exits = routed(model)
    original = torch.ops.dyndepth_cpp.climb_layers
    for place, wrong, message in ((1, 1, "come back above layer"), (4, 1, "without a head"), (4, 5, "bits of what is known")):

        def broken(*given: Any, place: int = place, wrong: int = wrong) -> Any:
            facts = list(given[16])
            if facts:  # a step's, not the prompts'
                facts[place] = wrong
            return original(*given[:16], facts, *given[17:])

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch.ops.dyndepth_cpp, "climb_layers", broken)
            with pytest.raises(RuntimeError, match=message):
                decoded(model, exits, "predict", steps=1)
