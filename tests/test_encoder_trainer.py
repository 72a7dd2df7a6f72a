"""The trainer of encoder exits: what learns and what stays, labels beside their samples, resuming bit by bit, errors."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_text
import torch
from torch import Tensor

from dyndepth.encoders import DynamicEncoder, SampleExits
from dyndepth.errors import ArgumentError, TrainingError
from dyndepth.exits import TopProbability
from dyndepth.recipes.sample_heads import answers, linear_exits
from dyndepth.training.encoder_losses import layer_weighted, unweighted
from dyndepth.training.encoder_states import PooledStates
from dyndepth.training.encoder_trainer import EncoderConfig, train_encoder


def made(model: Any, seed: int = 0, **options: Any) -> SampleExits:
    torch.manual_seed(seed)
    options = {"pooling": "mean", "classes": tiny_text.CLASSES} | options
    classes = options.pop("classes")
    return linear_exits(model, classes, lambda _: TopProbability(), math.inf, "test", **options)


def weights(*parts: torch.nn.Module) -> list[Tensor]:
    return [value.clone() for part in parts for value in part.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def accuracy(model: Any, exits: SampleExits, data: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    return (answers(model, exits, data[0]).argmax(-1) == data[1][:, None]).float().mean(0)


def test_a_frozen_model_stays_and_its_exits_learn() -> None:
    model, data, other = tiny_text.bert(dropout=0.1), tiny_text.task(600), tiny_text.task(200, 1)
    exits = made(model)
    before, start = weights(model), weights(exits)
    done = train_encoder(model, exits, *data, unweighted, config=EncoderConfig(updates=100, lr=2e-2), validation=other)
    assert same(weights(model), before)
    assert not same(weights(exits), start)
    assert len(done.losses) == done.updates == 100
    assert done.best_update % 50 == 0
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert bool((accuracy(model, done.exits, other) > 0.7).all())


def test_a_trained_model_learns_down_to_its_words() -> None:
    model, data, other = tiny_text.bert(dropout=0.1), tiny_text.task(600), tiny_text.task(200, 1)
    exits = made(model)
    before, facts = weights(model), exits.model
    model.train()
    with pytest.raises(ArgumentError, match="must be in eval mode"):
        DynamicEncoder(model, exits)(**data[0])
    done = train_encoder(model, exits, *data, unweighted, config=EncoderConfig(updates=60, lr=1e-2, base_lr=3e-3))
    changed = [not torch.equal(a, b) for a, b in zip(weights(model), before, strict=True)]
    named = dict(zip(model.state_dict(), changed, strict=True))
    assert named["embeddings.word_embeddings.weight"]
    assert named["encoder.layer.0.attention.self.query.weight"]
    assert done.exits.model != facts, "facts are those of the model as it is now"
    assert model.training, "the mode that it had"
    model.eval()
    assert bool((accuracy(model, done.exits, other) > 0.9).all())
    assert math.isnan(done.best)
    assert done.best_update == 60


@pytest.mark.parametrize("pooling", ["first", "mean", "max"])
def test_kept_vectors_answer_as_the_model_does(pooling: str) -> None:
    model, (inputs, _) = tiny_text.bert(), tiny_text.task(37)
    encoder = DynamicEncoder(model, made(model, pooling=pooling, dense=True, norm=True))
    assert PooledStates.fits(encoder)
    kept = PooledStates.collect(encoder, inputs, batch=8)
    assert kept.boundaries == (1, 2, 3, 4)
    rows = torch.tensor([30, 2, 2, 17])
    with torch.no_grad():
        wanted = encoder.everywhere(**inputs)
        found = kept.everywhere(encoder, rows)
    home = torch.argsort(wanted[0][0].ids)
    for (samples, mine), (_, theirs) in zip(found, wanted, strict=True):
        assert samples.count == 4
        torch.testing.assert_close(mine, theirs[home][rows], rtol=1e-5, atol=1e-5)


def test_kept_vectors_serve_many_trainings() -> None:
    """Given instead of inputs, they train the same weights."""
    model, data, other = tiny_text.bert(), tiny_text.task(60), tiny_text.task(20, 1)
    encoder = DynamicEncoder(model, made(model))
    kept = [PooledStates.collect(encoder, given) for given, _ in (data, other)]
    config = EncoderConfig(updates=10, evaluate_every=5)
    found = []
    for first, second in ((data[0], other[0]), (kept[0], kept[1])):
        exits = made(model)
        validation = second, other[1]
        found.append(train_encoder(model, exits, first, data[1], unweighted, config=config, validation=validation).exits)
    assert same(weights(found[0]), weights(found[1]))
    torch.testing.assert_close(answers(model, found[0], kept[1]), answers(model, found[0], other[0]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ArgumentError, match="kept states want a frozen model"):
        train_encoder(model, made(model), kept[0], data[1], unweighted, config=EncoderConfig(base_lr=0.1))
    with pytest.raises(ArgumentError, match="must both be kept states, or neither"):
        train_encoder(model, made(model), kept[0], data[1], unweighted, validation=other)
    with pytest.raises(ArgumentError, match=r"kept at \[1, 2, 3, 4\], the exits are at \[2, 4\]"):
        kept[0].everywhere(DynamicEncoder(model, made(model, leave=[2])))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_labels_stand_beside_their_samples(cached: bool, layout: str) -> None:
    """The label is the sample's length, which samples know; kept vectors forget it and are recognised by their values."""
    model, (inputs, _) = tiny_text.bert(), tiny_text.task(25)
    lengths = inputs["attention_mask"].sum(1)
    exits = made(model)
    encoder, seen = DynamicEncoder(model, exits), []
    own = torch.stack([_pooled(encoder, tiny_text.alone(inputs, row)) for row in range(25)])

    def loss(found: Any, labels: Tensor) -> Tensor:
        samples, logits = found[-1]
        if cached:
            nearest = torch.cdist(samples.hidden, own).argmin(1)
            assert lengths[nearest].tolist() == labels.tolist()
        else:
            assert samples.lengths.tolist() == labels.tolist()
        seen.append(len(labels))
        return logits.square().mean()

    watch = None if cached else (lambda encoder, batch: encoder.everywhere(**batch))
    config = EncoderConfig(updates=3, batch=10)
    train_encoder(model, exits, inputs, lengths, loss, config=config, watch=watch, layout=layout)
    assert seen == [10, 10, 5]


