"""Observers: what exits thought of each row and what the full model says of it, against transformers' own states."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
from full_model import FullModel, text_of

import dyndepth
from dyndepth.errors import ArgumentError
from dyndepth.exits import Always, Band, Exits, Margin, Patience, TopProbability
from dyndepth.runtime.bind import bind
from dyndepth.runtime.observe import Observed
from dyndepth.runtime.session import Session

OPTIONS: dict[str, Any] = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True}
#: Settings of the three ways in which the full model has its say.
WAYS: dict[str, dict[str, Any]] = {
    "recompute": {"kv": "recompute", "pending": 3},
    "release": {"kv": "release"},
    "lossless": {"mode": "lossless", "drafts": 3},
}


def norm_exits(model: Any) -> Exits:
    return tiny_exits.exits_of(model, Band(2, 6, TopProbability(), threshold=0.9), Band(4, 6, Margin(), threshold=0.5))


def run(model: Any, inputs: dict[str, Any], exits: Exits, **options: Any) -> tuple[Any, list[Observed]]:
    seen: list[Observed] = []
    out = model.generate(**inputs, custom_generate=dyndepth.generate, exits=exits, observe=seen.append, **(OPTIONS | options))
    return out, seen


@pytest.mark.parametrize("way", WAYS)
def test_observations_are_what_transformers_states_say(way: str) -> None:
    """Scores and tokens at every exit that judged the row, and the full model's token; every row that came to the top, once."""
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(5)
    out, seen = run(model, inputs, norm_exits(model), **WAYS[way])
    found = {}
    for each in seen:
        assert each.exits == (2, 4)
        for row, place in enumerate(zip(each.seq.tolist(), each.step.tolist(), strict=True)):
            assert place not in found
            found[place] = (each.scores[row], each.tokens[row], each.full[row], each.agrees[row])
    told, refused = 0, 0
    for sequence in range(5):
        text, first = text_of(out, inputs, sequence)
        full = FullModel(model, text)
        said = {leave: full.exit_logits(leave).argmax(-1) for leave in (2, 4, 6)}
        depths = out.exit_layers[sequence].tolist()
        for step, depth in enumerate(depths):
            reached = {"recompute": max(depths[step:]) == 6, "release": True, "lossless": True}[way]
            assert ((sequence, step) in found) == reached
            if not reached:
                continue
            scores, tokens, answer, agrees = found[sequence, step]
            at = first + step
            assert answer == said[6][at]
            for column, leave in enumerate((2, 4)):
                # A draft that was refused left somewhere, and a row that follows a full round of drafts is not judged.
                judged = tokens[column] >= 0 if way == "lossless" and depth == 6 else way == "release" or leave <= depth
                if not judged:
                    assert scores[column].isnan()
                    assert (int(tokens[column]), bool(agrees[column])) == (-1, False)
                    continue
                best = torch.softmax(full.exit_logits(leave)[at], -1).topk(2).values
                wanted = best[0] if leave == 2 else best[0] - best[1]
                assert float(scores[column]) == pytest.approx(float(wanted), abs=1e-4)
                assert tokens[column] == said[leave][at]
                assert bool(agrees[column]) == bool(said[leave][at] == said[6][at])
                told += 1
                refused += not bool(agrees[column])
    assert told > 25
    assert refused > 3


@pytest.mark.parametrize("way", WAYS)
def test_watching_changes_nothing_and_costs_nothing_unwatched(way: str, monkeypatch: Any) -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(4)
    exits = norm_exits(model)
    watched, _ = run(model, inputs, exits, **WAYS[way])
    from dyndepth.runtime import forward

    def nobody(*_: Any) -> Any:
        raise AssertionError("asked for without an observer")

    monkeypatch.setattr(forward, "names", nobody)
    for provider in (None, "torch"):
        with contextlib.nullcontext() if provider is None else dyndepth.backend(provider):
            plain = model.generate(**inputs, custom_generate=dyndepth.generate, exits=exits, **(OPTIONS | WAYS[way]))
        assert torch.equal(plain.sequences, watched.sequences)
        assert torch.equal(plain.exit_layers, watched.exit_layers)
        assert plain.work.layers == watched.work.layers
    # The one call of C++ that judges stays in use.
    session = Session(bind(model), [4], exits)
    band = session.plan.bands[2]
    watching = Session(bind(model), [4], exits, kv="release", observed=True)
    assert watching.plan.judge(watching.plan.bands[2]) is None
    if isinstance(bind(model).stack, str):
        pytest.skip("there is no such call here")
    assert session.plan.judge(band) is not None


@pytest.mark.parametrize("kind", ["shortlist", "block", "always", "patience", "router"])
def test_every_kind_of_exit_is_told(kind: str) -> None:
    """Tokens are of the whole vocabulary and of the exit's own head; criteria without a score have none."""
    from dyndepth.runtime.block import block_head

    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(3)
    band = {
        "shortlist": lambda: Band(2, 6, Margin(), threshold=0.3, shortlist=torch.arange(3, 60)),
        "block": lambda: Band(2, 6, TopProbability(), threshold=0.5, head=block_head(bind(model), 2)),
        "always": lambda: Band(2, 6, Always()),
        "patience": lambda: Band(2, 6, Patience(), threshold=0.0),
        "router": lambda: tiny_exits.band(model, 2, 6, head="mlp"),
    }[kind]()
    exits = tiny_exits.exits_of(model, band)
    out, seen = run(model, inputs, exits, kv="release")
    assert all(bool((each.scores.isnan()).all()) == (kind == "always") for each in seen)
    left = out.exit_layers == 2
    assert bool(left.any())
    for each in seen:
        for row, (sequence, step) in enumerate(zip(each.seq.tolist(), each.step.tolist(), strict=True)):
            said = int(each.tokens[row, 0])
            if left[sequence, step] and said != 2:  # the end is forbidden here
                assert int(out.sequences[sequence, 13 + step]) == said
            if not left[sequence, step] and int(each.full[row]) != 2:
                assert int(out.sequences[sequence, 13 + step]) == int(each.full[row])


def test_closed_exits_are_watched() -> None:
    """Nobody leaves, and every score is told: what thresholds are tuned on."""
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(3)
    out, seen = run(model, inputs, norm_exits(model).with_thresholds(float("inf")), kv="release")
    assert torch.equal(out.sequences, model.generate(**inputs, **OPTIONS).sequences)
    scores, tokens = torch.cat([each.scores for each in seen]), torch.cat([each.tokens for each in seen])
    assert scores.shape == (3 * 14, 2)
    assert not scores.isnan().any()
    assert bool((tokens >= 0).all())


def test_refusals() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(2)
    with pytest.raises(ArgumentError, match=r"observe compares exits with the full model, .* got kv='propagate'"):
        run(model, inputs, norm_exits(model), kv="propagate")
