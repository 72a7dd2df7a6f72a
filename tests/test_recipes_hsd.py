"""Hierarchical Skip Decoding: sets of layers that grow level by level, evenly spread; no K,V read that nobody wrote."""

from __future__ import annotations

import itertools
from typing import Any

import by_hand
import pytest
import tiny_models
import torch

from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits
from dyndepth.recipes import hsd
from dyndepth.runtime.bind import bind
from dyndepth.runtime.session import Session

NEW = 14
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
SHAPES = [
    {"least": 3, "length": 9, "levels": 3},
    {"least": 2, "length": 4, "levels": 2},
    {"least": 5, "length": 7, "levels": 1},
]


def skipped(step: int, shape: dict[str, int], layers: int = 6) -> list[int]:
    return hsd.skipped_at(step, layers=layers, bottom=1, top=1, **shape)


def test_the_order_by_hand() -> None:
    assert hsd.order(8) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert hsd.order(6) == [0, 4, 2, 1, 5, 3]
    assert hsd.order(1) == [0]
    shape = {"layers": 10, "least": 4, "length": 12, "levels": 3, "bottom": 1, "top": 1}
    assert [hsd.skipped_at(step, **shape) for step in (0, 3, 4, 8, 12, 99)] == [
        [], [], [1, 5], [1, 3, 5, 7], [1, 2, 3, 5, 6, 7], [1, 2, 3, 5, 6, 7],
    ]  # fmt: skip


@pytest.mark.parametrize("layers", [5, 8, 12, 30, 33])
def test_sets_are_nested_and_evenly_spread(layers: int) -> None:
    order = hsd.order(layers)
    assert sorted(order) == list(range(layers))
    half = sorted(order[: (layers + 1) // 2])
    assert all(b - a >= 2 for a, b in itertools.pairwise(half)), "no two neighbours among the first half"
    for count in range(2, layers):
        gaps = [b - a for a, b in itertools.pairwise(sorted(order[:count]))]
        assert max(gaps) <= 2 * max(2, layers / count) + 1


@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_leaves_out_the_layers_of_its_level(shape: dict[str, int]) -> None:
    model, inputs = tiny_models.tiny("llama"), tiny_models.prompts(4)
    counts: list[list[int]] = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: counts.append([0] * 6))
    for number, layer in enumerate(model.model.layers):

        def count(module: Any, args: Any, output: Any, number: int = number) -> None:
            counts[-1][number] += output.shape[0]

        layer.mlp.down_proj.register_forward_hook(count)
    out = hsd.generate(model, inputs, hsd.exits(model, **shape), **OPTIONS)
    assert counts[-NEW:] == [[0 if layer in skipped(step, shape) else 4 for layer in range(6)] for step in range(NEW)]
    assert out.layers_run.tolist() == [[6 - len(skipped(step, shape)) for step in range(NEW)]] * 4
    assert out.layers_run[0, -1] == shape["least"]
    assert out.kv == "none"


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_those_of_transformers_layers_by_hand(shape: dict[str, int]) -> None:
    model, ids = tiny_models.shared("llama"), tiny_models.prompts(1)["input_ids"]
    out = hsd.generate(model, ids, hsd.exits(model, **shape), output_logits=True, **OPTIONS)
    wanted = by_hand.logits(
        model, out.sequences[0, :-1], ids.shape[1],
        lambda step: lambda layer, hidden: hidden if layer in skipped(step, shape) else None,
    )  # fmt: skip
    for mine, theirs in zip(out.logits, wanted, strict=True):
        torch.testing.assert_close(mine[0], theirs, rtol=1e-3, atol=1e-3)


def test_no_key_is_read_that_nobody_wrote() -> None:
    """Pages full of NaN."""
    causal_lm = tiny_models.shared("llama")
    session = Session(bind(causal_lm), [20], hsd.exits(causal_lm, **SHAPES[0]), kv="none")
    session.pages.kv.fill_(torch.nan)
    tokens = torch.randint(3, tiny_models.VOCABULARY, (20,), generator=torch.Generator().manual_seed(0))
    session.prefill([tokens[:4]], session.work())
    for step in range(16):
        result = session.run([0], [4 + step], tokens=tokens[4 + step : 5 + step], step=[step])
        assert bool(result.ready.isfinite().all())
        slot = int(session.pages.slots([0], [4 + step]))
        written = session.pages.kv.flatten(2, 3)[:, 0, slot].isfinite().all((-2, -1))
        assert (~written).nonzero()[:, 0].tolist() == skipped(step, SHAPES[0])


def test_saved_and_refused(tmp_path: Any) -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(2)
    exits = hsd.exits(model, **SHAPES[0])
    exits.save_pretrained(tmp_path)
    again = hsd.generate(model, inputs, Exits.from_pretrained(tmp_path), **OPTIONS)
    assert torch.equal(again.sequences, hsd.generate(model, inputs, exits, **OPTIONS).sequences)
    for wrong in (
        {"least": 1, "length": 4},
        {"least": 6, "length": 4},
        {"least": 3, "length": 2},
        {"least": 3, "length": 9, "top": 0},
    ):
        with pytest.raises(
            ArgumentError, match="wanted bottom, top >= 1, bottom \\+ top <= least < 6 and length >= levels >= 1"
        ):
            hsd.exits(model, **wrong)
