"""Apparate: early release on exact K,V, and thresholds that never break the budget on what they were tuned on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from full_model import FullModel, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.exits import TopProbability
from dyndepth.recipes import apparate
from dyndepth.recipes.apparate import Feedback
from dyndepth.runtime.bind import bind
from dyndepth.runtime.observe import Observed
from dyndepth.runtime.session import Session

OPTIONS: dict[str, Any] = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True}


def feedback(rows: int, ramps: int, seed: int, skill: float = 0.5) -> Feedback:
    """Scores that say something about agreement, the deeper the more often right."""
    generator = np.random.default_rng(seed)
    agrees = generator.random((rows, ramps)) < np.linspace(0.3, 0.9, ramps)
    scores = (generator.random((rows, ramps)) + skill * agrees) / (1 + skill)
    return Feedback(tuple(range(2, 2 + ramps)), ramps + 4, scores, agrees)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60), ramps=st.integers(1, 4), seed=st.integers(0, 10**6), budget=st.floats(0, 1), skill=st.floats(0, 2)
)
def test_the_budget_holds_on_the_tuning_set(rows: int, ramps: int, seed: int, budget: float, skill: float) -> None:
    data = feedback(rows, ramps, seed, skill)
    thresholds = apparate.climb(data, budget)
    assert data.accuracy(thresholds) >= budget
    assert data.saved(thresholds) >= 0
    for ramp, threshold in enumerate(thresholds):
        mine = data.released(thresholds) == ramp
        assert threshold == (data.scores[mine, ramp].min() if mine.any() else math.inf), "no lower than what it released"


def test_no_round_breaks_the_budget(monkeypatch: Any) -> None:
    """Along the climb: thresholds that were taken keep it, savings never fall, and it ends within a step of more."""
    data, taken = feedback(400, 3, 0, 1.0), []
    original = Feedback.accuracy

    def noted(self: Feedback, thresholds: Any) -> float:
        found = original(self, thresholds)
        taken.append((np.array(thresholds), found))
        return found

    monkeypatch.setattr(Feedback, "accuracy", noted)
    thresholds = apparate.climb(data, 0.95)
    monkeypatch.undo()
    assert any(found < 0.95 for _, found in taken), "steps that would break it were tried"
    assert data.accuracy(thresholds) >= 0.95
    for ramp in range(3):
        freer = np.array(thresholds)
        freer[ramp] = min(freer[ramp], 1.0) - 0.05
        assert data.accuracy(freer) < 0.95 or data.saved(freer) - data.saved(thresholds) < 0.02
    assert data.saved(thresholds) > 0.1


def test_the_climb_by_hand() -> None:
    """Two ramps of six layers. The first is right about two of its three surest rows, the second about all: with no loss
    allowed the first releases the one above its mistake, the second the rest."""
    scores = np.array([[0.95, 0.9], [0.85, 0.8], [0.75, 0.7], [0.2, 0.6], [0.1, 0.5], [0.05, 0.5]])
    agrees = np.array([[True, True], [False, True], [True, True], [True, True], [False, False], [False, False]])
    data = Feedback((2, 4), 6, scores, agrees)
    thresholds = apparate.climb(data, 1.0)
    assert thresholds == [0.95, 0.6]
    assert data.released(thresholds).tolist() == [0, 1, 1, 1, 2, 2]
    assert data.saved(thresholds) == pytest.approx((4 + 2 * 3) / 6 / 6)
    # One mistake in six may be made. The second ramp would make two at once; the first opens past its own.
    assert apparate.climb(data, 0.8) == [0.2, math.inf]
    assert data.accuracy([0.2, 0.6]) == pytest.approx(5 / 6)
    # A release saves 4 or 2 layers, a look at a row that passes costs one: the second ramp is not worth it.
    assert data.utilities([0.2, 0.6], 1.0) == pytest.approx([4 * 4 / 6 - 2 / 6, -2 / 6])


def test_tuning_on_a_model_keeps_the_budget() -> None:
    """On the full model's continuations, by transformers' own states of them."""
    model = tiny_models.shared("llama")
    batches = [tiny_models.prompts(8, seed=seed) for seed in range(4)]
    ramps = apparate.exits(model, (2, 4, 5))
    assert all(isinstance(band.criterion, TopProbability) and band.threshold == math.inf for band in ramps)
    saved = []
    for budget in (1.0, 0.9, 0.7):
        tuned = apparate.tune(model, ramps, batches, budget, **OPTIONS)
        right = layers = rows = 0
        for inputs in batches:
            out = model.generate(**inputs, **OPTIONS)
            for row in range(8):
                text = out.sequences[row][torch.cat([inputs["attention_mask"][row].bool(), torch.ones(14, dtype=torch.bool)])]
                full = FullModel(model, text)
                for at in range(len(text) - 15, len(text) - 1):
                    depth = 6
                    for band in reversed(tuned.bands):
                        # A threshold is a score that was seen; it comes out here up to rounding.
                        if float(torch.softmax(full.exit_logits(band.leave)[at], -1).max()) >= band.threshold - 1e-5:
                            depth = band.leave
                    right += bool(full.exit_logits(depth)[at].argmax() == full.logits[at].argmax())
                    layers += depth
                    rows += 1
        reached = tuned.record["apparate"]
        assert reached["rows"] == rows == 4 * 8 * 14
        assert reached["accuracy"] >= budget
        assert right / rows == pytest.approx(reached["accuracy"], abs=0.003)
        assert 1 - layers / rows / 6 == pytest.approx(reached["saved"], abs=0.003)
        saved.append(reached["saved"])
    assert saved[0] < saved[1] < saved[2]


def test_released_tokens_are_the_ramps_and_pages_the_full_models() -> None:
    """Every layer runs for every row; what a ramp says of the full model's residual is out early."""
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(5)
    exits = apparate.exits(model, (2, 4)).with_thresholds(0.7)
    out = apparate.generate(model, inputs, exits, **OPTIONS)
    assert {2, 4, 6} == set(out.exit_layers.flatten().tolist())
    assert out.work.fraction == 1.0
    assert set(out.layers_run.flatten().tolist()) == {6}
    for row in range(5):
        text, first = text_of(out, inputs, row)
        full = FullModel(model, text)
        for step, depth in enumerate(out.exit_layers[row].tolist()):
            assert text[first + step + 1] == full.said(depth)[first + step]
    text, _ = text_of(out, inputs, 0)
    session = Session(bind(model), [len(text)], exits, kv="release")
    for at in range(len(text)):
        session.run([0], [at], tokens=text[at : at + 1])
        FullModel(model, text).check_pages(session, 0, [6] * (at + 1))


