"""Closed form: regression against textbook answers, search against brute force, and a whole fit on a small model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch

import dyndepth
from dyndepth.closed_form import candidate_spans
from dyndepth.closed_form.candidates import MapFitter
from dyndepth.closed_form.data import (
    FIT,
    TEST,
    TUNE,
    Piece,
    collect,
    deal,
    encode,
    openings,
    sections,
    text_pieces,
)
from dyndepth.closed_form.heads import exit_argmax, exit_statistics, frequent
from dyndepth.closed_form.measure import Lottery, Sample, draw
from dyndepth.closed_form.progress import Progress
from dyndepth.closed_form.ridge import NormalEquations, solve_best
from dyndepth.closed_form.router import _auc, fit_router
from dyndepth.closed_form.search import Candidate, _walk, choose, label, set_price, thresholds
from dyndepth.closed_form.trace import trace
from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.exits import Band, Exits, Saturation, TopProbability
from dyndepth.ops._math import rms_normalise
from dyndepth.runtime.bind import bind
from dyndepth.runtime.score import score

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
    model = bind(tiny_models.shared("llama"))
    spans = candidate_spans(6)
    said = MapFitter.memory(model, spans)
    held = 0
    for boundary in MapFitter(model, spans).boundaries:
        for equations in (boundary.fitting, boundary.held_out):
            held += sum(t.numel() * t.element_size() for t in (equations.gram, equations.cross, equations.square))
    assert held == said


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


# -- data -------------------------------------------------------------------------------------------------------------------


def _pieces(kind: str, documents: int, each: int, length: int) -> list[Piece]:
    return [Piece(torch.full((length,), d), 3, f"{kind} {d}") for d in range(documents) for _ in range(each)]


def test_splits_never_share_a_document_and_are_fixed_by_the_seed() -> None:
    own, text = _pieces("own", 24, 2, 30), _pieces("text", 16, 3, 40)
    data = deal(own, text, 10, seed=1)
    names = {name: {piece.document for piece in data.of(name)} for name in (FIT, TUNE, TEST)}
    assert not names[FIT] & names[TUNE]
    assert not names[FIT] & names[TEST]
    assert not names[TUNE] & names[TEST]
    assert len(set().union(*names.values())) == 40
    assert sum(data.judged(name) for name in names) == 48 * 27 + 48 * 37
    assert all(any(n.startswith(kind) for n in names[name]) for name in names for kind in ("own", "text"))
    again, other = deal(own, text, 10, seed=1), deal(own, text, 10, seed=2)
    assert [p.document for p in again.pieces] == [p.document for p in data.pieces]
    assert [p.document for p in other.pieces] != [p.document for p in data.pieces]


def test_a_texts_continuation_stays_with_the_text() -> None:
    both = [Piece(torch.zeros(60), 3, f"text {d}") for d in range(24)]
    data = deal(both, [Piece(torch.ones(60), 3, p.document) for p in both], 10, seed=0)
    split = {}
    for piece, name in zip(data.pieces, data.split, strict=True):
        assert split.setdefault(piece.document, name) == name


def test_few_texts_are_cut_into_sections_and_many_are_not() -> None:
    book = torch.arange(10_000)
    found = sections([book, book], 256)
    assert sum(part.shape[0] for part in found.values()) == 10_000, "a text given twice counts once"
    assert len(found) >= 12
    assert max(part.shape[0] for part in found.values()) <= 1024
    texts = [torch.arange(i, i + 2000) for i in range(30)]
    assert [part.shape[0] for part in sections(texts, 256).values()] == [2000] * 30


def test_pieces_respect_the_budget() -> None:
    texts = {"a": torch.arange(1000), "b": torch.arange(5), "c": torch.arange(700)}
    found = text_pieces(texts, 900, 256)
    assert 900 <= sum(p.tokens.shape[0] for p in found) <= 902
    assert max(p.tokens.shape[0] for p in found) <= 256
    assert sum(p.tokens.shape[0] for p in text_pieces(texts, 10**6, 256)) == 1705
    assert text_pieces({}, 100, 256) == []
    assert [(name, start[0].item()) for name, start in openings(texts, 256)][:5] == [
        ("a", 0),
        ("b", 0),
        ("c", 0),
        ("a", 256),
        ("c", 256),
    ]


def test_few_texts_are_continued_until_the_share_is_met() -> None:
    """One long text: its pieces' openings are continued, and every split holds generated text."""
    model = tiny_models.shared("llama")
    book = torch.randint(3, tiny_models.VOCABULARY, (16000,))
    data = collect(
        model, [book], None, tokens=8000, own=0.5, new_tokens=24, batch=8, seed=0, width=48, context=1 << 20
    )  # fmt: skip
    mine = [p for p in data.pieces if p.start == 31]  # given text is judged from its sixteenth token
    assert sum(p.tokens.shape[0] for p in mine) >= 3500
    for name in (FIT, TUNE, TEST):
        assert any(p.start == 31 for p in data.of(name))


