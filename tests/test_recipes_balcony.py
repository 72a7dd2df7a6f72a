"""Balcony: budgets of one batch, each the sub-model it names; where blocks start, and that they learn."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch

import dyndepth
from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.exits import Band, Exits, FixedDepth, NormHead, TopProbability
from dyndepth.recipes import balcony
from dyndepth.runtime.bind import bind
from dyndepth.training import TrainConfig

POINTS = (2, 3, 5)
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def blocks(model: Any, points: tuple[int, ...] = POINTS) -> Exits:
    """As after training: blocks that are no layer of the model any more."""
    exits = balcony.start(model, points)
    generator = torch.Generator().manual_seed(5)
    for parameter in (p for band in exits for p in band.head.parameters()):  # type: ignore[union-attr]
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)
    return exits


def sub_model(model: Any, exits: Exits, depth: int) -> Any:
    """transformers' own model of the first `depth` layers, the block and its norm on top; the LM head is shared."""
    if depth == tiny_models.LAYERS:
        return model
    head: Any = next(band.head for band in exits if band.leave == depth)
    small = copy.deepcopy(model)
    small.model.layers = torch.nn.ModuleList([*small.model.layers[:depth], copy.deepcopy(head.layer)])
    small.model.layers[depth].self_attn.layer_idx = depth
    small.model.norm = head.norm
    small.config.num_hidden_layers = depth + 1
    kinds = getattr(small.config, "layer_types", None)
    if kinds:
        small.config.layer_types = [*kinds[:depth], kinds[head.source]]
    return small


def test_the_papers_settings() -> None:
    assert balcony.default_exits(32) == (15, 18, 21)
    assert balcony.default_exits(4) == (2, 3)
    config = balcony.settings(32, tokens=7, loss="sampled_kl")
    assert (config.exits, config.head, config.init, config.weighting) == ((15, 18, 21), "block", "last", "equal")
    assert (config.lr, config.warmup, config.ce_weight, config.tokens, config.loss) == (5e-4, 0.01, 0.0, 7, "sampled_kl")
    assert balcony.settings(32).loss == "kl"


def test_blocks_start_as_the_last_layer() -> None:
    model = tiny_models.shared("llama")
    for band in balcony.start(model, POINTS):
        head: Any = band.head
        theirs = model.model.layers[-1].state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in head.layer.state_dict().items())
        assert torch.equal(head.norm.weight, model.model.layers[band.leave].input_layernorm.weight)
        assert isinstance(band.criterion, FixedDepth)


def test_names_of_budgets() -> None:
    model = tiny_models.shared("llama")

    def names(*points: int) -> dict[str, int]:
        return balcony.budgets(balcony.start(model, points))

    assert names(2, 3, 5) == {"S": 2, "M": 3, "L": 5, "XL": 6}
    assert list(names(2, 3, 5)) == ["S", "M", "L", "XL"]
    assert names(4) == {"L": 4, "XL": 6}
    assert names(1, 4) == {"M": 1, "L": 4, "XL": 6}
    assert names(1, 2, 3, 4, 5) == {"2XS": 1, "XS": 2, "S": 3, "M": 4, "L": 5, "XL": 6}
    assert balcony.budgets(tiny_exits.exits_of(model, tiny_exits.band(model, 2, 4), Band(4, 6))) == {"L": 4, "XL": 6}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "olmo2"])
def test_mixed_budgets_give_each_request_what_it_gets_alone(name: str) -> None:
    """One batch of all budgets: every row equals transformers' model of its depth and block, run on it alone."""
    model, inputs = tiny_models.shared(name), tiny_models.prompts(8)
    exits = blocks(model)
    asked: list[Any] = ["S", "XL", "M", 5, "L", None, 2, "M"]
    depths = [2, 6, 3, 5, 5, 6, 2, 3]
    out = balcony.generate(model, inputs, exits, asked, return_dict_in_generate=True, **OPTIONS)
    for row, depth in enumerate(depths):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        expected = sub_model(model, exits, depth).generate(**alone, **OPTIONS)
        assert torch.equal(out.sequences[row : row + 1, : expected.shape[1]], expected), depth
        mine = balcony.generate(model, alone, exits, asked[row], **OPTIONS)
        assert torch.equal(mine, expected)
        steps = int((out.exit_layers[row] >= 0).sum())
        assert out.exit_layers[row, :steps].tolist() == [depth] * steps


