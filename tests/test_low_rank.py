"""K,V maps of low rank: the cut, how bands carry it, and the passes that read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny_exits
import tiny_models
import torch
from tiny_training import texts
from torch import Tensor

import dyndepth
from dyndepth.closed_form import low_rank
from dyndepth.closed_form.candidates import MapFitter
from dyndepth.closed_form.ridge import NormalEquations
from dyndepth.closed_form.trace import trace
from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.exits import Band, Exits, KVMap
from dyndepth.plan.machine import Machine
from dyndepth.plan.rates import Exit, exits_of
from dyndepth.plan.shape import Shape
from dyndepth.plan.times import Times
from dyndepth.runtime.bind import bind
from dyndepth.runtime.fingerprint import check_exits, facts_of
from dyndepth.runtime.session import Session
from dyndepth.training.skip import SkipStudent

MODEL = tiny_models.shared("llama")
GROUP = 4


def regressed(rows: int = 400, features: int = 10, targets: int = 12, rank: int | None = None) -> tuple[Tensor, Any, Any]:
    """(weights, normal equations, (x, y)) of correlated features with a mean, and targets of very different sizes.

    With a rank, the weights are those that made the targets: solved ones would be of the rank but for the rounding of the
    equations' fp32 sums, whose smallest eigenvalues are 1e-4 of the largest, and so differ from processor to processor.
    """
    generator = torch.Generator().manual_seed(7)
    mix = torch.randn(features, features, generator=generator) * torch.logspace(0, -2, features)
    x = torch.randn(rows, features, generator=generator) @ mix + torch.randn(features, generator=generator)
    weight = torch.randn(features, targets, generator=generator)
    if rank is not None:
        weight = torch.randn(features, rank, generator=generator) @ torch.randn(rank, targets, generator=generator)
    sizes = torch.tensor([1.0, 100.0, 0.1]).repeat_interleave(GROUP)
    bias = torch.randn(targets, generator=generator)
    y = (x @ weight + bias) * sizes
    equations = NormalEquations(features, targets)
    equations.add(x, y)
    weights = equations.solve(1e-8).float() if rank is None else torch.cat([weight, bias[None]]) * sizes
    return weights, equations, (x, y)


def lost(predicted: Tensor, whole: Tensor, y: Tensor) -> float:
    """Squared differences of predictions, every group in units of its targets' spread."""
    spread = y.var(0, correction=0).unflatten(0, (-1, GROUP)).mean(1).sqrt().repeat_interleave(GROUP)
    return float(((predicted - whole) / spread).square().sum())


def predict(weights: Tensor, x: Tensor) -> Tensor:
    return x.double() @ weights[:-1].double() + weights[-1].double()


# -- the cut ----------------------------------------------------------------------------------------------------------------


def test_maps_that_are_of_the_rank_lose_nothing() -> None:
    weights, equations, (x, y) = regressed(rank=3)
    found = low_rank.cut(weights, equations, torch.arange(12), GROUP, 3)
    assert (found.down.shape, found.up.shape, found.bias.shape) == ((3, 10), (12, 3), (12,))
    assert lost(predict(found.weights, x), predict(weights, x), y) < 1e-9
    smaller = low_rank.cut(weights, equations, torch.arange(12), GROUP, 2)
    assert lost(predict(smaller.weights, x), predict(weights, x), y) > 1


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_no_map_of_the_rank_is_nearer(rank: int) -> None:
    """Neither the singular values of the weights alone (no covariance, no spread), nor small steps away from the cut."""
    weights, equations, (x, y) = regressed()
    whole, found = predict(weights, x), low_rank.cut(weights, equations, torch.arange(12), GROUP, rank)
    best = lost(predict(found.weights, x), whole, y)
    u, s, vh = torch.linalg.svd(weights[:-1], full_matrices=False)
    plain = u[:, :rank] * s[:rank] @ vh[:rank]
    bias = weights[-1] + x.mean(0) @ (weights[:-1] - plain)
    assert best < 0.9 * lost(predict(torch.cat([plain, bias[None]]), x), whole, y)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        step = [torch.randn(part.shape, generator=generator) * part.abs().mean() * 1e-2 for part in (found.down, found.up)]
        other = low_rank.Cut(found.down + step[0], found.up + step[1], found.bias)
        other = low_rank.Cut(other.down, other.up, weights[-1] + x.mean(0) @ (weights[:-1] - (other.up @ other.down).T))
        assert lost(predict(other.weights, x), whole, y) > best


def test_every_target_keeps_its_mean() -> None:
    weights, equations, (x, _) = regressed()
    found = low_rank.cut(weights, equations, torch.arange(12), GROUP, 2)
    torch.testing.assert_close(predict(found.weights, x).mean(0), predict(weights, x).mean(0), rtol=1e-4, atol=1e-4)


