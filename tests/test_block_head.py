"""Balcony's block head: one more decoder layer at the exit, with a K,V slot of its own."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch

import dyndepth
from dyndepth.errors import ExitsError
from dyndepth.exits import Band, FixedDepth, TopProbability
from dyndepth.runtime.bind import bind
from dyndepth.runtime.block import block_head
from dyndepth.runtime.score import score

OPTIONS: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False}


def _head(model: Any, leave: int, init: str = "last") -> Any:
    """A block whose weights differ from every layer of the model."""
    head = block_head(bind(model), leave, init)
    generator = torch.Generator().manual_seed(leave)
    for parameter in head.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)
    return head


def _expected(model: Any, head: Any, leave: int, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers' model of the first `leave` layers, the block, the block's norm and the shared LM head."""
    import copy

    small = copy.deepcopy(model)
    bound = bind(small)
    decoder = bound.decoder
    layers = [*getattr(decoder, bound.family.layers)[:leave], copy.deepcopy(head.layer)]
    setattr(decoder, bound.family.layers, torch.nn.ModuleList(layers))
    getattr(layers[-1], bound.family.attention).layer_idx = leave
    setattr(decoder, bound.family.final_norm, head.norm)
    small.config.num_hidden_layers = leave + 1
    kinds = getattr(small.config, "layer_types", None)
    if kinds:
        small.config.layer_types = [*kinds[:leave], kinds[head.source]]
    return small.generate(**inputs, **OPTIONS)


@pytest.mark.parametrize("prompt", ["full", "dynamic"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_static_exit_is_balcony(family: str, prompt: str) -> None:
    """All requests at one exit: the model cut there with one more layer on top, token for token."""
    model, inputs = tiny_models.shared(family), tiny_models.prompts(5)
    head = _head(model, 3)
    exits = tiny_exits.exits_of(model, Band(3, 6, FixedDepth(), head=head))
    ours = model.generate(
        **inputs, custom_generate=dyndepth.generate, exits=exits, depth=3, kv="none", prompt=prompt, **OPTIONS
    )
    assert torch.equal(ours, _expected(model, head, 3, inputs))


def test_budgets_mix_in_one_batch() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(6)
    heads = {2: _head(model, 2), 4: _head(model, 4, "next")}
    exits = tiny_exits.exits_of(model, *(Band(leave, 6, FixedDepth(), head=head) for leave, head in heads.items()))
    depths = [2, 4, 6, 2, 4, 6]
    ours = model.generate(**inputs, custom_generate=dyndepth.generate, exits=exits, depth=depths, kv="none", **OPTIONS)
    for row, depth in enumerate(depths):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        expected = model.generate(**alone, **OPTIONS) if depth == 6 else _expected(model, heads[depth], depth, alone)
        assert torch.equal(ours[row : row + 1, : expected.shape[1]], expected)


@pytest.mark.parametrize("kv", ["propagate", "predict"])
def test_dynamic_exit_through_a_block(kv: str) -> None:
    """Judged by the block's own logits, rows leave or go on; batch invariance holds and the block's work is counted."""
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(5)
    plain = tiny_exits.band(model, 3, 6)
    band = Band(3, 6, TopProbability(), threshold=0.5, head=_head(model, 3), kv=plain.kv)
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 1, 2), band)
    options = OPTIONS | {"custom_generate": dyndepth.generate, "exits": exits, "kv": kv, "return_dict_in_generate": True}
    together = model.generate(**inputs, **options)
    assert 0 < together.work.fraction < 1
    assert together.work.blocks[3] >= int((together.exit_layers == 3).sum()) > 0
    for row in range(5):
        alone = model.generate(**{name: value[row : row + 1] for name, value in inputs.items()}, **options)
        assert torch.equal(alone.bands_taken[0], together.bands_taken[row, : alone.bands_taken.shape[1]])
        assert torch.equal(alone.sequences[0], together.sequences[row, : alone.sequences.shape[1]])


@pytest.mark.parametrize("kv", ["propagate", "predict"])
def test_rows_that_are_away_give_the_block_keys_too(kv: str, poisoned: None) -> None:
    """Tokens whose band spans the exit store the block's K,V: a later token that exits through the block reads them."""
    model = tiny_models.shared("llama")
    plain = tiny_exits.band(model, 3, 6)
    exits = tiny_exits.exits_of(
        model,
        tiny_exits.band(model, 2, 4, threshold=0.5),
        Band(3, 6, TopProbability(), threshold=0.3, head=_head(model, 3), kv=plain.kv),
    )
    tokens = list(torch.randint(3, 90, (3, 12)))
    whole, chunked = (score(model, tokens, exits, kv=kv, chunk=chunk) for chunk in (64, 2))
    taken = whole.bands_taken.view(3, 12)
    away_then_block = (taken & 1).bool().cumsum(1).bool() & (taken & 2).bool()
    assert bool(away_then_block.any()), "some token must exit through the block after one that was away"
    assert bool(whole.logits().isfinite().all())
    torch.testing.assert_close(whole.logits(), chunked.logits(), rtol=1e-3, atol=1e-4)


def test_initialisation() -> None:
    """Balcony's start: the last layer's weights, the norm of the layer after the exit."""
    model = tiny_models.shared("llama")
    head = block_head(bind(model), 2)
    layers = model.model.layers
    assert head.source == 5
    for (name, mine), (_, theirs) in zip(head.layer.named_parameters(), layers[5].named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert torch.equal(head.norm.weight, layers[2].input_layernorm.weight)
    assert torch.equal(block_head(bind(model), 2, "next").layer.mlp.up_proj.weight, layers[2].mlp.up_proj.weight)
    assert not any(parameter.requires_grad for parameter in head.parameters())
    with pytest.raises(ExitsError, match="init must be one of last, next, got 'random'"):
        block_head(bind(model), 2, "random")
    with pytest.raises(ExitsError, match=r"leave must be in \[1, 6\), got 6"):
        block_head(bind(model), 6)
