"""Heads that learn: the layers they train through, where they start, the loop, and exits that come out of it."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
from tiny_training import SETTINGS, batches, looks, texts, train
from torch import Tensor

import dyndepth
from dyndepth.closed_form.measure import Lottery
from dyndepth.data import FIT, TUNE, Corpus
from dyndepth.errors import ArgumentError, ExitsError, NotEnoughDataError, TrainingError
from dyndepth.exits import Band, BlockHead, Exits, MlpHead, TopProbability, TranslatorHead
from dyndepth.ops._math import rms_normalise
from dyndepth.runtime.bind import bind
from dyndepth.runtime.score import score
from dyndepth.training.batches import Batches
from dyndepth.training.config import TrainConfig
from dyndepth.training.evaluate import evaluate, selective
from dyndepth.training.losses import kl
from dyndepth.training.run import frequent_answers, started
from dyndepth.training.stack import frozen, run_layer
from dyndepth.training.starts import INITS, fit_readout, start_head
from dyndepth.training.trainer import metrics, readout_of


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
    assert divergence(rank=60) == pytest.approx(ridge, rel=1e-2), "full rank is no restriction"
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


@pytest.mark.parametrize("kind", ["translator", "mlp", "block"])
def test_training_lowers_the_divergence_on_unseen_rows(kind: str, tmp_path: Path) -> None:
    exits = train(tmp_path, head=kind, own=0.0, corpus=12_000, tokens=24_000, lr=1e-3)
    seen = looks(tmp_path)
    for leave in ("2", "4"):
        assert seen[-1][leave]["kl"] < 0.97 * seen[0][leave]["kl"]
    record = exits.record["training"]
    assert record["validation"]["2"]["kl"] == min(look["2"]["kl"] for look in seen)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    loaded = Exits.from_pretrained(tmp_path / "exits")
    corpus = Corpus.load(tmp_path / "corpus.safetensors")
    assert record["tokens"] == {FIT: corpus.count(FIT), TUNE: corpus.count(TUNE)}
    # What is on disk reaches what the record says, through the ordinary pass.
    tokens, start = corpus.part(TUNE)
    model = tiny_models.shared("llama")
    full = score(model, tokens, start=start)
    for leave in (2, 4):
        ran = score(model, tokens, loaded, start=start, kv="propagate", depth=[leave] * len(tokens))
        alone = score(model, tokens, _only(loaded, leave), start=start, kv="propagate")
        assert bool((ran.exit_layer[ran.judged] == leave).all())
        if kind != "block":  # the past of a leaving row is back-filled here, exact in the record
            exact = _exact(model, loaded, leave, tokens)
            found = float(kl(exact[full.judged], full.logits()[full.judged]).mean())
            assert found == pytest.approx(record["validation"][str(leave)]["kl"], rel=0.02)
        assert alone.work.fraction == 1.0, "closed until somebody sets a threshold"


def _only(exits: Exits, leave: int) -> Exits:
    return Exits([band for band in exits if band.leave == leave], exits.model)


def _exact(model: Any, exits: Exits, leave: int, tokens: list[Tensor]) -> Tensor:
    head: Any = next(band.head for band in exits if band.leave == leave)
    bound = bind(model)
    hidden = torch.cat([model(t[None], output_hidden_states=True).hidden_states[leave][0] for t in tokens])
    return bound.logits(head(hidden, bound.finish))


def test_a_run_that_stops_goes_on_bit_by_bit(tmp_path: Path, monkeypatch: Any) -> None:
    """Stopped in the middle (between checkpoints too), the weights, the log and the exits are those of one go."""
    train(tmp_path / "whole")
    from dyndepth.training.trainer import Trainer

    step = Trainer._update
    for stop in (0, 1, 5, 12):
        folder, count = tmp_path / str(stop), 0

        def interrupted(self: Any, *args: Any, stop: int = stop) -> Any:
            nonlocal count
            count += 1
            if count > stop:
                raise KeyboardInterrupt
            return step(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_update", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(folder)
        train(folder)
        for name in ("exits/exits.json", "run/metrics.jsonl"):
            assert (folder / name).read_text() == (tmp_path / "whole" / name).read_text()
        assert len(list((folder / "run").glob("*checkpoint-*"))) == 1


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(TrainingError, match="holds another run"):
        train(tmp_path, lr=1e-3)
    with pytest.raises(dyndepth.errors.CacheError, match="holds another cache"):
        train(tmp_path, name="qwen2")


def test_training_ends_early_when_nothing_gets_better(tmp_path: Path) -> None:
    train(tmp_path, tokens=60_000, lr=1.0, clip=0.0, patience=2, evaluate_every=1)
    updates = [entry["update"] for entry in metrics(tmp_path / "run") if "loss" in entry]
    assert len(updates) < 30


def test_accumulated_steps_are_one_larger_batch(tmp_path: Path) -> None:
    """Two half batches per update see each row as often; the gradient is their mean."""
    train(tmp_path / "one", loss="kl", tokens=2000, batch=800, evaluate_every=1)
    train(tmp_path / "two", loss="kl", tokens=2000, batch=400, accumulate=2, evaluate_every=1)
    one, two = (looks(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two)
    assert one[-1]["2"]["kl"] == pytest.approx(two[-1]["2"]["kl"], rel=0.05)


def test_a_loss_that_is_not_finite_stops_with_a_whole_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    from dyndepth.training.objective import Objective

    call = Objective.__call__

    def broken(self: Any, ready: Any, batch: Any, which: Any, step: int) -> Any:
        losses, slopes = call(self, ready, batch, which, step)
        return ({e: loss * math.nan for e, loss in losses.items()} if step == 7 else losses), slopes

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", broken)
        with pytest.raises(TrainingError, match="loss of exit 2 is nan at update 7"):
            train(tmp_path)
    train(tmp_path)
    assert len(looks(tmp_path)) > 2


def test_what_training_refuses(tmp_path: Path) -> None:
    model = tiny_models.shared("llama")
    with pytest.raises(ArgumentError, match="norm head has nothing to train"):
        train(tmp_path / "norm", head="norm")
    with pytest.raises(NotEnoughDataError, match="to judge in the"):
        dyndepth.train(model, texts(3), output=tmp_path / "few", config=TrainConfig.of(SETTINGS), progress=False)
    short = [torch.tensor([5])] * 100
    with pytest.raises(NotEnoughDataError, match="to judge in the"):
        dyndepth.train(model, short, output=tmp_path / "short", config=TrainConfig.of(SETTINGS), progress=False)
    foreign = [torch.full((30,), tiny_models.VOCABULARY)]
    with pytest.raises(ArgumentError, match="tokenizer of another model"):
        dyndepth.train(model, foreign, output=tmp_path / "foreign", config=TrainConfig.of(SETTINGS), progress=False)
    with pytest.raises(ArgumentError, match=r"exits must be in \[1, 6\)"):
        train(tmp_path / "exits", exits=[9])
    empty = batches(tmp_path / "cache")
    with pytest.raises(NotEnoughDataError, match="at least one sequence"):
        Batches(empty.cache, [], 100, 0, [2])
    quantised = tiny_models.tiny("llama")
    quantised.lm_head = torch.nn.Sequential(quantised.lm_head).eval()
    quantised.lm_head.out_features = tiny_models.VOCABULARY
    with pytest.raises(TrainingError, match="no plain linear"):
        readout_of(bind(quantised))


def test_frequent_answers(tmp_path: Path) -> None:
    data = batches(tmp_path)
    answers = torch.cat([batch.answers[batch.judged] for batch in data.once()])
    found = frequent_answers(data, tiny_models.VOCABULARY, 7)
    counts = torch.bincount(answers, minlength=tiny_models.VOCABULARY)
    assert len(set(found.tolist())) == 7
    assert int(counts[found].min()) >= int(counts[[i for i in range(len(counts)) if i not in found.tolist()]].max())


def test_fit_takes_trained_heads(tmp_path: Path) -> None:
    """Maps, routers and thresholds around heads that training made; heads of another model are refused."""
    heads = train(tmp_path)
    model = tiny_models.shared("llama")
    corpus = Corpus.load(tmp_path / "corpus.safetensors")
    exits = dyndepth.fit(model, corpus, heads=heads, agreement=0.4, candidates=[(2, 6), (4, 6)], progress=False)
    for band in exits:
        trained: Any = next(other.head for other in heads if other.leave == band.leave)
        assert isinstance(band.head, TranslatorHead)
        assert torch.equal(band.head.up, trained.up)
        assert band.kv is not None
    assert exits.record["training"] == heads.record["training"]
    assert set(heads.record["documents"]) <= set(exits.record["documents"])
    with pytest.raises(ExitsError):
        dyndepth.fit(tiny_models.shared("qwen2"), corpus, heads=heads, progress=False)
    blocks = train(tmp_path / "block", head="block", tokens=400)
    with pytest.raises(ArgumentError, match="is a block"):
        dyndepth.fit(model, corpus, heads=blocks, progress=False)


def test_the_log_survives_a_line_that_was_cut(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"update": 1}) + "\n" + '{"upd')
    assert list(metrics(tmp_path)) == [{"update": 1}]


def test_tensorboard_gets_what_the_log_gets(tmp_path: Path, monkeypatch: Any) -> None:
    """With a stand-in for the writer: the package is optional."""
    told: dict[str, list[int]] = {}

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert (Path(folder).name, purge_step) == ("tensorboard", 1)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            assert math.isfinite(value)
            told.setdefault(name, []).append(step)

        def flush(self) -> None:
            pass

    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.setattr("dyndepth.training.trainer.require", lambda module, message: None)
    train(tmp_path, tokens=2000, tensorboard=True, evaluate_every=2)
    entries = list(metrics(tmp_path / "run"))
    assert told["loss/2"] == [entry["update"] for entry in entries if "loss" in entry]
    assert told["validation/4/kl"] == [entry["update"] for entry in entries if "validation" in entry]
