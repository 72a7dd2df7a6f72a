"""Which model exits were made for: sizes, and a small sample of weights that survives a change of dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dyndepth.errors import ExitsError
from dyndepth.exits import Band, Exits, ModelFacts
from dyndepth.exits.heads import MlpHead, TranslatorHead
from dyndepth.exits.maps import jump_width
from dyndepth.runtime.bind import Model
from dyndepth.runtime.bind_layer import optional

_SAMPLES = 4
# bf16 rounding moves a weight by at most 0.4 %, 0.15 % on average; noise that training leaves by more. A group of a few
# samples may be off by one such step, the average over all groups may not.
_GROUP_TOLERANCE = 0.006
_TOLERANCE = 0.003


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
    """A few entries of the embedding, every layer's modules, the final norm and the head; () where one is wrapped.

    One group per module, so that a module that was quantised or wrapped (LoRA) since is left out and the rest compared.
    """
    causal_lm: Any = model.causal_lm
    family = model.family
    inner = [name for name in (*family.qkv, family.out, family.q_norm, family.k_norm) if name]
    names = [
        *(f"{family.attention}.{name}" for name in inner),
        family.before_attention,
        family.before_mlp,
        *family.mlp,
    ]
    modules = [causal_lm.get_input_embeddings()]
    for layer in model.layers:
        modules += [optional(layer.module, name) for name in names]
    modules += [optional(model.decoder, family.final_norm), model.head]
    sampled = [samples_of(module) for module in modules]
    values = iter(
        torch.cat([part for part in sampled if part is not None]).tolist() if any(p is not None for p in sampled) else []
    )
    return tuple(() if part is None else tuple(float(f"{next(values):.6g}") for _ in part) for part in sampled)


def samples_of(module: Any) -> torch.Tensor | None:
    """fp32 spaced entries of each parameter of a module; None if there is none, or code of a third party wraps them."""
    if module is None or any(type(m).__module__.partition(".")[0] not in ("torch", "transformers") for m in module.modules()):
        return None
    parts = []
    for parameter in module.parameters():
        flat = parameter.detach().flatten()
        if type(parameter) is not torch.nn.Parameter or not flat.is_floating_point() or flat.numel() == 0:
            return None
        at = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64, device=flat.device).long()
        parts.append(flat[at].float())
    return torch.cat(parts) if parts else None


def check_exits(exits: Exits, model: Model) -> None:
    """Raise ExitsError unless the exits were made for this model."""
    made, here = exits.model, facts_of(model)
    for name in ("model_type", "layers", "width", "vocab_size"):
        if getattr(made, name) != getattr(here, name):
            raise ExitsError(
                f"exits were made for another model: {name} must be {getattr(made, name)!r}, got {getattr(here, name)!r}"
            )
    if differs(made.fingerprint, here.fingerprint):
        raise ExitsError(
            f"exits were made for another {made.model_type} of the same size: its weights differ from this model's "
            "(fingerprint mismatch)"
        )
    for band in exits:
        _check_widths(band, model)


def differs(made: Sequence[Sequence[float]], here: Sequence[Sequence[float]]) -> bool:
    """Whether two fingerprints are of different weights; groups that one of them lacks are not compared."""
    differences = []
    for one, other in zip(made, here, strict=False):
        if not one or not other or len(one) != len(other):
            continue
        a, b = torch.tensor(one), torch.tensor(other)
        differences.append(float((a - b).abs().mean() / (a.abs().mean() + 1e-12)))
    return bool(differences) and (max(differences) > _GROUP_TOLERANCE or sum(differences) / len(differences) > _TOLERANCE)


def _check_widths(band: Band, model: Model) -> None:
    """Raise unless the band's maps fit the model's widths."""
    width, ready = model.hidden_size, model.ready_size
    kv_width = model.layers[0].kv_heads * model.layers[0].head_dim
    wanted: dict[str, tuple[list[int], list[int]]] = {}
    if band.jump is not None:
        wanted["jump"] = [width], [jump_width(band.jump)]
    if band.kv is not None:
        rank = width if band.kv.rank is None else band.kv.rank
        wanted["K,V maps"] = [band.resume - band.leave, 2, kv_width, rank], list(band.kv.weight.shape)
        wanted["K,V maps' residuals"] = [width], [band.kv.width]
    if band.router is not None:
        wanted["router"] = [width], list(band.router.weight1.shape[1:])
    if isinstance(band.head, TranslatorHead):
        wanted["translator"] = [width, ready], _translator_widths(band.head)
    if isinstance(band.head, MlpHead):
        if band.head.readout is not None:
            wanted["readout"] = [width, ready], _translator_widths(band.head.readout)
        wanted["mlp"] = [width, width], [band.head.up.shape[1], band.head.down.shape[0]]
    for name, (want, got) in wanted.items():
        if want != got:
            raise ExitsError(f"band [{band.leave}, {band.resume}): {name} must be {want} for this model, got {got}")


def _translator_widths(head: TranslatorHead) -> list[int]:
    first = head.up if head.down is None else head.down
    return [first.shape[1], head.up.shape[0]]
