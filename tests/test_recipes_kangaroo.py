"""Kangaroo: the full model's own tokens, and drafting that stops at the first unsure token, counted by transformers' states."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
from full_model import FullModel
from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits, TopProbability
from dyndepth.recipes import balcony, kangaroo

NEW = 20
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}


@functools.cache
def endless() -> Any:
    """Without an end token every sequence runs to its limit, so that cycles can be counted."""
    model = tiny_models.tiny("llama", eos_token_id=None)
    model.generation_config.eos_token_id = None
    return model


def by_hand(model: Any, prompt: Tensor, leave: int, threshold: float, most: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens, and (drafted, accepted) per cycle: every draft from transformers' own states of the text so far."""
    text, cycles = prompt.tolist(), []
    while (left := len(prompt) + NEW - len(text)) > 0:
        drafts: list[int] = []
        while len(drafts) < min(most, left - 1):
            logits = FullModel(model, torch.tensor(text + drafts)).exit_logits(leave)[-1]
            chance = torch.softmax(logits, -1).max()
            assert abs(chance - threshold) > 1e-5, "a near-tie would be arbitrary"
            if chance < threshold:
                break
            drafts.append(int(logits.argmax()))
        answers = FullModel(model, torch.tensor(text + drafts)).logits[len(text) - 1 :].argmax(-1).tolist()
        accepted = next((at for at, draft in enumerate(drafts) if draft != answers[at]), len(drafts))
        text += [*drafts[:accepted], answers[accepted]]
        cycles.append((len(drafts), accepted))
    return text, cycles


def test_the_papers_settings() -> None:
    assert (kangaroo.default_exit(32), kangaroo.default_exit(6)) == (2, 1)
    config = kangaroo.settings(32, tokens=7)
    assert (config.exits, config.head, config.loss, config.tokens) == ((2,), "block", "kl", 7)
    assert kangaroo.settings(32, 3).exits == (3,)
    (band,) = kangaroo.exits(tiny_models.shared("llama"))
    assert (band.leave, band.resume, band.threshold, type(band.criterion)) == (1, 6, 0.6, TopProbability)
    assert kangaroo.DRAFTS == 6


@pytest.mark.parametrize(("threshold", "most"), [(0.6, 6), (0.8, 3), (0.0, 4)])
def test_drafting_stops_exactly_at_the_first_unsure_token(threshold: float, most: int) -> None:
    """Drafts and accepted drafts per sequence and cycle, in one batch, against each sequence by hand."""
    model, inputs = endless(), tiny_models.prompts(4)
    out = kangaroo.generate(model, inputs, kangaroo.exits(model, 4), threshold=threshold, drafts=most, **OPTIONS)
    stopped_early = 0
    for row in range(4):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        text, cycles = by_hand(model, prompt, 4, threshold, most)
        assert out.sequences[row, -NEW:].tolist() == text[-NEW:]
        assert int(out.drafted[row]) == sum(drafted for drafted, _ in cycles)
        assert int(out.accepted[row]) == sum(accepted for _, accepted in cycles)
        # Accepted drafts come from the exit; after them the full model says one token.
        assert out.exit_layers[row].tolist() == [depth for _, good in cycles for depth in [4] * good + [6]]
        stopped_early += sum(drafted < most for drafted, _ in cycles[:-2])
    assert int(out.accepted.sum()) >= 4
    assert (stopped_early > 5) == (threshold > 0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3", "gpt_neox"])
def test_greedy_output_is_the_full_models(family: str) -> None:
    """Token for token, with end tokens at different steps, whatever the threshold."""
    model, inputs = tiny_models.shared(family), tiny_models.prompts(5)
    wanted = model.generate(**inputs, **OPTIONS).sequences
    for threshold, leave in ((0.0, 2), (0.5, 4)):
        out = kangaroo.generate(model, inputs, kangaroo.exits(model, leave), threshold=threshold, **OPTIONS)
        assert torch.equal(out.sequences, wanted)
        assert int(out.drafted.sum()) > 0


def test_nothing_is_drafted_above_one() -> None:
    model, inputs = endless(), tiny_models.prompts(3)
    out = kangaroo.generate(model, inputs, kangaroo.exits(model, 2), threshold=1.1, **OPTIONS)
    assert out.drafted.tolist() == out.accepted.tolist() == [0, 0, 0]
    assert out.work.layers == [3 * NEW] * 6


def adapter(model: Any, leave: int) -> Exits:
    """A block head as after training."""
    heads = balcony.start(model, (leave,))
    generator = torch.Generator().manual_seed(5)
    for parameter in heads.bands[0].head.parameters():  # type: ignore[union-attr]
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)
    return heads


