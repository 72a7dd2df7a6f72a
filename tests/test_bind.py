"""What may stand between a model and the pass that replaces its loop: run, or refused by name, never ignored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn

import dyndepth
from dyndepth.errors import UnsupportedModelError
from dyndepth.runtime.bind import bind, most_likely

TOKENS = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))


def steer(module: Any, args: Any, output: Any) -> Any:
    return output * 1.5 if isinstance(output, torch.Tensor) else (output[0] * 1.5, *output[1:])


def tokens_of(model: Any, **options: Any) -> torch.Tensor:
    return model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize(
    "path",
    [
        "model.layers.2.mlp",
        "model.layers.2.input_layernorm",
        "model.layers.1.self_attn.o_proj",
        "model.layers.3.self_attn.q_proj",
        "model.embed_tokens",
        "model.norm",
        "lm_head",
    ],
)
def test_hooks_on_leaf_modules_run(path: str) -> None:
    model = tiny_models.tiny("llama")
    plain = model(TOKENS).logits
    model.get_submodule(path).register_forward_hook(steer)
    assert not torch.equal(model(TOKENS).logits, plain)
    assert torch.equal(tokens_of(model, custom_generate=dyndepth.generate), tokens_of(model))


@pytest.mark.parametrize("path", ["", "model", "model.layers.2", "model.layers.2.self_attn"])
def test_hooks_on_what_the_pass_replaces_are_refused(path: str) -> None:
    model = tiny_models.tiny("llama")
    model.get_submodule(path).register_forward_hook(steer)
    with pytest.raises(UnsupportedModelError, match="has forward hooks"):
        tokens_of(model, custom_generate=dyndepth.generate)


def test_transformers_own_recording_hooks_are_no_reason() -> None:
    model = tiny_models.tiny("llama")
    model(TOKENS, output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks, "transformers no longer leaves hooks: this test and the exception can go"
    assert torch.equal(tokens_of(model, custom_generate=dyndepth.generate), tokens_of(model))


def test_hooks_on_learned_positions_are_refused() -> None:
    model = tiny_models.tiny("gpt2")
    model.transformer.wpe.register_forward_hook(steer)
    with pytest.raises(UnsupportedModelError, match="positions has forward hooks"):
        tokens_of(model, custom_generate=dyndepth.generate)


def test_patches_and_subclasses_are_refused() -> None:
    model = tiny_models.tiny("llama")
    layer = model.model.layers[1]
    layer.forward = layer.forward
    with pytest.raises(UnsupportedModelError, match="layer 1 has a forward of its own"):
        tokens_of(model, custom_generate=dyndepth.generate)
    del layer.forward

    class Mine(type(layer)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    layer.__class__ = Mine
    with pytest.raises(UnsupportedModelError, match="layer 1 has a forward of its own"):
        tokens_of(model, custom_generate=dyndepth.generate)


def test_global_hooks_are_refused() -> None:
    model = tiny_models.tiny("llama")
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(UnsupportedModelError, match="global forward hooks"):
            tokens_of(model, custom_generate=dyndepth.generate)
    finally:
        handle.remove()


def test_parameters_on_the_meta_device_are_refused() -> None:
    model = tiny_models.tiny("llama")
    model.model.layers[0].mlp.to("meta")
    with pytest.raises(UnsupportedModelError, match="meta device"):
        tokens_of(model, custom_generate=dyndepth.generate)


def test_a_submodule_in_training_mode_is_refused() -> None:
    model = tiny_models.tiny("llama")
    model.model.layers[3].mlp.train()
    with pytest.raises(UnsupportedModelError, match="training mode"):
        tokens_of(model, custom_generate=dyndepth.generate)


class Quantised(torch.Tensor):
    """A weight that knows its own way of being multiplied, as torchao's do, and refuses all others."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            args = [a.as_subclass(torch.Tensor) if isinstance(a, Quantised) else a for a in args]
            return function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in ("__get__", "detach", "requires_grad_", "dim", "size", "is_meta"):
            return super().__torch_function__(function, types, args, kwargs or {})
        raise NotImplementedError(f"Quantised: {function}")


def test_weights_of_a_tensor_subclass_go_through_their_modules() -> None:
    model = tiny_models.tiny("llama")
    expected = tokens_of(model)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            module = getattr(layer.self_attn, name)
            weight = module.weight.detach().as_subclass(Quantised)
            del module._parameters["weight"]
            object.__setattr__(module, "weight", weight)
    assert torch.equal(tokens_of(model, custom_generate=dyndepth.generate), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("words", [1, 2, 15, 16, 17, 1000, 49152])
def test_the_most_likely_word_is_the_first_of_equals(words: int, dtype: torch.dtype) -> None:
    """And a NaN before all: what torch.argmax takes, by which transformers chooses."""
    generator = torch.Generator().manual_seed(words)
    ties = torch.randint(-3, 4, (33, words), generator=generator).to(dtype)
    broken = torch.randn(33, words, generator=generator).to(dtype)
    broken[torch.rand(33, words, generator=generator) < 2 / words] = torch.nan
    for scores in (ties, broken, torch.full_like(ties, -torch.inf), ties[:0]):
        assert torch.equal(most_likely(scores), scores.argmax(-1))
    assert most_likely(ties)[0] == (ties[0] == ties[0].max()).nonzero()[0, 0]


def test_a_cap_that_rounds_decides_with_the_logits() -> None:
    """In bf16 a soft cap makes equals of logits that were not: the token is the first of them, as in transformers."""
    bound = bind(copy.deepcopy(tiny_models.shared("gemma2")).to(torch.bfloat16))
    assert bound.logit_softcap > 0
    ready = 20 * torch.randn(200, bound.hidden_size, generator=torch.Generator().manual_seed(3)).bfloat16()
    head: Any = bound.head
    logits = torch.nn.functional.linear(ready, head.weight)
    capped = torch.tanh(logits / bound.logit_softcap) * bound.logit_softcap
    assert not torch.equal(logits.argmax(-1), capped.argmax(-1))
    assert torch.equal(bound.argmax(ready), capped.argmax(-1))
