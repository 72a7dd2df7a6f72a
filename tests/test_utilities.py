"""TaoCache, the condition switch and DARTS+ against witnesses made by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from tiny_dit import Ddim, TinyDiT
from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.utilities import ConditionSwitch, DartsPlus, TaoCache, TaoTable, calibrate_tao, derived, moments
from dyndepth.utilities.darts import OPS

STEPS = 12


def test_moments_by_hand() -> None:
    delta = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [-2.0, 0.0]])
    before = torch.tensor([[6.0, 8.0], [0.0, 2.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    cosine, ratio = moments(delta, before)
    assert cosine.tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0, -1.0], abs=1e-6)
    assert ratio.tolist() == pytest.approx([0.5, 0.5, 0.0, 0.0, 2.0], rel=1e-6)
    a, b = torch.randn(7, 2, 3, 5), torch.randn(7, 2, 3, 5)
    cosine, ratio = moments(a, b)
    for row in range(7):
        x, y = a[row].double().flatten(), b[row].double().flatten()
        assert float(cosine[row]) == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-5)
        assert float(ratio[row]) == pytest.approx(float(x.norm() / y.norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("a", "b"), [(1e-11, 1e-11), (1e10, 1e10), (1e-30, 3e-30), (1e30, 1e30), (1e-12, 1e12), (1e-42, 1e-41)]
)
def test_moments_do_not_depend_on_units(a: float, b: float) -> None:
    x, y = torch.tensor([[3.0, 4.0, 0.0]]) * a, torch.tensor([[0.0, 4.0, 3.0]]) * b
    wanted = [
        float(v)
        for v in (x.double() @ y.double().T / x.double().norm() / y.double().norm(), x.double().norm() / y.double().norm())
    ]
    cosine, ratio = moments(x, y)
    assert [float(cosine), float(ratio)] == pytest.approx(wanted, rel=1e-5)


def _geometric(n: int = 4, ratio: float = 0.5, steps: int = STEPS) -> list[Tensor]:
    """Outputs whose differences keep their direction and shrink by `ratio`: all can be told from the first two."""
    start, delta = torch.randn(n, 3), torch.randn(n, 3)
    run = [start]
    for at in range(steps - 1):
        run.append(run[-1] + delta * ratio**at)
    return run


def test_calibration_by_hand() -> None:
    table = calibrate_tao([_geometric(), _geometric(2)])
    assert all(math.isnan(value) for value in (*table.cosine[:2], *table.ratio[:2]))
    assert table.cosine[2:] == pytest.approx([1.0] * (STEPS - 2), abs=1e-4)
    assert table.ratio[2:] == pytest.approx([0.5] * (STEPS - 2), rel=1e-2)
    assert TaoTable.from_json(json.loads(json.dumps(table.to_json()))).ratio[2:] == table.ratio[2:]
    with pytest.raises(ArgumentError, match=r"at least 3, got \[2, 4\]"):
        calibrate_tao([_geometric(steps=2), _geometric(steps=4)])


def test_what_can_be_told_is_told_and_only_the_others_run() -> None:
    """Rows 0 and 2 keep their direction, 1 and 3 turn around: these two run every step, as a batch of two."""
    straight, calls = _geometric(), []
    noisy = [torch.randn(4, 3) for _ in range(STEPS)]
    rows = torch.tensor([True, False, True, False])
    run = [torch.where(rows[:, None], a, b) for a, b in zip(straight, noisy, strict=True)]
    cache = TaoCache(calibrate_tao([straight]), threshold=0.9, start=0.5, most=3)
    for step in range(STEPS):

        def model(number: Tensor, step: int = step) -> Tensor:
            calls.append((step, number.tolist()))
            return run[step][number]

        out = cache(model, step, torch.arange(4))
        torch.testing.assert_close(out, run[step], rtol=1e-3, atol=1e-3)
    # Six early steps and the last run in full; three in a row are skipped, then one runs.
    everybody, two = [0, 1, 2, 3], [1, 3]
    wanted = [everybody] * 6 + [two, two, two, everybody, two, everybody]
    noise_told = [(step, numbers) for step, numbers in calls]
    assert noise_told == list(enumerate(wanted))
    assert cache.fraction == pytest.approx(sum(map(len, wanted)) / (4 * STEPS))
    assert torch.stack(cache.runs).sum(0).tolist() == [8, 12, 8, 12]


def _told_by_hand(run: list[Tensor], table: TaoTable, threshold: float, most: int) -> tuple[list[Tensor], list[bool]]:
    """One prompt, in float64: only what the model computed is ever compared, from scratch at every step."""
    given: list[Tensor] = []
    real: list[tuple[int, Tensor]] = []
    runs: list[bool] = []
    for step, computed in enumerate(run):
        skip = False
        if len(real) > 2 and step + 1 < len(run) and table.cosine[step] >= threshold:
            (_, a), (_, b), (last, c) = real[-3:]
            seen = float((c - b) @ (b - a) / (c - b).norm() / (b - a).norm())
            skip = seen >= threshold and step - last <= most
        if not skip:
            given.append(computed)
            real.append((step, computed))
        else:
            (first, b), (last, c) = real[-2:]
            # Deltas of steps first + 1 .. last in units of the first one; they add up to c - b.
            units = [1.0]
            for at in range(first + 2, last + 1):
                units.append(units[-1] * table.ratio[at])
            delta = (c - b) / sum(units) * units[-1]
            for at in range(last + 1, step + 1):
                delta = delta * table.ratio[at]
            given.append(given[-1] + delta)
        runs.append(not skip)
    return given, runs


@pytest.mark.parametrize("most", [1, 3])
def test_only_computed_outputs_are_compared(most: int) -> None:
    """Prompts that turn a little at every step: what was told is wrong, and must not be taken for what was seen."""
    generator = torch.Generator().manual_seed(4)
    n, steps = 12, 24
    turn = torch.rand(n, 1, generator=generator)  # per prompt, from straight to wild
    straight = torch.randn(n, 6, generator=generator)
    deltas = [straight + turn * torch.randn(n, 6, generator=generator) for _ in range(steps)]
    run = list(torch.stack(deltas).cumsum(0))
    ratios = (0.8 + 0.02 * (k % 9) for k in range(steps - 2))
    table = TaoTable((math.nan, math.nan, *[0.9] * (steps - 2)), (math.nan, math.nan, *ratios))
    cache = TaoCache(table, threshold=0.6, start=0.0, most=most)
    outputs = [cache(lambda rows, step=step: run[step][rows], step, torch.arange(n)) for step in range(steps)]
    runs = torch.stack(cache.runs)
    for row in range(n):
        wanted, ran = _told_by_hand([part[row].double() for part in run], table, 0.6, most)
        assert runs[:, row].tolist() == ran, row
        torch.testing.assert_close(torch.stack(outputs)[:, row].double(), torch.stack(wanted), rtol=1e-4, atol=1e-4)
    assert len(set(runs.sum(0).tolist())) > 3
    assert 0.3 < cache.fraction < 0.9


def test_the_caller_may_write_to_what_it_gets() -> None:
    """And the model to the buffer that it returned."""
    run, buffer = _geometric(), torch.empty(4, 3)
    cache = TaoCache(calibrate_tao([run]), start=0.0, most=2)
    for step in range(STEPS):

        def model(number: Tensor, step: int = step) -> Tensor:
            return buffer.copy_(run[step])[: len(number)]

        out = cache(model, step, torch.arange(4))
        torch.testing.assert_close(out, run[step], rtol=1e-3, atol=1e-3)
        out.zero_()
    assert cache.fraction < 1


def test_nobody_runs_when_all_can_be_told() -> None:
    run = _geometric()
    cache = TaoCache(calibrate_tao([run]), start=0.0, most=2)
    calls = 0
    for step in range(STEPS):

        def model(number: Tensor, step: int = step) -> Tensor:
            nonlocal calls
            calls += 1
            return run[step][number]

        torch.testing.assert_close(cache(model, step, torch.arange(4)), run[step], rtol=1e-3, atol=1e-3)
    assert calls == 3 + 3  # 0, 1, 2 make the first cosine; then every third, the last among them
    assert [bool(r.all()) for r in cache.runs] == [True, True, True, False, False, True, False, False, True, False, False, True]


@pytest.mark.parametrize(("options", "runs"), [({"threshold": 1.1}, 12), ({"most": 0}, 12), ({"start": 1.0}, 12)])
def test_settings_that_skip_nothing(options: dict[str, Any], runs: int) -> None:
    run = _geometric()
    cache = TaoCache(calibrate_tao([run]), **options)
    for step in range(STEPS):
        assert torch.equal(cache(lambda number, step=step: run[step][number], step, torch.arange(4)), run[step])
    assert sum(bool(r.all()) for r in cache.runs) == runs


def _sampled(model: TinyDiT, labels: Tensor, cache: TaoCache | None) -> tuple[Tensor, list[Tensor]]:
    ddim, outputs = Ddim(STEPS), []
    x = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(1))[: len(labels)]
    for step, t in enumerate(ddim.timesteps):

        def run(x: Tensor, labels: Tensor, t: Tensor = t) -> Tensor:
            return model(x, t.expand(len(x)), labels)

        noise = run(x, labels) if cache is None else cache(run, step, x, labels)
        outputs.append(noise)
        x = ddim.step(noise, step, x)
    return x, outputs


def test_on_a_diffusion_transformer_prompts_decide_alone() -> None:
    """A batch skips what each prompt skips by itself, and ends where it ends."""
    torch.manual_seed(3)
    model, labels = TinyDiT(width=32, layers=2).eval(), torch.arange(10) % 5
    full, outputs = _sampled(model, labels, None)
    table = calibrate_tao([outputs])
    level = sorted(table.cosine[2:])[4]
    cache = TaoCache(table, threshold=level, start=0.3, most=2)
    found, _ = _sampled(model, labels, cache)
    runs = torch.stack(cache.runs)
    assert 0.4 < cache.fraction < 1
    for row in range(10):
        alone = TaoCache(table, threshold=level, start=0.3, most=2)
        x = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(1))[row : row + 1]
        ddim = Ddim(STEPS)
        for step, t in enumerate(ddim.timesteps):
            noise = alone(lambda x, y, t=t: model(x, t.expand(len(x)), y), step, x, labels[row : row + 1])
            x = ddim.step(noise, step, x)
        assert torch.stack(alone.runs)[:, 0].tolist() == runs[:, row].tolist()
        torch.testing.assert_close(x[0], found[row], rtol=1e-3, atol=1e-3)
    assert float((found - full).norm() / full.norm()) < 0.5


def test_what_taocache_refuses() -> None:
    table = calibrate_tao([_geometric()])
    with pytest.raises(ArgumentError, match=r"start in \[0, 1\] and most at least 0, got 0.9, 2, 1"):
        TaoCache(table, threshold=0.9, start=2)
    cache = TaoCache(table)
    with pytest.raises(ArgumentError, match="step must be 0 of 12, got 1"):
        cache(lambda x: x, 1, torch.zeros(2, 3))
    with pytest.raises(ArgumentError, match=r"equally many prompts, got \[\[2, 3\], \[3\]\]"):
        cache(lambda x, y: x, 0, torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ArgumentError, match="equally many prompts"):
        cache(lambda: torch.zeros(1), 0)
    cache(lambda x: x, 0, torch.zeros(2, 3))
    with pytest.raises(ArgumentError, match="this run has 2 prompts, got 3"):
        cache(lambda x: x, 1, torch.zeros(3, 3))


def test_conditions_switch_row_by_row() -> None:
    source, target = torch.zeros(4, 2, 3), torch.ones(4, 2, 3)
    switch = ConditionSwitch(source, target, torch.tensor([0, 3, 5, 9]))

    def under_target(step: int | Tensor, rows: Tensor | None = None) -> list[int]:
        made = switch(step, rows)
        assert bool((made == made[:, :1, :1]).all())
        return made[:, 0, 0].int().tolist()

    assert [under_target(step) for step in (0, 2, 3, 5, 9)] == [
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]
    assert under_target(torch.tensor([0, 2, 6, 8])) == [1, 0, 1, 0]
    assert under_target(4, torch.tensor([3, 1])) == [0, 1]
    assert under_target(torch.tensor([9, 2]), torch.tensor([3, 1])) == [1, 0]
    with pytest.raises(ArgumentError, match=r"source and target must be alike \[n, ...\]"):
        ConditionSwitch(source, target[:, :1], switch.at)
    with pytest.raises(ArgumentError, match=r"at must be int64 \[4\]"):
        ConditionSwitch(source, target, torch.zeros(4))
    with pytest.raises(ArgumentError, match=r"step must be a number or int64 \[4\], got \[2\]"):
        switch(torch.tensor([1, 2]))


def _alpha(strong: dict[int, str], edges: int = 5) -> Tensor:
    """Weights of a cell of two nodes (2 + 3 edges): each named edge prefers its operation, the others sep_conv_3x3 weakly."""
    alpha = torch.zeros(edges, len(OPS))
    alpha[:, OPS.index("sep_conv_3x3")] = 0.1
    for edge, name in strong.items():
        alpha[edge, OPS.index(name)] = 2.0 + 0.1 * edge
    return alpha


def test_a_cell_by_hand() -> None:
    alpha = _alpha({0: "skip_connect", 1: "dil_conv_5x5", 2: "max_pool_3x3", 4: "sep_conv_5x5"})
    alpha[3, OPS.index("none")] = 9.0  # a strong "none" leaves little to the others
    assert derived(alpha) == [(0, 0, "skip_connect"), (0, 1, "dil_conv_5x5"), (1, 0, "max_pool_3x3"), (1, 2, "sep_conv_5x5")]
    with pytest.raises(ArgumentError, match="alpha must be"):
        derived(torch.zeros(4, len(OPS)))
    with pytest.raises(ArgumentError, match="alpha must be"):
        derived(torch.zeros(5, 3))


def test_two_skip_connects_stop_the_search() -> None:
    stop = DartsPlus(patience=None)
    assert not stop.update(_alpha({0: "skip_connect"}))
    # Two edges that prefer skip-connects, but only one of them is kept by its node: edge 2 is weaker than 3 and 4.
    assert not stop.update(_alpha({0: "skip_connect", 2: "skip_connect", 3: "sep_conv_5x5", 4: "sep_conv_5x5"}))
    assert stop.reason is None
    assert stop.update(_alpha({0: "skip_connect", 4: "skip_connect"}))
    assert stop.reason == "2 skip-connects in the normal cell"
    assert not DartsPlus(skips=3, patience=None).update(_alpha({0: "skip_connect", 4: "skip_connect"}))


def test_a_ranking_that_stands_stops_the_search() -> None:
    stop = DartsPlus(skips=None, patience=3)
    first, other = _alpha({}), _alpha({1: "dil_conv_3x3"})
    assert [stop.update(a) for a in (first, first, first, other, other, other)] == [False] * 6
    assert stop.count == 2
    # Weights grow and pooling and skip-connects overtake all: the learnable ones keep their order.
    grown = other * 3
    grown[:, [OPS.index("skip_connect"), OPS.index("max_pool_3x3")]] += 9
    resumed = DartsPlus(skips=None, patience=3)
    resumed.load_state_dict(json.loads(json.dumps(stop.state_dict())))
    assert stop.update(grown)
    assert resumed.update(grown)
    assert resumed.reason == "the ranking of learnable operations has stood for 3 epochs"


def test_what_darts_refuses() -> None:
    with pytest.raises(ArgumentError, match="wanted skips or patience"):
        DartsPlus(skips=None, patience=None)
    with pytest.raises(ArgumentError, match="at least 1, got 0 and 10"):
        DartsPlus(skips=0)
    with pytest.raises(ArgumentError, match="none of none, skip_connect is learnable"):
        DartsPlus(ops=("none", "skip_connect"))
    with pytest.raises(ArgumentError, match="NaN"):
        DartsPlus().update(_alpha({}) * math.nan)
