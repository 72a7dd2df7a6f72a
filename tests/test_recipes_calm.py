"""CALM: three measures, a threshold that falls with the position, propagation from the actual exit, calibration; and slips of
published code that must stay away."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
from torch import Tensor

import dyndepth
from dyndepth.calibration import Reliability, brier
from dyndepth.closed_form.router import fit_router
from dyndepth.data import FIT, TEST, TUNE, Corpus, Piece
from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.exits import Band, Decay, Exits, Margin, Router, RouterScore, Saturation
from dyndepth.recipes import balcony, calm
from dyndepth.runtime.bind import bind
from dyndepth.runtime.score import score
from dyndepth.runtime.session import Session


def texts(count: int, length: int = 24, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator) for _ in range(count)]


def corpus(count: int = 20, length: int = 21) -> Corpus:
    """Few enough rows for one chunk of a pass; every fourth piece tests."""
    pieces = [Piece(text, 5, str(i)) for i, text in enumerate(texts(count, length))]
    return Corpus(pieces, [(FIT, FIT, TUNE, TEST)[i % 4] for i in range(count)])


@pytest.mark.parametrize("measure", calm.MEASURES)
def test_exits_start_strict(measure: str) -> None:
    """Every boundary judges, and before calibration nobody leaves, however late the step."""
    model = tiny_models.shared("llama")
    exits = calm.exits(model, texts(200), measure=measure)
    assert [band.leave for band in exits] == [1, 2, 3, 4, 5]
    kinds = {"softmax": Margin, "state": Saturation, "meta": RouterScore}
    assert all(isinstance(band.criterion, kinds[measure]) for band in exits)
    assert all(math.isfinite(band.threshold) for band in exits), "strict, but a path can start there"
    scored = score(model, texts(6, seed=1), exits)
    assert scored.work.fraction == 1.0
    late = torch.tensor([0, 10**6], dtype=torch.int32)
    wanted = calm.grid(exits)[0][0] * 0.9 if measure == "state" else 1.0
    assert exits.bands[0].thresholds(late)[1].item() == pytest.approx(wanted, abs=1e-6)


def test_many_layers_have_as_many_boundaries_as_exits_can() -> None:
    model = tiny_models.tiny("llama", num_hidden_layers=70)
    assert [band.leave for band in calm.exits(model)] == list(range(1, 70, 2))


def test_propagation_is_of_the_actual_exit() -> None:
    """t5x gives the layers above every exit K,V of the *first* exit's residual; here it is the exit the row took.

    One token per sequence: no past, and no rotation at position 0, so K is W_k norm(h_exit) of transformers' own states.
    """
    model = tiny_models.shared("llama")
    tokens = torch.arange(3, 83)
    states = model(tokens[:, None], output_hidden_states=True).hidden_states
    exits = calm.exits(model, leave=(2, 4), decay=None).with_thresholds([0.6, 0.3])
    session = Session(bind(model), [1] * 80, exits)
    assert session.kv_policy == "propagate"
    result = session.run(list(range(80)), [0] * 80, tokens=tokens)
    left = result.exit_layer
    assert {int((left == at).sum()) > 5 for at in (2, 4, 6)} == {True}
    slots = session.pages.slots(list(range(80)), [0] * 80).long()
    for number, layer in enumerate(model.model.layers):
        keys, values = session.pages.kv[number].flatten(1, 2)[:, slots]
        for at in (2, 4, 6):
            rows = left == at
            x = layer.input_layernorm(states[min(at, number)][rows, 0])
            torch.testing.assert_close(keys[rows].flatten(1), layer.self_attn.k_proj(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(values[rows].flatten(1), layer.self_attn.v_proj(x), rtol=1e-4, atol=1e-4)
    first = model.model.layers[5].input_layernorm(states[2][left == 4, 0])
    keys = session.pages.kv[5].flatten(1, 2)[0, slots][left == 4].flatten(1)
    assert float((keys - model.model.layers[5].self_attn.k_proj(first)).abs().max()) > 0.1, "the slip would show"


@pytest.mark.parametrize("measure", calm.MEASURES)
def test_the_decay_gets_the_position(measure: str) -> None:
    """In published code the position is never passed. A score that is always 0.5 must leave from the step on that allows it."""
    model = tiny_models.shared("llama")
    exits = calm.exits(model, texts(200), measure=measure, leave=(3, 4), decay=Decay(tau=1.0, length=4)).with_thresholds(0.5)
    steps = torch.arange(12, dtype=torch.int32)
    for band in exits:
        # 0.45 + 0.1 exp(-t / 4) <= 0.5 from t = 4 ln 2 = 2.77 on.
        assert band.thresholds(steps).tolist() == pytest.approx([0.45 + 0.1 * math.exp(-t / 4) for t in range(12)])
        band.router = Router(48)
        band.criterion = RouterScore(band.router)
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    out = model.generate(
        **tiny_models.prompts(3), custom_generate=dyndepth.generate, exits=exits, return_dict_in_generate=True, **options
    )
    assert out.exit_layers.tolist() == [[6] * 3 + [3] * 9] * 3


def test_a_threshold_that_decays_ends_at_its_level() -> None:
    model = tiny_models.shared("llama")
    exits = calm.exits(model, decay=Decay(tau=4.0, length=32))
    ends = torch.tensor([10**6], dtype=torch.int32)
    found = [exits.with_thresholds(vector).bands[0].thresholds(ends).item() for vector in calm.grid(exits)]
    assert found == pytest.approx(list(calm._GRID), abs=1e-6)
    plain = calm.exits(model, decay=None)
    assert calm.grid(plain) == [[level] * 5 for level in calm._GRID]
    constant = Decay(tau=0.0, length=1)
    shifted = calm.exits(model, decay=constant).with_thresholds(calm.grid(calm.exits(model, decay=constant))[3])
    assert shifted.bands[0].thresholds(ends).item() == pytest.approx(calm._GRID[3])


def test_labels_are_what_the_exits_would_say() -> None:
    """Agreement of transformers' own states, read through final norm and head, with its own answers."""
    model, data = tiny_models.shared("llama"), corpus()
    bound = bind(model)
    pairs = calm._pairs(bound, list(calm.exits(model, leave=(2, 4, 5))), data, "independent", 0)
    at = 0
    for leave in (2, 4, 5):
        for piece, split in zip(data.pieces, data.split, strict=True):
            out = model(piece.tokens[None], output_hidden_states=True)
            residual = out.hidden_states[leave][0, 5:]
            agrees = model.lm_head(model.model.norm(residual)).argmax(-1) == out.logits[0, 5:].argmax(-1)
            rows = slice(at, at + 16)
            torch.testing.assert_close(pairs.residual[rows], residual, rtol=1e-4, atol=1e-4)
            assert torch.equal(pairs.agrees[rows], agrees)
            assert pairs.boundary[rows].tolist() == [leave] * 16
            assert pairs.split[rows] == [split] * 16
            at += 16
    assert at == len(pairs.agrees)
    assert 0.05 < float(pairs.agrees.float().mean()) < 0.95


