"""Losses of exits against the full model, their gradients, and the schedules that weigh them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.training import losses
from dyndepth.training.batches import Batch
from dyndepth.training.config import TrainConfig
from dyndepth.training.losses import LOSSES, Readout, Words
from dyndepth.training.objective import Objective
from dyndepth.training.weighting import (
    WEIGHTS,
    layerskip_dropout,
    layerskip_exits,
    layerskip_weights,
)

WORDS, WIDTH = 211, 24


def _logits(rows: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, WORDS, generator=torch.Generator().manual_seed(seed))


def test_kl_by_hand() -> None:
    """Teacher (1/2, 1/4, 1/4), student (1/4, 1/4, 1/2): 1/2 ln 2 - 1/4 ln 2."""
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    student = torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert float(losses.kl(student, teacher)) == pytest.approx(0.25 * math.log(2), rel=1e-6)
    assert float(losses.kl(teacher, teacher)) == pytest.approx(0, abs=1e-7)
    # One word in the top: masses (1/2, 1/2) against (1/4, 3/4).
    known = losses.top_kl(student, torch.tensor([[0]]), teacher[:, :1], torch.zeros(1))
    assert float(known) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)


def test_kl_is_torchs_summed_per_row() -> None:
    student, teacher = _logits(9, 1), _logits(9, 2)
    wanted = torch.nn.functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none")
    torch.testing.assert_close(losses.kl(student, teacher), wanted.sum(-1))


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
def test_top_mass_never_exceeds_the_full_kl_and_meets_it(scale: float) -> None:
    """Merging words can only lose divergence (data processing); nothing merged, nothing lost."""
    student, teacher = _logits(40, 1, scale), _logits(40, 2, scale)
    full, before = losses.kl(student, teacher), torch.zeros(40)
    for top in (1, 4, 32, WORDS - 1, WORDS):
        best = teacher.topk(top)
        found = losses.top_kl(student, best.indices.int(), best.values, teacher.logsumexp(-1))
        assert bool((found <= full + 1e-4 * full.abs() + 1e-5).all())
        assert bool((found >= before - 1e-4 * full.abs() - 1e-5).all()), "more words, more divergence"
        before = found
    torch.testing.assert_close(before, full, rtol=1e-4, atol=1e-5)


def test_top_mass_of_a_sure_teacher_has_finite_gradients() -> None:
    teacher = torch.full((2, WORDS), -80.0)
    teacher[:, 5] = 60.0
    student = _logits(2, 1).requires_grad_(True)
    best = teacher.topk(3)
    with torch.enable_grad():
        losses.top_kl(student, best.indices, best.values, teacher.logsumexp(-1)).sum().backward()
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


def test_all_words_sampled_is_the_full_kl() -> None:
    student, teacher = _logits(7, 1), _logits(7, 2)
    words = Words.draw(WORDS, torch.arange(0, 40, 2), WORDS, torch.Generator().manual_seed(0))
    assert sorted(words.ids.tolist()) == list(range(WORDS))
    assert not words.weight.any()
    torch.testing.assert_close(
        losses.kl(student[:, words.ids], teacher[:, words.ids], words.weight), losses.kl(student, teacher)
    )


def test_sampled_words_are_distinct_and_stand_for_the_vocabulary() -> None:
    frequent = torch.tensor([3, 5, 200])
    logits, total = _logits(1, 4)[0], torch.zeros((), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3000):
        words = Words.draw(WORDS, frequent, 20, generator)
        assert len(set(words.ids.tolist())) == 23
        assert words.ids[:3].tolist() == [3, 5, 200]
        assert words.weight[3:].tolist() == pytest.approx([math.log((WORDS - 3) / 20)] * 20)
        total += torch.exp(logits[words.ids].double() + words.weight).sum()
    assert float(total / 3000) == pytest.approx(float(logits.double().exp().sum()), rel=0.05)


def test_words_where_all_are_frequent() -> None:
    words = Words.draw(4, torch.arange(4), 10, torch.Generator())
    assert words.ids.tolist() == [0, 1, 2, 3]
    assert words.weight.tolist() == [0.0] * 4


def _problem(dtype: torch.dtype = torch.float32) -> tuple[Readout, Batch, dict[int, Tensor]]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    head = Readout(normal(WORDS, WIDTH) / 3, normal(WORDS) / 3, 9.0)
    rows, judged = 50, torch.arange(50) % 3 > 0
    ready = normal(rows, WIDTH)
    logits = head(ready)
    best = logits.topk(6)
    labels = torch.randint(0, WORDS, (rows,), generator=generator)
    labels[7] = -100
    batch = Batch(
        lengths=[20, 30], residual={}, judged=judged, ready=ready, answers=best.indices[:, 0], top_ids=best.indices,
        top_logits=best.values,
        logsumexp=logits.logsumexp(-1), labels=labels,
    )  # fmt: skip
    mine = {e: (ready + 0.5 * normal(rows, WIDTH))[judged].to(dtype) for e in (2, 5)}
    return head, batch, mine


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
def test_objective_equals_the_whole_expression(kind: str, ce_weight: float, monkeypatch: Any) -> None:
    """In parts of a few rows or all at once, loss and gradient are those of the mean over judged rows."""
    monkeypatch.setattr("dyndepth.training.objective._LOGITS", 7 * WORDS)
    head, batch, mine = _problem()
    config = TrainConfig(loss=kind, ce_weight=ce_weight, frequent=8, random=30, seed=4)
    objective = Objective(config, head, torch.arange(8))
    found, slopes = objective(mine, batch, batch.judged, 11)
    generator = torch.Generator().manual_seed(4 * 1_000_033 + 11)
    words = Words.draw(WORDS, torch.arange(8), 30, generator)
    judged = batch.judged
    for leave, ready in mine.items():
        leaf = ready.clone().requires_grad_(True)
        with torch.enable_grad():
            logits, teacher = head(leaf), head(batch.ready[judged])
            if kind == "kl":
                per_row = losses.kl(logits, teacher)
            elif kind == "sampled_kl":
                per_row = losses.kl(logits[:, words.ids], teacher[:, words.ids], words.weight)
            elif kind == "top_kl":
                per_row = losses.top_kl(logits, batch.top_ids[judged], batch.top_logits[judged], batch.logsumexp[judged])
            elif kind == "ce":
                per_row = torch.nn.functional.cross_entropy(logits, batch.labels[judged], reduction="none", ignore_index=-100)
            else:
                per_row = losses.state(leaf, batch.ready[judged])
            whole = per_row.mean()
            if ce_weight:
                wanted = torch.nn.functional.cross_entropy(logits, batch.labels[judged], reduction="none", ignore_index=-100)
                whole = whole + ce_weight * wanted.mean()
            (slope,) = torch.autograd.grad(whole, leaf)
        torch.testing.assert_close(found[leave], whole.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(slopes[leave], slope, rtol=1e-4, atol=1e-6)


def test_the_mean_is_over_tokens_not_over_sequences() -> None:
    """Balcony's published `batchmean` grows with the sequence length; the same rows as one sequence or two must not matter."""
    head, batch, mine = _problem()
    objective = Objective(TrainConfig(loss="kl"), head, torch.arange(8))
    together, _ = objective(mine, batch, batch.judged, 0)
    doubled = Batch(**{
        **{k: torch.cat([v, v]) for k, v in vars(batch).items() if isinstance(v, Tensor)}, "lengths": [100], "residual": {},
    })  # fmt: skip
    twice, _ = objective({e: torch.cat([v, v]) for e, v in mine.items()}, doubled, doubled.judged, 0)
    for leave in mine:
        torch.testing.assert_close(twice[leave], together[leave])