def test_targets_are_found_by_their_columns() -> None:
    weights, equations, (x, y) = regressed()
    columns = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    found = low_rank.cut(weights[:, columns], equations, columns, GROUP, 3)
    alone = NormalEquations(10, 8)
    alone.add(x, y[:, columns])
    same = low_rank.cut(weights[:, columns], alone, torch.arange(8), GROUP, 3)
    torch.testing.assert_close(found.weights, same.weights, rtol=1e-4, atol=1e-4)


def test_constant_targets_do_not_break_it() -> None:
    """A group without variance has no spread to divide by; its mean is the bias's affair."""
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(3))
    y = torch.cat([x[:, :4] * 2, torch.full((100, 4), 5.0)], dim=1)
    equations = NormalEquations(6, 8)
    equations.add(x, y)
    found = low_rank.cut(equations.solve(1e-8).float(), equations, torch.arange(8), GROUP, 4)
    torch.testing.assert_close(predict(found.weights, x).float(), y, rtol=1e-3, atol=1e-3)


# -- fitting ----------------------------------------------------------------------------------------------------------------


def fitted(kv_rank: int | None, spans: list[tuple[int, int]]) -> tuple[list[tuple[Band, dict[str, float]]], MapFitter]:
    model = bind(MODEL)
    fitter = MapFitter(model, spans, kv_rank)
    for chunk in trace(model, texts(12), *fitter.needs()):
        held = torch.arange(chunk.ready.shape[0]) % 4 == 0
        fitter.add(chunk, ~held, held)
    return [fitter.band(span) for span in spans], fitter


def test_bands_get_maps_of_the_rank_where_these_are_smaller() -> None:
    """Width 48 and 2 x 24 targets a layer: rank 30 is fewer numbers for four layers (7,200 of 9,216), not for one."""
    spans = [(2, 6), (4, 5)]
    ((long, errors), (short, _)), fitter = fitted(30, spans)
    ((whole, whole_errors), (same, _)), _ = fitted(None, spans)
    assert long.kv is not None
    assert short.kv is not None
    assert whole.kv is not None
    assert same.kv is not None
    kv = whole.kv.weight.shape[2]
    assert low_rank.pays(30, 48, 4 * 2 * kv)
    assert not low_rank.pays(30, 48, 2 * kv)
    assert (long.kv.rank, long.kv.width, tuple(long.kv.weight.shape)) == (30, 48, (4, 2, kv, 30))
    assert short.kv.rank is None
    torch.testing.assert_close(short.kv.weight, same.kv.weight)
    assert sum(p.numel() for p in long.kv.parameters()) < sum(p.numel() for p in whole.kv.parameters())
    # The error that is said is that of the maps that are used, layer by layer, on rows that were held out.
    assert long.kv.down is not None
    boundary = fitter.boundaries[0]
    found = []
    for number, layer in enumerate(range(2, 6)):
        weights = torch.cat([(long.kv.weight[number].flatten(0, 1) @ long.kv.down).T, long.kv.bias[number].flatten()[None]])
        found.append(boundary.held_out.error(weights.double(), boundary.columns["kv", layer]))
    assert errors["kv"] == pytest.approx(sum(found) / 4, rel=1e-4)
    assert errors["kv"] != whole_errors["kv"]
    assert errors["head"] == whole_errors["head"]


def test_fit_says_what_ranks_there_are() -> None:
    for rank in (0, 48, -1):
        with pytest.raises(ArgumentError, match=rf"fit: kv_rank must be in \[1, 48\), the model's width, got {rank}"):
            dyndepth.fit(MODEL, texts(4), kv_rank=rank, progress=False)


def test_fit_saves_and_loads(tmp_path: Path) -> None:
    exits = dyndepth.fit(MODEL, texts(400), candidates=[(2, 6)], tokens=4000, own=0.0, agreement=0.5, kv_rank=9, progress=False)
    exits.save_pretrained(tmp_path)
    (band,), (again,) = exits, Exits.from_pretrained(tmp_path)
    assert again.kv is not None
    assert again.kv.rank == 9
    for name, value in band.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


# -- bands and files --------------------------------------------------------------------------------------------------------


def test_files_without_a_rank_are_as_they_were(tmp_path: Path) -> None:
    for kv_rank, entry in ((None, {}), (5, {"rank": 5})):
        folder = tmp_path / str(kv_rank)
        tiny_exits.exits_of(MODEL, tiny_exits.band(MODEL, 2, 6, kv_rank=kv_rank)).save_pretrained(folder)
        (said,) = json.loads(next(folder.glob("*.json")).read_text())["bands"]
        assert said["kv"] == {"layers": 4, "kv_width": said["kv"]["kv_width"], "width": 48} | entry
        (band,) = Exits.from_pretrained(folder)
        assert band.kv is not None
        assert (band.kv.rank, band.kv.width) == (kv_rank, 48)


