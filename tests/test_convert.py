"""convert and revert: a model swapped in place, and put back as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny_exits
import tiny_models
import torch
import transformers

import dyndepth
from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.exits import Always, Never
from dyndepth.runtime.convert import converted

INPUTS = tiny_models.prompts(4)


@pytest.fixture
def model() -> transformers.PreTrainedModel:
    return tiny_models.tiny("llama")


def test_closed_exits_change_nothing(model: transformers.PreTrainedModel) -> None:
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 3, 6, Never()))
    before, tokens = model(**INPUTS).logits, model.generate(**INPUTS, max_new_tokens=5, do_sample=False)
    dyndepth.convert(model, exits)
    kept = INPUTS["attention_mask"].bool()
    torch.testing.assert_close(model(**INPUTS).logits[kept], before[kept], rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(**INPUTS, max_new_tokens=5, do_sample=False), tokens)


def test_forward_has_dynamic_depth(model: transformers.PreTrainedModel) -> None:
    """model(...) of a converted model is the teacher-forced pass: what decoding these tokens would give."""
    exits = tiny_exits.mixed(model)
    dyndepth.convert(model, exits, kv="propagate")
    tokens = torch.randint(3, tiny_models.VOCABULARY, (2, 11))
    whole = model(tokens).logits
    from dyndepth.runtime.score import score

    scored = score(model, list(tokens), exits, kv="propagate")
    torch.testing.assert_close(whole, scored.logits().view_as(whole))
    assert scored.work.fraction < 1
    assert model(tokens, logits_to_keep=1).logits.shape == (2, 1, tiny_models.VOCABULARY)
    torch.testing.assert_close(model(tokens, logits_to_keep=3).logits, whole[:, -3:])
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]])
    embeds = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, whole)
    assert isinstance(model(tokens, return_dict=False), tuple)
    loss = model(tokens, labels=tokens).loss
    expected = torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)


def test_generate_uses_the_exits(model: transformers.PreTrainedModel) -> None:
    exits = tiny_exits.mixed(model)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(**INPUTS, custom_generate=dyndepth.generate, exits=exits, **options)
    dyndepth.convert(model, exits)
    found = model.generate(**INPUTS, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.bands_taken, expected.bands_taken)
    assert model.generate(**INPUTS, kv="propagate", **options).kv == "propagate"


def test_revert_restores_everything(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    names, before = set(model.__dict__), model(**INPUTS).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    dyndepth.convert(model, tiny_exits.mixed(model))
    assert {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()} >= set(state) - {
        "lm_head.weight"
    }
    assert sorted(model.state_dict()) == sorted(state)
    model.save_pretrained(tmp_path)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(reloaded(**INPUTS).logits, before)
    assert converted(model) is not None
    assert dyndepth.revert(model) is model
    assert set(model.__dict__) == names
    assert converted(model) is None
    assert torch.equal(model(**INPUTS).logits, before)
    dyndepth.revert(model)


def test_converting_twice_takes_the_second(model: transformers.PreTrainedModel) -> None:
    first, second = tiny_exits.mixed(model), tiny_exits.exits_of(model, tiny_exits.band(model, 3, 6))
    dyndepth.convert(dyndepth.convert(model, first), second)
    assert converted(model).exits is second
    dyndepth.revert(model)
    assert "forward" not in model.__dict__


def test_a_copy_of_a_converted_model_is_its_own(model: transformers.PreTrainedModel) -> None:
    dyndepth.convert(model, tiny_exits.mixed(model))
    twin = copy.deepcopy(model)
    tokens = torch.tensor([[5, 6, 7]])
    expected = twin(tokens).logits
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(twin(tokens).logits, expected)


def test_refusals_leave_the_model_alone(model: transformers.PreTrainedModel) -> None:
    with pytest.raises(ExitsError, match="kv must be one of"):
        dyndepth.convert(model, tiny_exits.mixed(model), kv="clone")
    assert converted(model) is None
    dyndepth.convert(model, tiny_exits.mixed(model))
    cache = dyndepth.revert(copy.deepcopy(model))(torch.tensor([[3, 4]]), use_cache=True).past_key_values
    with pytest.raises(ArgumentError, match="takes whole sequences, got past_key_values"):
        model(torch.tensor([[5]]), past_key_values=cache)
    with pytest.raises(ArgumentError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ArgumentError, match=r"attention_mask must be \[1, 2\], got \[1, 3\]"):
        model(torch.tensor([[3, 4]]), attention_mask=torch.ones(1, 3))


def test_what_the_forward_cannot_give_is_refused(model: transformers.PreTrainedModel) -> None:
    dyndepth.convert(model, tiny_exits.mixed(model))
    tokens = torch.randint(3, 90, (2, 5))
    with pytest.raises(ArgumentError, match="keeps no cache, got use_cache=True"):
        model(tokens, use_cache=True)
    with pytest.raises(ArgumentError, match="does not support output_hidden_states"):
        model(tokens, output_hidden_states=True)
    with pytest.raises(ArgumentError, match="does not support banana"):
        model(tokens, banana=3)
    model(tokens, use_cache=False, output_attentions=None, labels=tokens, num_items_in_batch=10)


def test_no_gradient_is_pretended(model: transformers.PreTrainedModel) -> None:
    dyndepth.convert(model, tiny_exits.mixed(model))
    tokens = torch.randint(3, 90, (2, 5))
    with torch.enable_grad():
        assert not model(tokens, labels=tokens).loss.requires_grad


def test_classifier_free_guidance(model: transformers.PreTrainedModel) -> None:
    """A processor that calls the model itself gets the model's own forward, with its cache."""
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 3, 6, Never()))
    tokens = torch.randint(3, 90, (2, 5))
    expected = model.generate(tokens, max_new_tokens=4, do_sample=False, guidance_scale=2.0)
    dyndepth.convert(model, exits)
    shadow = model.forward
    assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False, guidance_scale=2.0), expected)
    assert model.forward is shadow


def test_naming_custom_generate_keeps_the_exits(model: transformers.PreTrainedModel) -> None:
    dyndepth.convert(model, tiny_exits.exits_of(model, tiny_exits.band(model, 1, 6, Always())))
    out = model.generate(**INPUTS, custom_generate=dyndepth.generate, max_new_tokens=3, return_dict_in_generate=True)
    assert out.work.fraction == pytest.approx(1 / 6)


def test_revert_restores_patches_of_others(model: transformers.PreTrainedModel) -> None:
    own = model.forward
    model.forward = lambda *a, **k: own(*a, **k)
    patched = model.forward
    dyndepth.convert(model, tiny_exits.mixed(model))
    dyndepth.revert(model)
    assert model.forward is patched
    assert "generate" not in model.__dict__


def test_padding_is_zero_with_a_biased_head() -> None:
    model = tiny_models.tiny("llama")
    model.lm_head = torch.nn.Linear(48, tiny_models.VOCABULARY, bias=True).requires_grad_(False).eval()
    dyndepth.convert(model, tiny_exits.exits_of(model, tiny_exits.band(model, 3, 6, Never())))
    logits = model(**INPUTS).logits
    kept = INPUTS["attention_mask"].bool()
    assert float(logits[~kept].abs().max()) == 0
    assert float(logits[kept].abs().min(-1).values.max()) > 0