def test_restricted_head_gives_the_same_logits() -> None:
    head, batch, _ = _problem()
    ids = torch.tensor([200, 3, 77])
    torch.testing.assert_close(head.restricted(ids)(batch.ready), head(batch.ready)[:, ids])


def test_weights_of_exits() -> None:
    assert WEIGHTS["equal"]([2, 5, 6], 8) == [1 / 3] * 3
    assert WEIGHTS["calm"]([2, 5, 6], 8) == [2 / 13, 5 / 13, 6 / 13]
    assert WEIGHTS["ee_tuning"]([6, 12], 24) == [0.25, 0.5], "EE-LLM's 1.3B recipe"


def test_layerskip_schedules_by_hand() -> None:
    """Four layers: e(l) = 0, 1, 3 below the top and 3 + 3 there; dropout 0 at the first layer and all of it at the last."""
    assert layerskip_weights([1, 2, 3, 4], 4) == [0, 1 / 10, 3 / 10, 6 / 10]
    assert layerskip_weights([3, 4], 4) == [3 / 9, 6 / 9], "normalised over the exits that are on"
    assert layerskip_dropout(3, 0.2) == pytest.approx([0, 0.2 * (math.sqrt(2) - 1), 0.2])
    assert layerskip_dropout(3, 0.2, progress=0.0) == [0, 0, 0]
    assert layerskip_exits(8, 0, 100, "rotational", every=4) == [1, 5, 8]
    assert layerskip_exits(8, 1, 100, "rotational", every=4) == [2, 6, 8]
    assert layerskip_exits(8, 0, 160, "gradual") == [8]
    assert layerskip_exits(8, 20, 160, "gradual") == [6, 7, 8]
    assert layerskip_exits(8, 80, 160, "gradual") == list(range(1, 9)), "all on after half of the training"
    with pytest.raises(ArgumentError, match="rotational or gradual"):
        layerskip_exits(8, 0, 10, "random")
    with pytest.raises(ArgumentError, match="most and progress"):
        layerskip_dropout(8, 1.5)


def test_learning_rate() -> None:
    config = TrainConfig(lr=1.0, warmup=0.1)
    rates = [config.rate(update, 100) for update in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "tree"}, "head must be one of"),
        ({"loss": "mse"}, "loss must be one of"),
        ({"head": "block", "init": "zero"}, "init must be one of"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"tokens": 1.5}, "tokens must be a whole number"),
        ({"exits": (3, 3)}, "exits must be different"),
        ({"warmup": 1.0}, "warmup must be in"),
        ({"clip": -1.0}, "clip must be at least 0"),
        ({"learning_rate": 1.0}, "unknown settings learning_rate"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        TrainConfig.of(settings)


def test_settings_from_a_file(tmp_path: Any) -> None:
    path = tmp_path / "train.toml"
    path.write_text('exits = [20, 25]\nhead = "mlp"\nlr = 1e-3\n')
    config = TrainConfig.read(path, lr=2e-3)
    assert (config.exits, config.head, config.lr, config.starting()) == ((20, 25), "mlp", 2e-3, "ridge")
    assert config.at(30) == [20, 25]
    assert [TrainConfig().at(layers) for layers in (30, 6, 2)] == [[25, 28], [5], [1]]
    with pytest.raises(ArgumentError, match=r"exits must be in \[1, 25\)"):
        config.at(25)
    path.write_text("exits = [")
    with pytest.raises(ArgumentError, match="cannot be read"):
        TrainConfig.read(path)
    with pytest.raises(ArgumentError, match="cannot be read"):
        TrainConfig.read(tmp_path / "none.toml")
