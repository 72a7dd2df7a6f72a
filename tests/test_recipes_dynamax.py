"""DYNAMAX: labels are the relaxed ones, weights fall linearly, classifiers learn, and both backbones generate under them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import test_ssm
import tiny_models
import torch
from torch import Tensor

from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.exits import Exits, RouterScore
from dyndepth.recipes import dynamax
from dyndepth.ssm import CLASSIFIERS, SsmExits


def _sequences(words: int, count: int = 30, length: int = 16) -> list[Tensor]:
    return list(torch.randint(3, words, (count, length), generator=torch.Generator().manual_seed(8)))


@functools.cache
def _trained(kind: str) -> Any:
    short = _sequences(test_ssm.WORDS, 10, 8)  # a Mamba block on the CPU is a loop over tokens
    return dynamax.train(test_ssm.tiny(), short, leave=(3, 5), kind=kind, top_k=2, epochs=2, lr=1e-2)


def _middle(model: Any, classifier: Any, leave: int) -> float:
    """A threshold that about half of some rows reach."""
    residuals, _ = dynamax.observed(model, torch.arange(3, 36), (leave,), 2)
    return float(torch.sigmoid(classifier(residuals[0][None])).median())


def test_where_exits_lie_and_how_they_weigh() -> None:
    assert dynamax.default_exits(32) == (16, 18, 20, 22, 24, 26, 28, 30)
    assert dynamax.default_exits(1) == ()
    assert dynamax.default_exits(5) == (2, 4)
    assert dynamax.weights(4) == [1.0, 0.75, 0.5, 0.25]


def test_safe_is_being_among_the_top_k() -> None:
    full = torch.tensor([[0.0, 5.0, 3.0, 4.0]] * 4)
    said = torch.eye(4)
    assert dynamax.safe(said, full, 1).tolist() == [False, True, False, False]
    assert dynamax.safe(said, full, 2).tolist() == [False, True, False, True]
    assert dynamax.safe(said, full, 3).tolist() == [False, True, True, True]
    assert dynamax.safe(said, torch.zeros(4, 4), 1).all(), "a tie with the k-th counts"
    with pytest.raises(ArgumentError, match="top_k must be 1 to 4, got 5"):
        dynamax.safe(said, full, 5)


def test_the_loss_by_hand() -> None:
    z = [torch.tensor([0.0, 2.0]), torch.tensor([-1.0, 1.0])]
    y = [torch.tensor([True, False]), torch.tensor([False, True])]
    p = [torch.sigmoid(part.double()) for part in z]
    first = -(p[0][0].log() + (1 - p[0][1]).log()) / 2
    second = -((1 - p[1][0]).log() + p[1][1].log()) / 2
    assert float(dynamax.loss(z, y)) == pytest.approx(float(first + 0.5 * second), rel=1e-6)
    with pytest.raises(ArgumentError, match="as many logits as targets, got 2 and 1"):
        dynamax.loss(z, y[:1])


def test_labels_of_both_backbones_are_those_of_transformers_logits() -> None:
    tokens = _sequences(test_ssm.WORDS, 1)[0]
    model = test_ssm.tiny()
    out = model(tokens[None], output_hidden_states=True)
    residuals, targets = dynamax.observed(model, tokens, (3, 5), 2)
    for at, x, target in zip((3, 5), residuals, targets, strict=True):
        assert torch.equal(x, out.hidden_states[at - 1][0])
        said = model.lm_head(model.backbone.norm_f(x)).argmax(-1)
        rank = [int((row > row[word]).sum()) for row, word in zip(out.logits[0], said, strict=True)]
        assert target.tolist() == [place < 2 for place in rank]
    llama = tiny_models.shared("llama")
    out = llama(tokens[None], output_hidden_states=True)
    residuals, targets = dynamax.observed(llama, tokens, (4,), 3)
    torch.testing.assert_close(residuals[0], out.hidden_states[4][0], rtol=1e-4, atol=1e-4)
    said = llama.lm_head(llama.model.norm(out.hidden_states[4][0])).argmax(-1)
    rank = [int((row > row[word]).sum()) for row, word in zip(out.logits[0], said, strict=True)]
    assert targets[0].tolist() == [place < 3 for place in rank]


@pytest.mark.parametrize("kind", list(CLASSIFIERS))
def test_classifiers_of_mamba_learn_and_decode(kind: str, tmp_path: Path) -> None:
    model = test_ssm.tiny()
    points = _trained(kind)
    assert isinstance(points, SsmExits)
    assert [(p.leave, p.threshold, p.classifier.kind) for p in points] == [(3, 0.9, kind), (5, 0.9, kind)]
    reached = points.record["dynamax"]["held_out"]
    assert set(reached) == {"3", "5"}
    assert all(part["rows"] == 2 * 8 and 0 < part["safe"] < 1 for part in reached.values()), reached
    points.save_pretrained(tmp_path)
    found = SsmExits.from_pretrained(tmp_path)
    level = _middle(model, found.exits[0].classifier, 3)
    inputs = test_ssm.prompts()
    out = dynamax.generate(model, inputs, found, policy="update", threshold=level, max_new_tokens=6, end=-1)
    assert len(set(out.layers_run.flatten().tolist())) > 1
    for row, length in enumerate(test_ssm.LENGTHS):
        prompt = inputs["input_ids"][row, -length:]
        tokens, depths = test_ssm.alone(model, found.with_thresholds(level), prompt, "update", 6)
        assert out.sequences[row, 6 : 6 + len(tokens)].tolist() == tokens
        assert out.layers_run[row, : len(depths)].tolist() == depths


@torch.enable_grad()
def _best_linear(seen: list[Any], at: int) -> float:
    """The smallest mean cross-entropy of a logistic regression on rms-normed residuals, by L-BFGS in float64."""
    x = torch.cat([residuals[at] for residuals, _ in seen]).double()
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    y = torch.cat([targets[at] for _, targets in seen]).double()
    weight = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def value() -> Tensor:
        solver.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ weight[:-1] + weight[-1], y)
        loss.backward()
        return loss

    solver.step(value)
    return float(value())


@pytest.mark.parametrize("kind", list(CLASSIFIERS))
def test_classifiers_learn_more_than_how_often_it_is_safe(kind: str) -> None:
    """On what they were shown, under the recipe's own loss, beside the best constant guess per boundary."""
    model, sequences = test_ssm.tiny(), _sequences(test_ssm.WORDS, 12, 9)
    epochs = 14 if kind == "mamba" else 60
    points = dynamax.train(model, sequences, leave=(3, 5), kind=kind, top_k=2, epochs=epochs, lr=2e-2, held_out=0.01)
    seen = [dynamax.observed(model, tokens, (3, 5), 2) for tokens in sequences]
    found, constant = 0.0, 0.0
    rates = [torch.stack([targets[at] for _, targets in seen]).float().mean() for at in range(2)]
    for residuals, targets in seen:
        judged = [p.classifier(x[None])[0] for p, x in zip(points, residuals, strict=True)]
        found += float(dynamax.loss(judged, targets))
        constant += float(dynamax.loss([torch.logit(r).expand(9) for r in rates], targets))
    if kind == "linear":  # convex: what it should reach can be computed
        assert found < 1.05 * sum(12 * weight * _best_linear(seen, at) for at, weight in enumerate(dynamax.weights(2)))
        assert found < 0.9 * constant, (found, constant)
    else:
        assert found < 0.8 * constant, (found, constant)


