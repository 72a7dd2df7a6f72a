"""Swapping a model in place: after `convert`, calling it and generating with it have dynamic depth; `revert` undoes it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits
from dyndepth.runtime.bind import bind
from dyndepth.runtime.entry import generate as generate_entry
from dyndepth.runtime.fingerprint import check_exits
from dyndepth.runtime.forward import check_policy
from dyndepth.runtime.inputs import real_tokens
from dyndepth.runtime.score import score
from dyndepth.runtime.session import default_policy

_MARK = "_dyndepth"


@dataclass(frozen=True)
class Converted:
    """What `convert` attached to a model."""

    exits: Exits
    kv: str | None


def convert(model: Any, exits: Exits, *, kv: str | None = None) -> Any:
    """Give a causal LM dynamic depth in place, and return it.

    `model(...)` then lets every token leave (teacher-forced: what decoding these tokens one by one would give), and
    `model.generate(...)` is `custom_generate=dyndepth.generate` with these exits. Parameters, state_dict and
    save_pretrained stay as they were. Converting twice replaces the exits.
    """
    bound = bind(model)
    check_exits(exits, bound)
    check_policy(exits, kv or default_policy(exits))
    revert(model)
    setattr(model, _MARK, Converted(exits, kv))
    # Instance attributes shadow the class's methods; revert deletes them.
    model.forward = functools.partial(_forward, model)
    model.generate = functools.partial(_generate, model)
    return model


def revert(model: Any) -> Any:
    """Undo `convert`; a model that was not converted stays as it is."""
    if _MARK in model.__dict__:
        for name in ("forward", "generate", _MARK):
            model.__dict__.pop(name, None)
    return model


def converted(model: Any) -> Converted | None:
    """What the model was converted with, or None."""
    return model.__dict__.get(_MARK)


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    state: Converted = getattr(model, _MARK)
    if kwargs.get("custom_generate") is None:
        kwargs["custom_generate"] = generate_entry
        kwargs.setdefault("exits", state.exits)
        kwargs.setdefault("kv", state.kv)
    return type(model).generate(model, *args, **kwargs)


def _forward(
    model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    state: Converted = getattr(model, _MARK)
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        raise ArgumentError("a converted model's forward takes whole sequences, got past_key_values; use model.generate")
    if (input_ids is None) == (inputs_embeds is None):
        raise ArgumentError("wanted exactly one of input_ids and inputs_embeds")
    content = inputs_embeds if input_ids is None else input_ids
    assert content is not None
    sequences, kept = real_tokens("forward", content, attention_mask, position_ids)
    scored = score(model, sequences, state.exits, kv=state.kv, embeds=input_ids is None)
    # Rows of padding were never computed; their logits are zero.
    ready = scored.ready.new_zeros(*kept.shape, scored.ready.shape[1])
    ready[kept.to(ready.device)] = scored.ready
    chosen = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
    if not isinstance(chosen, int):
        ready = ready[:, chosen]
    logits = scored.model.logits(ready).to(scored.model.dtype)
    loss = None
    if labels is not None:
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=scored.model.vocab_size, **kwargs)
    output = CausalLMOutputWithPast(loss=loss, logits=logits)
    return output if return_dict is not False else output.to_tuple()
