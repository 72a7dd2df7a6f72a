"""Depth efficiency: forced rates, a perfect machine worked out by hand, blocks that were preempted, tables, the schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import depth_efficiency as de
import pytest
import tables_speed
import tiny_exits
import tiny_models
import torch
from depth_forced import Draw, Scenario, at_rates, boundary_bytes, draw, forced_exits, perfect_saving

from dyndepth.exits import Band, Exits, KVMap, TopProbability, TranslatorHead
from dyndepth.runtime.bind import bind
from dyndepth.runtime.fingerprint import facts_of

LAYERS = tiny_models.LAYERS


def rows(batch: int, length: int = 6) -> list[torch.Tensor]:
    return list(torch.randint(3, tiny_models.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_rates_are_exact(batch: int, rate: float) -> None:
    """To the nearest row over all steps, and live rows are those that nobody took away."""
    scenario = Scenario("two", ((2, 6, rate), (4, 6, rate)))
    found = draw(scenario, LAYERS, 8, batch, seed=1)
    left = [int(band.sum()) for band in found.leaving]
    assert left[0] == round(8 * batch * rate)
    assert abs(left[1] - rate * (8 * batch - left[0])) <= 0.5
    for step, live in enumerate(found.live):
        first, second = (int(band[step].sum()) for band in found.leaving)
        assert live == [batch] * 2 + [batch - first] * 2 + [batch - first - second] * 2
        assert not (found.leaving[0][step] & found.leaving[1][step]).any()
    assert found.run == 8 * batch * LAYERS - 4 * left[0] - 2 * left[1]


def test_rows_that_resume_can_leave_again() -> None:
    found = draw(Scenario("band", ((1, 3, 1.0), (3, 6, 1.0))), LAYERS, 1, 2, seed=1)
    assert found.live == [[2, 0, 0, 0, 0, 0]]
    assert found.counts == [2]


def test_which_rows_leave_is_random_and_seeded() -> None:
    scenario = Scenario("one", ((2, 6, 0.5),))
    first, again, other = (draw(scenario, LAYERS, 8, 16, seed).leaving[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_a_perfect_machine_by_hand() -> None:
    """Three layers, four rows: all, two, none; then all, all, one. A layer takes 10, 14, 16 at 1, 2, 4 rows."""
    drawn = Draw([], [[4, 2, 0], [4, 4, 1]])
    saved = perfect_saving(drawn, {1: 10.0, 2: 14.0, 4: 16.0}, 4)
    assert saved == ((16 - 14) + (16 - 0) + (16 - 10)) / 2
    assert perfect_saving(Draw([], [[4, 4, 4]]), {4: 16.0}, 4) == 0
    assert drawn.counts == [1, 2, 4]
    with pytest.raises(KeyError):
        perfect_saving(drawn, {1: 10.0, 4: 16.0}, 4)


def samples(*seconds: float, preempted: tuple[int, ...] = ()) -> list[de.Sample]:
    return [de.Sample(value, number in preempted) for number, value in enumerate(seconds)]


def test_efficiency_by_hand() -> None:
    """A perfect machine saves 12 of 100; 9 were saved in the median. Round 2 was preempted and is in nothing."""
    drawn = Draw([], [[4, 2], [4, 0]])
    taken = {
        ("full", None): samples(100, 100, 900, preempted=(2,)),
        ("forced", 0): samples(92, 90, 1),
        ("layer", 4): samples(18, 18, 1),
        ("layer", 2): samples(12, 12, 1),
        ("layer", 3): samples(1, 1, 1, preempted=(0, 1)),  # of another scenario
    }
    taken["forced", 0][2] = de.Sample(1, True)
    taken["layer", 4][2] = taken["layer", 2][2] = de.Sample(1, True)
    found = de.cell(Scenario("x", ((1, 2, 0.5),)), drawn, taken, ("forced", 0), 4)
    assert (found["full_s"], found["dynamic_s"], found["saved_s"]) == (100, 91, 9)
    assert found["perfect_s"] == ((18 - 12) + (18 - 0)) / 2 == 12
    assert found["efficiency"] == 0.75
    # Of 92 and 90, drawn twice, medians are 92, 91, 91 and 90: a tenth of all draws lies within either quarter.
    assert found["efficiency_p10"] == pytest.approx(8 / 12)
    assert found["efficiency_p90"] == pytest.approx(10 / 12)
    assert (found["rounds_kept"], found["resolved"]) == (2, True)
    assert found["rows_x_layers"] == 10 / 16


def test_nothing_to_save_is_not_a_ratio() -> None:
    """Where fewer rows take as long as all, there is no efficiency to speak of."""
    taken = {
        ("full", None): samples(100), ("forced", 0): samples(101), ("layer", 4): samples(5), ("layer", 2): samples(5),
    }  # fmt: skip
    found = de.cell(Scenario("x", ((1, 2, 0.5),)), Draw([], [[4, 2]]), taken, ("forced", 0), 4)
    assert (found["efficiency"], found["efficiency_p10"], found["resolved"]) == (None, None, False)


def test_machinery_by_hand() -> None:
    taken = {("full", None): samples(100, 100, 50, preempted=(2,)), ("configured", None): samples(102, 104, 1, preempted=(2,))}
    found = de.machinery(taken)
    assert (found["full_s"], found["configured_s"]) == (100, 103)
    assert found["cost"] == pytest.approx(0.03)
    assert (found["cost_p10"], found["cost_p90"]) == (pytest.approx(0.02), pytest.approx(0.04))
    assert found["rounds_kept"] == 2


def test_preempted_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One switch is forgiven; more than one and fifty a second is not. Medians leave such blocks out."""
    switches = iter([0, 1, 10, 12])
    monkeypatch.setattr(de, "_switches", lambda: next(switches))
    assert not de.sample(lambda: 2).preempted
    assert de.sample(lambda: 2).preempted
    assert de.middle(samples(1, 9, 1, preempted=(1,))) == 1
    assert de.middle(samples(1, 9, 9, preempted=(1, 2))) == 9  # too few are left
    assert de.quantile([], 0.5) is None