def test_geometric_labels_carry_the_geometric_likelihood() -> None:
    """- log s_i - sum_{j < i} log(1 - s_j) at the first agreeing i, against cross-entropy of the pairs that are kept."""
    model, data, points = tiny_models.shared("llama"), corpus(), (1, 2, 3, 4, 5)
    bands, bound = list(calm.exits(model, leave=points)), bind(model)
    whole = calm._pairs(bound, bands, data, "independent", 0)
    kept = calm._pairs(bound, bands, data, "geometric", 0)
    agrees = whole.agrees.view(5, -1)
    score_of = torch.randn(48, generator=torch.Generator().manual_seed(3))
    chances = torch.sigmoid(whole.residual @ score_of * 0.1).double().view(5, -1)
    total = 0.0
    for row in range(agrees.shape[1]):
        for boundary in range(5):
            total -= float((chances if agrees[boundary, row] else 1 - chances)[boundary, row].log())
            if agrees[boundary, row]:
                break
    mine = torch.nn.functional.binary_cross_entropy_with_logits(
        kept.residual @ score_of * 0.1, kept.agrees.float(), reduction="sum"
    )
    assert float(mine) == pytest.approx(total, rel=1e-5)
    assert len(kept.agrees) < len(whole.agrees)


def test_balanced_labels_are_the_rare_class_repeated() -> None:
    """Three disagreeing rows for one that agrees: the router is that of rows where each agreeing one stands three times."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1200, 6, generator=generator)
    score_of = h @ torch.tensor([2.0, -1.0, 0.5, 0, 0, 0]) + torch.randn(1200, generator=generator)
    agrees = torch.zeros(1200, dtype=torch.bool)
    for part in (slice(0, 600), slice(600, 1200)):
        agrees[part] = score_of[part] >= score_of[part].kthvalue(451).values
    held_out = torch.arange(1200) >= 600
    balanced, found = fit_router(h, agrees, held_out, balanced=True)
    times = torch.where(agrees, 3, 1)
    repeated, wanted = fit_router(*(value.repeat_interleave(times, dim=0) for value in (h, agrees, held_out)))
    torch.testing.assert_close(balanced.weight1, repeated.weight1, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(balanced.bias2, repeated.bias2, rtol=1e-3, atol=1e-4)
    assert found["log_loss"] == pytest.approx(wanted["log_loss"], rel=1e-3)
    assert found["log_loss_of_constant"] == pytest.approx(math.log(2), rel=1e-6)
    plain, _ = fit_router(h, agrees, held_out)
    assert float(plain(h).mean()) == pytest.approx(0.25, abs=0.03)
    assert float(balanced(h).mean()) > 0.35


@pytest.mark.parametrize("shared", [True, False])
def test_the_classifier_learns_and_says_how_well(shared: bool) -> None:
    model = tiny_models.shared("llama")
    data = texts(1600)
    exits = calm.exits(model, data, measure="meta", leave=(3, 5), shared=shared, tokens=40_000)
    about = exits.record["calm"]
    assert set(about["meta"]) == ({"all"} if shared else {"3", "5"})
    for reached in about["meta"].values():
        # Random weights: which boundary a residual is of tells most of what there is to tell, and a shared classifier sees it.
        assert reached["auc"] > (0.6 if shared else 0.52)
        assert reached["log_loss"] < reached["log_loss_of_constant"]
    routers = [band.router for band in exits]
    assert (routers[0] is routers[1]) == shared
    # The scores of the record, by hand on the same rows.
    collected, _ = calm._corpus(bind(model), data, None, 40_000, 0)
    pairs = calm._pairs(bind(model), list(exits), collected, "independent", 0)
    test = torch.tensor([name == TEST for name in pairs.split]) & ((pairs.boundary == 5) | shared)
    assert routers[1] is not None
    scores, agrees = routers[1](pairs.residual[test]).numpy(), pairs.agrees[test].numpy()
    reached = about["meta"]["all" if shared else "5"]
    assert reached["brier"] == pytest.approx(brier(scores, agrees), rel=1e-6)
    assert reached["calibration_error"] == pytest.approx(Reliability.of(scores, agrees).calibration_error, rel=1e-6)
    assert (reached["agreement"], reached["rows"]) == (pytest.approx(agrees.mean()), len(agrees))


@pytest.mark.parametrize("measure", calm.MEASURES)
def test_rows_leave_at_the_first_boundary_that_is_sure(measure: str) -> None:
    """Each measure by hand on transformers' own states of sequences of one token."""
    model, tokens = tiny_models.shared("llama"), torch.arange(3, 123)
    threshold = {"softmax": 0.3, "state": 0.8, "meta": 0.5}[measure]
    exits = calm.exits(model, texts(200), measure=measure, decay=None).with_thresholds(threshold)
    states = [state[:, 0] for state in model(tokens[:, None], output_hidden_states=True).hidden_states]
    wanted = torch.full((120,), 6)
    for band in reversed(exits.bands):
        h = states[band.leave]
        if measure == "softmax":
            best = torch.softmax(model.lm_head(model.model.norm(h)), -1).topk(2).values
            found = best[:, 0] - best[:, 1]
        elif measure == "meta":
            assert band.router is not None
            x = h / h.pow(2).mean(-1, keepdim=True).sqrt()
            found = torch.sigmoid(x @ band.router.weight1[0] + band.router.bias2)
        elif band.leave == 1:
            continue
        else:
            found = torch.cosine_similarity(h, states[band.leave - 1], dim=-1)
        assert float((found - threshold).abs().min()) > 1e-5, "a near-tie would make the test arbitrary"
        wanted[found >= threshold] = band.leave
    scored = score(model, list(tokens[:, None]), exits)
    assert scored.exit_layer.tolist() == wanted.tolist()
    assert len(wanted.unique()) >= 3


