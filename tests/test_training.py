"""Heads that learn: the layers they train through, where they start, the loop, and exits that come out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
from tiny_training import batches, texts
from torch import Tensor

from dyndepth.closed_form.measure import Lottery
from dyndepth.closed_form.ridge import NormalEquations
from dyndepth.errors import ArgumentError
from dyndepth.exits import Band, BlockHead, Exits, MlpHead, TopProbability, TranslatorHead
from dyndepth.ops._math import rms_normalise
from dyndepth.runtime.bind import bind
from dyndepth.runtime.score import score
from dyndepth.testing import assert_same
from dyndepth.training.config import TrainConfig
from dyndepth.training.evaluate import evaluate, selective
from dyndepth.training.run import started
from dyndepth.training.stack import frozen, run_layer
from dyndepth.training.starts import INITS, fit_readout, start_head
from dyndepth.training.trainer import readout_of


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_layers_on_padded_sequences_are_the_models(name: str) -> None:
    model = tiny_models.shared(name)
    bound = bind(model)
    parts = [text[:n] for text, n in zip(texts(3, 19), (19, 7, 13), strict=True)]
    expected = [model(part[None], output_hidden_states=True).hidden_states for part in parts]
    cos, sin = bound.rotary_tables(19)
    hidden = torch.nn.utils.rnn.pad_sequence([states[1][0] for states in expected], batch_first=True)
    for at in range(1, bound.depth - 1):
        hidden = run_layer(bound.layers[at], hidden, cos, sin)
        for row, states in enumerate(expected):
            torch.testing.assert_close(hidden[row, : len(parts[row])], states[at + 1][0], rtol=2e-4, atol=2e-4)


def test_rows_away_are_read_as_the_pass_reads_them() -> None:
    """Rows skip [2, 4) by lot: with K,V of the band's maps put in their place, the layers above see what the pass sees."""
    model = tiny_models.shared("llama")
    bound, parts = bind(model), texts(3, 17)
    band = tiny_exits.band(model, 2, 4, Lottery(0.4))
    ran = score(model, parts, tiny_exits.exits_of(model, band), kv="predict")
    away = (ran.layers_run < bound.depth).unflatten(0, (3, 17))
    assert 5 < int(away.sum()) < 46
    hidden = torch.cat([model(part[None], output_hidden_states=True).hidden_states[2] for part in parts])
    cos, sin = bound.rotary_tables(17)
    maps, x = band.kv, rms_normalise(hidden, 1e-6)
    assert maps is not None
    left = hidden
    for at in range(2, bound.depth):
        if at == 4:
            assert band.jump is not None
            hidden = torch.where(away[..., None], band.jump(left), hidden)
        if at < 4:
            kv = torch.einsum("bte,poe->bpto", x, maps.weight[at - 2]) + maps.bias[at - 2][None, :, None]
            key, value = (kv[:, part].unflatten(-1, (bound.layers[at].kv_heads, -1)) for part in (0, 1))
            hidden = run_layer(bound.layers[at], hidden, cos, sin, away=away, key=key, value=value)
        else:
            hidden = run_layer(bound.layers[at], hidden, cos, sin)
    torch.testing.assert_close(bound.finish(hidden).flatten(0, 1), ran.ready, rtol=1e-4, atol=1e-4)


def test_the_base_gets_no_gradient_and_is_given_back() -> None:
    model = tiny_models.tiny("llama")
    model.lm_head.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt_post_norm"])
@pytest.mark.parametrize("kind", ["translator", "mlp", "block"])
def test_students_say_what_exits_say(kind: str, name: str, tmp_path: Path) -> None:
    """Head-ready rows in training are those of the pass when every row leaves there, readouts included."""
    model = tiny_models.shared(name)
    bound, data = bind(model), batches(tmp_path, name)
    for init in INITS[kind]:
        student = started(bound, data, TrainConfig(exits=(2, 4), head=kind, init=init))
        batch = next(data.once())
        everywhere = torch.ones_like(batch.judged)
        for leave in (2, 4):
            head: Any = student.heads[str(leave)]
            for parameter in head.parameters():
                parameter.data += 0.01 * torch.randn_like(parameter)
            exits = Exits([Band(leave, bound.depth, TopProbability(), threshold=0.0, head=head)], _facts(model))
            parts = texts(40, 20)[: len(batch.lengths)]
            ran = score(model, parts, exits, kv="propagate")
            assert bool((ran.exit_layer == leave).all())
            torch.testing.assert_close(student.ready(leave, batch, everywhere), ran.ready, rtol=2e-4, atol=2e-4)


def _facts(model: Any) -> Any:
    return tiny_exits.exits_of(model).model


def test_ridge_starts_beat_the_bare_norm_and_a_low_rank_is_near(tmp_path: Path) -> None:
    model = tiny_models.shared("llama")
    bound, data = bind(model), batches(tmp_path, count=120)
    readout = readout_of(bound)

    def divergence(**settings: Any) -> float:
        student = started(bound, data, TrainConfig(exits=(2, 4), **settings))
        return sum(q.kl for q in evaluate(student, readout, data, 10_000).values())

    bare, ridge = divergence(init="zero"), divergence()
    assert ridge < 0.9 * bare
    assert divergence(rank=48) == pytest.approx(ridge, rel=1e-2), "full rank is no restriction"
    assert ridge < divergence(rank=20) < bare
    assert divergence(head="block", init="next+ridge") < divergence(head="block", init="next")


