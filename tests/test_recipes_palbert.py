"""PALBERT: Q-exit is the posterior's quantile, the same every time; PonderNet's draws have the posterior's distribution."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
import transformers as t

import dyndepth
from dyndepth.encoders import LambdaHead, LinearHead, QExit, SampleExits
from dyndepth.encoders.criteria import draw
from dyndepth.errors import ArgumentError
from dyndepth.recipes import palbert
from dyndepth.training.encoder_trainer import EncoderConfig


@functools.cache
def trained() -> tuple[Any, SampleExits]:
    model, (inputs, labels) = tiny_text.bert(), tiny_text.task(300)
    torch.manual_seed(0)
    exits = palbert.exits(model, tiny_text.CLASSES, inner=16)
    config = EncoderConfig(updates=60, lr=5e-3, base_lr=1e-3)
    return model, palbert.train(model, exits, inputs, labels, rate=0.3, config=config)


def chances(model: Any, exits: SampleExits, row: int, inputs: Any) -> tuple[list[float], list[torch.Tensor]]:
    """Of one sample: lambda at every exit, and the logits everywhere, from transformers' own states."""
    states = [each[0] for each in tiny_text.states(model, tiny_text.alone(inputs, row))]
    judge, head = exits.exits[0].judge, exits.final
    assert isinstance(judge, LambdaHead)
    assert isinstance(head, LinearHead)
    assert head.dense is not None
    previous, found = torch.zeros(24), []
    for state in states[:-1]:
        found.append(float(torch.sigmoid(judge.body(torch.cat([state, previous])))))
        previous = state
    return found, [head.out(torch.tanh(head.dense(state))) for state in states]


@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_q_exit_is_the_quantile_of_the_posterior(q: float) -> None:
    model, exits = trained()
    inputs, _ = tiny_text.task(40, 5)
    out = dyndepth.DynamicEncoder(model, exits.with_thresholds(q))(**inputs)
    for row in range(40):
        lambdas, logits = chances(model, exits, row, inputs)
        rest, passed, wanted = 1.0, 0.0, 4
        for layer, chance in enumerate(lambdas, 1):
            passed += rest * chance
            rest *= 1 - chance
            assert abs(passed - q) > 1e-5 or q in (0.0, 1.0), "no tie that rounding could decide"
            if passed > q:
                wanted = layer
                break
        assert int(out.exit_layers[row]) == wanted
        torch.testing.assert_close(out.logits[row], logits[wanted - 1], rtol=1e-4, atol=1e-4)
    if q == 0.0:
        assert set(out.exit_layers.tolist()) == {1}


def test_q_exit_says_the_same_every_time_and_a_draw_does_not() -> None:
    model, exits = trained()
    inputs, _ = tiny_text.task(60, 6)
    encoder = dyndepth.DynamicEncoder(model, exits)
    first, again = encoder(**inputs), encoder(**inputs)
    assert torch.equal(first.exit_layers, again.exit_layers)
    assert torch.equal(first.logits, again.logits)
    drawn = [dyndepth.DynamicEncoder(model, palbert.ponder(exits, seed=seed))(**inputs).exit_layers for seed in range(3)]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    same = dyndepth.DynamicEncoder(model, palbert.ponder(exits, seed=0))(**inputs).exit_layers
    assert torch.equal(same, drawn[0]), "a draw is a function of seed, sample and layer"


def test_draws_have_the_posteriors_distribution() -> None:
    """Over many seeds, the share of draws that leave at each layer, within five standard errors."""
    model, exits = trained()
    inputs, _ = tiny_text.task(12, 7)
    wanted = torch.zeros(5)
    for row in range(12):
        rest = 1.0
        for layer, chance in enumerate(chances(model, exits, row, inputs)[0], 1):
            wanted[layer] += rest * chance / 12
            rest *= 1 - chance
        wanted[4] += rest / 12
    count = 150
    seen = torch.zeros(5)
    for seed in range(count):
        layers = dyndepth.DynamicEncoder(model, palbert.ponder(exits, seed=seed))(**inputs).exit_layers
        seen += torch.bincount(layers, minlength=5) / (12 * count)
    errors = (wanted * (1 - wanted) / (12 * count)).sqrt()
    assert bool(((seen - wanted).abs() <= 5 * errors + 1e-9).all())
    assert float(wanted[1:].max()) < 0.98


