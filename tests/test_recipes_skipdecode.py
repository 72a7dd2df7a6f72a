"""SkipDecode: a depth that falls with the step, the same for all rows; lower layers skipped; no K,V read that nobody wrote."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.exits import Band, Exits, Schedule
from dyndepth.recipes import skipdecode
from dyndepth.runtime.bind import bind
from dyndepth.runtime.session import Session

NEW = 14
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
SCHEDULES = [
    {"least": 2, "length": 8, "most": 6, "warmup": 1},
    {"least": 3, "length": 5, "most": 5, "warmup": 2},
    {"least": 4, "length": 3, "most": 6, "warmup": 1},
]


def layers_of(depth: int, warmup: int) -> list[int]:
    """The layers that a token of this depth runs."""
    return [*range(warmup), *range(6 - depth + warmup, 6)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_depth_falls_with_the_step_and_rows_are_alike(schedule: dict[str, int]) -> None:
    """Prompts of different lengths; the layers by hooks on their modules. In code where the position never arrives the depth
    would stay that of step 0."""
    model, inputs = tiny_models.tiny("llama"), tiny_models.prompts(5)
    exits = skipdecode.exits(model, **schedule)
    counts: list[list[int]] = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: counts.append([0] * 6))
    for number, layer in enumerate(model.model.layers):

        def count(module: Any, args: Any, output: Any, number: int = number) -> None:
            counts[-1][number] += output.shape[0]

        layer.mlp.down_proj.register_forward_hook(count)
    out = skipdecode.generate(model, inputs, exits, **OPTIONS)
    wanted = [skipdecode.depth_at(t, **{k: v for k, v in schedule.items() if k != "warmup"}) for t in range(NEW)]
    assert out.layers_run.tolist() == [wanted] * 5
    assert wanted[0] == schedule["most"]
    assert wanted[-1] == schedule["least"]
    assert wanted == sorted(wanted, reverse=True)
    ran = [[5 if layer in layers_of(depth, schedule["warmup"]) else 0 for layer in range(6)] for depth in wanted]
    assert counts[-NEW:] == ran
    assert out.kv == "none"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_key_is_read_that_nobody_wrote(schedule: dict[str, int]) -> None:
    """Pages full of NaN: what a row reads was written, and what it skipped was not."""
    model = bind(tiny_models.shared("llama"))
    exits = skipdecode.exits(tiny_models.shared("llama"), **schedule)
    tokens = torch.randint(3, tiny_models.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    session = Session(model, [20, 20], exits, kv="none")
    session.pages.kv.fill_(torch.nan)
    session.prefill([tokens[0, :4], tokens[1, :4]], session.work())
    for step in range(16):
        result = session.run([0, 1], [4 + step] * 2, tokens=tokens[:, 4 + step], step=[step] * 2)
        assert bool(result.ready.isfinite().all())
        slot = session.pages.slots([0], [4 + step]).long()
        written = session.pages.kv.flatten(2, 3)[:, 0, slot[0]].isfinite().all((-2, -1))
        assert written.nonzero()[:, 0].tolist() == layers_of(int(result.layers_run[0]), schedule["warmup"])


def cut(model: Any, layers: list[int]) -> Any:
    small = copy.deepcopy(model)
    small.model.layers = torch.nn.ModuleList([small.model.layers[number] for number in layers])
    for number, layer in enumerate(small.model.layers):
        layer.self_attn.layer_idx = number
    small.config.num_hidden_layers = len(layers)
    return small


@pytest.mark.parametrize(("depth", "warmup"), [(3, 1), (4, 2), (5, 4)])
def test_a_constant_schedule_is_the_model_without_those_layers(depth: int, warmup: int) -> None:
    """transformers' own, low layers deleted; prompts at the same depth."""
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(4)
    exits = skipdecode.exits(model, depth, 4, most=depth, warmup=warmup)
    out = skipdecode.generate(model, inputs, exits, prompt="dynamic", **OPTIONS)
    assert torch.equal(out.sequences, cut(model, layers_of(depth, warmup)).generate(**inputs, **OPTIONS).sequences)


