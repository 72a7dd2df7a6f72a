"""Losses of encoders with exits, against numbers worked out by hand and against finite differences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_text
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndepth.encoders import DynamicEncoder, LambdaHead, Samples
from dyndepth.errors import ArgumentError
from dyndepth.recipes import jei_dnn, palbert
from dyndepth.training import encoder_losses as losses


@pytest.fixture(autouse=True)
def _gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


def answers_of(*rows: list[list[float]], boundaries: tuple[int, ...] = ()) -> Any:
    """Results of `everywhere` with these logits per exit; residuals are the logits."""
    found = []
    for number, logits in enumerate(rows):
        values = torch.tensor(logits)
        ones, ids = torch.ones(len(values), dtype=torch.int64), torch.arange(len(values))
        found.append((Samples(values, ones, ids, boundaries[number] if boundaries else number + 1), values))
    return found


def from_probabilities(*rows: list[list[float]], **options: Any) -> Any:
    return answers_of(*[[[math.log(p) for p in sample] for sample in row] for row in rows], **options)


LABELS = torch.tensor([0, 1])
#: Probabilities of the label: 1/2 and 1/4 at the first exit, 1 and 1/2 at the top.
FOUND = from_probabilities([[0.5, 0.5], [0.75, 0.25]], [[1 - 1e-12, 1e-12], [0.5, 0.5]], boundaries=(2, 6))


def test_cross_entropies_by_hand() -> None:
    first, top = math.log(2) * 1.5, math.log(2) / 2
    assert float(losses.unweighted(FOUND, LABELS)) == pytest.approx(first + top, abs=1e-6)
    assert float(losses.layer_weighted(FOUND, LABELS)) == pytest.approx((2 * first + 6 * top) / 8, abs=1e-6)
    assert float(losses.top_only(FOUND, LABELS)) == pytest.approx(top, abs=1e-6)
    assert float(losses.below_top(FOUND, LABELS)) == pytest.approx(first, abs=1e-6)


def test_regression_by_hand() -> None:
    found = answers_of([[1.0], [2.0]], [[0.0], [4.0]])
    labels = torch.tensor([0.0, 3.0])
    assert float(losses.layer_weighted(found, labels)) == pytest.approx((1 * 1.0 + 2 * 0.5) / 3)
    with pytest.raises(ArgumentError, match="one logit, got 2"):
        losses.unweighted(FOUND, labels)


def test_the_posterior_of_stopping() -> None:
    p = losses.posterior(torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.2, 0.0]]))
    torch.testing.assert_close(p, torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.2, 0.0, 0.8]]))
    torch.testing.assert_close(losses.geometric_prior(3, 0.1), torch.tensor([0.1, 0.09, 0.081, 0.729]))
    with pytest.raises(ArgumentError, match="rate must be in"):
        losses.geometric_prior(3, 1.0)


@pytest.mark.parametrize("direction", ["posterior", "prior"])
def test_the_ponder_loss(direction: str) -> None:
    """Against sums written out, sample by sample, layer by layer."""
    model, (inputs, labels) = tiny_text.bert(), tiny_text.task(7)
    torch.manual_seed(1)
    exits = palbert.exits(model, tiny_text.CLASSES, pooling="mean", inner=8)
    encoder = DynamicEncoder(model, exits)
    found = encoder.everywhere(**inputs)
    order = found[0][0].ids
    loss = losses.PonderLoss(exits, beta=0.5, rate=0.1, direction=direction)
    prior = [0.1, 0.09, 0.081, 0.729]
    total = 0.0
    for row in range(7):
        states = [each.mean(0) for each in tiny_text.states(model, tiny_text.alone(inputs, row))]
        rest, p = 1.0, []
        for at in range(3):
            judge = exits.exits[at].judge
            assert isinstance(judge, LambdaHead)
            before = states[at - 1][None] if at else torch.zeros(1, 24)
            chance = float(judge(states[at][None], before))
            p.append(rest * chance)
            rest *= 1 - chance
        p.append(rest)
        head = exits.final
        assert head is not None
        for at in range(4):
            logits = head.last(torch.tanh(head.dense(states[at])))  # type: ignore[misc, operator]
            total += p[at] * -float(torch.log_softmax(logits, -1)[labels[row]]) / 7
            a, b = (p[at], prior[at]) if direction == "posterior" else (prior[at], p[at])
            total += 0.5 * a * math.log(a / b) / 7
    assert float(loss(found, labels[order])) == pytest.approx(total, rel=1e-5)


def test_detached_lambdas_leave_the_model_alone() -> None:
    model, (inputs, labels) = tiny_text.bert(), tiny_text.task(5)
    exits = palbert.exits(model, tiny_text.CLASSES)
    encoder = DynamicEncoder(model, exits)
    slopes = []
    for detach in (False, True):
        loss = losses.PonderLoss(exits, beta=1.0, detach=detach)
        found = encoder.everywhere(**inputs)
        slope = torch.autograd.grad(loss(found, labels[found[0][0].ids]), model.embeddings.word_embeddings.weight)[0]
        slopes.append(slope)
    assert not torch.allclose(*slopes)
    found = encoder.everywhere(**inputs)
    p = losses.posterior(losses.stopping(found, exits)).detach()
    wanted = torch.autograd.grad(
        (p * losses.exit_losses(found, labels[found[0][0].ids])).sum(1).mean(), model.embeddings.word_embeddings.weight
    )[0]
    torch.testing.assert_close(slopes[1], wanted, rtol=1e-4, atol=1e-7)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=5))
def test_the_exit_distribution_is_one(gates: list[list[float]]) -> None:
    shares, conditional = losses.exit_distribution(torch.tensor(gates))
    torch.testing.assert_close(shares.sum(1), torch.ones(len(gates)), rtol=0, atol=1e-5)
    assert bool((shares >= -1e-6).all())
    assert bool(((conditional >= 0) & (conditional <= 1)).all())
    rest = torch.ones(len(gates))
    for k in range(4):  # the conditionals make the same distribution
        torch.testing.assert_close(rest * conditional[:, k], shares[:, k], rtol=1e-4, atol=1e-5)
        rest = rest * (1 - conditional[:, k])


def test_the_exit_distribution_by_hand() -> None:
    shares, conditional = losses.exit_distribution(torch.tensor([[0.5, 0.25, 0.5], [0.75, 0.5, 0.0]]))
    torch.testing.assert_close(shares, torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.75, 0.25, 0.0, 0.0]]))
    torch.testing.assert_close(conditional, torch.tensor([[0.5, 0.5, 1.0], [0.75, 1.0, 1.0]]))


def jei_loss(trade: float = 0.5) -> tuple[Any, losses.JointExitLoss]:
    model = tiny_text.bert()
    torch.manual_seed(0)
    exits = jei_dnn.exits(model, 2, leave=[1, 3])
    return exits, losses.JointExitLoss(exits, [0.25, 0.75, 1.0], trade, warmup=10, every=4)


def test_phases_of_jei_dnn() -> None:
    _, loss = jei_loss()
    phases = []
    for update in range(22):
        loss.at_update(update)
        phases.append(loss.phase)
    assert phases == ["warmup"] * 10 + ["gates"] * 4 + ["modules"] * 4 + ["gates"] * 4


def test_gates_learn_where_leaving_is_worth_it() -> None:
    """Losses plus cost: 1 + .125, .8 + .375, .7 + .5: the first; 2.125, .875, .9: the second; 9.125, 9.375, 1.5: the top."""
    exits, loss = jei_loss()
    table = torch.tensor([[1.0, 0.8, 0.7], [2.0, 0.5, 0.4], [9.0, 9.0, 1.0]])
    wanted = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    assert torch.equal(loss.targets(table), wanted)
    gates = torch.tensor([[0.3, -0.2], [0.1, 2.0], [-1.0, 0.5]])
    total = 0.0
    for exit_, weight in ((0, 2.0), (1, 0.5)):  # zeros to ones per gate
        for row in range(3):
            chance = 1 / (1 + math.exp(-float(gates[row, exit_])))
            total -= weight * math.log(chance) / 6 if wanted[row, exit_] else math.log(1 - chance) / 6
    assert float(loss.gate_loss(gates, table)) == pytest.approx(total, rel=1e-5)
    with pytest.raises(ArgumentError, match="costs must be 3 numbers, got 2"):
        losses.JointExitLoss(exits, [0.5, 1.0], 0.1, warmup=0)


def test_modules_and_gates_learn_from_their_own_phases() -> None:
    exits, loss = jei_loss()
    found = from_probabilities([[0.6, 0.4], [0.7, 0.3]], [[0.8, 0.2], [0.5, 0.5]], [[0.9, 0.1], [0.2, 0.8]])
    found = [(samples, logits.requires_grad_(True)) for samples, logits in found]
    own = [point.judge for point in exits]
    ce = losses.exit_losses(found, LABELS)
    loss.at_update(0)
    assert float(loss(found, LABELS)) == pytest.approx(float(3 * ce[:, 0].mean() + 2 * ce[:, 1].mean() + ce[:, 2].mean()))
    loss.at_update(10)
    slopes = torch.autograd.grad(loss(found, LABELS), [found[0][1], own[0].weight], allow_unused=True)  # type: ignore[union-attr]
    assert slopes[0] is None
    assert slopes[1] is not None
    loss.at_update(14)
    value = loss(found, LABELS)
    slopes = torch.autograd.grad(value, [found[0][1], own[0].weight], allow_unused=True)  # type: ignore[union-attr]
    assert slopes[1] is None
    assert slopes[0] is not None
    shares, _ = losses.exit_distribution(torch.sigmoid(losses.gates_of(found, exits)))
    # The scale makes the value the plain mean of all losses, whatever the shares: only gradients are weighed by them.
    assert float(value) == pytest.approx(float(ce.mean()), rel=1e-5)
    scale = ce.sum() / (shares * ce).sum()
    probabilities = torch.softmax(found[0][1], -1)
    wanted = (shares[:, 0] * scale)[:, None] * (probabilities - torch.nn.functional.one_hot(LABELS, 2)) / 6
    torch.testing.assert_close(slopes[0], wanted.detach(), rtol=1e-4, atol=1e-6)


def module_weights(scale: str, shares: list[list[float]], table: list[list[float]]) -> tuple[float, torch.Tensor]:
    """(value, gradient by every loss) of the modules' phase."""
    exits, _ = jei_loss()
    loss = losses.JointExitLoss(exits, [0.25, 0.75, 1.0], 0.5, warmup=0, scale=scale)
    values = torch.tensor(table, requires_grad=True)
    value = loss.module_loss(torch.tensor(shares), values)
    return float(value), torch.autograd.grad(value, values)[0]