def test_feedback_in_use_is_what_tuning_sees() -> None:
    """Released rows are judged by the ramps above as well, so thresholds can be tuned anew while they are used."""
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(5)
    seen: list[Observed] = []
    exits = apparate.exits(model, (2, 4)).with_thresholds(0.7)
    out = apparate.generate(model, inputs, exits, observe=seen.append, **OPTIONS)
    data = Feedback.of(seen, 6)
    assert len(data) == 5 * 14
    released = data.released([0.7, 0.7])
    told: dict[tuple[int, int], int] = {}
    at = 0
    for each in seen:
        for q, t in zip(each.seq.tolist(), each.step.tolist(), strict=True):
            told[q, t] = int(released[at])
            at += 1
    assert [[(2, 4, 6)[told[q, t]] for t in range(14)] for q in range(5)] == out.exit_layers.tolist()
    assert data.accuracy(apparate.climb(data, 0.9)) >= 0.9


def test_what_apparate_refuses() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(2)
    with pytest.raises(NotEnoughDataError, match="rows that every ramp has judged"):
        apparate.tune(model, apparate.exits(model), [], max_new_tokens=2)
    with pytest.raises(ArgumentError, match=r"accuracy in \[0, 1\] and 0 < smallest <= step, got 1.5"):
        apparate.climb(feedback(3, 1, 0), 1.5)
    with pytest.raises(NotEnoughDataError, match="at least one row"):
        apparate.climb(feedback(0, 1, 0))
    with pytest.raises(TypeError, match="kv"):
        apparate.generate(model, inputs, apparate.exits(model), kv="predict")