def test_draws_are_uniform_at_every_depth() -> None:
    """Kolmogorov-Smirnov distance of 20 000 draws, at boundaries where the mixing runs past 64 bits too."""
    for boundary, seed in ((1, 0), (5, 3), (48, 2**40)):
        found = draw(torch.arange(20_000), boundary, seed).sort().values
        assert float((found - torch.arange(20_000) / 20_000).abs().max()) < 1.95 / 20_000**0.5
    assert not torch.equal(draw(torch.arange(9), 5, 0), draw(torch.arange(9), 6, 0))


def test_the_expectation_averages_probabilities() -> None:
    model, exits = trained()
    inputs, _ = tiny_text.task(9, 8)
    found = palbert.expectation(model, exits, **inputs)
    torch.testing.assert_close(found.sum(1), torch.ones(9))
    for row in range(9):
        lambdas, logits = chances(model, exits, row, inputs)
        rest, mixed = 1.0, torch.zeros(tiny_text.CLASSES)
        for chance, each in zip([*lambdas, 1.0], logits, strict=True):
            mixed += rest * chance * torch.softmax(each, -1)
            rest *= 1 - chance
        torch.testing.assert_close(found[row], mixed, rtol=1e-4, atol=1e-5)


def test_training_learns_answers_and_files_keep_one_head(tmp_path: Path) -> None:
    model, exits = trained()
    inputs, labels = tiny_text.task(200, 9)
    out = dyndepth.DynamicEncoder(model, exits)(**inputs)
    assert float((out.logits.argmax(-1) == labels).float().mean()) > 0.8
    exits.save_pretrained(tmp_path)
    loaded = SampleExits.from_pretrained(tmp_path)
    assert loaded.exits[0].head is loaded.exits[2].head is loaded.final
    assert loaded.exits[0].judge is loaded.exits[2].judge
    assert torch.equal(dyndepth.DynamicEncoder(model, loaded)(**inputs).logits, out.logits)


def test_q_of_one_closes_the_exits() -> None:
    """Sums of probabilities in float32 come out above 1 now and then."""
    torch.manual_seed(0)
    config = t.BertConfig(
        vocab_size=31, hidden_size=24, num_hidden_layers=12, num_attention_heads=4, intermediate_size=40,
        initializer_range=0.35,
    )  # fmt: skip
    model = t.BertModel(config, add_pooling_layer=False).eval()
    exits = palbert.exits(model, 3, q=1.0)
    judge = exits.exits[0].judge
    assert isinstance(judge, LambdaHead)
    for parameter in judge.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
    judge.body[-1].bias.data.fill_(3.5)
    ids = torch.randint(1, 31, (1500, 6), generator=torch.Generator().manual_seed(0))
    assert set(dyndepth.DynamicEncoder(model, exits)(input_ids=ids).exit_layers.tolist()) == {12}
    assert int((dyndepth.DynamicEncoder(model, exits.with_thresholds(0.99))(input_ids=ids).exit_layers < 12).sum()) > 1000


def test_one_classifier_even_where_the_model_has_its_own() -> None:
    model = tiny_text.bert(head=True)
    exits = palbert.exits(model)
    assert exits.final is exits.exits[0].head
    assert exits.model.vocab_size == tiny_text.CLASSES
    inputs, _ = tiny_text.task(6)
    out = dyndepth.DynamicEncoder(model, exits.with_thresholds(1.0))(**inputs)
    head = exits.final
    assert isinstance(head, LinearHead)
    assert head.dense is not None
    top = torch.stack([tiny_text.states(model, tiny_text.alone(inputs, row))[-1][0] for row in range(6)])
    torch.testing.assert_close(out.logits, head.out(torch.tanh(head.dense(top))), rtol=1e-4, atol=1e-5)


def test_errors() -> None:
    model = tiny_text.bert()
    with pytest.raises(ArgumentError, match=r"q must be in \[0, 1\], got 1.5"):
        palbert.exits(model, 3, q=1.5)
    from dyndepth.recipes import pabee

    with pytest.raises(ArgumentError, match=r"wanted exits of palbert\.exits, got the criterion patience"):
        palbert.ponder(pabee.exits(model, 3))
    assert all(isinstance(point.criterion, QExit) for point in palbert.exits(model, 3))