def _pooled(encoder: DynamicEncoder, text: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return encoder.everywhere(**text)[-1][0].pooled("mean")[0]


class _KilledError(Exception):
    pass


def test_a_run_that_was_killed_ends_with_the_weights_it_would_have_had(tmp_path: Path) -> None:
    """Dropout, best weights and the optimizer's memory included."""
    data, other = tiny_text.task(90), tiny_text.task(40, 1)
    config = EncoderConfig(updates=12, batch=16, lr=1e-2, base_lr=1e-3, checkpoint_every=4, evaluate_every=3)

    def run(folder: Path, die: bool) -> list[Tensor]:
        model = tiny_text.bert(dropout=0.2)
        exits, calls = made(model, dense=True, one_dense=True), [0]
        torch.manual_seed(die)  # whatever was drawn before plays no part

        def loss(found: Any, labels: Tensor) -> Tensor:
            calls[0] += 1
            if die and calls[0] == 11:
                raise _KilledError
            return unweighted(found, labels)

        done = train_encoder(model, exits, *data, loss, judge=unweighted, config=config, validation=other, folder=folder)
        if calls[0] < 12:
            assert len(done.losses) == calls[0] == 4, "eight updates were done before"
        return weights(model, done.exits)

    whole = run(tmp_path / "a", die=False)
    with pytest.raises(_KilledError):
        run(tmp_path / "b", die=True)
    assert [path.name for path in (tmp_path / "b").glob("checkpoint-*")] == ["checkpoint-00000008"]
    assert same(run(tmp_path / "b", die=False), whole)
    model, config = tiny_text.bert(), EncoderConfig(updates=13, checkpoint_every=4)
    with pytest.raises(TrainingError, match="holds another run"):
        train_encoder(model, made(model), *data, unweighted, config=config, folder=tmp_path / "b")


def test_a_run_that_ended_early_is_over(tmp_path: Path) -> None:
    """Started again it does no update and hands back the same weights."""
    model, data = tiny_text.bert(), tiny_text.task(64)
    config = EncoderConfig(updates=40, batch=64, evaluate_every=1, patience=2, checkpoint_every=1)
    looks: list[float] = []

    def judge(found: Any, labels: Tensor) -> Tensor:
        looks.append(1.0 + len(looks))
        return torch.tensor(looks[-1])

    found = []
    for number in range(3):
        exits = made(model)
        done = train_encoder(
            model, exits, *data, unweighted, config=config, validation=data, judge=judge, folder=tmp_path
        )  # fmt: skip
        assert (done.updates, done.best_update, len(done.losses)) == (3, 1, 0 if number else 3)
        found.append(weights(done.exits))
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    assert len(looks) == 3


def test_a_folder_is_of_one_run(tmp_path: Path) -> None:
    """Other data of the same size, other labels, exits, losses or validation: refused, and named."""
    model, (inputs, labels), other = tiny_text.bert(), tiny_text.task(32), tiny_text.task(32, 1)
    config = EncoderConfig(updates=2, checkpoint_every=1)

    def run(**changes: Any) -> Any:
        given: dict[str, Any] = {
            "exits": made(model), "inputs": inputs, "labels": labels, "loss": unweighted, "validation": other,
        }  # fmt: skip
        given |= changes
        return train_encoder(model, config=config, folder=tmp_path, **given)

    assert run().updates == 2
    assert len(run(exits=made(model, seed=9)).losses) == 0, "weights come from the checkpoint"
    for changes, said in (
        ({"inputs": {name: value.flip(0) for name, value in inputs.items()}}, "data"),
        ({"labels": labels.flip(0)}, "data"),
        ({"validation": None}, "data"),
        ({"validation": (other[0], other[1].flip(0))}, "data"),
        ({"loss": layer_weighted}, "loss, judge"),
        ({"judge": layer_weighted}, "judge"),
        ({"exits": made(model, leave=[1, 2])}, "exits"),
        ({"exits": made(model, dense=True)}, "exits"),
    ):
        with pytest.raises(TrainingError, match=f"holds another run, whose {said} differ; choose another folder"):
            run(**changes)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_callers_draws_stay(tmp_path: Path, checkpoints: bool) -> None:
    model, data = tiny_text.bert(dropout=0.1), tiny_text.task(32)
    config = EncoderConfig(updates=2, base_lr=1e-4, checkpoint_every=int(checkpoints))

    def draws() -> list[float]:
        return [float(torch.rand(())), float(np.random.rand()), random.random()]  # noqa: NPY002

    def seeded(seed: int) -> SampleExits:
        exits = made(model)
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        return exits

    seeded(5)
    wanted = draws()
    for _ in range(2):  # the second call resumes, where accelerate sets generators
        exits = seeded(5)
        train_encoder(model, exits, *data, unweighted, config=config, folder=tmp_path if checkpoints else None)
        assert draws() == wanted
        seeded(6)
        draws()


def test_every_seed_that_is_taken_trains() -> None:
    model, data = tiny_text.bert(), tiny_text.task(16)
    assert train_encoder(model, made(model), *data, unweighted, config=EncoderConfig(updates=1, seed=2**32 - 1)).updates == 1
    with pytest.raises(ArgumentError, match=r"seed must be a whole number in \[0, 2\^32\), got 4294967296"):
        EncoderConfig(seed=2**32)


def test_the_weights_of_the_best_look_are_kept() -> None:
    """A judge that says 2, 1, 3, 4, ...: the second look's weights are those of a run that ends there."""
    model, data = tiny_text.bert(), tiny_text.task(64)
    start = made(model)
    values = iter([2.0, 1.0, 3.0, 4.0, 5.0])

    def judge(found: Any, labels: Tensor) -> Tensor:
        return torch.tensor(next(values))

    exits = copy.deepcopy(start)
    config = EncoderConfig(updates=100, batch=64, evaluate_every=5, patience=2, warmup=0.0)
    done = train_encoder(model, exits, *data, unweighted, config=config, validation=data, judge=judge)
    assert (done.best, done.best_update, done.updates) == (1.0, 10, 20)
    stopped, lasts = copy.deepcopy(start), []

    def note(found: Any, labels: Tensor) -> Tensor:
        lasts.append(weights(stopped))
        return unweighted(found, labels)

    train_encoder(model, stopped, *data, note, config=config)
    assert same(weights(done.exits), lasts[10]), "the weights before the eleventh update"


def test_bfloat16_products_float32_weights() -> None:
    model, data, other = tiny_text.bert(), tiny_text.task(300), tiny_text.task(200, 1)
    exits = made(model)
    config = EncoderConfig(updates=50, lr=1e-2, base_lr=3e-3, precision="bf16")
    done = train_encoder(model, exits, *data, unweighted, config=config)
    assert all(p.dtype == torch.float32 for part in (model, done.exits) for p in part.parameters())
    assert bool((accuracy(model, done.exits, other) > 0.8).all())


def test_only_what_is_named_learns() -> None:
    model, data = tiny_text.bert(), tiny_text.task(40)
    exits = made(model)
    assert exits.final is not None
    ramps, top = [weights(point) for point in exits], weights(exits.final)
    train_encoder(model, exits, *data, unweighted, config=EncoderConfig(updates=3), train_only=exits.final)
    assert all(same(weights(point), old) for point, old in zip(exits, ramps, strict=True))
    assert not same(weights(exits.final), top)


def test_errors() -> None:
    model, data = tiny_text.bert(), tiny_text.task(8)
    exits = made(model)

    def broken(found: Any, labels: Tensor) -> Tensor:
        return unweighted(found, labels) * math.nan

    with pytest.raises(TrainingError, match="the loss is nan at update 0"):
        train_encoder(model, exits, *data, broken)
    with pytest.raises(TrainingError, match="gradient's norm is nan at update 0"):
        train_encoder(model, exits, *data, lambda found, labels: (found[0][1] - found[0][1].detach()).abs().sqrt().sum())
    with pytest.raises(ArgumentError, match=r"equally many samples, at least one, got .*'labels': 7"):
        train_encoder(model, exits, data[0], data[1][:7], unweighted)
    with pytest.raises(ArgumentError, match="nothing learns"):
        train_encoder(model, exits, *data, unweighted, train_only=torch.nn.ModuleList([]))
    with pytest.raises(ArgumentError, match="checkpoint_every needs a folder"):
        train_encoder(model, exits, *data, unweighted, config=EncoderConfig(checkpoint_every=1))
    with pytest.raises(TrainingError, match="must be in float32"):
        train_encoder(copy.deepcopy(model).bfloat16(), exits, *data, unweighted)
    for wrong in ({"updates": 0}, {"lr": -1.0}, {"warmup": 1.0}, {"precision": "fp16"}, {"patience": -1}, {"clip": math.inf}):
        with pytest.raises(ArgumentError, match=f"train_encoder: {next(iter(wrong))} must be"):
            EncoderConfig(**wrong)  # type: ignore[arg-type]
