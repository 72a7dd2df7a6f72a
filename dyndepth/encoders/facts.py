"""Which encoder exits were made for: sizes, and a few weights of every layer."""

from __future__ import annotations

from typing import Any

from dyndepth.encoders.exits import EncoderFacts, SampleExits
from dyndepth.encoders.family import EncoderFamily, bind
from dyndepth.encoders.heads import SampleHead
from dyndepth.errors import ExitsError
from dyndepth.runtime.fingerprint import differs, samples_of


def facts_of(model: Any, final: SampleHead | None = None) -> EncoderFacts:
    """Facts of a transformers encoder; `final` says how wide the answers are where the model has no head of its own."""
    return _facts(bind(model), final)


def _facts(family: EncoderFamily, final: SampleHead | None) -> EncoderFacts:
    classes = family.classes if final is None or final.classes is None else final.classes
    if classes is None:
        raise ExitsError(f"facts_of: {type(family.model).__name__} has no head of its own; give `final`")
    modules = list(dict.fromkeys(family.modules))  # ALBERT's layers are few modules
    sampled = [samples_of(module) for module in modules]
    fingerprint = tuple(() if part is None else tuple(float(f"{value:.6g}") for value in part.tolist()) for part in sampled)
    widths = tuple(family.width_at(boundary) for boundary in range(1, family.depth + 1))
    if set(widths) == {family.width}:
        widths = ()
    return EncoderFacts(family.config.model_type, family.depth, family.width, classes, fingerprint, widths)


def check_facts(exits: SampleExits, family: EncoderFamily) -> None:
    """Raise ExitsError unless the exits were made for this model."""
    made, here = exits.model, _facts(family, exits.final)
    for name in ("model_type", "layers", "width", "vocab_size", "widths"):
        if getattr(made, name) != getattr(here, name):
            said = "classes" if name == "vocab_size" else name
            raise ExitsError(
                f"exits were made for another model: {said} must be {getattr(made, name)!r}, got {getattr(here, name)!r}"
            )
    if differs(made.fingerprint, here.fingerprint):
        raise ExitsError(
            f"exits were made for another {made.model_type} of the same size: its weights differ from this model's "
            "(fingerprint mismatch)"
        )
