"""Runs: they learn, stop, go on, refuse, and give exits that the rest can use."""

from __future__ import annotations

import json
import math
import platform
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_training import SETTINGS, batches, looks, texts, train
from torch import Tensor

import dyndepth
from dyndepth.closed_form.heads import block_ready, exit_argmax
from dyndepth.closed_form.measure import Lottery, Sample
from dyndepth.closed_form.search import with_criterion
from dyndepth.data import FIT, TUNE, Corpus, gather
from dyndepth.errors import ArgumentError, CacheError, ExitsError, NotEnoughDataError, TrainingError
from dyndepth.exits import Exits, TranslatorHead
from dyndepth.runtime.bind import bind
from dyndepth.runtime.fingerprint import facts_of
from dyndepth.runtime.score import score
from dyndepth.training.batches import Batches
from dyndepth.training.cache import TeacherCache
from dyndepth.training.config import TrainConfig
from dyndepth.training.losses import kl
from dyndepth.training.objective import Objective
from dyndepth.training.run import frequent_answers, started
from dyndepth.training.stack import frozen
from dyndepth.training.trainer import Trainer, metrics, readout_of


@pytest.mark.parametrize("kind", ["translator", "mlp", "block"])
def test_training_lowers_the_divergence_on_unseen_rows(kind: str, tmp_path: Path) -> None:
    exits = train(tmp_path, head=kind, own=0.0, corpus=12_000, tokens=24_000, lr=1e-3, evaluate_rows=10_000)
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
    with pytest.raises(dyndepth.errors.CacheError, match="or by another model"):
        train(tmp_path, name="qwen2")


def test_training_ends_early_when_nothing_gets_better(tmp_path: Path) -> None:
    train(tmp_path, tokens=60_000, lr=1.0, clip=0.0, patience=2, evaluate_every=1)
    updates = [entry["update"] for entry in metrics(tmp_path / "run") if "loss" in entry]
    assert len(updates) < 30


def test_accumulated_steps_are_one_larger_batch(tmp_path: Path) -> None:
    """The gradient of an update of three batches is that of their rows together, every token counting alike."""
    model = tiny_models.shared("llama")
    bound, data = bind(model), batches(tmp_path / "cache", count=60)
    config = TrainConfig(exits=(2, 4), loss="kl", accumulate=3, tokens=300, lr=1e-12, clip=0.0, batch=100)
    objective = Objective(config, readout_of(bound), torch.arange(5))
    student = started(bound, data, config)
    expected = started(bound, data, config)
    together = data.of([i for step in range(3) for i in data._dealt(0)[step]])
    with torch.enable_grad(), frozen(model):
        ready = expected(together, together.judged)
        _, slopes = objective(ready, together, together.judged, 0)
        sum((ready[e] * slopes[e]).sum() / 2 for e in ready).backward()
    seen: dict[str, Tensor] = {}

    class Spy(Trainer):
        def _finite(self, value: float, name: str, state: Any) -> None:
            if name == "the gradient" and not seen:
                seen.update({key: p.grad.clone() for key, p in self.student.named_parameters() if p.grad is not None})

    Spy(bound, student, objective, data, data, config, tmp_path / "run").run()
    wanted = dict(expected.named_parameters())
    assert seen
    for key, gradient in seen.items():
        other = wanted[key].grad
        assert other is not None
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)


