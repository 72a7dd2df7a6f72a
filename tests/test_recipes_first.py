"""FiRST: layer sets per sequence, decided by its prompt."""

from __future__ import annotations

from typing import Any

import by_hand
import pytest
import tiny_exits
import tiny_models
import torch
from torch import Tensor

import dyndepth
from dyndepth.engine import Engine
from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.exits import Band, Exits, PromptRouter, Router, Schedule
from dyndepth.recipes import first, flexidepth
from dyndepth.runtime.bind import bind
from dyndepth.runtime.score import score
from dyndepth.runtime.session import Session

NEW = 12
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}


def made(model: Any, threshold: float = 0.5, **options: Any) -> Exits:
    return first.exits(flexidepth.exits(model, tiny_exits.gates(**options)), threshold)


def real(inputs: dict[str, Tensor], row: int) -> Tensor:
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()]


def wanted_sets(model: Any, inputs: dict[str, Tensor], threshold: float) -> list[list[int]]:
    """Layers that each sequence leaves out, from transformers' residuals of the prompt but for its last token."""
    found = []
    for row in range(inputs["input_ids"].shape[0]):
        with torch.no_grad():
            states = model(real(inputs, row)[None], output_hidden_states=True).hidden_states
        scores = {layer: router(states[layer][0, :-1]) for layer, (router, _) in tiny_exits.gates().items()}
        found.append([layer for layer, score in scores.items() if len(score) and float(score.mean()) >= threshold])
    return found


@pytest.mark.parametrize("chunk", [512, 7])
def test_the_prompt_decides_for_all_new_tokens(chunk: int) -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(8)
    threshold = 0.47
    exits = made(model, threshold)
    out = first.generate(model, inputs, exits, output_logits=True, prefill_chunk=chunk, **OPTIONS)
    sets = wanted_sets(model, inputs, threshold)
    assert len({tuple(each) for each in sets}) >= 3, "sequences must go different ways for this to test anything"
    bits = [sum(1 << [2, 3, 4].index(layer) for layer in each) for each in sets]
    assert out.bands_taken.tolist() == [[bit] * NEW for bit in bits]
    assert out.layers_run.tolist() == [[6 - len(each)] * NEW for each in sets]
    assert out.prompt_work.fraction == 1
    jumps = {layer: jump for layer, (_, jump) in tiny_exits.gates().items()}
    for row, each in enumerate(sets):
        prompt = real(inputs, row)
        ids = torch.cat([prompt, out.sequences[row, inputs["input_ids"].shape[1] : -1]])
        theirs = by_hand.logits(
            model,
            ids,
            len(prompt),
            lambda step: lambda layer, hidden: jumps[layer](hidden) if layer in each else None,  # noqa: B023
        )
        for step in range(NEW):
            torch.testing.assert_close(out.logits[step][row], theirs[step], rtol=1e-3, atol=1e-3)


def test_neighbours_change_nothing() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(6)
    exits = made(model, 0.47)
    together = first.generate(model, inputs, exits, **OPTIONS)
    for row in range(6):
        prompt = real(inputs, row)
        alone = first.generate(model, prompt[None], exits, **OPTIONS)
        assert alone.sequences[0, len(prompt) :].tolist() == together.sequences[row, 13:].tolist()
        assert torch.equal(alone.bands_taken[0], together.bands_taken[row])


def test_no_key_is_read_that_nobody_wrote() -> None:
    """Pages full of NaN; a one-token prompt has nobody to ask and runs every layer."""
    causal_lm = tiny_models.shared("llama")
    exits = made(causal_lm, 0.47)
    session = Session(bind(causal_lm), [20, 20, 20], exits, kv="none")
    session.pages.kv.fill_(torch.nan)
    tokens = torch.randint(3, tiny_models.VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(2))
    session.prefill([tokens[0, :6], tokens[1, :3], tokens[2, :0]], session.work())
    at = [6, 3, 0]
    for step in range(10):
        pos = [begin + step for begin in at]
        result = session.run([0, 1, 2], pos, tokens=tokens[[0, 1, 2], pos], step=[step] * 3)
        assert bool(result.ready.isfinite().all())
        assert int(result.layers_run[2]) == 6
        for row in range(3):
            slot = int(session.pages.slots([row], [pos[row]]))
            written = session.pages.kv.flatten(2, 3)[:, 0, slot].isfinite().all((-2, -1))
            assert int(written.sum()) == int(result.layers_run[row])


def test_saved_sets_decide_the_same(tmp_path: Any) -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(4)
    exits = made(model, 0.47)
    exits.save_pretrained(tmp_path)
    loaded = Exits.from_pretrained(tmp_path)
    assert all(isinstance(band.criterion, PromptRouter) for band in loaded)
    again = first.generate(model, inputs, loaded, **OPTIONS)
    assert torch.equal(again.bands_taken, first.generate(model, inputs, exits, **OPTIONS).bands_taken)
    assert first.exits(flexidepth.exits(model, tiny_exits.gates(), 0.3)).bands[0].threshold == 0.3


def test_drafts_may_leave_out_what_the_prompt_decides() -> None:
    """The same sets as drafts of lossless generation, which asks no verified row."""
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(6)
    exits = made(model, 0.47, maps=False)
    plain = model.generate(**inputs, **OPTIONS)
    out = first.generate(model, inputs, exits, mode="lossless", **OPTIONS)
    assert torch.equal(out.sequences, plain.sequences)
    sets = wanted_sets(model, inputs, 0.47)
    for row, each in enumerate(sets):
        bits = sum(1 << [2, 3, 4].index(layer) for layer in each)
        assert set(out.bands_taken[row].tolist()) <= {0, bits}


def test_refusals() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(2)
    exits = made(model)
    with pytest.raises(ArgumentError, match="prompt must be 'full' with bands that prompts decide"):
        first.generate(model, inputs, exits, prompt="dynamic", **OPTIONS)
    with pytest.raises(ExitsError, match="criterion prompt_router is decided while generate runs a prompt"):
        score(model, [torch.arange(3, 12)], exits)
    with pytest.raises(ArgumentError, match="Engine: bands that prompts decide"):
        Engine(model, exits, kv="none")
    with pytest.raises(ArgumentError, match=r"first.exits: bands must resume below the top under a router, got \[4, 6\)"):
        first.exits(tiny_exits.exits_of(model, tiny_exits.band(model, 4, 6)))
    with pytest.raises(ExitsError, match="the router may look at the residual alone"):
        PromptRouter(Router(48, 1, cosine=True))
    mixed = Exits([*exits.bands, Band(5, 6, Schedule(6, 5, 4))], exits.model)
    with pytest.raises(ExitsError, match="a schedule beside bands that prompts decide"):
        model.generate(**inputs, custom_generate=dyndepth.generate, exits=mixed, kv="none", max_new_tokens=3)
