"""Invariant 1 for every family: nobody exits, so tokens and logits are transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
import transformers

import dyndepth
from dyndepth.errors import UnsupportedModelError
from dyndepth.runtime.bind import bind
from dyndepth.runtime.family import supported
from dyndepth.testing import assert_as_exact_as

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_full_depth_is_transformers(family: str, batch: int) -> None:
    model = tiny_models.shared(family)
    inputs = tiny_models.prompts(batch)
    theirs = model.generate(**inputs, **GREEDY)
    ours = model.generate(**inputs, custom_generate=dyndepth.generate, **GREEDY)
    assert torch.equal(ours.sequences, theirs.sequences)
    # Truth for the bound: the same tokens through the same model in float64.
    exact = _exact_logits(family, theirs.sequences, inputs["attention_mask"])
    for step, (mine, reference) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        alive = ours.exit_layers[:, step] >= 0
        truth = exact[alive, inputs["input_ids"].shape[1] - 1 + step]
        assert_as_exact_as(mine[alive], reference[alive], truth, what=f"{family} step {step}", factor=4)
    assert ours.work.fraction == 1.0


def _exact_logits(family: str, sequences: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """float64 logits [batch, width, V]; one sequence at a time without its padding, which is left at zero."""
    model = tiny_models.tiny(family, torch.float64)
    exact = torch.zeros(*sequences.shape, tiny_models.VOCABULARY, dtype=torch.float64)
    for row in range(len(sequences)):
        first = int((mask[row] == 0).sum())
        exact[row, first:] = model(input_ids=sequences[row : row + 1, first:]).logits[0]
    return exact


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_sequences_end_at_different_steps(family: str) -> None:
    """EOS is made likely: sequences end one by one, and the rest go on as if alone."""
    model = tiny_models.tiny(family)
    inputs = tiny_models.prompts(9)
    probe = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    common = torch.bincount(probe.flatten()).argsort(descending=True)[:3].tolist()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": common, "pad_token_id": 0}
    theirs = model.generate(**inputs, **options)
    ours = model.generate(**inputs, custom_generate=dyndepth.generate, return_dict_in_generate=True, **options)
    assert torch.equal(ours.sequences, theirs)
    ends = (ours.exit_layers >= 0).sum(1)
    assert len(ends.unique()) > 1, "the sequences must end at different steps for this to test anything"
    assert ours.work.rows == int(ends.sum())


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_page_size_does_not_matter(family: str, page_size: int) -> None:
    model, inputs = tiny_models.shared(family), tiny_models.prompts(3)
    options = {"max_new_tokens": 6, "do_sample": False, "custom_generate": dyndepth.generate}
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, page_size=page_size, prefill_chunk=4, **options), expected)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_wrapped_projections_run_as_modules(family: str) -> None:
    """A hook on a projection takes it off the fused path; the hook runs and the answer stays."""
    model, inputs = tiny_models.tiny(family), tiny_models.prompts(3)
    options = {"max_new_tokens": 4, "do_sample": False, "custom_generate": dyndepth.generate}
    expected = model.generate(**inputs, **options)
    calls = []
    names = bind(model).family.qkv
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in names:
            module.register_forward_hook(lambda *_: calls.append(1))
    assert all(layer.plain is None for layer in bind(model).layers)
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert len(calls) >= 4 * tiny_models.LAYERS * len(names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox"])
def test_half_precision_differs_only_at_near_ties(family: str, dtype: torch.dtype) -> None:
    """Given the same text, where our arg max is not theirs, their logits of the two tokens are closer than rounding."""
    model = tiny_models.tiny(family, dtype)
    tokens = torch.randint(3, tiny_models.VOCABULARY, (4, 30))
    theirs = model(input_ids=tokens).logits.float()
    from dyndepth.runtime.score import score

    ours = score(model, list(tokens)).logits().view_as(theirs)
    exact = tiny_models.tiny(family, torch.float64)(input_ids=tokens).logits
    slack = 4 * (theirs - exact).abs().max()
    chosen = theirs.gather(-1, ours.argmax(-1, keepdim=True))[..., 0]
    assert bool((chosen >= theirs.max(-1).values - slack).all())
    assert float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()) > 0.8
    assert_as_exact_as(ours.to(dtype), theirs.to(dtype), exact, what=family, factor=2)


def test_unsupported_model_is_named() -> None:
    config = transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModelError, match=r"'bloom' has no family spec; supported: gemma2, .*qwen3"):
        bind(model)
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt2", "opt", "gpt_neox"} <= set(
        supported()
    )


def test_not_a_causal_lm() -> None:
    with pytest.raises(UnsupportedModelError, match="wanted a transformers causal LM, got Linear"):
        bind(torch.nn.Linear(2, 2))


def test_training_mode_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"call model\.eval\(\) first"):
        bind(tiny_models.tiny("llama").train())


def test_learned_positions_run_out() -> None:
    model = tiny_models.shared("gpt2")
    with pytest.raises(UnsupportedModelError, match="would reach 140 positions, the model has learned 128"):
        model.generate(torch.ones(1, 140, dtype=torch.long), custom_generate=dyndepth.generate, max_new_tokens=1)


def test_batch_dependent_rotary_angles_are_refused_past_their_length() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_models.tiny("llama", rope_parameters=rope, max_position_embeddings=32)
    inputs = tiny_models.prompts(2)
    short = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**inputs, custom_generate=dyndepth.generate, **short), model.generate(**inputs, **short))
    with pytest.raises(UnsupportedModelError, match="dynamic rotary angles change for the whole batch past 32 positions"):
        model.generate(**inputs, custom_generate=dyndepth.generate, max_new_tokens=40)