def test_the_best_weights_are_given_back_also_after_a_kill(tmp_path: Path, monkeypatch: Any) -> None:
    """A rate that ruins the heads: the start was best, and a run that was stopped knows that when it goes on."""
    settings: dict[str, Any] = {
        "lr": 1.0,
        "clip": 0.0,
        "tokens": 4000,
        "evaluate_every": 2,
        "checkpoint_every": 2,
        "patience": 3,
    }
    heads = train(tmp_path / "whole", **settings)
    assert heads.record["training"]["best_update"] == 0
    assert heads.record["training"]["updates"] == 6, "three looks without anything better"
    best = torch.load(tmp_path / "whole" / "run" / "best.pt", weights_only=True)["heads"]
    for band in heads:
        assert torch.equal(band.head.up, best[f"heads.{band.leave}.up"])  # type: ignore[union-attr]
    step = Trainer._update

    def interrupted(self: Any, accelerator: Any, student: Any, optimizer: Any, state: Any) -> Any:
        if state.update == 5:
            raise KeyboardInterrupt
        return step(self, accelerator, student, optimizer, state)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", **settings)
    train(tmp_path / "killed", **settings)
    for name in ("exits/exits.json", "run/metrics.jsonl"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    call = Objective.__call__

    def broken(self: Any, ready: Any, batch: Any, which: Any, step: int, rows: int) -> Any:
        losses, slopes = call(self, ready, batch, which, step, rows)
        return losses, {e: slope * math.nan for e, slope in slopes.items()} if step == 7 else slopes

    train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", broken)
        with pytest.raises(TrainingError, match="the gradient is nan at update 7"):
            train(tmp_path / "hit")
    train(tmp_path / "hit")
    assert (tmp_path / "hit" / "exits" / "exits.json").read_text() == (tmp_path / "whole" / "exits" / "exits.json").read_text()


def test_a_loss_that_is_not_finite_stops_with_a_whole_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    call = Objective.__call__

    def broken(self: Any, ready: Any, batch: Any, which: Any, step: int, rows: int) -> Any:
        losses, slopes = call(self, ready, batch, which, step, rows)
        return ({e: loss * math.nan for e, loss in losses.items()} if step == 7 else losses), slopes

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", broken)
        with pytest.raises(TrainingError, match="loss of exit 2 is nan at update 7"):
            train(tmp_path)
    train(tmp_path)
    assert len(looks(tmp_path)) > 2


def test_what_training_refuses(tmp_path: Path) -> None:
    model = tiny_models.shared("llama")
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


def test_a_corpus_serves_the_call_it_was_collected_for(tmp_path: Path, monkeypatch: Any) -> None:
    """A run killed after its corpus and started with other texts or settings must not learn from the old ones."""
    with monkeypatch.context() as patch:
        patch.setattr(TeacherCache, "build", _stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    assert (tmp_path / "corpus.safetensors").exists()
    for changes in ({"corpus": 3001}, {"seed": 7}, {"new_tokens": 8}):
        with pytest.raises(CacheError, match="other texts, prompts or settings"):
            train(tmp_path, **changes)
    config = TrainConfig.of(SETTINGS)
    with pytest.raises(CacheError, match="other texts, prompts or settings"):
        dyndepth.train(tiny_models.shared("llama"), texts(799), output=tmp_path, config=config, progress=False)
    train(tmp_path)


def _stop(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def test_what_is_asked_before_anything_is_computed(tmp_path: Path, monkeypatch: Any) -> None:
    def nothing(name: str, **changes: Any) -> None:
        train(tmp_path / name, **changes)

    with pytest.raises(ArgumentError, match="norm head has nothing to train"):
        nothing("norm", head="norm")
    with pytest.raises(ModuleNotFoundError, match="tensorboard"):
        nothing("board", tensorboard=True)
    half = tiny_models.tiny("llama", torch.float16)
    with pytest.raises(TrainingError, match="float32 or bfloat16, got"):
        dyndepth.train(half, texts(9), output=tmp_path / "half", progress=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="several processes"):
        nothing("two")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_bf16_model_trains_after_an_fp32_one(tmp_path: Path) -> None:
    train(tmp_path / "fp32", tokens=1000)
    config = TrainConfig.of(SETTINGS | {"tokens": 6000})
    model = tiny_models.tiny("llama", torch.bfloat16)
    heads = dyndepth.train(model, texts(800), output=tmp_path / "bf16", config=config, progress=False)
    seen = looks(tmp_path / "bf16")
    assert seen[-1]["2"]["kl"] < seen[0]["2"]["kl"]
    assert all(p.dtype == torch.bfloat16 for band in heads for p in band.head.parameters())  # type: ignore[union-attr]
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_leftovers_of_killed_runs_go(tmp_path: Path) -> None:
    train(tmp_path, tokens=1000)
    node = platform.node()
    left = [tmp_path / f".corpus.safetensors.{node}@4194999.x.tmp", tmp_path / "run" / f".best.pt.{node}@4194999.x.tmp"]
    left.append(tmp_path / "exits" / f".exits.json.{node}@4194999.x.tmp")
    for path in left:
        path.write_text("half")
    (tmp_path / "run" / ".checkpoint-00000001").mkdir()
    train(tmp_path, tokens=1000)
    assert not any(path.exists() for path in left)
    assert not list((tmp_path / "run").glob(".checkpoint*"))


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
    # The same texts again: what the heads learned from may fit, but neither tune nor test.
    learned = set(heads.record["training"]["documents"])
    dealt = gather(model, texts(800), None, None, "fit", tokens=3000, own=0.0, new_tokens=8, batch=4, seed=9, learned=learned)
    assert {p.document for p in dealt.of(FIT)} & learned
    assert not {p.document for name in (TUNE, "test") for p in dealt.of(name)} & learned
    other = dyndepth.fit(model, corpus, heads=heads, agreement=0.4, candidates=[(3, 6)], progress=False)
    assert "training" not in other.record, "no band of these has a trained head"
    assert set(heads.record["documents"]) <= set(exits.record["documents"])
    with pytest.raises(ExitsError):
        dyndepth.fit(tiny_models.shared("qwen2"), corpus, heads=heads, progress=False)


def test_fit_takes_trained_blocks(tmp_path: Path) -> None:
    """A block attends to other rows: what fit believes that it says is what it says when rows leave there; from files too."""
    model, corpus = tiny_models.shared("llama"), texts(800)
    blocks = train(tmp_path, head="block", tokens=2000)
    bound, band = bind(model), blocks.bands[0]
    sample = Sample.of(model, corpus[:4], [3, 0, 5, 9])
    measured = sample.run(Exits([with_criterion(band, Lottery(0.4))], facts_of(bound)), "propagate")
    went = measured.skipped
    assert 10 < int(went.sum()) < int(sample.judged.sum())
    ready = block_ready(model, band, facts_of(bound), sample.tokens, sample.start)
    torch.testing.assert_close(ready[went], measured.scored.ready[went], rtol=1e-4, atol=1e-4)
    assert torch.equal(exit_argmax(bound, band, torch.empty(0), ready)[went], measured.scored.argmax()[went])
    options: dict[str, Any] = {"agreement": 0.3, "candidates": [(2, 6), (4, 6)], "progress": False}
    exits = dyndepth.fit(model, corpus, heads=blocks, **options)
    again = dyndepth.fit(model, corpus, heads=Exits.from_pretrained(tmp_path / "exits"), **options)
    assert [b.threshold for b in exits] == [b.threshold for b in again]
    for found in exits:
        assert found.has_block
        assert found.router is not None
        assert found.router.stats_weight is not None
        assert not math.isinf(found.threshold)
    exits.save_pretrained(tmp_path / "fitted")
    ran = score(model, corpus[:4], Exits.from_pretrained(tmp_path / "fitted"), kv="predict")
    assert torch.equal(ran.layers_run, score(model, corpus[:4], exits, kv="predict").layers_run)


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
