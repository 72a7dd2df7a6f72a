"""Which model exits were made for: sizes, and a small sample of weights that survives a change of dtype."""

from __future__ import annotations

from typing import Any

import torch

from dyndepth.errors import ExitsError
from dyndepth.exits import Exits, ModelFacts
from dyndepth.runtime.bind import Model
from dyndepth.runtime.norms import is_plain_linear

_SAMPLES = 64
# bf16 rounding moves a weight by at most 0.4 %; another seed, another checkpoint or a retrained model by far more.
_TOLERANCE = 0.02


def facts_of(model: Model) -> ModelFacts:
    """Sizes and fingerprint of a bound model."""
    return ModelFacts(
        model_type=model.model_type,
        layers=model.depth,
        width=model.hidden_size,
        vocab_size=model.vocab_size,
        fingerprint=_fingerprint(model),
    )


def _fingerprint(model: Model) -> tuple[tuple[float, ...], ...]:
    """Spaced entries of the input embedding and three output projections (empty where one is quantised or wrapped)."""
    causal_lm: Any = model.causal_lm
    tensors = [causal_lm.get_input_embeddings().weight]
    for number in (0, model.depth // 2, model.depth - 1):
        out: Any = model.layers[number].out
        tensors.append(out.weight if isinstance(out, torch.nn.Module) and is_plain_linear(out) else None)
    groups = []
    for tensor in tensors:
        if tensor is None or not tensor.is_floating_point():
            groups.append(())
            continue
        flat = tensor.detach().flatten()
        at = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
        groups.append(tuple(round(value, 6) for value in flat[at.to(flat.device)].float().tolist()))
    return tuple(groups)


def check_exits(exits: Exits, model: Model) -> None:
    """Raise ExitsError unless the exits were made for this model."""
    made, here = exits.model, facts_of(model)
    for name in ("model_type", "layers", "width", "vocab_size"):
        if getattr(made, name) != getattr(here, name):
            raise ExitsError(
                f"exits were made for another model: {name} must be {getattr(made, name)!r}, got {getattr(here, name)!r}"
            )
    for one, other in zip(made.fingerprint, here.fingerprint, strict=False):
        if not one or not other:
            continue
        a, b = torch.tensor(one), torch.tensor(other)
        if len(one) != len(other) or float((a - b).abs().mean()) > _TOLERANCE * float(a.abs().mean()) + 1e-6:
            raise ExitsError(
                f"exits were made for another {made.model_type} of the same size: its weights differ from this model's "
                "(fingerprint mismatch)"
            )