def test_no_piece_is_longer_than_the_context() -> None:
    data = collect(
        tiny_models.shared("gpt2"), [torch.randint(3, 90, (9000,))], None, tokens=3000, own=0.3, new_tokens=24, batch=8, seed=0,
        width=48, context=128,
    )  # fmt: skip
    assert max(p.tokens.shape[0] for p in data.pieces) == 128


@pytest.mark.parametrize(("pieces", "name"), [((4, 1, 300), "fit"), ((7, 1, 5000), "test"), ((8, 1, 102), "tune")])
def test_too_little_data_is_refused(pieces: tuple[int, int, int], name: str) -> None:
    """The split that lacks rows is named, whichever it is."""
    with pytest.raises(NotEnoughDataError, match=rf"wanted at least \d+ tokens to judge in the {name} split, got \d+ of"):
        deal(_pieces("own", *pieces), [], {"fit": 1000, "test": 10, "tune": 10}[name] if name != "tune" else 10, seed=0)


class Bos:
    """A tokenizer that opens with token 1 and closes with token 2 unless told not to."""

    bos_token, eos_token, eos_token_id = "<s>", "</s>", 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [10 + ord(letter) for letter in text.removeprefix("<s>")]
        opened = [1, *ids] if add_special_tokens or text.startswith("<s>") else ids
        return {"input_ids": [*opened, 2] if add_special_tokens else opened}


def test_strings_open_as_generation_opens_them() -> None:
    for text in ("ab", "<s>ab"):
        assert encode([text], Bos(), special=True)[0].tolist() == [1, 107, 108]
    assert encode(["ab"], Bos())[0].tolist() == [107, 108]
    with pytest.raises(ArgumentError, match=r"texts must be a sequence of strings .* got one str"):
        encode("the quick brown fox", Bos())


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


def test_candidate_spans() -> None:
    spans = candidate_spans(30)
    assert (3, 6) in spans
    assert (3, 8) in spans
    assert {leave for leave, resume in spans if resume == 30} == {27, 25, 22, 20}
    for layers in range(2, 70):
        assert candidate_spans(layers)
        assert all(1 <= leave < resume <= layers for leave, resume in candidate_spans(layers))
    assert candidate_spans(1) == []


# -- a whole fit --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted() -> tuple[Any, Exits]:
    model = tiny_models.tiny("llama")
    return model, _fit(model)


def _texts(count: int = 24, length: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator) for _ in range(count)]


def _fit(model: Any, **options: Any) -> Exits:
    settings = {"agreement": 0.8, "tokens": 2400, "own": 0.4, "new_tokens": 24, "batch": 8, "progress": False} | options
    return dyndepth.fit(model, _texts(), **settings)


def test_fit_meets_its_wish_on_the_tuning_split(fitted: tuple[Any, Exits]) -> None:
    model, exits = fitted
    assert len(exits) >= 1
    assert exits.record["tune"]["agreement"] >= 0.8
    assert exits.record["tune"]["rows_x_layers"] < 1
    assert exits.record["test"]["rows"] > 50
    assert all(band.kv is not None for band in exits)
    out = model.generate(
        **tiny_models.prompts(5),
        custom_generate=dyndepth.generate,
        exits=exits,
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert out.kv == "predict"


def test_recorded_numbers_are_reproducible(fitted: tuple[Any, Exits], tmp_path: Any) -> None:
    """The test split's agreement and work, measured again from the saved exits by other code."""
    model, exits = fitted
    exits.save_pretrained(tmp_path)
    loaded = Exits.from_pretrained(tmp_path)
    data = collect(model, _texts(), None, tokens=2400, own=0.4, new_tokens=24, batch=8, seed=0, width=48, context=1 << 20)
    tokens, start = data.part(TEST)
    full, found = (score(model, tokens, e, start=start, kv="predict" if e else None) for e in (None, loaded))
    agree = float((full.argmax() == found.argmax())[full.judged].float().mean())
    assert agree == pytest.approx(exits.record["test"]["agreement"], abs=1e-9)
    assert found.work.fraction == pytest.approx(exits.record["test"]["rows_x_layers"], abs=1e-9)


def test_fit_is_deterministic(fitted: tuple[Any, Exits]) -> None:
    again = _fit(tiny_models.tiny("llama"))
    assert [(b.leave, b.resume, b.threshold) for b in again] == [(b.leave, b.resume, b.threshold) for b in fitted[1]]
    for one, other in zip(again, fitted[1], strict=True):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "opt_post_norm", "gpt_neox"])
