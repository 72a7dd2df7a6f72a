"""EE-LLM: tokens leave at the first exit that is sure, on the full model's own residuals and K,V; a bound on parked tokens."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
from full_model import FullModel, text_of
from torch import Tensor

from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.exits import TopProbability
from dyndepth.recipes import ee_llm, ee_tuning
from dyndepth.runtime.bind import bind
from dyndepth.runtime.session import Session

OPTIONS: dict[str, Any] = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True}
THRESHOLD = 0.8


def sure(full: FullModel, leave: int, at: int) -> float:
    return float(torch.softmax(full.exit_logits(leave)[at], -1).max())


def test_the_papers_exits() -> None:
    assert ee_llm.default_exits(32) == (8, 16)
    assert ee_llm.default_exits(24) == (6, 12)
    assert ee_llm.default_exits(2) == (1,)
    model = tiny_models.shared("llama")
    exits = ee_llm.exits(model)
    assert [(band.leave, band.threshold) for band in exits] == [(2, 1.0), (3, 1.0)]
    assert all(isinstance(band.criterion, TopProbability) for band in exits)
    heads = tiny_exits.exits_of(model, tiny_exits.band(model, 1, 3), tiny_exits.band(model, 4, 6, head="mlp"))
    assert [(band.leave, band.head_or_norm().kind) for band in ee_llm.exits(model, heads=heads)] == [(4, "mlp")]
    assert exits.record["recipe"].startswith("EE-LLM")


def test_nobody_leaves_above_one_and_the_text_is_transformers_own() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(5)
    out = ee_llm.generate(model, inputs, ee_llm.exits(model), threshold=1.1, **OPTIONS)
    assert torch.equal(out.sequences, model.generate(**inputs, **OPTIONS).sequences)
    assert set(out.exit_layers.flatten().tolist()) == {6}
    assert out.work.fraction == 1.0


@pytest.mark.parametrize("pending", [2, 16])
def test_decisions_are_those_of_the_full_models_residuals(pending: int) -> None:
    """Each token leaves at the first exit that is sure of it by transformers' own states of the same text, says what that
    exit says, and runs to the top where too many are parked."""
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(6)
    exits = ee_llm.exits(model, (2, 4))
    out = ee_llm.generate(model, inputs, exits, threshold=THRESHOLD, pending=pending, output_logits=True, **OPTIONS)
    forced = 0
    for row in range(6):
        text, first = text_of(out, inputs, row)
        full = FullModel(model, text)
        waiting = 0
        for step, depth in enumerate(out.exit_layers[row].tolist()):
            chances = {leave: sure(full, leave, first + step) for leave in (2, 4)}
            assert all(abs(chance - THRESHOLD) > 1e-4 for chance in chances.values()), "a near-tie would be arbitrary"
            willing = next((leave for leave in (2, 4) if chances[leave] >= THRESHOLD), 6)
            wanted = 6 if waiting == pending else willing
            forced += wanted != willing
            assert depth == wanted
            waiting = 0 if depth == 6 else waiting + 1
            torch.testing.assert_close(out.logits[step][row], full.exit_logits(depth)[first + step], rtol=1e-3, atol=1e-3)
            assert text[first + step + 1] == full.said(depth)[first + step]
    assert {2, 4, 6} == set(out.exit_layers.flatten().tolist())
    assert (forced > 0) == (pending == 2)


def test_pages_hold_the_full_models_keys_and_values() -> None:
    """After every pass, in every layer that a token has run, whatever left before it."""
    model = tiny_models.shared("llama")
    text = torch.randint(3, tiny_models.VOCABULARY, (24,), generator=torch.Generator().manual_seed(6))
    full = FullModel(model, text)
    session = Session(bind(model), [24], ee_llm.exits(model, (2, 4), threshold=THRESHOLD), kv="recompute")
    parked, ran, depths = None, [0] * 24, []
    for at in range(24):
        result = session.run([0], [at], tokens=text[at : at + 1], step=[at], parked=parked)
        for position, layers in zip(
            [at, *([] if parked is None else parked.pos.tolist())], result.layers_run.tolist(), strict=True
        ):
            ran[position] += layers
        parked = session.left(result, [0], [at], [at], parked)
        depths.append(int(result.exit_layer[0]))
        assert ran[at] == depths[-1] <= min(ran[: at + 1])
        full.check_pages(session, 0, ran[: at + 1])
    assert {2, 4, 6} == set(depths)


def test_every_row_decides_for_itself() -> None:
    """Published code lets the last row of a batch decide for all: here a batch is its rows alone, text and depths."""
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(6)
    exits = ee_llm.exits(model, (2, 4), threshold=THRESHOLD)
    together = ee_llm.generate(model, inputs, exits, **OPTIONS)
    alone = [
        ee_llm.generate(model, {name: value[row : row + 1] for name, value in inputs.items()}, exits, **OPTIONS)
        for row in range(6)
    ]
    assert torch.equal(together.sequences, torch.cat([out.sequences for out in alone]))
    assert torch.equal(together.exit_layers, torch.cat([out.exit_layers for out in alone]))
    last = together.exit_layers[-1]
    assert bool((together.exit_layers[:-1] < last).any()), "rows leave where the last one stays"
    assert bool((together.exit_layers[:-1] > last).any()), "rows stay where the last one leaves"


def test_trained_heads_and_thresholds_by_exit() -> None:
    """A subset of exits, by thresholds; heads of other makers; input ids without a mask."""
    model = tiny_models.shared("llama")
    heads = tiny_exits.exits_of(model, tiny_exits.band(model, 2, 6), tiny_exits.band(model, 4, 6, head="mlp"))
    exits = ee_llm.exits(model, heads=heads)
    ids: Tensor = tiny_models.prompts(3)["input_ids"].clamp_min(3)
    for thresholds, seen in (([1.1, 0.0], {4}), ([0.0, 1.1], {2})):
        out = ee_llm.generate(model, ids, exits, threshold=thresholds, pending=99, **OPTIONS)
        assert set(out.exit_layers.flatten().tolist()) == seen
    assert out.kv == "recompute"
    assert [band.threshold for band in exits] == [1.0, 1.0], "the exits themselves stay as they are"


def test_what_ee_llm_refuses() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(2)
    routed = tiny_exits.exits_of(model, tiny_exits.band(model, 2, 6))
    with pytest.raises(ArgumentError, match="must be judged by top_probability, got router at boundary 2"):
        ee_llm.generate(model, inputs, routed, max_new_tokens=2)
    with pytest.raises(ArgumentError, match=r"leave must be boundaries of the heads \[2\], got \[3\]"):
        ee_llm.exits(model, (3,), heads=routed)
    with pytest.raises(ExitsError, match="wanted 1 numbers"):
        ee_llm.generate(model, inputs, ee_tuning.exits(model, (2,)), threshold=[0.5, 0.5])
    with pytest.raises(ArgumentError, match="pending must be at least 1, got 0"):
        ee_llm.generate(model, inputs, ee_llm.exits(model), pending=0)
    with pytest.raises(TypeError, match="kv"):
        ee_llm.generate(model, inputs, ee_llm.exits(model), kv="propagate")