def test_levels_of_the_state_measure_are_read_off_the_texts() -> None:
    """The highest cosine between neighbours that transformers' own states show, then quantiles from the top down."""
    model, data = tiny_models.shared("llama"), corpus()
    exits = calm.exits(model, data, measure="state", leave=(2, 3, 5), decay=None)
    seen = []
    for piece in data.pieces:
        states = model(piece.tokens[None], output_hidden_states=True).hidden_states
        seen += [torch.cosine_similarity(states[b][0, 5:], states[a][0, 5:], dim=-1) for a, b in ((2, 3), (3, 5))]
    cosines = torch.cat(seen).sort(descending=True).values
    levels = exits.record["calm"]["levels"]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] == pytest.approx(float(cosines[0]), abs=1e-5)
    assert levels[-1] == pytest.approx(float(cosines[len(cosines) // 2]), abs=1e-5)
    assert calm.grid(exits)[4] == [levels[4]] * 3
    ran = score(model, [p.tokens for p in data.pieces], exits.with_thresholds(calm.grid(exits)[-1]))
    assert 0 < int((ran.exit_layer < 6).sum()) < len(ran.exit_layer)
    assert not bool((ran.exit_layer == 2).any()), "the first boundary has nothing to compare with"


@pytest.mark.parametrize("loss", ["inconsistency", "disagreement"])
@pytest.mark.parametrize("measure", calm.MEASURES)
def test_calibration_opens_the_exits(measure: str, loss: str) -> None:
    model = tiny_models.shared("llama")
    exits = calm.exits(model, texts(200), measure=measure, decay=Decay(tau=4.0, length=6))
    prompts = texts(25, 9, seed=4)
    found = calm.calibrate(model, exits, prompts, loss=loss, risk=0.6, confidence=0.9, new_tokens=6, batch=25, progress=False)
    certificate = found.certificate
    assert certificate is not None
    assert certificate["certified"]
    assert (certificate["kv"], certificate["loss"]) == ("propagate", loss)
    assert [band.threshold for band in found] in calm.grid(exits)
    assert certificate["rows_x_layers"] < 1
    assert certificate["measured_risk"] <= 0.6


def test_calibration_never_sees_what_was_learned_from() -> None:
    model, data = tiny_models.shared("llama"), texts(200)
    exits = calm.exits(model, data, measure="state")
    with pytest.raises(ArgumentError, match="were seen by fit"):
        calm.calibrate(model, exits, [*texts(40, 9, seed=4), data[3]], risk=0.5, new_tokens=4, progress=False)


def test_trained_heads_and_files(tmp_path: Path) -> None:
    """Heads of other exits at their boundaries, the final norm elsewhere; what is saved calibrates as what was made."""
    model = tiny_models.shared("llama")
    heads = tiny_exits.exits_of(model, tiny_exits.band(model, 1, 3), tiny_exits.band(model, 4, 6, head="mlp"))
    exits = calm.exits(model, texts(200), measure="meta", heads=heads)
    assert [(band.leave, band.head_or_norm().kind) for band in exits] == [(4, "mlp")]
    exits = calm.exits(model, texts(200), measure="meta", heads=heads, leave=(2, 4))
    assert [(band.leave, band.head_or_norm().kind) for band in exits] == [(2, "norm"), (4, "mlp")]
    exits.save_pretrained(tmp_path)
    loaded = Exits.from_pretrained(tmp_path)
    assert calm.grid(loaded) == calm.grid(exits)
    assert loaded.bands[0].decay == calm.DECAY
    sequences = texts(5, seed=3)
    one, other = (score(model, sequences, e.with_thresholds(0.5)) for e in (exits, loaded))
    assert torch.equal(one.exit_layer, other.exit_layer)
    assert len(one.exit_layer.unique()) > 1


def test_what_calm_refuses() -> None:
    model = tiny_models.shared("llama")
    with pytest.raises(ArgumentError, match="measure must be one of softmax, state, meta, got 'entropy'"):
        calm.exits(model, measure="entropy")
    with pytest.raises(ArgumentError, match="target must be one of"):
        calm.exits(model, measure="meta", target="hard")
    with pytest.raises(ArgumentError, match=r"leave must be boundaries in \[1, 6\), got \[6\]"):
        calm.exits(model, leave=[6])
    with pytest.raises(ArgumentError, match="meta wants norm, translator or mlp heads"):
        calm.exits(model, corpus(), measure="meta", heads=balcony.start(model))
    with pytest.raises(ArgumentError, match="at least two in leave, got one"):
        calm.exits(model, corpus(), measure="state", leave=[3])
    with pytest.raises(NotEnoughDataError):
        calm.exits(model, measure="meta")
    with pytest.raises(ArgumentError, match="made with texts where the measure is state"):
        calm.grid(calm.exits(model, measure="state"))
    with pytest.raises(ArgumentError, match=r"wanted exits of calm\.exits"):
        calm.grid(tiny_exits.exits_of(model, Band(3, 6, Margin())))
