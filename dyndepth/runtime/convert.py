"""Swapping a model in place: after `convert`, calling it and generating with it have dynamic depth; `revert` undoes it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits
from dyndepth.runtime.bind import bind
from dyndepth.runtime.entry import generate as generate_entry
from dyndepth.runtime.fingerprint import check_exits
from dyndepth.runtime.inputs import real_tokens
from dyndepth.runtime.policies import check_policy
from dyndepth.runtime.score import score
from dyndepth.runtime.session import default_policy

_MARK = "_dyndepth"
_SHADOWED = ("forward", "generate")
#: Arguments of transformers' loss functions.
_LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")


@dataclass(frozen=True)
class Converted:
    """What `convert` attached to a model."""

    exits: Exits
    kv: str | None
    #: Instance attributes that `convert` shadowed (accelerate's and users' own patches), put back by `revert`.
    before: dict[str, Any] = field(default_factory=dict)


def convert(model: Any, exits: Any, *, kv: str | None = None) -> Any:
    """Give a causal LM dynamic depth in place, and return it; or an encoder, with `dyndepth.SampleExits`.

    `model(...)` then lets every token leave (teacher-forced: what decoding these tokens one by one would give), and
    `model.generate(...)` is `custom_generate=dyndepth.generate` with these exits. Parameters, state_dict and
    save_pretrained stay as they were. Converting twice replaces the exits. The forward computes no gradients and keeps no
    cache: it refuses `use_cache=True`, `output_hidden_states` and what else it cannot give.
    """
    if not isinstance(exits, Exits):
        from dyndepth.encoders import SampleExits
        from dyndepth.encoders.convert import convert as convert_encoder

        if isinstance(exits, SampleExits):
            if kv is not None:
                raise ArgumentError(f"convert: an encoder keeps no K,V, got kv={kv!r}")
            return convert_encoder(model, exits)
        raise ArgumentError(f"convert: exits must be dyndepth.Exits or dyndepth.SampleExits, got {type(exits).__name__}")
    bound = bind(model)
    check_exits(exits, bound)
    check_policy(exits, kv or default_policy(exits))
    revert(model)
    # Instance attributes shadow the class's methods.
    before = {name: model.__dict__[name] for name in _SHADOWED if name in model.__dict__}
    setattr(model, _MARK, Converted(exits, kv, before))
    model.forward = functools.partial(_forward, model)
    model.generate = functools.partial(_generate, model)
    return model


def revert(model: Any) -> Any:
    """Undo `convert`; a model that was not converted stays as it is."""
    if "_dyndepth_encoder" in model.__dict__:
        from dyndepth.encoders.convert import revert as revert_encoder

        return revert_encoder(model)
    state = model.__dict__.pop(_MARK, None)
    if state is not None:
        for name in _SHADOWED:
            model.__dict__.pop(name, None)
        model.__dict__.update(state.before)
    return model


def converted(model: Any) -> Converted | None:
    """What the model was converted with, or None."""
    return model.__dict__.get(_MARK)


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    state: Converted = getattr(model, _MARK)
    if kwargs.get("custom_generate") in (None, generate_entry):
        kwargs["custom_generate"] = generate_entry
        kwargs.setdefault("exits", state.exits)
        if kwargs.get("mode", "dynamic") == "dynamic":  # the other modes have a policy of their own
            kwargs.setdefault("kv", state.kv)
    generate = state.before.get("generate") or functools.partial(type(model).generate, model)
    with _own_forward(model, state):
        return generate(*args, **kwargs)


@contextlib.contextmanager
def _own_forward(model: Any, state: Converted) -> Iterator[None]:
    """The forward of before `convert`, for what calls it inside generate: classifier-free guidance, other loops."""
    shadow = model.__dict__.pop("forward", None)
    if "forward" in state.before:
        model.forward = state.before["forward"]
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
        if shadow is not None:
            model.forward = shadow


@torch.no_grad()
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
    if use_cache:
        raise ArgumentError("a converted model's forward keeps no cache, got use_cache=True; use model.generate to decode")
    known = _LOSS_ARGUMENTS if labels is not None else ()
    unknown = [name for name, value in kwargs.items() if value not in (None, False) and name not in known]
    if unknown:
        raise ArgumentError(f"a converted model's forward does not support {', '.join(sorted(unknown))}")
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
    real = kept if isinstance(chosen, int) else kept[:, chosen.cpu() if isinstance(chosen, Tensor) else chosen]
    logits *= real.to(logits.device)[..., None]  # a head with a bias says something about nothing
    loss = None
    if labels is not None:
        loss = model.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=scored.model.vocab_size,
            **{name: kwargs[name] for name in kwargs if name in known},
        )
    output = CausalLMOutputWithPast(loss=loss, logits=logits)
    return output if return_dict is not False else output.to_tuple()
