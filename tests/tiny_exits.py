"""Random exits for the tiny models: maps large enough to matter, routers that let about half of the rows go."""

from __future__ import annotations

from typing import Any

import torch

from dyndepth.exits import (
    Band,
    Criterion,
    Exits,
    JumpMap,
    KVMap,
    MlpHead,
    NormHead,
    Router,
    RouterScore,
    TranslatorHead,
)
from dyndepth.runtime.bind import bind
from dyndepth.runtime.fingerprint import facts_of


def filled(module: torch.nn.Module, generator: torch.Generator, scale: float = 1.0) -> Any:
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale / max(parameter.shape[-1], 1) ** 0.5
    return module


def head_of(kind: str, width: int, ready: int, generator: torch.Generator) -> Any:
    if kind == "norm":
        return NormHead()
    if kind == "mlp":
        return filled(MlpHead(width, 20), generator)
    return filled(TranslatorHead(width, ready, 8 if kind == "translator" else None), generator)


def band(
    model: Any,
    leave: int,
    resume: int,
    criterion: Criterion | None = None,
    *,
    head: str = "translator",
    seed: int = 0,
    kv_rank: int | None = None,
    **options: Any,
) -> Band:
    """A band with random maps; by default a random router decides."""
    bound = bind(model)
    generator = torch.Generator().manual_seed(100 * leave + resume + seed)
    width, kv_width = bound.hidden_size, bound.layers[0].kv_heads * bound.layers[0].head_dim
    top = resume == bound.depth
    router = filled(Router(width, 3, silu=True), generator, 4.0)
    router.bias1.data.zero_()
    router.bias2.data.zero_()
    options.setdefault("threshold", 0.5)
    return Band(
        leave,
        resume,
        criterion or RouterScore(router),
        head=head_of(head, width, bound.ready_size, generator) if top else None,
        jump=None if top else filled(JumpMap(width), generator),
        kv=filled(KVMap(resume - leave, kv_width, width, kv_rank), generator),
        **options,
    )


def exits_of(model: Any, *bands: Band) -> Exits:
    return Exits(bands, facts_of(bind(model)))


def mixed(model: Any, **options: Any) -> Exits:
    """Two bands that resume and two exits, overlapping, for six layers."""
    return exits_of(
        model,
        band(model, 1, 3, **options),
        band(model, 2, 5, **options),
        band(model, 3, 6, **options),
        band(model, 5, 6, head="mlp", **options),
    )


def gates(layers: tuple[int, ...] = (2, 3, 4), *, maps: bool = True) -> dict[int, tuple[Router, JumpMap | None]]:
    """Random routers of single layers, with random maps in the layers' place or none."""
    generator = torch.Generator().manual_seed(5)
    found: dict[int, tuple[Router, JumpMap | None]] = {}
    for layer in layers:
        router = filled(Router(48, 3, silu=True), generator, 6.0)
        router.bias1.data.zero_()
        router.bias2.data.zero_()
        jump = filled(JumpMap(48), generator)
        found[layer] = router, jump if maps else None
    return found
