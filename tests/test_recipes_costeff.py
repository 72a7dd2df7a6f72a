"""COST-EFF: what importance measures, what pruning keeps, and a narrow multi-exit model taught by a wide one."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch

import dyndepth
from dyndepth.encoders import DynamicEncoder, LinearHead, SampleExits
from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.recipes import costeff
from dyndepth.recipes.costeff_slender import (
    FactoredEmbedding,
    Widths,
    factor,
    layers_of,
    multiplications,
    prune,
    widths,
)
from dyndepth.training.encoder_losses import equilibrium, exit_losses, representation_mse, soft_ce, top_only
from dyndepth.training.encoder_trainer import EncoderConfig, train_encoder


@functools.cache
def teacher() -> tuple[Any, SampleExits]:
    model, (inputs, labels) = tiny_text.bert(), tiny_text.task(300)
    torch.manual_seed(0)
    exits = costeff.exits(model, tiny_text.CLASSES)
    return model, train_encoder(
        model, exits, inputs, labels, top_only, config=EncoderConfig(updates=60, lr=5e-3, base_lr=2e-3)
    ).exits


@functools.cache
def assistant() -> tuple[Any, SampleExits]:
    inputs, labels = tiny_text.task(300)
    model = copy.deepcopy(teacher()[0])
    torch.manual_seed(1)
    exits = costeff.exits(model, tiny_text.CLASSES, entropy=0.4)
    config = EncoderConfig(updates=60, lr=5e-3, base_lr=5e-4)
    return model, costeff.assist(model, exits, *teacher(), inputs, labels, config=config)


@functools.cache
def slender() -> costeff.Slender:
    inputs, labels = tiny_text.task(300)
    config = EncoderConfig(updates=30, lr=5e-3, base_lr=2e-3)
    return costeff.slenderise(*assistant(), inputs, labels, heads=2, neurons=16, rank=12, steps=2, config=config, samples=128)


def accuracy(model: Any, exits: SampleExits) -> tuple[float, float]:
    inputs, labels = tiny_text.task(200, 9)
    out = DynamicEncoder(model, exits)(**inputs)
    return float((out.logits.argmax(-1) == labels).float().mean()), out.work.fraction


def test_importance_is_the_derivative_by_a_factor_on_the_output() -> None:
    """Of one head and one neuron: finite differences of every exit's loss, sizes added up."""
    model, exits = assistant()
    inputs, labels = tiny_text.task(16, 3)
    found = costeff.importance(model, exits, inputs, labels, *teacher(), batch=16)
    other, tops = teacher()
    wanted = DynamicEncoder(other, tops).everywhere(**inputs)

    def losses(changed: Any) -> torch.Tensor:
        mine = DynamicEncoder(changed, SampleExits(exits, dyndepth.encoders.facts_of(changed, exits.final), final=exits.final))
        values = []
        for (samples, logits), (theirs, answers) in zip(mine.everywhere(**inputs), wanted, strict=True):
            ce = exit_losses([(samples, logits)], labels[samples.ids]).mean()
            values.append(0.9 * soft_ce(logits, answers) + 0.1 * ce + representation_mse([samples.tokens()], [theirs.tokens()]))
        return torch.stack(values).double()

    for layer, part, at in ((1, 0, 2), (2, 1, 7), (0, 1, 0), (3, 0, 1)):
        sides = []
        for step in (1e-2, -1e-2):
            changed = copy.deepcopy(model)
            block = layers_of(changed)[layer]
            carrier = block.attention.output.dense if part == 0 else block.output.dense
            columns = slice(at * 6, at * 6 + 6) if part == 0 else slice(at, at + 1)
            carrier.weight.data[:, columns] *= 1 + step
            sides.append(losses(changed))
        slope = (sides[0] - sides[1]) / 2e-2
        assert float(slope.abs().sum()) == pytest.approx(float(found[layer][part][at]), rel=0.02, abs=2e-4)
        assert bool((slope[:layer].abs() < 1e-6).all()), "exits below do not see it"