@pytest.mark.parametrize("kind", ["linear", "ffn"])
def test_a_transformer_gets_routers_and_copied_keys(kind: str) -> None:
    model = tiny_models.shared("llama")
    points = dynamax.train(
        model, _sequences(tiny_models.VOCABULARY, 12), leave=(4,), kind=kind, top_k=9, epochs=2, threshold=0.5
    )
    assert isinstance(points, Exits)
    assert [(band.leave, band.resume, band.threshold) for band in points] == [(4, 6, 0.5)]
    assert isinstance(points.bands[0].criterion, RouterScore)
    inputs = tiny_models.prompts(4)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    router = points.bands[0].criterion.router
    assert router is not None
    rate = _middle(model, lambda x: torch.logit(router(x[0])), 4)
    out = dynamax.generate(model, inputs, points, threshold=rate, **options)
    depths = out.layers_run
    assert set(depths.flatten().tolist()) == {4, 6}
    from dyndepth.runtime import entry

    wanted = model.generate(**inputs, custom_generate=entry.generate, exits=points.with_thresholds(rate), kv="copy", **options)
    assert torch.equal(out.sequences, wanted.sequences)


@pytest.mark.parametrize("kind", ["linear", "ffn"])
def test_a_classifier_and_its_router_are_one_function(kind: str) -> None:
    torch.manual_seed(0)
    one = CLASSIFIERS[kind](24)
    x = torch.randn(9, 24) * 3
    router = one.router()
    assert router is not None
    torch.testing.assert_close(router(x), torch.sigmoid(one(x)), rtol=1e-5, atol=1e-6)


def test_what_dynamax_refuses() -> None:
    model, sequences = test_ssm.tiny(), _sequences(test_ssm.WORDS, 4)
    with pytest.raises(ArgumentError, match="kind must be one of linear, ffn, mamba, got 'lstm'"):
        dynamax.train(model, sequences, kind="lstm")
    with pytest.raises(ArgumentError, match=r"leave must be boundaries in \[1, 6\), got \[3, 6\]"):
        dynamax.train(model, sequences, leave=(3, 6))
    with pytest.raises(ArgumentError, match="held_out must be between 0 and 1"):
        dynamax.train(model, sequences, held_out=1.0)
    with pytest.raises(NotEnoughDataError, match="at least 2 sequences, got 1"):
        dynamax.train(model, sequences[:1])
    with pytest.raises(ArgumentError, match="mamba classifiers remember their sequence"):
        dynamax.train(tiny_models.shared("llama"), sequences, kind="mamba")
