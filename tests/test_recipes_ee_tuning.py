"""EE-Tuning: heads that start as copies, tuned on the text's next tokens, left where the largest probability is high enough."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
from torch import Tensor

import dyndepth
from dyndepth.data import Piece
from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.exits import Band, BlockHead, Exits, MlpHead, TopProbability
from dyndepth.recipes import ee_tuning
from dyndepth.runtime.bind import bind
from dyndepth.runtime.score import score
from dyndepth.training.batches import Batches
from dyndepth.training.cache import TeacherCache
from dyndepth.training.objective import Objective
from dyndepth.training.run import started
from dyndepth.training.stack import frozen
from dyndepth.training.trainer import metrics, readout_of


def rhymes(count: int, length: int = 24, seed: int = 0) -> list[Tensor]:
    """Texts whose next token is a function of the last: twice it plus one, wrapped. Heads can learn it, the base does not."""
    words = tiny_models.VOCABULARY - 3
    starts = torch.randint(0, words, (count,), generator=torch.Generator().manual_seed(seed))
    found = []
    for start in starts.tolist():
        text = [start]
        for _ in range(length - 1):
            text.append((2 * text[-1] + 1) % words)
        found.append(torch.tensor(text) + 3)
    return found


def test_the_papers_settings() -> None:
    assert ee_tuning.default_exits(40) == (5, 10, 15, 20, 25, 30, 35)
    config = ee_tuning.settings(40, head="block", tokens=9)
    assert (config.head, config.init, config.loss, config.weighting) == ("block", "copy", "ce", "ee_tuning")
    assert (config.lr, config.own, config.tokens) == (1e-4, 0.0, 9)
    assert ee_tuning.settings(40).head == "mlp"
    with pytest.raises(ArgumentError, match="head must be one of mlp, block, translator, got 'norm'; a norm head"):
        ee_tuning.settings(40, head="norm")


def data(folder: Path, model: Any) -> Batches:
    pieces = [Piece(text, 3, str(i)) for i, text in enumerate(rhymes(12, 20))]
    cache = TeacherCache.build(bind(model), pieces, (2, 4), folder, top=8)
    return Batches(cache, range(12), 1000, 0, (2, 4))


@pytest.mark.parametrize("head", list(ee_tuning.STARTS))
def test_heads_start_as_copies(head: str, tmp_path: Path) -> None:
    """Before tuning: a block is the last layer under the final norm; an MLP or a correction leaves the final norm alone."""
    model = tiny_models.shared("llama")
    bound, batches = bind(model), data(tmp_path, model)
    student = started(bound, batches, ee_tuning.settings(6, (2, 4), head=head))
    batch = next(batches.once())
    everywhere = torch.ones_like(batch.judged)
    for leave in (2, 4):
        parts = []
        for text in rhymes(12, 20):
            hidden = model(text[None], output_hidden_states=True).hidden_states[leave]
            if head == "block":
                small = copy.deepcopy(model)
                small.model.layers = torch.nn.ModuleList([*small.model.layers[:leave], small.model.layers[-1]])
                small.model.layers[leave].self_attn.layer_idx = leave
                small.config.num_hidden_layers = leave + 1
                parts.append(small.model(text[None]).last_hidden_state[0])
            else:
                parts.append(model.model.norm(hidden)[0])
        torch.testing.assert_close(student.ready(leave, batch, everywhere), torch.cat(parts), rtol=2e-4, atol=2e-4)


def test_the_loss_is_cross_entropy_with_the_text(tmp_path: Path) -> None:
    """torch's own, over judged rows, of what each exit says; the full model's answers play no part."""
    model = tiny_models.shared("llama")
    bound, batches = bind(model), data(tmp_path, model)
    config = ee_tuning.settings(6, (2, 4), head="mlp")
    student, batch = started(bound, batches, config), next(batches.once())
    objective = Objective(config, readout_of(bound), torch.arange(40))
    with torch.enable_grad(), frozen(model):
        ready = student(batch, batch.judged)
        found, slopes = objective(ready, batch, batch.judged, 0)
    for leave in (2, 4):
        leaf = ready[leave].detach().requires_grad_(True)
        with torch.enable_grad():
            wanted = torch.nn.functional.cross_entropy(model.lm_head(leaf), batch.labels[batch.judged], reduction="sum")
            wanted = wanted / int(batch.judged.sum())
            (slope,) = torch.autograd.grad(wanted, leaf)
        torch.testing.assert_close(found[leave], wanted.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(slopes[leave], slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("head", ["mlp", "block"])
def test_tuning_teaches_exits_the_text(head: str, tmp_path: Path) -> None:
    """The loss falls below what the untouched base says of such texts; the exits leave by their largest probability."""
    model = tiny_models.shared("llama")
    before, texts = copy.deepcopy(model.state_dict()), rhymes(420)
    config = ee_tuning.settings(
        6, head=head, corpus=9000, tokens=24_000, batch=400, lr=3e-3, evaluate_every=20, checkpoint_every=100, evaluate_rows=200
    )
    exits = ee_tuning.train(model, texts, output=tmp_path, leave=[2, 4], config=config, progress=False)
    losses = [entry["loss"] for entry in metrics(tmp_path / "run") if "loss" in entry]
    for leave in ("2", "4"):
        assert losses[-1][leave] < 0.7 * losses[0][leave]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loaded = Exits.from_pretrained(tmp_path / "exits")
    for band in loaded:
        assert isinstance(band.criterion, TopProbability)
        assert band.threshold == 1.0
        assert band.head_or_norm().kind == head
    assert all(isinstance(band.head, MlpHead if head == "mlp" else BlockHead) for band in exits)
    assert loaded.record["recipe"].startswith("EE-Tuning")
    out = model.generate(
        **tiny_models.prompts(4), custom_generate=dyndepth.generate, exits=loaded.with_thresholds(0.5), max_new_tokens=6,
        do_sample=False, return_dict_in_generate=True,
    )  # fmt: skip
    assert out.kv == "propagate"


def test_rows_leave_where_the_largest_probability_reaches_the_threshold() -> None:
    """Each row by itself, where published code lets the last row of a batch decide for all."""
    model, tokens = tiny_models.shared("llama"), torch.arange(3, 83)
    exits = ee_tuning.exits(model, (2, 4))
    assert [band.head_or_norm().kind for band in exits] == ["norm", "norm"]
    assert score(model, list(tokens[:, None]), exits).work.fraction == 1.0
    states = model(tokens[:, None], output_hidden_states=True).hidden_states
    wanted = torch.full((80,), 6)
    for leave in (4, 2):
        top = torch.softmax(model.lm_head(model.model.norm(states[leave][:, 0])), -1).amax(-1)
        wanted[top >= 0.5] = leave
    found = score(model, list(tokens[:, None]), exits.with_thresholds(0.5)).exit_layer
    assert found.tolist() == wanted.tolist()
    assert set(found.tolist()) == {2, 4, 6}


def test_given_heads() -> None:
    model = tiny_models.shared("llama")
    heads = tiny_exits.exits_of(model, tiny_exits.band(model, 1, 3), tiny_exits.band(model, 4, 6, head="mlp"))
    exits = ee_tuning.exits(model, heads=heads, threshold=0.75)
    assert [(band.leave, band.threshold) for band in exits] == [(4, 0.75)]
    assert exits.bands[0].head is heads.bands[1].head
    assert exits.bands[0].kv is None
    with pytest.raises(ArgumentError, match=r"leave must be boundaries of the heads \[4\], got \[3\]"):
        ee_tuning.exits(model, (3,), heads=heads)
    with pytest.raises(ExitsError, match="made for another model"):
        ee_tuning.exits(tiny_models.shared("qwen2"), heads=heads)


def test_a_norm_head_is_not_trained(tmp_path: Path) -> None:
    from dyndepth.training import TrainConfig

    with pytest.raises(ArgumentError, match=r"config\.head must be one of"):
        ee_tuning.train(tiny_models.shared("llama"), output=tmp_path, config=TrainConfig(head="norm"))
    assert ee_tuning.exits(tiny_models.shared("llama")).bands[0].head is None
    assert isinstance(ee_tuning.exits(tiny_models.shared("llama")).bands[0], Band)