@pytest.mark.parametrize("part", ["heads", "neurons"])
def test_pruning_is_the_model_with_those_outputs_silenced(part: str) -> None:
    """transformers' own model, with the columns that carry the pruned ones set to zero."""
    model = tiny_text.bert()
    inputs, _ = tiny_text.task(9)
    kept = [
        Widths((0, 2) if part == "heads" else each.heads, tuple(range(0, 40, 3)) if part == "neurons" else each.neurons)
        for each in widths(model)
    ]
    silenced = copy.deepcopy(model)
    for layer in layers_of(silenced):
        if part == "heads":
            layer.attention.output.dense.weight.data[:, [*range(6, 12), *range(18, 24)]] = 0
        else:
            layer.output.dense.weight.data[:, [i for i in range(40) if i % 3]] = 0
    before = multiplications(model)
    prune(model, kept)
    assert multiplications(model) < before
    assert [len(each.heads) for each in widths(model)] == [2 if part == "heads" else 4] * 4
    torch.testing.assert_close(model(**inputs).last_hidden_state, silenced(**inputs).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_the_factored_embedding_is_the_truncated_decomposition() -> None:
    model = tiny_text.bert()
    weight = model.embeddings.word_embeddings.weight.detach().clone()
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    factor(model, 5)
    made = model.embeddings.word_embeddings
    assert isinstance(made, FactoredEmbedding)
    found = made(torch.arange(len(weight))).double()
    torch.testing.assert_close(found, u[:, :5] @ torch.diag(s[:5]) @ v[:5], rtol=1e-4, atol=1e-5)
    assert float((found - weight).norm()) == pytest.approx(float(s[5:].norm()), rel=1e-4)
    with pytest.raises(ArgumentError, match="factored already"):
        factor(model, 4)


def test_attention_maps_are_transformers_own() -> None:
    model, exits = assistant()
    inputs, _ = tiny_text.task(7, 4)
    encoder = DynamicEncoder(model, exits, layout="padded")
    before = model.config._attn_implementation
    with costeff.attention_maps(model) as maps:
        found = encoder.everywhere(**inputs)
    assert model.config._attn_implementation == before
    for place, row in enumerate(found[0][0].ids.tolist()):
        text = tiny_text.alone(inputs, row)
        length = text["input_ids"].shape[1]
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        wanted = eager(**text, output_attentions=True).attentions
        for mine, theirs in zip(maps, wanted, strict=True):
            torch.testing.assert_close(mine[place, :, :length, :length], theirs[0], rtol=1e-4, atol=1e-5)
    assert len(maps) == 4


def test_the_narrow_model_is_narrow_and_knows_what_the_assistant_knows() -> None:
    wide, narrow = assistant(), slender()
    assert [(len(each.heads), len(each.neurons)) for each in widths(narrow.model)] == [(2, 16)] * 4
    assert all(len(set(each.heads)) == 2 and max(each.neurons) < 40 for each in narrow.kept)
    assert multiplications(narrow.model) < 0.5 * multiplications(wide[0])
    full, early = accuracy(*wide)[0], accuracy(narrow.model, narrow.exits.closed())[0]
    assert full > 0.85
    assert early > full - 0.1
    right, work = accuracy(narrow.model, narrow.exits)
    assert work < 0.95
    assert right > full - 0.15
    assert narrow.exits.record["slender"] == {"heads": 2, "neurons": 16, "rank": 12, "steps": 2}
    assert [(len(each.heads), len(each.neurons)) for each in widths(wide[0])] == [(4, 40)] * 4, "the assistant stays"


def test_distillation_helps() -> None:
    """The same pruned model without it answers worse at its top."""
    narrow = copy.deepcopy(assistant()[0])
    factor(narrow, 12)
    prune(narrow, slender().kept)
    exits = assistant()[1]
    exits = SampleExits(exits, dyndepth.encoders.facts_of(narrow, exits.final), final=exits.final)
    assert accuracy(narrow, exits.closed())[0] < accuracy(slender().model, slender().exits.closed())[0]


def test_exits_at_some_layers_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """What assist and slenderise give `everywhere`: shares of exits, where they are few."""
    inputs, labels = tiny_text.task(20)
    asked: list[tuple[Any, ...]] = []

    def noted(*given: Any) -> Any:
        asked.append(given)
        return equilibrium(*given)

    monkeypatch.setattr(costeff, "equilibrium", noted)
    model = copy.deepcopy(teacher()[0])
    exits = costeff.exits(model, tiny_text.CLASSES, leave=[3])
    once = EncoderConfig(updates=1, base_lr=1e-6)
    exits = costeff.assist(model, exits, *teacher(), inputs, labels, config=once)
    costeff.slenderise(model, exits, inputs, labels, heads=3, neurons=30, steps=1, config=once)
    assert asked == [(4, [3]), (4, [3])]


def test_modes_of_teachers_come_back() -> None:
    """Those in training mode, and a part of one that was not."""
    inputs, labels = tiny_text.task(20)
    (wide, exits), (other, tops) = assistant(), teacher()
    wide, other = copy.deepcopy(wide), copy.deepcopy(other)
    for each in (wide, other):
        each.train()
        each.embeddings.eval()
    modes = [part.training for each in (wide, other) for part in each.modules()]
    once = EncoderConfig(updates=1, base_lr=1e-6)
    model = copy.deepcopy(teacher()[0])
    costeff.assist(model, costeff.exits(model, tiny_text.CLASSES), other, tops, inputs, labels, config=once)
    costeff.importance(wide, exits, inputs, labels, other, tops)
    exits = SampleExits(exits, dyndepth.encoders.facts_of(wide, exits.final), final=exits.final)
    costeff.slenderise(wide, exits, inputs, labels, heads=3, neurons=30, steps=1, config=once)
    assert [part.training for each in (wide, other) for part in each.modules()] == modes


def test_representations_come_first() -> None:
    """An assistant that starts elsewhere comes nearer to the teacher's hidden states."""
    inputs, labels = tiny_text.task(100)
    model = tiny_text.bert(seed=5)
    exits = costeff.exits(model, tiny_text.CLASSES)
    other, tops = teacher()

    def apart() -> float:
        mine = DynamicEncoder(model, SampleExits(exits, dyndepth.encoders.facts_of(model, exits.final), final=exits.final))
        pairs = zip(mine.everywhere(**inputs), DynamicEncoder(other, tops).everywhere(**inputs), strict=True)
        return sum(float(representation_mse([a.tokens()], [b.tokens()])) for (a, _), (b, _) in pairs)

    before = apart()
    config = EncoderConfig(updates=30, lr=1e-3, base_lr=5e-3)
    costeff.assist(
        model, exits, other, tops, inputs, labels, represent=config, config=EncoderConfig(updates=1, lr=1e-6, base_lr=1e-9)
    )
    assert apart() < 0.7 * before


def test_samples_of_a_narrow_model_leave_alone_as_in_a_batch() -> None:
    made = slender()
    inputs, _ = tiny_text.task(24, 8)
    out = DynamicEncoder(made.model, made.exits)(**inputs)
    assert len(set(out.exit_layers.tolist())) > 1
    for row in range(24):
        states = tiny_text.states(made.model, tiny_text.alone(inputs, row))
        for layer, head in enumerate([*(point.head for point in made.exits), made.exits.final], 1):
            assert isinstance(head, LinearHead)
            assert head.dense is not None
            logits = head.out(torch.tanh(head.dense(states[layer - 1][0])))
            p = torch.softmax(logits.double(), -1)
            if -(p * p.log()).sum() <= 0.4 or layer == 4:
                break
        assert int(out.exit_layers[row]) == layer
        torch.testing.assert_close(out.logits[row], logits, rtol=1e-4, atol=1e-4)


def test_files(tmp_path: Path) -> None:
    made = slender()
    costeff.save(made.model, tmp_path)
    inputs, _ = tiny_text.task(6)
    loaded = costeff.load(tmp_path)
    assert torch.equal(loaded(**inputs).last_hidden_state, made.model(**inputs).last_hidden_state)
    DynamicEncoder(loaded, made.exits)(**inputs)
    text = (tmp_path / "slender.json").read_text()
    for old, new, said in (('"BertModel"', '"torch"', "no transformers model"), ('"bert"', '"gpt2"', "model_type must be")):
        (tmp_path / "slender.json").write_text(text.replace(old, new))
        with pytest.raises(ExitsError, match=said):
            costeff.load(tmp_path)
    (tmp_path / "slender.json").write_text(text[:40])
    with pytest.raises(ExitsError, match="is damaged"):
        costeff.load(tmp_path)


def test_errors() -> None:
    wide = assistant()
    data = tiny_text.task(10)
    with pytest.raises(ArgumentError, match="heads and neurons must be 1 to 4 and 40, got 5 and 16"):
        costeff.slenderise(*wide, *data, heads=5, neurons=16, steps=1)
    with pytest.raises(ArgumentError, match="steps must be at least 1"):
        costeff.slenderise(*wide, *data, heads=2, neurons=16, steps=0)
    with pytest.raises(ArgumentError, match="wanted widths of 4 layers, got 0"):
        prune(tiny_text.bert(), [])
    with pytest.raises(ArgumentError, match="rank must be 1 to 24, got 25"):
        factor(tiny_text.bert(), 25)
    with pytest.raises(ArgumentError, match="entropy must be 0 or more"):
        costeff.exits(wide[0], 3, entropy=-1)
