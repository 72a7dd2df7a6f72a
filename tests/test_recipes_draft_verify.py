"""Draft & Verify: the full model's text with drafts that leave out layers, and a search that finds the layers nobody misses."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch

from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.exits import Exits
from dyndepth.recipes import draft_verify
from dyndepth.runtime.bind import bind

OPTIONS: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True}


def idle(*layers: int) -> Any:
    """A model in which these layers add nothing to the residual."""
    model = tiny_models.tiny("llama")
    for number in layers:
        model.model.layers[number].self_attn.o_proj.weight.data.zero_()
        model.model.layers[number].mlp.down_proj.weight.data.zero_()
    return model


@pytest.mark.parametrize("layers", [[2], [1, 2, 4], [1, 5], [3, 4, 5]])
def test_greedy_tokens_are_the_full_models(layers: list[int]) -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(5)
    exits = draft_verify.exits(model, layers)
    assert sorted(layer for band in exits for layer in range(band.leave, band.resume)) == layers
    out = draft_verify.generate(model, inputs, exits, **OPTIONS)
    assert torch.equal(out.sequences, model.generate(**inputs, **OPTIONS).sequences)
    assert int(out.drafted.sum()) > 10


def test_layers_that_add_nothing_are_never_missed() -> None:
    """Every draft holds, and a drafting pass runs four of six layers."""
    model, inputs = idle(2, 4), tiny_models.prompts(3)
    out = draft_verify.generate(
        model, inputs, draft_verify.exits(model, [4, 2]), drafts=3, confidence=None, eos_token_id=None, **OPTIONS
    )
    assert torch.equal(out.accepted, out.drafted)
    verified = out.work.rows - int(out.accepted.sum())
    drafted = int(out.drafted.sum())
    assert drafted == 12 * 3  # sixteen tokens are four times three drafts and one token more
    assert out.work.layers == [drafted * times + verified for times in (1, 1, 1, 2, 1, 2)]


def test_the_search_finds_them() -> None:
    model = idle(2, 4)
    prompts = [torch.randint(3, tiny_models.VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 9, 12)]
    found = draft_verify.search(model, prompts, drafts=4, tokens=15, most=3)
    record = found.record["draft_verify"]
    assert record["layers"] == [2, 4]
    assert [(band.leave, band.resume) for band in found] == [(2, 3), (4, 5)]
    best = next(trial for trial in record["trials"] if list(trial["layers"]) == [2, 4])
    assert best["accepted"] == best["drafted"]
    assert record["gain"] == best["gain"] == max(trial["gain"] for trial in record["trials"]) > 1.2
    # Layers alone, then three, three and no more: the second step has three candidates, of which one is not left for the third.
    assert [len(trial["layers"]) for trial in record["trials"]] == [1] * 5 + [2] * 3 + [3] * 3
    few = draft_verify.search(model, prompts, tokens=15, budget=6)
    assert len(few.record["draft_verify"]["trials"]) == 6
    one = draft_verify.search(model, prompts, tokens=15, most=1)
    assert one.record["draft_verify"]["layers"] in ([2], [4])


def test_gain_by_hand() -> None:
    """Ten tokens: six accepted of eight drafts leave four verifications; 10 layers and a head of 2, four layers left out."""
    assert draft_verify.gain(10, 8, 6, layers=10, skipped=4, head=2.0) == pytest.approx(10 * 12 / (8 * 8 + 4 * 12))
    assert draft_verify.gain(10, 0, 0, layers=10, skipped=4, head=2.0) == 1
    model = bind(tiny_models.shared("llama"))
    # width 48, q 84, k and v 28 each, inner 72, two norms; head 203 rows
    layer = 48 * (84 + 28 + 28) + 84 * 48 + 3 * 48 * 72 + 2 * 48
    assert draft_verify.head_in_layers(model) == pytest.approx(203 * 48 / layer)


def test_exits_are_saved(tmp_path: Any) -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(2)
    draft_verify.search(model, [torch.tensor([5, 6, 7])], tokens=4, most=1).save_pretrained(tmp_path)
    out = draft_verify.generate(model, inputs, Exits.from_pretrained(tmp_path), **OPTIONS)
    assert torch.equal(out.sequences, model.generate(**inputs, **OPTIONS).sequences)


def test_refusals() -> None:
    model = tiny_models.shared("llama")
    for layers in ([], [0], [6], [2, 2]):
        with pytest.raises(ArgumentError, match="layers must be different numbers from 1 to 5, at least one, got"):
            draft_verify.exits(model, layers)
    with pytest.raises(ArgumentError, match=r"wanted most in \[1, 5\] and width, drafts, tokens, budget >= 1, got most 6"):
        draft_verify.search(model, [torch.tensor([3])], most=6)
    with pytest.raises(NotEnoughDataError, match="wanted at least one prompt, got none"):
        draft_verify.search(model, [])
