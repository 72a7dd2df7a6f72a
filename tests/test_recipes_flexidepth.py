"""FlexiDepth: per row and layer, run it or pass a light map; the layer's own K,V in any case."""

from __future__ import annotations

from typing import Any

import by_hand
import pytest
import tiny_exits
import tiny_models
import torch
from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits
from dyndepth.recipes import flexidepth

NEW = 14
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}


@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize("batch", [1, 5])
def test_rows_decide_layer_by_layer_and_their_keys_are_computed(batch: int, maps: bool) -> None:
    """By hand with transformers' layers: a row that skips writes K,V of its residual, and later rows read them."""
    model = tiny_models.shared("llama")
    inputs = {name: value[:batch] for name, value in tiny_models.prompts(5).items()}
    given = tiny_exits.gates(maps=maps)
    out = flexidepth.generate(model, inputs, flexidepth.exits(model, given), output_logits=True, **OPTIONS)
    assert out.kv == "propagate"
    kinds = set()
    for row in range(batch):
        ids = out.sequences[row, :-1][torch.cat([inputs["attention_mask"][row].bool(), torch.ones(NEW - 1, dtype=torch.bool)])]
        ran = [[True] * 6 for _ in range(NEW)]

        def skip(step: int, ran: list[list[bool]] = ran) -> Any:
            def one(layer: int, hidden: Tensor) -> Tensor | None:
                if layer not in given or float(given[layer][0](hidden[0])) < 0.5:
                    return None
                ran[step][layer] = False
                jump = given[layer][1]
                return hidden if jump is None else jump(hidden)

            return one

        wanted = by_hand.logits(model, ids, int(inputs["attention_mask"][row].sum()), skip, keys_values=True)
        for step in range(NEW):
            torch.testing.assert_close(out.logits[step][row], wanted[step], rtol=1e-3, atol=1e-3)
        assert out.layers_run[row].tolist() == [sum(each) for each in ran]
        kinds |= {tuple(each) for each in ran}
    assert len(kinds) >= 3, "rows must go different ways for this to test anything"


def test_prompts_may_be_gated_too() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(3)
    out = flexidepth.generate(model, inputs, flexidepth.exits(model, tiny_exits.gates()), prompt="dynamic", **OPTIONS)
    assert out.prompt_work.fraction < 1
    assert out.prompt_work.layers[1] > out.prompt_work.layers[2]


def test_gates_in_closed_form() -> None:
    """Layers that add nothing: every skip agrees, so their gates open first, and text stays the full model's."""
    model = tiny_models.tiny("llama")
    for layer in (3, 4):
        model.model.layers[layer].self_attn.o_proj.weight.data.zero_()
        model.model.layers[layer].mlp.down_proj.weight.data.zero_()
    texts = [torch.randint(3, tiny_models.VOCABULARY, (60,), generator=torch.Generator().manual_seed(n)) for n in range(24)]
    found = flexidepth.fit(model, texts, tokens=1440, own=0.0, layers=(1, 2, 3, 4), skip=0.45, progress=False)
    assert [(band.leave, band.resume) for band in found] == [(1, 2), (2, 3), (3, 4), (4, 5)]
    inputs = tiny_models.prompts(4)
    out = flexidepth.generate(model, inputs, found, **OPTIONS)
    taken = [float((out.bands_taken >> bit & 1).float().mean()) for bit in range(4)]
    assert min(taken[2:]) > 0.8
    assert max(taken[:2]) < 0.2
    assert found.record["recipe"].startswith("FlexiDepth")
    plain = model.generate(**inputs, **OPTIONS)
    only = flexidepth.exits(model, {layer: (found.bands[layer - 1].router, None) for layer in (3, 4)}, found.bands[0].threshold)
    assert torch.equal(flexidepth.generate(model, inputs, only, **OPTIONS).sequences, plain.sequences)


def test_which_layers_and_refusals(tmp_path: Any) -> None:
    assert flexidepth.gated_layers(32) == list(range(16, 31))
    assert flexidepth.gated_layers(6) == [3, 4]
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(2)
    exits = flexidepth.exits(model, tiny_exits.gates(), [0.3, 0.5, 0.7])
    assert [band.threshold for band in exits] == [0.3, 0.5, 0.7]
    exits.save_pretrained(tmp_path)
    again = flexidepth.generate(model, inputs, Exits.from_pretrained(tmp_path), **OPTIONS)
    assert torch.equal(again.sequences, flexidepth.generate(model, inputs, exits, **OPTIONS).sequences)
    with pytest.raises(ArgumentError, match=r"flexidepth.exits: layers must be in \[1, 5\), got 5"):
        flexidepth.exits(model, tiny_exits.gates((5,)))
    with pytest.raises(ArgumentError, match=r"at least one, and skip in \(0, 1\), got \[3, 4\], 1.0"):
        flexidepth.fit(model, [torch.arange(3, 40)], skip=1.0)