def test_maps_are_shipped_where_there_are_some() -> None:
    model = tiny_models.shared("llama")
    bound, shipped = bind(model), list(tiny_exits.mixed(model))
    scenario = Scenario("mixed", ((1, 2, 0.5), (2, 6, 0.5), (3, 6, 0.5)))
    exits, said = forced_exits(bound, scenario, draw(scenario, LAYERS, 2, 2, 1), shipped)
    assert said == {"[1, 2)": "zeros", "[2, 6)": "zeros", "[3, 6)": "shipped"}
    first, second, third = exits
    assert first.jump is not None
    assert not first.kv.weight.any()
    assert third.kv is shipped[2].kv
    assert third.head is shipped[2].head is second.head


def test_thresholds_at_rates() -> None:
    """Two exits of a model of six layers, scores of four rows in two steps: 4 of 8 leave, then 1 of the 4 that are left."""
    exits = Exits([Band(1, 6, TopProbability()), Band(2, 6, TopProbability())], facts_of(bind(tiny_models.shared("llama"))))
    first = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.999, 0.6, 0.001, 0.7]])
    second = torch.tensor([[0.05, 0.01, 0.03, 0.9], [0.9, 0.9, 0.02, 0.9]])  # the 0.9s are of rows that are gone by then

    def run(now: Exits) -> list[list[int]]:
        live = []
        for a, b in zip(first, second, strict=True):
            stay = a < now.bands[0].threshold
            live.append([4, int(stay.sum()), *[int((stay & (b < now.bands[1].threshold)).sum())] * 4])
        return live

    scenario = Scenario("two", ((1, 6, 0.5), (2, 6, 0.25)))
    opened, found = at_rates(exits, scenario, draw(scenario, 6, 2, 4, seed=1), run)
    assert 0.3 < opened.bands[0].threshold <= 0.4
    assert 0.03 < opened.bands[1].threshold <= 0.05
    assert found.live == [[4, 3, 2, 2, 2, 2], [4, 1, 1, 1, 1, 1]]


def test_bytes_of_boundaries_by_hand() -> None:
    """Two steps: in the first the judge sees rows and some leave, in the second nobody is left to judge at the second exit."""
    kv, head = KVMap(4, 4, 6), TranslatorHead(6, 6, None)
    band = Band(1, 6, TopProbability(), head=head, kv=KVMap(5, 4, 6), shortlist=torch.arange(5))
    later = Band(2, 6, TopProbability(), head=head, kv=kv, shortlist=torch.arange(5))
    size = {part: sum(w.numel() * w.element_size() for w in part.parameters()) for part in (head, kv, band.kv)}
    words = 5 * 6 * kv.weight.element_size()
    exits = Exits([band, later], facts_of(bind(tiny_models.shared("llama"))))
    once = boundary_bytes(exits, Draw([], [[4, 2, 2]]), 6)
    assert once == size[head] + words + size[band.kv] + size[head] + words
    assert boundary_bytes(exits, Draw([], [[4, 2, 2], [4, 0, 0]]), 6) == once / 2 + (size[head] + words + size[band.kv]) / 2
    assert boundary_bytes(exits, Draw([], [[4, 4, 1]]), 6) == 2 * (size[head] + words) + size[kv]


