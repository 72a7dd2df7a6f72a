"""Closed form: regression against textbook answers, search against brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch

from dyndepth.closed_form import candidate_spans
from dyndepth.closed_form.candidates import MapFitter
from dyndepth.closed_form.heads import frequent
from dyndepth.closed_form.measure import Lottery, Sample, draw
from dyndepth.closed_form.ridge import NormalEquations, solve_best
from dyndepth.closed_form.router import _auc, fit_router
from dyndepth.closed_form.search import Candidate, _walk, choose, expected_price, greedy, label, pareto, thresholds
from dyndepth.closed_form.trace import trace
from dyndepth.exits import Band, Exits
from dyndepth.ops._math import rms_normalise
from dyndepth.runtime.bind import bind

# -- regression -----------------------------------------------------------------------------------------------------------


def test_normal_equations_equal_least_squares() -> None:
    x, y = torch.randn(400, 7), torch.randn(400, 3)
    equations = NormalEquations(7, 3)
    for part in torch.arange(400).split(61):  # streamed in uneven chunks
        equations.add(x[part], y[part])
    wide = torch.cat([x, torch.ones(400, 1)], dim=1).double()
    expected = torch.linalg.lstsq(wide, y.double()).solution
    torch.testing.assert_close(equations.solve(0.0), expected, rtol=1e-5, atol=1e-6)
    residual = float((wide @ expected - y).pow(2).sum() / y.double().pow(2).sum())
    assert equations.error(expected) == pytest.approx(residual, rel=1e-4)


def test_ridge_leaves_the_bias_free() -> None:
    """With an endless penalty only the mean of y remains."""
    x, y = torch.randn(300, 4), torch.randn(300, 2) + 5
    equations = NormalEquations(4, 2)
    equations.add(x, y)
    weights = equations.solve(1e9)
    assert float(weights[:-1].abs().max()) < 1e-6
    torch.testing.assert_close(weights[-1], y.double().mean(0), rtol=1e-5, atol=1e-5)


def test_penalty_is_chosen_by_held_out_error() -> None:
    """Few noisy rows want a strong penalty, many clean ones a weak one; groups of columns choose apart."""
    generator = torch.Generator().manual_seed(0)
    fitting, held_out = NormalEquations(40, 2), NormalEquations(40, 2)
    truth = torch.randn(40, 2, generator=generator)
    for equations, rows in ((fitting, 60), (held_out, 500)):
        x = torch.randn(rows, 40, generator=generator)
        noise = torch.randn(rows, 2, generator=generator) * torch.tensor([0.0, 30.0])
        equations.add(x, x @ truth + noise)
    best = solve_best(fitting, held_out, {"clean": slice(0, 1), "noisy": slice(1, 2)})
    weak, strong = (fitting.solve(p) for p in (1e-4, 1e-1))
    torch.testing.assert_close(best["clean"][0], weak[:, :1].float())
    torch.testing.assert_close(best["noisy"][0], strong[:, 1:].float())
    assert best["clean"][1] == pytest.approx(held_out.error(weak[:, :1], slice(0, 1)))


def test_maps_recover_a_linear_network() -> None:
    """If layers only add linear functions of the normed residual, jump and K,V maps are found exactly (held-out error 0)."""
    model = bind(tiny_models.shared("llama"))
    fitter = MapFitter(model, [(2, 4), (4, 6)])
    generator = torch.Generator().manual_seed(2)
    d, kv = model.hidden_size, 2 * model.layers[0].kv_heads * model.layers[0].head_dim
    jump, maps = (torch.randn(d, width, generator=generator) for width in (d, kv))

    class Chunk:
        begin = 0
        residual: dict[int, torch.Tensor]

    for _ in range(4):
        h = torch.randn(200, d, generator=generator) * 3
        chunk: Any = Chunk()
        chunk.residual = {2: h, 4: h + rms_normalise(h, 1e-6) @ jump, 6: h}
        chunk.kv = {
            layer: (rms_normalise(chunk.residual[leave], 1e-6) @ maps).unflatten(1, (2, -1))
            for layer, leave in ((2, 2), (3, 2), (4, 4), (5, 4))
        }
        chunk.ready = model.finish(chunk.residual[4]) + rms_normalise(chunk.residual[4], 1e-6) @ jump
        held_out = torch.arange(200) % 5 == 0
        # Rows that belong to neither must not weigh in: an attention sink among them would bend every map.
        ignored = torch.arange(200) == 7
        chunk.residual[4][ignored] *= 1e4
        fitter.add(chunk, ~held_out & ~ignored, held_out & ~ignored)
    for span in ((2, 4), (4, 6)):
        band, errors = fitter.band(span)
        assert max(errors.values()) < 1e-5
        h = torch.randn(50, d, generator=generator) * 3
        h = h if span == (2, 4) else h + rms_normalise(h, 1e-6) @ jump
        part = band.jump(h) - h if band.jump is not None else band.head(h, model.finish) - model.finish(h)
        torch.testing.assert_close(part, rms_normalise(h, 1e-6) @ jump, rtol=0.05, atol=0.1)
        keys_values = rms_normalise(h, 1e-6) @ band.kv.weight[1].flatten(0, 1).T + band.kv.bias[1].flatten()
        torch.testing.assert_close(keys_values, rms_normalise(h, 1e-6) @ maps, rtol=0.05, atol=0.1)


def test_memory_is_said_beforehand() -> None:
    """What is said covers what is held: accumulators, solutions and maps, counted after a pass and a solve."""
    model = bind(tiny_models.shared("llama"))
    spans = candidate_spans(6)
    fitter = MapFitter(model, spans)
    tokens = [torch.randint(3, 90, (200,)) for _ in range(3)]
    for chunk in trace(model, tokens, *fitter.needs()):
        rows = torch.arange(chunk.ready.shape[0])
        fitter.add(chunk, rows % 4 > 0, rows % 4 == 0)
    bands = [fitter.band(span)[0] for span in spans]
    maps = sum(value.numel() * value.element_size() for band in bands for value in band.state_dict().values())
    solved = sum(w.numel() * w.element_size() for b in fitter.boundaries for w, _ in b.solved().values())
    said = MapFitter.memory(model, spans)
    assert fitter.accumulators + maps + solved < said < 2 * (fitter.accumulators + maps + solved)


# -- trace ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "olmo2"])
def test_trace_shows_what_transformers_computes(family: str) -> None:
    model = tiny_models.shared(family)
    bound = bind(model)
    sequences = [torch.randint(3, tiny_models.VOCABULARY, (length,)) for length in (9, 4, 7)]
    chunks = list(trace(bound, sequences, range(7), range(6), chunk=10))
    assert [chunk.begin for chunk in chunks] == [0, 13]
    states = [model(input_ids=tokens[None], output_hidden_states=True).hidden_states for tokens in sequences]
    for boundary in range(6):  # transformers' last entry is normed already
        found = torch.cat([chunk.residual[boundary] for chunk in chunks])
        torch.testing.assert_close(found, torch.cat([s[boundary][0] for s in states]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([c.ready for c in chunks]), torch.cat([s[6][0] for s in states]), rtol=1e-4, atol=1e-4)
    # V is what transformers caches; K is before rotation, so it equals the cache at position 0, which is not turned.
    caches = [model(input_ids=tokens[None], use_cache=True).past_key_values for tokens in sequences]
    for layer in range(6):
        if bound.layers[layer].window:
            continue  # transformers' cache keeps no more than the window
        found = torch.cat([chunk.kv[layer] for chunk in chunks])
        values = torch.cat([cache.layers[layer].values[0].movedim(1, 0).flatten(1) for cache in caches])
        torch.testing.assert_close(found[:, 1], values, rtol=1e-4, atol=1e-4)
        keys = torch.stack([cache.layers[layer].keys[0, :, 0].flatten() for cache in caches])
        torch.testing.assert_close(found[[0, 9, 13], 0], keys, rtol=1e-4, atol=1e-4)


# -- routers ----------------------------------------------------------------------------------------------------------------


def test_router_finds_a_separating_direction() -> None:
    generator = torch.Generator().manual_seed(4)
    h = torch.randn(3000, 12, generator=generator) * 5
    direction = torch.randn(12, generator=generator)
    chance = torch.sigmoid(3 * rms_normalise(h, 1e-6) @ direction)
    agrees = torch.rand(3000, generator=generator) < chance
    router, found = fit_router(h, agrees, torch.arange(3000) % 5 == 0)
    assert found["log_loss"] < 0.7 * found["log_loss_of_constant"]
    assert found["auc"] > 0.85
    learned = router(h)
    assert float((learned - chance).abs().mean()) < 0.03
    assert float(learned.mean()) == pytest.approx(float(agrees.float().mean()), abs=0.02), "calibrated on average"


@pytest.mark.parametrize("value", [True, False])
def test_router_of_one_class(value: bool) -> None:
    """All rows agree, or none: a constant near one or zero, not a crash."""
    router, found = fit_router(torch.randn(100, 6), torch.full((100,), value), torch.arange(100) % 5 == 0)
    assert found["auc"] == 0.5
    assert bool((router(torch.randn(50, 6)) > 0.9 if value else router(torch.randn(50, 6)) < 0.1).all())


def test_area_under_the_curve_by_hand() -> None:
    score_, positive = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True])
    assert _auc(score_, positive) == pytest.approx(0.75)
    assert _auc(torch.zeros(4), positive) == pytest.approx(0.5)


# -- search -----------------------------------------------------------------------------------------------------------------


def test_lottery_is_fair_and_fixed() -> None:
    seq, step = torch.arange(200).repeat_interleave(100), torch.arange(100).repeat(200)
    first = draw(seq, step, 0.25, seed=0)
    assert torch.equal(first, draw(seq, step, 0.25, seed=0))
    for number in range(4):
        assert float((first == number).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float((first == draw(seq, step, 0.25, seed=1)).float().mean()) == pytest.approx(0.25, abs=0.02)
    # Neither a sequence nor a step gives the draw away.
    assert float((first == 0).float().view(200, 100).mean(1).std()) < 0.06
    assert float((first == 0).float().view(200, 100).mean(0).std()) < 0.06


def test_frequent_words() -> None:
    assert frequent(torch.tensor([5, 5, 5, 9, 9, 2]), 2).tolist() == [5, 9]
    assert frequent(torch.tensor([5, 5, 5, 9, 9, 2]), 100).tolist() == [2, 5, 9]
    assert len(frequent(torch.tensor([7, 7]), 10)) == 2


def test_labels_are_the_rows_that_skipped() -> None:
    """Against a pass per row set: labels name judged rows that skipped exactly that band, with what they answered."""
    model = tiny_models.shared("llama")
    facts = tiny_exits.exits_of(model).model
    sample = Sample.of(model, [torch.randint(3, tiny_models.VOCABULARY, (40,)) for _ in range(4)], [4, 0, 9, 30])
    candidates = [Candidate(tiny_exits.band(model, *span), {}) for span in ((1, 3), (2, 4), (2, 6))]
    found = label(candidates, sample, facts, 2, lambda: None)
    for labels in found:
        assert len(labels.rows) > 10
        assert bool(sample.judged[labels.rows].all())
    # (2, 4) and (2, 6) leave at one boundary, so (2, 6) has passes of its own: repeat them by hand.
    band = candidates[2].band
    expected = {}
    for seed in (0, 1):
        measured = sample.run(Exits([Band(2, 6, Lottery(0.3, 0, seed), head=band.head, kv=band.kv)], facts), "predict")
        expected |= {(seed, row): bool(measured.agrees[row]) for row in measured.skipped.nonzero()[:, 0].tolist()}
    assert found[2].rows.tolist() == [row for _, row in expected]
    assert found[2].agrees.tolist() == list(expected.values())


@pytest.mark.parametrize("price", [0.05, 0.2, 0.5])
def test_walking_past_overlapping_bands(price: float) -> None:
    """Expected loss and saving of a policy, against plain Python: a row that is away passes no other band."""
    candidates, chances = _three()
    limits = thresholds(candidates, price)
    loss = saved = 0.0
    for row in range(300):
        away = 0
        for band, chance, limit in sorted(zip(candidates, chances, limits, strict=True), key=lambda e: e[0].band.leave):
            if away > band.band.leave:
                continue
            saved -= band.judging
            if float(chance[row]) >= limit:
                away = band.band.resume
                loss += 1 - float(chance[row]) + band.harm
                saved += band.saved
    assert _walk(candidates, chances, limits) == pytest.approx((loss / 300, saved / 300), rel=1e-4)


def _three() -> tuple[list[Candidate], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(6)
    candidates = [Candidate(Band(a, b), {}, harm=0.01, judging=0.1) for a, b in ((1, 3), (2, 6), (4, 6))]
    return candidates, [torch.rand(300, generator=generator) ** power for power in (0.3, 0.5, 0.1)]


def test_choose_equals_brute_force() -> None:
    """Bands of equal routers: the expected saving is what walking row by row gives."""
    candidates, chances = _three()
    best = (0.0, ())
    for size in (1, 2):
        for chosen in itertools.combinations(range(3), size):
            saved = _saving([candidates[i] for i in chosen], [chances[i] for i in chosen], 0.05)
            if saved > best[0] * 1.02:
                best = (saved, chosen)
    assert choose(candidates, chances, 0.95, 2) == list(best[1])


def _saving(bands: list[Candidate], chances: list[torch.Tensor], budget: float) -> float:
    """Over a fine grid of prices instead of a bisection."""
    best = 0.0
    for price in [i / 400 for i in range(401)]:
        loss, saved = _walk(bands, chances, thresholds(bands, price))
        if loss <= budget:
            best = max(best, saved)
    return best


@pytest.mark.parametrize("price", [0.05, 0.2, 0.5])
def test_walking_with_routers_that_see_what_was_skipped(price: float) -> None:
    """Against plain Python: a chance is shifted in its logit by what the row took, and then speaks of all of it."""
    candidates, chances = _three()
    offsets = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-1.5, 0.0, 0.0]])
    limits = thresholds(candidates, price)
    loss = saved = 0.0
    several = 0
    for row in range(300):
        away, taken, wrong = 0, [], 0.0
        for i, band in enumerate(candidates):
            if away > band.band.leave:
                continue
            saved -= band.judging
            chance = float(chances[i][row])
            shift = sum(float(offsets[i, j]) for j in taken)
            chance = 1 / (1 + math.exp(-(math.log(chance / (1 - chance)) + shift)))
            if chance >= limits[i]:
                away = band.band.resume
                wrong = 1 - chance
                taken.append(i)
                loss += band.harm
                saved += band.saved
        loss += wrong
        several += len(taken) > 1
    assert _walk(candidates, chances, limits, offsets) == pytest.approx((loss / 300, saved / 300), rel=1e-3)
    assert several or price < 0.2, "rows must take two bands for this to test anything"


def test_sets_grow_by_the_band_that_adds_most() -> None:
    candidates, chances = _three()
    grown = greedy(candidates, chances, 0.95, 3)
    assert [len(chosen) for _, chosen in grown] == list(range(1, len(grown) + 1))
    assert grown[0][1] == choose(candidates, chances, 0.95, 1)
    saved = 0.0
    for number, (gain, chosen) in enumerate(grown):
        before = set(grown[number - 1][1]) if number else set()
        assert before < set(chosen)
        others = [sorted(before | {i}) for i in range(3) if i not in before]
        best = max(_saving([candidates[i] for i in wider], [chances[i] for i in wider], 0.05) for wider in others)
        assert gain == pytest.approx(best, rel=0.03)
        assert gain > 1.02 * saved
        saved = gain
    twins = [Candidate(Band(2, 4), {}, harm=0.0), Candidate(Band(2, 6), {}, harm=0.0)]
    assert len(greedy(twins, [torch.ones(9)] * 2, 0.9, 2)) == 1, "a boundary has one band"
    assert greedy(twins, [torch.zeros(9)] * 2, 0.9, 2) == []


def test_choosing_of_many_grows_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, chances = _three()
    hopeless = [torch.zeros(9)] * 3
    fallen_back = choose(candidates, hopeless, 0.95, 2)
    monkeypatch.setattr("dyndepth.closed_form.search._SETS", 2)
    assert choose(candidates, chances, 0.95, 2) == greedy(candidates, chances, 0.95, 2)[-1][1]
    assert choose(candidates, hopeless, 0.95, 2) == fallen_back, "nothing pays: the one that loses least per layer"


def test_the_expected_price_spends_the_budget() -> None:
    candidates, chances = _three()
    price, saved = expected_price(candidates, chances, 0.1)
    assert _walk(candidates, chances, thresholds(candidates, price))[0] <= 0.1
    assert _walk(candidates, chances, thresholds(candidates, price + 0.01))[0] > 0.1
    walks = [_walk(candidates, chances, thresholds(candidates, i / 4000)) for i in range(2000)]
    assert saved == pytest.approx(max(gain for loss, gain in walks if loss <= 0.1), rel=0.02)


def test_pareto_is_what_nothing_beats() -> None:
    generator = torch.Generator().manual_seed(2)
    points = [(round(float(a), 1), round(float(w), 1)) for a, w in torch.rand(60, 2, generator=generator)]
    kept = pareto(points)
    for i, (agreement, work) in enumerate(points):
        beaten = any((a >= agreement and w <= work) and (a > agreement or w < work) for a, w in points)
        first = points.index((agreement, work)) == i
        assert (i in kept) == (not beaten and first)
    assert [points[i][1] for i in kept] == sorted(points[i][1] for i in kept)
    assert pareto([]) == []


def test_rows_that_count_several_times() -> None:
    """A weight of three is the row three times over; none is one each."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(50, 4, generator=generator), torch.randn(50, 2, generator=generator)
    times = torch.randint(1, 4, (50,), generator=generator)
    weighted, repeated, plain, ones = (NormalEquations(4, 2) for _ in range(4))
    weighted.add(x, y, times)
    repeated.add(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0))
    for name in ("gram", "cross", "square"):
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name), rtol=1e-5, atol=1e-5)
    plain.add(x, y)
    ones.add(x, y, torch.ones(50))
    torch.testing.assert_close(plain.gram, ones.gram)


def test_candidate_spans() -> None:
    spans = candidate_spans(30)
    assert (3, 6) in spans
    assert (3, 8) in spans
    assert {leave for leave, resume in spans if resume == 30} == {27, 25, 22, 20}
    for layers in range(2, 70):
        assert candidate_spans(layers)
        assert all(1 <= leave < resume <= layers for leave, resume in candidate_spans(layers))
    assert candidate_spans(1) == []