def test_the_published_factor_cancels_the_gates() -> None:
    """CE (0.01, 5) and P (1, 0): the factor is 5.01 / 0.01, the value 0.01 * 501 / 2, and as the gradient goes through the
    factor, both losses count one half."""
    value, slopes = module_weights("sample", [[1.0, 0.0]], [[0.01, 5.0]])
    assert value == pytest.approx(2.505)
    torch.testing.assert_close(slopes, torch.tensor([[0.5, 0.5]]))
    # The quotient written out, for samples that leave elsewhere too.
    shares, ce = torch.tensor([[1.0, 0.0], [0.25, 0.75]]), torch.tensor([[0.01, 5.0], [1.0, 2.0]], requires_grad=True)
    written = (shares * ce * (ce.sum(1) / (shares * ce).sum(1))[:, None]).mean()
    value, slopes = module_weights("sample", shares.tolist(), ce.tolist())
    assert value == pytest.approx(float(written.detach()))
    torch.testing.assert_close(slopes, torch.autograd.grad(written, ce)[0])
    assert module_weights("sample", [[1.0, 0.0]], [[0.0, 0.0]])[0] == 0.0


def test_the_batchs_factor_keeps_the_gates() -> None:
    """CE (0.01, 5), (1, 2) and P (1, 0), (0.25, 0.75): the factor is 8.01 / (0.01 + 0.25 + 1.5) = 4.551; every loss counts
    P times that over 4, the one of 0.01 not the 501 times of its own factor."""
    value, slopes = module_weights("batch", [[1.0, 0.0], [0.25, 0.75]], [[0.01, 5.0], [1.0, 2.0]])
    assert value == pytest.approx(8.01 / 4)
    torch.testing.assert_close(slopes * 4, torch.tensor([[4.5511, 0.0], [1.1378, 3.4134]]), rtol=1e-4, atol=0)
    alone, slopes = module_weights("batch", [[1.0, 0.0]], [[0.01, 5.0]])
    assert alone == pytest.approx(2.505)
    torch.testing.assert_close(slopes, torch.tensor([[250.5, 0.0]]))
    with pytest.raises(ArgumentError, match="scale must be batch or sample, got 'exit'"):
        module_weights("exit", [[1.0, 0.0]], [[1.0, 1.0]])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**31))