def test_a_measurement() -> None:
    """Everything really runs as drawn, and the schema is whole."""
    model = tiny_models.shared("llama")
    found = json.loads(json.dumps(de.measure(model, rows(4), tiny_exits.mixed(model), steps=3, rounds=2), allow_nan=False))
    assert found["batch"] == 4
    assert set(found["layer_s"]) >= {"2", "4"}
    assert found["maps"]["[4, 6)"] == "zeros"
    names = [(cell["scenario"], cell["rate"]) for cell in found["cells"]]
    kinds = ("exit at 4", "exits at 2 and 4", "exit at 4, by lot", "exits at 2 and 4, by lot", "band [1, 2), by lot")
    assert names == [(name, rate) for rate in (0.25, 0.5) for name in kinds]
    # Twelve rows x steps: at one half 6 leave for two layers; at two exits 6 leave for four layers and 3 of 6 for two.
    shares = [cell["rows_x_layers"] for cell in found["cells"][5:]]
    assert shares == pytest.approx([1 - 12 / 72, 1 - 30 / 72, 1 - 12 / 72, 1 - 30 / 72, 1 - 6 / 72])
    for cell in found["cells"]:
        assert cell["saved_s"] == pytest.approx(cell["full_s"] - cell["dynamic_s"])
        assert cell["parts_s"]["boundaries: back-fill"] > 0
        assert cell["boundary_weights_s"] > 0
    assert "boundaries: back-fill" not in found["machinery"]["parts_s"]
    assert found["machinery"]["parts_s"]["boundaries: judging"] > 0
    assert "boundaries: judging" not in found["full_parts_s"]
    assert found["blocks"] == 2 * (12 + len(found["layer_s"]))


def test_other_work_than_drawn_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.shared("llama")
    bench = de.Bench(model, rows(2), steps=1)
    scenario = Scenario("one", ((2, 6, 0.5),))
    drawn = draw(scenario, LAYERS, 1, 2, 1)
    session = bench.session(forced_exits(bench.model, scenario, drawn)[0])
    assert bench.block(session, drawn.live)[1]() == 1
    with pytest.raises(RuntimeError, match=r"step 0: wanted .* rows by layer"):
        bench.block(session, [[2] * LAYERS])[1]()


def test_contexts_are_shared_and_text_is_full_depths() -> None:
    """Every system decodes the tokens that full depth says, and what it writes leaves the prompt's K,V as they were."""
    model = tiny_models.shared("llama")
    given = rows(2)
    bench = de.Bench(model, given, steps=3)
    text = model.generate(input_ids=torch.stack(given), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(torch.stack(bench.tokens[1:], 1), text[:, 6:])
    scenario = Scenario("one", ((2, 6, 1.0),))
    drawn = draw(scenario, LAYERS, 3, 2, 1)
    session = bench.session(forced_exits(bench.model, scenario, drawn)[0])
    assert session.pages is bench.full.pages
    prompt_slots = session.pages.slots([0] * 5 + [1] * 5, [*range(5)] * 2).long()
    before = session.pages.kv.flatten(2, 3)[:, :, prompt_slots].clone()
    bench.block(session, drawn.live)[1]()
    assert torch.equal(session.pages.kv.flatten(2, 3)[:, :, prompt_slots], before)


# -- tables -----------------------------------------------------------------------------------------------------------------


MACHINE = {"cpu": {"name": "A CPU", "capability": "AVX2"}, "packages": {"torch": "2.0"}}


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    cell: dict[str, Any] = {
        "batch": 4, "scenario": "exit at 20", "rate": 0.5, "rows_x_layers": 5 / 6, "full_s": 0.1, "dynamic_s": 0.091,
        "saved_s": 0.009, "perfect_s": 0.012, "efficiency": 0.75, "efficiency_p10": 0.7, "efficiency_p90": 0.8,
        "resolved": True, "boundary_weights_s": 0.003,
    }  # fmt: skip
    flat = {**cell, "scenario": "band", "efficiency": None, "efficiency_p10": None, "efficiency_p90": None, "resolved": False}
    cost = {"full_s": 0.1, "configured_s": 0.102, "cost": 0.02, "cost_p10": 0.01, "cost_p90": 0.03}
    settings = {"model": "M", "dtype": "bfloat16", "context": 128, "threads": 2, "rounds": 3, "steps": 8, "resolved_from": 0.02}
    batch = {"batch": 4, "cells": [cell, flat], "machinery": cost, "preempted": 1, "blocks": 9}
    found = {"machine": MACHINE, "settings": settings, "batches": [batch]}
    (tmp_path / "depth_efficiency.json").write_text(json.dumps(found))
    text = tables_speed.depth_efficiency(tmp_path)
    assert "| 4 | exit at 20 | 50% | 83.3% | 100.00 | 9.00 | 12.00 | 3.00 | 75% (70%–80%) |" in text
    assert "| 4 | band | 50% | 83.3% | 100.00 | 9.00 | 12.00 | 3.00 | – |" in text
    assert "| 4 | 100.00 | 102.00 | 2.0% (1.0%–3.0%) |" in text
    assert "1 of 9 blocks preempted" in text
    de.plot(tmp_path / "x.png", found)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