def test_a_budget_runs_its_layers_and_its_block_and_nothing_else() -> None:
    """Rows x layers of a mixed batch, prompts included, counted by hand."""
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(5)
    exits, depths = blocks(model), [3, 2, 6, 3, 5]
    out = balcony.generate(
        model, inputs, exits, depths, return_dict_in_generate=True, min_new_tokens=8, max_new_tokens=8, do_sample=False
    )
    prompt = (inputs["attention_mask"].sum(1) - 1).tolist()
    assert out.work.layers == [8 * sum(depth > layer for depth in depths) for layer in range(6)]
    assert out.work.blocks == {2: 8, 3: 16, 5: 8}
    assert out.prompt_work.layers == [
        sum(n for n, depth in zip(prompt, depths, strict=True) if depth > layer) for layer in range(6)
    ]
    assert out.kv == "none"
    medium = balcony.generate(model, inputs, exits, "M", return_dict_in_generate=True, **OPTIONS)
    assert medium.work.layers[:3] == [medium.work.rows] * 3
    assert medium.work.layers[3:] == [0, 0, 0]
    assert medium.work.blocks == {3: medium.work.rows}


def test_the_whole_model_is_the_models_own() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(6)
    expected = model.generate(**inputs, **OPTIONS)
    assert torch.equal(balcony.generate(model, inputs, blocks(model), "XL", **OPTIONS), expected)
    assert torch.equal(balcony.generate(model, inputs, blocks(model), None, **OPTIONS), expected)
    ids = inputs["input_ids"][:1]
    assert torch.equal(balcony.generate(model, ids, blocks(model), 6, **OPTIONS), model.generate(ids, **OPTIONS))


def test_heads_of_other_criteria_are_used_at_the_depth_named() -> None:
    """A criterion that would open, K,V maps and bands that resume play no part when the depth is fixed."""
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(4)
    other = tiny_exits.exits_of(
        model, tiny_exits.band(model, 1, 3, threshold=-1.0), Band(4, 6, TopProbability(), threshold=0.0, head=NormHead())
    )
    plain = tiny_exits.exits_of(model, Band(4, 6, FixedDepth()))
    ours = balcony.generate(model, inputs, other, ["L", "XL", 4, None], **OPTIONS)
    assert torch.equal(ours, balcony.generate(model, inputs, plain, [4, 6, 4, 6], **OPTIONS))
    assert torch.equal(ours[1], model.generate(**inputs, **OPTIONS)[1])


def test_what_budgets_are_refused() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(2)
    exits = blocks(model)
    with pytest.raises(ArgumentError, match=r"budget must be one of S \(2\), M \(3\), L \(5\), XL \(6\), a depth or None, got"):
        balcony.generate(model, inputs, exits, "XXL", **OPTIONS)
    with pytest.raises(ExitsError, match="depth must name an exit point"):
        balcony.generate(model, inputs, exits, 4, **OPTIONS)
    with pytest.raises(ArgumentError, match="one entry per sequence"):
        balcony.generate(model, inputs, exits, ["S", "M", "L"], **OPTIONS)


def test_training_lowers_the_divergence_of_every_budget(tmp_path: Path) -> None:
    """From texts to saved exits that generate takes as they are; the base is not touched."""
    model = tiny_models.shared("llama")
    before = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, tiny_models.VOCABULARY, (24,), generator=generator) for _ in range(400)]
    config = balcony.settings(
        6, own=0.0, corpus=9000, tokens=16_000, batch=400, lr=1e-3, evaluate_every=5, checkpoint_every=50, evaluate_rows=400
    )
    exits = balcony.train(model, texts, output=tmp_path, exits=[2, 4], config=config, progress=False)
    from dyndepth.training.trainer import metrics

    looks = [entry["validation"] for entry in metrics(tmp_path / "run") if "validation" in entry]
    for leave in ("2", "4"):
        assert looks[-1][leave]["kl"] < 0.9 * looks[0][leave]["kl"]
    assert exits.record["recipe"].startswith("Balcony")
    assert balcony.budgets(exits) == {"M": 2, "L": 4, "XL": 6}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loaded, inputs = Exits.from_pretrained(tmp_path / "exits"), tiny_models.prompts(4)
    assert all(isinstance(band.criterion, FixedDepth) for band in loaded)
    assert loaded.record["recipe"] == exits.record["recipe"]
    asked = ["M", "L", "XL", 2]
    ours = balcony.generate(model, inputs, loaded, asked, **OPTIONS)
    assert torch.equal(ours, balcony.generate(model, inputs, exits, asked, **OPTIONS))
    direct = model.generate(
        **inputs, custom_generate=dyndepth.generate, exits=loaded, depth=[2, 4, None, 2], kv="none", **OPTIONS
    )
    assert torch.equal(ours, direct)
    head: Any = exits.bands[0].head
    assert not torch.equal(head.layer.mlp.up_proj.weight, model.model.layers[-1].mlp.up_proj.weight)
    assert bind(model).depth == 6


def test_other_heads_are_no_balcony(tmp_path: Path) -> None:
    config = dataclasses.replace(TrainConfig(), exits=(2,))
    with pytest.raises(ArgumentError, match=r"config\.head must be block, got 'translator'"):
        balcony.train(tiny_models.shared("llama"), output=tmp_path, config=config)