def test_a_falling_depth_is_shorter_models_on_one_cache() -> None:
    """By hand: at each step transformers' own layers, those of the depth, over a cache that all steps share."""
    from transformers import DynamicCache

    model, schedule = tiny_models.shared("llama"), {"least": 2, "length": 6, "most": 6}
    ids: Tensor = tiny_models.prompts(1)["input_ids"]
    exits = skipdecode.exits(model, warmup=1, **schedule)
    out = skipdecode.generate(model, ids, exits, output_logits=True, **OPTIONS)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
        for step in range(NEW):
            at = ids.shape[1] - 1 + step
            hidden = model.model.embed_tokens(out.sequences[:, at : at + 1])
            rotary = model.model.rotary_emb(hidden, torch.tensor([[at]]))
            for number in layers_of(skipdecode.depth_at(step, **schedule), 1):
                hidden = model.model.layers[number](
                    hidden,
                    attention_mask=None,
                    position_ids=torch.tensor([[at]]),
                    past_key_values=cache,
                    position_embeddings=rotary,
                )
            logits = model.lm_head(model.model.norm(hidden))[0, 0]
            torch.testing.assert_close(out.logits[step][0], logits, rtol=1e-3, atol=1e-3)


def test_no_skipping_is_transformers_own() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(4)
    exits = skipdecode.exits(model, 6, 1)
    assert len(exits) == 0
    assert torch.equal(
        skipdecode.generate(model, inputs, exits, **OPTIONS).sequences, model.generate(**inputs, **OPTIONS).sequences
    )


def test_a_depth_that_rises_is_refused() -> None:
    """A band that a schedule keeps later rows from would leave holes that they read."""
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(2)
    # A wide band low down takes rows away from the boundary of another: they stop skipping what they skipped.
    bands = [Band(1, 3, Schedule(first=9, last=0, length=4)), Band(2, 5, Schedule(first=0, last=0, length=1))]
    holes = Exits(bands, skipdecode.exits(model, 4, 4).model)
    with pytest.raises(ExitsError, match="a later step runs a layer that an earlier one skipped"):
        skipdecode.generate(model, inputs, holes, **OPTIONS)


@pytest.mark.parametrize("length", [3, 7, 48, 100])
def test_every_model_depth_follows_the_line(length: int) -> None:
    """Rounding: bands of any depth open so that layers run are the line's, at every step."""
    model = tiny_models.tiny("llama", num_hidden_layers=40)
    for most, least, warmup in ((40, 11, 1), (33, 32, 3), (37, 5, 4)):
        exits = skipdecode.exits(model, least, length, most=most, warmup=warmup)
        steps = torch.arange(length + 5, dtype=torch.int32)
        from dyndepth.exits.criteria import View

        skipped = torch.zeros(40, len(steps), dtype=torch.bool)
        for band in exits:
            view: Any = View(
                hidden=steps,
                seq=steps,
                step=steps,
                previous=None,
                stats=None,
                depth=None,
                leave=band.leave,
                layers=40,  # type: ignore[arg-type]
            )
            skipped[band.leave] = band.criterion.leaves(view, steps)
        depths = 40 - skipped.sum(0)
        assert depths.tolist() == [skipdecode.depth_at(t, most=most, least=least, length=length) for t in range(length + 5)]
        for step, depth in enumerate(depths.tolist()):
            assert skipped[:, step].nonzero()[:, 0].tolist() == list(range(warmup, warmup + 40 - depth))


def test_budgets_and_refusals() -> None:
    assert skipdecode.least_for(0.75, 32) == 16
    assert skipdecode.least_for(0.5, 24, most=20) == 4
    with pytest.raises(ArgumentError, match=r"budget must be in \[0.531, 1.000\] of 32 layers, got 0.5"):
        skipdecode.least_for(0.5, 32)
    model = tiny_models.shared("llama")
    for wrong in (
        {"least": 1},
        {"least": 4, "most": 3},
        {"least": 3, "warmup": 0},
        {"least": 3, "length": 0},
        {"least": 3, "most": 7},
    ):
        with pytest.raises(ArgumentError, match="the top layer always runs"):
            skipdecode.exits(model, **({"length": 4} | wrong))
