"""FREE: a shallow exit on exact K,V, labels that deep passes give away, a Beta mixture that learns from them, rollback."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import tiny_exits
import tiny_models
import torch
from full_model import FullModel, text_of
from scipy.stats import beta
from torch import Tensor

from dyndepth.calibration import BetaMixture
from dyndepth.errors import ArgumentError
from dyndepth.exits import Margin
from dyndepth.recipes import free
from dyndepth.runtime.observe import Observed

NEW = 18
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}


@functools.cache
def endless() -> Any:
    model = tiny_models.tiny("llama", eos_token_id=None)
    model.generation_config.eos_token_id = None
    return model


def margin(full: FullModel, leave: int, at: int) -> float:
    best = torch.softmax(full.exit_logits(leave)[at], -1).topk(2).values
    return float(best[0] - best[1])


def observed(scores: list[float], agrees: list[bool]) -> Observed:
    full = torch.ones(len(scores), dtype=torch.int64)
    return Observed((4,), torch.tensor(scores)[:, None], torch.tensor(agrees).long()[:, None], full, full, full)


def test_the_papers_exit() -> None:
    assert (free.default_exit(24), free.default_exit(2)) == (6, 1)
    model = tiny_models.shared("llama")
    (band,) = free.exits(model)
    assert (band.leave, band.resume, band.threshold, type(band.criterion)) == (2, 6, 0.9, Margin)
    heads = tiny_exits.exits_of(model, tiny_exits.band(model, 1, 3), tiny_exits.band(model, 4, 6, head="mlp"))
    assert free.exits(model, heads=heads).bands[0].head is heads.bands[1].head


@pytest.mark.parametrize("pending", [2, 16])
def test_decisions_and_tokens_are_those_of_the_full_models_residuals(pending: int) -> None:
    model, inputs = endless(), tiny_models.prompts(5)
    out = free.generate(model, inputs, free.exits(model, 3, threshold=0.5), pending=pending, **OPTIONS)
    for row in range(5):
        text, first = text_of(out, inputs, row)
        full, stacked = FullModel(model, text), 0
        for step, depth in enumerate(out.exit_layers[row].tolist()):
            found = margin(full, 3, first + step)
            assert abs(found - 0.5) > 1e-5
            assert depth == (3 if found >= 0.5 and stacked < pending else 6)
            stacked = stacked + 1 if depth == 3 else 0
            assert text[first + step + 1] == full.said(depth)[first + step]
    assert {3, 6} == set(out.exit_layers.flatten().tolist())


def test_labels_are_the_full_models_and_the_threshold_follows() -> None:
    """Two calls: each learns from the margins and agreements that transformers' states have for every completed token, and the
    second runs at the threshold that the first made, all by hand with scipy."""
    model, exits, adaptive = endless(), free.exits(endless(), 3), free.Adaptive()
    scores: list[float] = []
    agrees: list[bool] = []
    densities = [(1.0, 2.0), (2.0, 1.0)]
    threshold = 0.9
    for seed in (3, 4):
        inputs = tiny_models.prompts(6, seed=seed)
        out = free.generate(model, inputs, exits, adaptive, **OPTIONS)
        plain = free.generate(model, inputs, exits.with_thresholds(threshold), **OPTIONS)
        assert torch.equal(out.exit_layers, plain.exit_layers)
        for row in range(6):
            text, first = text_of(out, inputs, row)
            full = FullModel(model, text)
            depths = out.exit_layers[row].tolist()
            for step in range(len(depths)):
                at = first + step
                # A token that follows a full stack is judged as well; one that nobody completed has no label.
                if 6 in depths[step:]:
                    scores.append(min(max(margin(full, 3, at), 1e-4), 1 - 1e-4))
                    agrees.append(bool(full.exit_logits(3)[at].argmax() == full.logits[at].argmax()))
        x, y = np.array(scores), np.array(agrees, dtype=float)
        wrong, right = (beta.pdf(x, a, b) for a, b in densities)
        share = 0.8 * right / (wrong + right) + 0.2 * y
        for which, weights in enumerate((1 - share, share)):
            mean = np.average(x, weights=weights)
            common = mean * (1 - mean) / np.average((x - mean) ** 2, weights=weights) - 1
            densities[which] = (mean * common, (1 - mean) * common)
        for got, wanted in zip(adaptive.mixture.densities, densities, strict=True):
            assert got == pytest.approx(wanted, rel=1e-3)
        grid = np.linspace(0.3, 0.9, 10)
        wrong, right = (beta.pdf(grid, a, b) for a, b in densities)
        sure = right / (wrong + right) > 0.4
        threshold = float(grid[np.argmax(sure)]) if sure.any() else 0.9
        assert adaptive.threshold == pytest.approx(threshold)
    assert adaptive.updates == 2
    assert 5 < sum(agrees) < len(agrees) - 5


def test_the_soft_responsibility_is_not_overwritten_by_the_label() -> None:
    """The published slip. By hand: densities of 0.8 responsibility + 0.2 label differ from those of labels alone."""
    generator = np.random.default_rng(1)
    x = np.concatenate([generator.beta(6, 2, 80), generator.beta(3, 3, 80)]).clip(1e-4, 1 - 1e-4)
    y = np.repeat([1.0, 0.0], 80)
    fitted = {}
    for weight in (0.8, 0.0):
        adaptive = free.Adaptive(BetaMixture(weight=weight))
        adaptive.update([observed(x.tolist(), (y > 0).tolist())])
        wrong, right = beta.pdf(x, 1, 2), beta.pdf(x, 2, 1)
        share = weight * right / (wrong + right) + (1 - weight) * y
        mean = np.average(x, weights=share)
        variance = np.average((x - mean) ** 2, weights=share)
        a = mean * (mean * (1 - mean) / variance - 1)
        fitted[weight] = adaptive.mixture.densities[1]
        assert fitted[weight] == pytest.approx((a, a * (1 - mean) / mean), rel=1e-5)
    assert abs(fitted[0.8][0] - fitted[0.0][0]) > 0.5


def test_the_threshold_goes_where_the_labels_say() -> None:
    generator = np.random.default_rng(2)
    thresholds = []
    for center in (2.0, 12.0):
        adaptive = free.Adaptive(BetaMixture(ratio=0.5))
        right, wrong = generator.beta(center + 6, 4, 200), generator.beta(center, 12, 200)
        adaptive.update([observed([*right, *wrong], [True] * 200 + [False] * 200)])
        thresholds.append(adaptive.threshold)
    assert thresholds[0] < thresholds[1]


def test_learning_ends_and_then_costs_nothing(monkeypatch: Any) -> None:
    model, inputs = endless(), tiny_models.prompts(3)
    adaptive = free.Adaptive(most=1)
    free.generate(model, inputs, free.exits(model, 3), adaptive, **OPTIONS)
    learned = adaptive.threshold
    from dyndepth.runtime import generate

    monkeypatch.setattr(generate, "observed", None)  # calling it would raise
    out = free.generate(model, inputs, free.exits(model, 3), adaptive, **OPTIONS)
    assert (adaptive.updates, adaptive.threshold) == (1, learned)
    again = free.generate(model, inputs, free.exits(model, 3, threshold=learned), **OPTIONS)
    assert torch.equal(out.exit_layers, again.exit_layers)
    adaptive.update([])
    assert adaptive.updates == 1


def rolled(model: Any, prompt: Tensor, leave: int, threshold: float, most: int, rollback: float) -> tuple[list[int], int]:
    """Tokens, and how many drafts stayed that the full model would not have said."""
    text, tolerated = prompt.tolist(), 0
    while (left := len(prompt) + NEW - len(text)) > 0:
        drafts: list[int] = []
        while len(drafts) < min(most, left - 1):
            full = FullModel(model, torch.tensor(text + drafts))
            if margin(full, leave, -1) < threshold:
                break
            drafts.append(int(full.exit_logits(leave)[-1].argmax()))
        logits = FullModel(model, torch.tensor(text + drafts)).logits[len(text) - 1 :]
        surprise = [-float(torch.log_softmax(row, -1)[draft]) for row, draft in zip(logits, drafts, strict=False)]
        assert all(abs(s - rollback) > 1e-4 for s in surprise)
        answers = logits.argmax(-1).tolist()
        kept = next((j for j, s in enumerate(surprise) if s > rollback and drafts[j] != answers[j]), len(drafts))
        tolerated += sum(draft != answer for draft, answer in zip(drafts[:kept], answers, strict=False))
        text += [*drafts[:kept], answers[kept]]
    return text, tolerated


@pytest.mark.parametrize("rollback", [0.0, 2.0, 5.0])
def test_rollback_cuts_at_the_first_token_that_surprises(rollback: float) -> None:
    model, inputs = endless(), tiny_models.prompts(4)
    out = free.generate(model, inputs, free.exits(model, 4, threshold=0.3), pending=4, rollback=rollback, **OPTIONS)
    total = 0
    for row in range(4):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        text, tolerated = rolled(model, prompt, 4, 0.3, 4, rollback)
        assert out.sequences[row, -NEW:].tolist() == text[-NEW:]
        total += tolerated
    assert (total > 0) == (rollback > 0)
    if rollback == 0:
        assert torch.equal(out.sequences, model.generate(**inputs, **OPTIONS).sequences)
    assert int(out.accepted.sum()) < int(out.drafted.sum())


def test_rollback_of_nothing_is_plain_decoding_and_learns_too() -> None:
    model, inputs, exits = endless(), tiny_models.prompts(4), free.exits(endless(), 4, threshold=0.5)
    plain = free.generate(model, inputs, exits, pending=4, **OPTIONS)
    adaptive = free.Adaptive(BetaMixture(start=0.5))
    everything = free.generate(model, inputs, exits, adaptive, pending=4, rollback=math.inf, **OPTIONS)
    # But for the last token: a draft would need one more to verify it, so the full model says it.
    assert torch.equal(plain.sequences[:, :-1], everything.sequences[:, :-1])
    assert torch.equal(plain.exit_layers[:, :-1], everything.exit_layers[:, :-1])
    assert everything.exit_layers[:, -1].tolist() == [6] * 4
    assert adaptive.updates == 1


def test_what_free_refuses() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(2)
    two = tiny_exits.exits_of(model, tiny_exits.band(model, 2, 6), tiny_exits.band(model, 4, 6))
    with pytest.raises(ArgumentError, match=r"there is one exit; leave must be one of \[2, 4\], got None"):
        free.exits(model, heads=two)
    with pytest.raises(ArgumentError, match=r"leave must be in \[1, 6\), got 6"):
        free.exits(model, 6)
    with pytest.raises(ArgumentError, match=r"must be one under margin \(free.exits\), got router at 2, router at 4"):
        free.generate(model, inputs, two, max_new_tokens=2)
    for rollback in (-1.0, math.nan):
        with pytest.raises(ArgumentError, match="wants rollback in nats from 0 up"):
            free.generate(model, inputs, free.exits(model), rollback=rollback, max_new_tokens=2)
    with pytest.raises(ArgumentError, match="mode='rollback' is greedy"):
        free.generate(model, inputs, free.exits(model), rollback=1.0, do_sample=True, max_new_tokens=2)