def test_low_rank_readout_is_the_best_of_its_rank() -> None:
    """Reduced-rank regression by hand: no random map of the same rank, and no change of this one, has a smaller error."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 12, generator=generator) * torch.linspace(0.1, 3, 12)
    y = x @ torch.randn(12, 9, generator=generator)
    readout = TranslatorHead(12, 9, 3)
    fit_readout(readout, [(x, torch.zeros(4000, 9), y)])
    assert readout.down is not None
    seen = rms_normalise(x, 1e-6)

    def error(weight: Tensor) -> float:
        return float((seen @ weight.T + readout.bias - y).pow(2).mean())

    best = readout.up @ readout.down
    assert torch.linalg.matrix_rank(best) == 3
    full = torch.linalg.lstsq(seen, y - y.mean(0)).solution.T
    left, values, right = torch.linalg.svd(full)
    truncated = left[:, :3] * values[:3] @ right[:3]
    assert error(best) < error(truncated), "truncation in the metric of the features, not of the matrix"
    for _ in range(50):
        step = 0.01 * torch.randn(readout.up.shape, generator=generator) @ readout.down
        assert error(best + step) > error(best) - 1e-3 * error(best)


def test_low_rank_readout_is_the_best_around_the_features_mean() -> None:
    """Against the closed form of reduced-rank regression with an intercept, on features far from zero."""
    generator = torch.Generator().manual_seed(1)
    x = rms_normalise(torch.randn(6000, 12, generator=generator) + 3 * torch.randn(12, generator=generator), 1e-6)
    y = x @ torch.randn(12, 9, generator=generator) + 0.1 * torch.randn(6000, 9, generator=generator)
    readout = TranslatorHead(12, 9, 3)
    fit_readout(readout, [(x, torch.zeros(6000, 9), y)])
    assert readout.down is not None
    mine = x @ (readout.up @ readout.down).T + readout.bias
    centred, target = x - x.mean(0), y - y.mean(0)
    full = torch.linalg.lstsq(centred, target).solution
    right = torch.linalg.svd(centred @ full, full_matrices=False).Vh[:3]
    best = centred @ full @ right.T @ right + y.mean(0)
    assert float((mine - y).pow(2).mean()) < 1.01 * float((best - y).pow(2).mean())


def test_low_rank_readout_of_features_that_depend_on_each_other() -> None:
    """Half of the features are sums of others, one is massive, heads run in bf16: so starts are fitted."""
    generator = torch.Generator().manual_seed(2)
    free = torch.randn(3000, 100, generator=generator)
    free[:, 0] *= 300
    x = rms_normalise(torch.cat([free, free @ torch.randn(100, 100, generator=generator)], dim=1), 1e-6)
    y = x @ torch.randn(200, 9, generator=generator)
    readout = TranslatorHead(200, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert fit_readout(readout, [(x, torch.zeros(3000, 9), y)]) < 1e-4
    assert readout.down is not None
    assert float((x @ (readout.up @ readout.down).T + readout.bias - y).pow(2).mean()) < 1e-4 * float(y.pow(2).mean())


def test_normal_equations_are_fp32_under_autocast() -> None:
    """Starts are fitted where heads run in bf16: their sums of products are not to be rounded to that."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(500, 6, generator=generator) + 4, torch.randn(500, 3, generator=generator)
    plain, mixed = NormalEquations(6, 3), NormalEquations(6, 3)
    plain.add(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        mixed.add(x, y)
    assert_same(mixed.gram, plain.gram, "gram")
    assert_same(mixed.cross, plain.cross, "cross")


def test_starts_are_what_they_say() -> None:
    model = tiny_models.shared("llama")
    bound, generator = bind(model), torch.Generator().manual_seed(0)

    def start(kind: str, init: str) -> Any:
        return start_head(kind, bound, 2, init, rank=None, inner=11, generator=generator)

    layers = model.model.layers
    last, following, random = start("block", "last"), start("block", "next"), start("block", "random")
    assert isinstance(last, BlockHead)
    assert torch.equal(last.layer.mlp.up_proj.weight, layers[-1].mlp.up_proj.weight)
    assert torch.equal(last.norm.weight, layers[2].input_layernorm.weight), "Balcony's norm"
    assert torch.equal(following.layer.mlp.up_proj.weight, layers[2].mlp.up_proj.weight)
    assert not torch.equal(random.layer.mlp.up_proj.weight, layers[-1].mlp.up_proj.weight)
    assert torch.equal(start("block", "next+ridge").norm.weight, model.model.norm.weight)
    mlp = start("mlp", "random")
    assert isinstance(mlp, MlpHead)
    assert (mlp.up.shape[0], bool(mlp.down.any()), mlp.readout) == (11, False, None)
    with pytest.raises(ArgumentError, match=r"rank must be in \[1, 48\]"):
        start_head("translator", bound, 2, "ridge", rank=49, inner=None, generator=generator)
    for kind, init in (("block", "ridge"), ("translator", "last"), ("tree", "zero")):
        with pytest.raises(ArgumentError, match=r"init of a|head must be"):
            start(kind, init)


def test_selective_agreement_by_hand() -> None:
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    agrees = torch.tensor([True, True, False, True, False])
    assert selective(scores, agrees, 1.0) == 0.4
    assert selective(scores, agrees, 0.75) == 0.8
    assert selective(scores, agrees, 0.6) == 1.0
    assert selective(-scores, agrees, 0.9) == 0.0