@pytest.mark.parametrize(
    ("rank", "message"), [(0, "rank must be at least 1, got 0"), (7, "kv"), ("five", "kv|int"), (None, "kv")]
)
def test_files_whose_rank_is_wrong(rank: Any, message: str, tmp_path: Path) -> None:
    tiny_exits.exits_of(MODEL, tiny_exits.band(MODEL, 2, 6, kv_rank=5)).save_pretrained(tmp_path)
    path = next(tmp_path.glob("*.json"))
    said = json.loads(path.read_text())
    said["bands"][0]["kv"]["rank"] = rank
    path.write_text(json.dumps(said))
    with pytest.raises(ExitsError, match=message):
        Exits.from_pretrained(tmp_path)


def test_maps_of_another_width_are_refused() -> None:
    with pytest.raises(ExitsError, match="rank must be at least 1, got 0"):
        KVMap(2, 24, 48, 0)
    kv = tiny_exits.band(MODEL, 2, 4).kv
    assert kv is not None
    for maps, name in ((KVMap(2, kv.weight.shape[2], 60, 5), "residuals"), (KVMap(2, 60, 48, 5), "K,V maps")):
        with pytest.raises(ExitsError, match=rf"{name} must be \["):
            check_exits(Exits([Band(2, 4, kv=maps)], facts_of(bind(MODEL))), bind(MODEL))


# -- passes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("everyone", [False, True], ids=["some leave", "all leave"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2"])
def test_page_entries(family: str, everyone: bool) -> None:
    """Every K and V in the pages equals the oracle's, which computes a token at a time through transformers."""
    model = tiny_models.shared(family)
    threshold = -1.0 if everyone else 0.5
    exits = tiny_exits.exits_of(
        model, tiny_exits.band(model, 1, 3, kv_rank=7), tiny_exits.band(model, 4, 6, threshold=threshold, kv_rank=13)
    )
    tokens = torch.randint(3, tiny_models.VOCABULARY, (19,))
    session = Session(bind(model), [19], exits, kv="predict")
    session.run([0] * 19, list(range(19)), tokens=tokens)
    told = oracle.Oracle(model, exits, "predict", 0).run(tokens)
    slots = session.pages.slots([0] * 19, list(range(19))).long()
    for number in range(tiny_models.LAYERS):
        keys, values = session.pages.kv[number].flatten(1, 2)[:, slots]
        torch.testing.assert_close(keys, told.keys[number], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values, told.values[number], rtol=1e-4, atol=1e-4)


def test_the_identity_gives_whole_maps() -> None:
    """A product with the identity changes no bit of the residual's norm."""
    low, whole = (tiny_exits.band(MODEL, 2, 6, threshold=-1.0, kv_rank=rank) for rank in (48, None))
    assert low.kv is not None
    assert whole.kv is not None
    assert low.kv.down is not None
    low.kv.down.data, low.kv.weight.data, low.kv.bias.data = torch.eye(48), whole.kv.weight.data, whole.kv.bias.data
    pages = []
    for band in (low, whole):
        session = Session(bind(MODEL), [5], tiny_exits.exits_of(MODEL, band), kv="predict")
        session.run([0] * 5, list(range(5)), tokens=torch.arange(3, 8))
        slots = session.pages.slots([0] * 5, list(range(5))).long()
        pages.append(session.pages.kv.flatten(2, 3)[:, :, slots])
    assert torch.equal(*pages)


def test_training_reaches_every_part() -> None:
    band = tiny_exits.band(MODEL, 2, 6, kv_rank=5)
    with torch.enable_grad():
        student = SkipStudent(bind(MODEL), [band], 0.3, 0)
        names = {name.split(".kv.")[1] for name, p in student.named_parameters() if ".kv." in name and p.requires_grad}
    assert names == {"down", "weight", "bias"}


def test_the_planner_knows_the_rank() -> None:
    (one,) = exits_of(tiny_exits.exits_of(MODEL, tiny_exits.band(MODEL, 2, 6, kv_rank=5)), {2: 0.5})
    assert one.kv_rank == 5
    times = Times(Machine.named("h100-sxm"), Shape.demo())
    seconds = [times.leave(Exit(2, 6, 0.5, kv_rank=rank), "B", 4096) for rank in (1, 100, 0)]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[2]
    with pytest.raises(ArgumentError, match="kv_rank must not be negative"):
        Exit(2, 6, 0.5, kv_rank=-1)
