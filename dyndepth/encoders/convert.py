"""Swapping an encoder in place: after `convert`, calling the model has dynamic depth; `revert` undoes it."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from dyndepth.encoders.encoder import DynamicEncoder
from dyndepth.encoders.exits import SampleExits
from dyndepth.errors import ArgumentError

MARK = "_dyndepth_encoder"


def convert(model: Any, exits: SampleExits, *, layout: str = "auto") -> Any:
    """Give an encoder dynamic depth in place, and return it; its parameters, state_dict and saving stay as they were."""
    encoder = DynamicEncoder(model, exits, layout=layout)
    revert(model)
    setattr(model, MARK, {"forward": model.__dict__["forward"]} if "forward" in model.__dict__ else {})
    model.forward = functools.partial(_forward, encoder)
    return model


def revert(model: Any) -> Any:
    """Undo `convert`; a model that was not converted stays as it is."""
    before = model.__dict__.pop(MARK, None)
    if before is not None:
        model.__dict__.pop("forward", None)
        model.__dict__.update(before)
    return model


def _forward(encoder: DynamicEncoder, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
    # Positions are those of the model's own forward.
    names = list(inspect.signature(type(encoder.model).forward).parameters)[1:]
    if len(args) > len(names) or set(names[: len(args)]) & set(kwargs):
        raise ArgumentError(
            f"a converted model's forward takes {', '.join(names)}; got {len(args)} by position, {sorted(kwargs)}"
        )
    kwargs.update(zip(names, args, strict=False))
    output = encoder(**{name: value for name, value in kwargs.items() if value is not False})
    return output if return_dict is not False else output.to_tuple()