def test_the_batchs_factor_lies_between_the_samples(count: int, seed: int) -> None:
    """No weight is above P times the largest factor that a sample of the batch has by itself, none below P times the least."""
    generator = torch.Generator().manual_seed(seed)
    ce = torch.rand(count, 3, generator=generator) * 10 ** (4 * torch.rand(count, 3, generator=generator) - 3) + 1e-4
    shares, _ = losses.exit_distribution(torch.rand(count, 2, generator=generator))
    shares = shares.clamp_min(0)
    own = ce.sum(1) / (shares * ce).sum(1)
    _, slopes = module_weights("batch", shares.tolist(), ce.tolist())
    weights = slopes * ce.numel()
    assert bool((weights <= shares * own.max() * (1 + 1e-4) + 1e-6).all())
    assert bool((weights >= shares * own.min() * (1 - 1e-4) - 1e-6).all())


def test_soft_cross_entropy_by_hand() -> None:
    student, teacher = torch.log(torch.tensor([[0.25, 0.75]])), torch.log(torch.tensor([[0.5, 0.5]]))
    wanted = -(0.5 * math.log(0.25) + 0.5 * math.log(0.75))
    assert float(losses.soft_ce(student, teacher)) == pytest.approx(wanted)
    hot = losses.soft_ce(torch.tensor([[2.0, 0.0]]), torch.tensor([[4.0, 0.0]]), 2.0)
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    assert float(hot) == pytest.approx(-(p * math.log(q) + (1 - p) * math.log(1 - q)))
    with pytest.raises(ArgumentError, match="wanted 2 tensors, got 1"):
        losses.representation_mse([student], [student, teacher])