def test_fit_serves_other_families(family: str) -> None:
    """Rows really leave, and the recorded agreement is what a fresh measurement of the returned exits gives."""
    model = tiny_models.tiny(family)
    exits = _fit(model, candidates=[(2, 4), (4, 6)], agreement=0.5)
    assert exits.record["tune"]["agreement"] >= 0.5
    assert exits.record["tune"]["rows_x_layers"] < 1
    limit = bind(model).positions_limit or 1 << 20
    data = collect(model, _texts(), None, tokens=2400, own=0.4, new_tokens=24, batch=8, seed=0, width=48, context=limit)
    measured = Sample.of(model, *data.part(TUNE)).run(exits, "predict")
    assert measured.agreement == pytest.approx(exits.record["tune"]["agreement"], abs=1e-9)


def test_unreachable_agreement_closes_the_bands(capsys: pytest.CaptureFixture[str]) -> None:
    """A head of noise disagrees wherever a row leaves: no price but zero is perfect, and the user is told."""
    model = tiny_models.shared("llama")
    band = tiny_exits.band(model, 1, 6)
    sample = Sample.of(model, [torch.randint(3, tiny_models.VOCABULARY, (40,)) for _ in range(4)], [4, 0, 9, 30])
    exits = tiny_exits.exits_of(model, band)
    assert sample.run(exits.with_thresholds(-1.0), "predict").agreement < 0.2
    closed, measured = set_price([Candidate(band, {}, harm=0.0)], exits, sample, 1.0, 7, lambda: None)
    assert [b.threshold for b in closed] == [math.inf]
    assert (measured.agreement, measured.rows_x_layers) == (1.0, 1.0)
    closed.record = {"wanted_agreement": 1.0, "test": {"agreement": 1.0, "rows_x_layers": 1.0}}
    Progress(True).result(closed)
    assert "the exits are closed" in capsys.readouterr().err


def test_closed_bands_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A band without a reachable threshold costs nothing, unless something later waits for what it would have seen."""
    model = tiny_models.shared("llama")
    asked: list[int] = []
    monkeypatch.setattr(TopProbability, "score", lambda self, view: asked.append(view.leave) or torch.zeros(len(view.seq)))
    tokens = [torch.randint(3, 90, (6,))]
    plain = [Band(leave, 6, TopProbability(), threshold=math.inf) for leave in (2, 4)]
    score(model, tokens, tiny_exits.exits_of(model, *plain), kv="propagate")
    assert asked == []
    score(model, tokens, tiny_exits.exits_of(model, plain[0], Band(5, 6, Saturation(), threshold=0.9)), kv="propagate")
    assert asked == [2]


def test_exit_answers_are_the_runtime_s() -> None:
    """Labels of exits come from kept residuals; a pass in which everybody takes that exit gives the same tokens."""
    model = tiny_models.shared("llama")
    bound = bind(model)
    band = tiny_exits.band(model, 4, 6, threshold=-1.0, shortlist=torch.tensor([3, 50, 99, 120]))
    tokens = torch.randint(3, tiny_models.VOCABULARY, (30,))
    residual = next(trace(bound, [tokens], [4], [])).residual[4]
    scored = score(model, [tokens], tiny_exits.exits_of(model, band))
    assert torch.equal(exit_argmax(bound, band, residual), scored.argmax())
    logits = bound.logits(scored.ready)[:, [3, 50, 99, 120]]
    torch.testing.assert_close(exit_statistics(bound, band, residual).logsumexp, logits.logsumexp(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"agreement": 0.0}, ArgumentError, r"agreement must be in \(0, 1\], got 0.0"),
        ({"own": 1.5}, ArgumentError, r"own must be in \[0, 1\]"),
        ({"bands": 0}, ArgumentError, "must be at least 1"),
        ({"candidates": []}, ArgumentError, "no candidate bands"),
        ({"candidates": [(3, 9)]}, ArgumentError, r"spans 1 <= leave < resume <= 6, got \(3, 9\)"),
        ({"tokens": 100}, NotEnoughDataError, "wanted at least 256 tokens to judge in the fit split"),
    ],
)
def test_wrong_wishes(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _fit(tiny_models.shared("llama"), **options)


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(ArgumentError, match=r"texts\[0\] is a string, so a tokenizer is needed"):
        dyndepth.fit(tiny_models.shared("llama"), ["hello"], progress=False)
    with pytest.raises(ArgumentError, match=r"texts\[0\] must be a string or int64 \[t\]"):
        dyndepth.fit(tiny_models.shared("llama"), [torch.zeros(3, 3)], progress=False)
