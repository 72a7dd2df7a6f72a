"""JEI-DNN: gates make a distribution over exits, samples leave by its conditionals, and the price of cost moves them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny_text
import torch

import dyndepth
from dyndepth.encoders import LinearHead, SampleExits
from dyndepth.errors import ArgumentError
from dyndepth.recipes import jei_dnn
from dyndepth.training.encoder_trainer import EncoderConfig


@functools.cache
def trained(trade: float) -> tuple[Any, SampleExits]:
    model, (inputs, labels) = tiny_text.bert(), tiny_text.task(300)
    torch.manual_seed(0)
    exits = jei_dnn.exits(model, tiny_text.CLASSES)
    config = EncoderConfig(updates=240, lr=2e-2, batch=64)
    return model, jei_dnn.train(model, exits, inputs, labels, trade=trade, warmup=60, every=30, config=config)


def gates(model: Any, exits: SampleExits, text: Any) -> tuple[list[float], list[torch.Tensor]]:
    """g of every exit and logits everywhere, of one sample, written out from transformers' states."""
    states, found, answers = tiny_text.states(model, text), [], []
    for number, head in enumerate([*(point.head for point in exits), exits.final]):
        assert isinstance(head, LinearHead)
        assert head.norm is not None
        logits = head.out(head.norm(states[number][0]))
        answers.append(logits)
        if number < len(exits):
            p = torch.softmax(logits, -1)
            sharp = p.square() / p.square().sum()
            top = p.sort(descending=True).values
            features = torch.stack([top[0], -(p * p.log()).sum(), top[0] - top[1], -(sharp * sharp.log()).sum()])
            gate = exits.exits[number].judge
            assert isinstance(gate, torch.nn.Linear)
            found.append(float(torch.sigmoid(gate(features))))
    return found, answers


@pytest.mark.parametrize("trade", [0.2, 2.0])
def test_samples_leave_by_the_papers_rule(trade: float) -> None:
    model, exits = trained(trade)
    inputs, _ = tiny_text.task(40, 5)
    out = dyndepth.DynamicEncoder(model, exits)(**inputs)
    shares = jei_dnn.distribution(model, exits, **inputs)
    for row in range(40):
        g, logits = gates(model, exits, tiny_text.alone(inputs, row))
        p = [max(0.0, min(g[k], 1 - sum(g[:k]))) for k in range(3)]
        torch.testing.assert_close(shares[row], torch.tensor([*p, 1 - sum(p)]), rtol=1e-4, atol=1e-5)
        rest, wanted = 1.0, 4
        for k in range(3):
            a = min(1.0, max(0.0, p[k] / rest)) if rest > 0 else 1.0
            assert abs(a - 0.5) > 1e-5
            if a >= 0.5:
                wanted = k + 1
                break
            rest *= 1 - a
        assert int(out.exit_layers[row]) == wanted
        torch.testing.assert_close(out.logits[row], logits[wanted - 1], rtol=1e-4, atol=1e-4)


def test_the_exit_distribution_sums_to_one() -> None:
    model, exits = trained(0.2)
    inputs, _ = tiny_text.task(100, 6)
    shares = jei_dnn.distribution(model, exits, **inputs)
    assert shares.shape == (100, 4)
    assert float(shares.min()) >= -1e-6
    torch.testing.assert_close(shares.sum(1), torch.ones(100), rtol=0, atol=1e-6)


def test_a_higher_price_makes_samples_leave_earlier() -> None:
    inputs, labels = tiny_text.task(200, 7)
    layers, right = [], []
    for trade in (0.2, 2.0):
        model, exits = trained(trade)
        out = dyndepth.DynamicEncoder(model, exits)(**inputs)
        layers.append(float(out.exit_layers.float().mean()))
        right.append(float((out.logits.argmax(-1) == labels).float().mean()))
    assert layers[1] < layers[0]
    assert min(right) > 0.6


def test_the_model_is_frozen() -> None:
    model = tiny_text.bert()
    exits = jei_dnn.exits(model, 3)
    assert jei_dnn.costs(model, exits) == [0.25, 0.5, 0.75, 1.0]
    inputs, labels = tiny_text.task(20)
    with pytest.raises(ArgumentError, match=r"the model is frozen, so base_lr must be 0, got 0\.1"):
        jei_dnn.train(model, exits, inputs, labels, config=EncoderConfig(base_lr=0.1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    jei_dnn.train(model, exits, inputs, labels, warmup=2, every=1, config=EncoderConfig(updates=6), validation=(inputs, labels))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gates_that_have_not_learned_are_not_kept() -> None:
    """On labels that mean nothing every look is worse than the one before: the best of all would be one of the warm-up."""
    model, (inputs, labels), (held, _) = tiny_text.bert(), tiny_text.task(200), tiny_text.task(60, 8)
    torch.manual_seed(0)
    exits = jei_dnn.exits(model, tiny_text.CLASSES)
    start = [point.judge.weight.clone() for point in exits if isinstance(point.judge, torch.nn.Linear)]
    config = EncoderConfig(updates=80, lr=2e-2, batch=50, evaluate_every=10)
    meaningless = torch.randint(0, tiny_text.CLASSES, (60,), generator=torch.Generator().manual_seed(1))
    done = jei_dnn.train(
        model, exits, inputs, labels, warmup=60, every=10, config=config, validation=(held, meaningless)
    )  # fmt: skip
    for before, point in zip(start, done, strict=True):
        assert isinstance(point.judge, torch.nn.Linear)
        assert not torch.equal(point.judge.weight, before)


def test_what_is_refused() -> None:
    model, (inputs, labels) = tiny_text.bert(), tiny_text.task(20)
    with pytest.raises(ArgumentError, match=r"warmup must be in \[0, 6\), the updates of all, got 6"):
        jei_dnn.train(
            model, jei_dnn.exits(model, tiny_text.CLASSES), inputs, labels, warmup=6, config=EncoderConfig(updates=6)
        )  # fmt: skip


def test_the_factor_of_the_modules_is_chosen() -> None:
    """Both factors train; they lead to other modules, and no third one is taken."""
    model, (inputs, labels) = tiny_text.bert(), tiny_text.task(40)
    weights = []
    for scale in ("batch", "sample"):
        torch.manual_seed(0)
        exits = jei_dnn.exits(model, tiny_text.CLASSES)
        config = EncoderConfig(updates=8, batch=20, lr=2e-2)
        done = jei_dnn.train(model, exits, inputs, labels, warmup=2, every=2, scale=scale, config=config)
        head = done.exits[0].head
        assert isinstance(head, LinearHead)
        weights.append(head.out.weight.clone())
    assert not torch.allclose(*weights)
    with pytest.raises(ArgumentError, match="scale must be batch or sample, got 'exit'"):
        jei_dnn.train(
            model, exits, inputs, labels, warmup=2, scale="exit", config=EncoderConfig(updates=6)
        )  # fmt: skip