def test_gradients_are_scaled_and_values_are_not() -> None:
    value = torch.randn(3, requires_grad=True)
    found = losses.scaled_gradient(value, 0.25)
    assert torch.equal(found, value)
    found.sum().backward()
    assert torch.equal(value.grad, torch.full((3,), 0.25))  # type: ignore[arg-type]


def test_equilibrium_gives_every_exit_the_same_say() -> None:
    """With layers that pass everything on, each of L exits counts 1 / L at the bottom."""
    for layers in (2, 5, 12):
        start = torch.zeros(layers, requires_grad=True)
        fork, hidden, total = losses.equilibrium(layers), start, torch.zeros(())
        for boundary in range(1, layers):
            read, hidden = fork(hidden, boundary)
            total = total + read[boundary - 1]
        total = total + hidden[layers - 1]
        (slope,) = torch.autograd.grad(total, start)
        torch.testing.assert_close(slope, torch.full((layers,), 1 / layers))


@pytest.mark.parametrize("leave", [[1], [2, 5], [3, 4, 11], []])
def test_equilibrium_counts_exits_not_layers(leave: list[int]) -> None:
    """Exits after some of twelve layers: each of them and the top counts one share, in which order they are given or not."""
    count = len(leave) + 1
    start = torch.zeros(count, requires_grad=True)
    fork, hidden, total = losses.equilibrium(12, leave[::-1]), start, torch.zeros(())
    for place, boundary in enumerate(leave):
        read, hidden = fork(hidden, boundary)
        total = total + read[place]
    (slope,) = torch.autograd.grad(total + hidden[-1], start)
    torch.testing.assert_close(slope, torch.full((count,), 1 / count))
    with pytest.raises(ArgumentError, match=r"different boundaries in \[1, 12\), got \[2, 12\]"):
        losses.equilibrium(12, [12, 2])


def test_equilibrium_in_a_model() -> None:
    """Values as without; the gradient of one exit's loss at the words is 1 / L of what it was where layers are linear: here
    the ratio of both is the same number everywhere."""
    model, (inputs, labels) = tiny_text.bert(), tiny_text.task(6)
    torch.manual_seed(0)
    exits = jei_dnn.exits(model, tiny_text.CLASSES)
    encoder, words = DynamicEncoder(model, exits), model.embeddings.word_embeddings.weight
    for at in range(4):
        slopes = []
        for fork in (None, losses.equilibrium(4)):
            found = encoder.everywhere(fork, **inputs) if fork else encoder.everywhere(**inputs)
            ce = losses.per_sample(found[at][1], labels[found[0][0].ids]).mean()
            slopes.append((float(ce), torch.autograd.grad(ce, words)[0]))
        assert slopes[0][0] == slopes[1][0]
        torch.testing.assert_close(slopes[1][1], slopes[0][1] / 4, rtol=1e-4, atol=1e-8)


def test_a_missing_judge_is_named() -> None:
    model, (inputs, labels) = tiny_text.bert(), tiny_text.task(3)
    exits = palbert.exits(model, tiny_text.CLASSES)
    found = DynamicEncoder(model, exits).everywhere(**inputs)
    exits.exits[1].judge = None
    with pytest.raises(ArgumentError, match="the exit at 2 has no lambda head"):
        losses.PonderLoss(exits)(found, labels)
    with pytest.raises(ArgumentError, match="direction must be posterior or prior, got 'both'"):
        losses.PonderLoss(exits, direction="both")
