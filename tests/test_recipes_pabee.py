"""PABEE: exits and answers of the paper's loop on one sample, for classes and for numbers; counts that survive compaction."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from torch import Tensor

import dyndepth
from dyndepth.encoders import LinearHead, SampleExits
from dyndepth.errors import ArgumentError
from dyndepth.recipes import pabee
from dyndepth.training.encoder_trainer import EncoderConfig


@functools.cache
def trained(regression: bool = False) -> tuple[Any, SampleExits]:
    model, (inputs, labels) = tiny_text.bert(), tiny_text.task(300)
    torch.manual_seed(0)
    classes, tolerance = (1, 0.25) if regression else (tiny_text.CLASSES, None)
    exits = pabee.exits(model, classes, patience=2, tolerance=tolerance)
    wanted = labels.float() if regression else labels
    config = EncoderConfig(updates=25, lr=5e-3, base_lr=1e-3)
    return model, pabee.train(model, exits, inputs, wanted, config=config)


def the_papers_loop(
    model: Any, exits: SampleExits, text: dict[str, Tensor], patience: int, tau: float | None
) -> tuple[int, Tensor]:
    """(layers run, logits): a counter, the last answer, layer after layer; published for one sample."""
    count, last = 0, None
    states = tiny_text.states(model, text)
    heads = [*(point.head for point in exits), exits.final]
    for layer, (state, head) in enumerate(zip(states, heads, strict=True), 1):
        assert isinstance(head, LinearHead)
        assert head.dense is not None
        logits = head.out(torch.tanh(head.dense(state[0])))
        now = float(logits[0]) if tau is not None else int(logits.argmax())
        if last is not None:
            agrees = abs(now - last) < tau if tau is not None else now == last
            count = count + 1 if agrees else 0
        last = now
        if (patience and count == patience) or layer == len(states):
            return layer, logits
    raise AssertionError


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("patience", [0, 1, 2, 3])
def test_the_papers_loop_on_every_sample(regression: bool, patience: int) -> None:
    model, exits = trained(regression)
    inputs, _ = tiny_text.task(48, 5)
    encoder = dyndepth.DynamicEncoder(model, exits.with_thresholds(pabee.threshold(patience)))
    out = encoder(**inputs)
    for row in range(48):
        layer, logits = the_papers_loop(model, exits, tiny_text.alone(inputs, row), patience, 0.25 if regression else None)
        assert int(out.exit_layers[row]) == layer
        torch.testing.assert_close(out.logits[row], logits, rtol=1e-4, atol=1e-4)
    depths = set(out.exit_layers.tolist())
    assert min(depths) >= (patience + 1 if patience else 4), "P agreements need P + 1 layers"
    assert patience in (0, 3) or len(depths) > 1, "some leave and some stay"


def test_exits_of_a_sample_do_not_depend_on_its_batch() -> None:
    """Counts travel with samples: neighbours leave at every boundary, and each goes on counting its own."""
    model, exits = trained()
    inputs, _ = tiny_text.task(40, 6)
    encoder = dyndepth.DynamicEncoder(model, exits.with_thresholds(1.0))
    whole = encoder(**inputs).exit_layers
    for rows in torch.randperm(40, generator=torch.Generator().manual_seed(0)).split(7):
        part = encoder(**{name: value[rows] for name, value in inputs.items()})
        assert torch.equal(part.exit_layers, whole[rows])


def test_all_exits_learn_and_the_pooler_is_one() -> None:
    model, exits = trained()
    inputs, labels = tiny_text.task(200, 9)
    out = dyndepth.DynamicEncoder(model, exits)(**inputs)
    assert float((out.logits.argmax(-1) == labels).float().mean()) > 0.7
    assert out.work.fraction < 0.95
    heads = [*(point.head for point in exits), exits.final]
    assert all(isinstance(head, LinearHead) and head.dense is heads[0].dense for head in heads)  # type: ignore[union-attr]
    assert len({id(head) for head in heads}) == 4


def test_files_keep_what_exits_say(tmp_path: Path) -> None:
    model, exits = trained()
    exits.save_pretrained(tmp_path)
    inputs, _ = tiny_text.task(20, 7)
    old = dyndepth.DynamicEncoder(model, exits)(**inputs)
    loaded = SampleExits.from_pretrained(tmp_path)
    new = dyndepth.DynamicEncoder(model, loaded)(**inputs)
    assert torch.equal(old.logits, new.logits)
    assert torch.equal(old.exit_layers, new.exit_layers)
    poolers = {id(head.dense) for head in [*(point.head for point in loaded), loaded.final]}  # type: ignore[union-attr]
    assert len(poolers) == 1, "the pooler is still one"
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in exits.parameters())


def test_a_models_own_head_is_the_top() -> None:
    model = tiny_text.bert(head=True)
    exits = pabee.exits(model, patience=1)
    assert exits.final is None
    assert exits.model.vocab_size == tiny_text.CLASSES
    inputs, _ = tiny_text.task(6)
    closed = dyndepth.DynamicEncoder(model, exits.with_thresholds(math.inf))(**inputs)
    torch.testing.assert_close(closed.logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_errors() -> None:
    model = tiny_text.bert()
    with pytest.raises(ArgumentError, match="patience must be 0 or more, got -1"):
        pabee.exits(model, 3, patience=-1)
    with pytest.raises(ArgumentError, match="tolerance is for regression with one answer, got classes 3"):
        pabee.exits(model, 3, tolerance=0.5)
    with pytest.raises(ArgumentError, match="tolerance is for regression with one answer, got classes 3"):
        pabee.exits(tiny_text.bert(head=True), tolerance=0.5)
    with pytest.raises(ArgumentError, match="classes must be given"):
        pabee.exits(model, tolerance=0.5)
    with pytest.raises(ArgumentError, match="classes must be given"):
        pabee.exits(model)
    with pytest.raises(ArgumentError, match=r"boundaries in \[1, 4\), got \[4\]"):
        pabee.exits(model, 3, leave=[4])