def test_an_adapter_that_attends_drafts_without_loss() -> None:
    """Its own K,V of drafts that were refused are written over; text and counts are those of each sequence alone."""
    model, inputs = endless(), tiny_models.prompts(4)
    exits = kangaroo.exits(model, heads=adapter(model, 2), threshold=0.3)
    assert exits.bands[0].has_block
    out = kangaroo.generate(model, inputs, exits, **OPTIONS)
    assert torch.equal(out.sequences, model.generate(**inputs, **OPTIONS).sequences)
    alone = [
        kangaroo.generate(model, {name: value[row : row + 1] for name, value in inputs.items()}, exits, **OPTIONS)
        for row in range(4)
    ]
    assert torch.equal(out.drafted, torch.cat([one.drafted for one in alone]))
    assert torch.equal(out.accepted, torch.cat([one.accepted for one in alone]))
    assert 0 < int(out.accepted.sum()) < int(out.drafted.sum())


def test_training_makes_a_drafter(tmp_path: Path) -> None:
    model = tiny_models.shared("llama")
    words = torch.randint(3, tiny_models.VOCABULARY, (240, 24), generator=torch.Generator().manual_seed(0))
    config = kangaroo.settings(
        6, corpus=5000, tokens=400, batch=100, own=0.0, evaluate_every=2, checkpoint_every=10, evaluate_rows=50
    )
    exits = kangaroo.train(model, list(words), output=tmp_path, leave=2, config=config, progress=False)
    loaded = Exits.from_pretrained(tmp_path / "exits")
    assert [(band.leave, band.threshold, band.has_block or band.head_or_norm().kind) for band in exits] == [(2, 0.6, True)]
    assert (loaded.bands[0].leave, loaded.bands[0].threshold, loaded.bands[0].head_or_norm().kind) == (2, 0.6, "block")
    inputs = tiny_models.prompts(2)
    out = kangaroo.generate(model, inputs, loaded, threshold=0.0, **OPTIONS)
    assert torch.equal(out.sequences, model.generate(**inputs, **OPTIONS).sequences)


def test_what_kangaroo_refuses(tmp_path: Path) -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(2)
    two = tiny_exits.exits_of(model, tiny_exits.band(model, 2, 6), tiny_exits.band(model, 4, 6))
    with pytest.raises(ArgumentError, match=r"one exit drafts; name it with leave, one of \[2, 4\]"):
        kangaroo.exits(model, heads=two)
    assert kangaroo.exits(model, 4, heads=two).bands[0].head is two.bands[1].head
    with pytest.raises(ArgumentError, match=r"must be one under top_probability .* got router at 2, router at 4"):
        kangaroo.generate(model, inputs, two, max_new_tokens=2)
    with pytest.raises(ArgumentError, match="drafts must be at least 1, got 0"):
        kangaroo.generate(model, inputs, kangaroo.exits(model), drafts=0, max_new_tokens=2)
    with pytest.raises(ArgumentError, match=r"config\.exits must be one boundary"):
        kangaroo.train(model, output=tmp_path, config=balcony.settings(6))
