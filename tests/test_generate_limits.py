"""Where generation runs out of something, or could: pages, positions, depth by request, ended sequences, autocast."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
import transformers as t

import dyndepth
from dyndepth.errors import ArgumentError, ExitsError, UnsupportedModelError
from dyndepth.exits import Always, Band, FixedDepth, Schedule, TopProbability
from dyndepth.runtime.bind import bind

MODEL = tiny_models.shared("llama")
INPUTS = tiny_models.prompts(6)


def both(**options: Any) -> tuple[Any, Any]:
    """transformers and dyndepth at full depth, with the same options and seeds."""
    settings = {"max_new_tokens": 10, "do_sample": False} | options
    torch.manual_seed(5)
    theirs = MODEL.generate(**INPUTS, **settings)
    torch.manual_seed(5)
    ours = MODEL.generate(**INPUTS, custom_generate=dyndepth.generate, **settings)
    return ours, theirs


@pytest.mark.parametrize(
    ("bands", "fits"),
    [
        (
            [Band(1, 4, Schedule(6, 1, 4)), Band(2, 6, Always())],
            False,
        ),  # later steps run layers 4, 5, which earlier ones skipped
        ([Band(1, 6, Schedule(6, 1, 4)), Band(2, 6, Always())], True),
        ([Band(2, 4, Always()), Band(5, 6, Schedule(6, 5, 4))], True),
        ([Band(3, 6, FixedDepth()), Band(5, 6, Schedule(6, 5, 4))], True),
    ],
)
def test_policy_none_looks_at_all_bands_together(bands: list[Band], fits: bool, poisoned: None) -> None:
    exits = tiny_exits.exits_of(MODEL, *bands)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    if not fits:
        with pytest.raises(ExitsError, match="a later step runs a layer that an earlier one skipped"):
            MODEL.generate(**INPUTS, custom_generate=dyndepth.generate, exits=exits, kv="none", **options)
        return
    out = MODEL.generate(**INPUTS, custom_generate=dyndepth.generate, exits=exits, kv="none", eos_token_id=None, **options)
    assert out.work.fraction < 1
    assert all(bool(logits.isfinite().all()) for logits in out.logits)


def test_pages_are_freed_when_sequences_end() -> None:
    """With pages that would not do if ended sequences kept theirs: those of short ones are needed for the long one."""
    width = INPUTS["input_ids"].shape[1]
    _, free = both(max_new_tokens=24, eos_token_id=None)
    ends = sorted({int(free[row, width + 2]) for row in range(0, 6, 2)})
    ours, theirs = both(max_new_tokens=24, eos_token_id=ends)
    assert torch.equal(ours, theirs)
    is_end = torch.isin(theirs[:, width:], torch.tensor(ends))
    short = [int(row.nonzero()[0]) + 1 if bool(row.any()) else 24 for row in is_end]
    assert min(short) < 6 < max(short), "some sequences must end early for this to test anything"
    prompts = INPUTS["attention_mask"].sum(1).tolist()

    def needed(step: int, keep: bool) -> int:
        return sum(-(-(p + min(step, s)) // 2) for p, s in zip(prompts, short, strict=True) if keep or s > step)

    enough, too_few = (max(needed(step, keep) for step in range(24)) for keep in (False, True))
    assert enough < too_few - 1
    ours = MODEL.generate(
        **INPUTS, custom_generate=dyndepth.generate, max_new_tokens=24, do_sample=False, page_size=2, pages=enough + 1,
        eos_token_id=ends,
    )  # fmt: skip
    assert torch.equal(ours, theirs)


def test_a_high_limit_costs_nothing() -> None:
    """K,V pages are taken as they are needed: a limit nobody reaches takes no memory, and growing changes no token."""
    options: dict[str, Any] = {"max_new_tokens": 10_000_000, "stopping_criteria": t.StoppingCriteriaList([AfterTwenty()])}
    ours, theirs = both(**options)
    assert torch.equal(ours, theirs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dyndepth.runtime.generate._ROOM", 1)
        grown, _ = both(**options)
    assert torch.equal(grown, theirs)


class AfterTwenty(t.StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 20 + INPUTS["input_ids"].shape[1])


class FirstRowAfterThree(t.StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.arange(input_ids.shape[0]) * 100 + 3 + INPUTS["input_ids"].shape[1] <= input_ids.shape[1]


def test_without_eos_ended_sequences_go_on_as_in_transformers() -> None:
    criteria = t.StoppingCriteriaList([FirstRowAfterThree()])
    ours, theirs = both(eos_token_id=None, stopping_criteria=criteria, max_new_tokens=8)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_learned_positions_to_the_last(name: str) -> None:
    """The last new token is never embedded, so prompt + new tokens may be one more than the model has positions."""
    model = tiny_models.shared(name)
    limit = bind(model).positions_limit
    assert limit is not None
    tokens = torch.randint(3, 90, (2, 5))
    options = {"max_new_tokens": limit - 5 + 1, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ours = model.generate(tokens, custom_generate=dyndepth.generate, **options)
    assert torch.equal(ours, model.generate(tokens, **options))
    options["max_new_tokens"] = limit - 5 + 2
    with pytest.raises(UnsupportedModelError, match=f"would reach {limit + 1} positions, the model has learned {limit}"):
        model.generate(tokens, custom_generate=dyndepth.generate, **options)


def test_depth_is_repeated_with_the_prompts() -> None:
    exits = tiny_exits.exits_of(MODEL, tiny_exits.band(MODEL, 3, 6, FixedDepth()), tiny_exits.band(MODEL, 5, 6, threshold=-1.0))
    prompts = {name: value[:2] for name, value in INPUTS.items()}
    out = MODEL.generate(
        **prompts, custom_generate=dyndepth.generate, exits=exits, depth=[3, None], num_return_sequences=2, do_sample=True,
        max_new_tokens=3, return_dict_in_generate=True, eos_token_id=None,
    )  # fmt: skip
    assert out.exit_layers.tolist() == [[3] * 3] * 2 + [[5] * 3] * 2
    with pytest.raises(ArgumentError, match="depth must be an int or one int or None per request, got 'deep'"):
        MODEL.generate(**prompts, custom_generate=dyndepth.generate, exits=exits, depth=["deep", None], max_new_tokens=2)


def test_a_request_with_a_depth_is_judged_by_nothing_else() -> None:
    """Every criterion would let everybody go at boundary 1; a request that asks for 5 or for the top gets that."""
    exits = tiny_exits.exits_of(
        MODEL,
        tiny_exits.band(MODEL, 1, 6, TopProbability(), threshold=-math.inf),
        tiny_exits.band(MODEL, 2, 4, Always()),
        tiny_exits.band(MODEL, 5, 6, FixedDepth()),
    )
    out = MODEL.generate(
        **INPUTS, custom_generate=dyndepth.generate, exits=exits, depth=[5, 6, None, 5, 6, None], max_new_tokens=3,
        return_dict_in_generate=True, eos_token_id=None,
    )  # fmt: skip
    assert out.exit_layers[:, 0].tolist() == [5, 6, 1, 5, 6, 1]
    assert out.layers_run[:, 0].tolist() == [5, 6, 1, 5, 6, 1]


def test_numpy_depth_and_wrong_exits() -> None:
    import numpy as np

    exits = tiny_exits.exits_of(MODEL, tiny_exits.band(MODEL, 3, 6, FixedDepth()))
    MODEL.generate(**INPUTS, custom_generate=dyndepth.generate, exits=exits, depth=np.int64(3), max_new_tokens=2)
    with pytest.raises(ArgumentError, match=r"exits must be dyndepth\.Exits .* got str"):
        MODEL.generate(**INPUTS, custom_generate=dyndepth.generate, exits="exits/", max_new_tokens=2)


@pytest.mark.parametrize("name", ["llama", "olmo2", "gpt2", "gpt_neox", "opt_post_norm"])
def test_autocast_changes_nothing(name: str) -> None:
    model, exits = tiny_models.shared(name), tiny_exits.mixed(tiny_models.shared(name))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "custom_generate": dyndepth.generate, "exits": exits}
    plain = model.generate(**INPUTS, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.generate(**INPUTS, **options), plain)
