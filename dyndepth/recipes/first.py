"""FiRST (arXiv 2410.12513): the prompt decides, once, which layers all new tokens of its sequence leave out.

A router per layer (or stretch of layers) is asked of every prompt token while the prompt runs; the mean decides. All new tokens
of a sequence go the same way, so no K,V is missing that one of them reads, and nothing is back-filled. Sequences of a batch go
different ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.exits import Band, Exits, PromptRouter, RouterScore
from dyndepth.runtime import entry


def exits(gates: Exits, threshold: float | Sequence[float] | None = None) -> Exits:
    """Bands that prompts decide, from bands that rows decide.

    Args:
        gates: exits whose bands resume below the top under routers of the residual alone (dyndepth.recipes.flexidepth.fit: one
            layer each; dyndepth.fit: stretches). Routers and jump maps are shared; K,V maps are not needed.
        threshold: a sequence takes a band where the router's mean over its prompt reaches it; one, or one per band. None takes
            those of the bands.
    """
    bands = []
    for band in gates:
        if band.resume == gates.model.layers or not isinstance(band.criterion, RouterScore) or band.router is None:
            raise ArgumentError(
                f"first.exits: bands must resume below the top under a router, got [{band.leave}, {band.resume}) under "
                f"{band.criterion.kind}"
            )
        bands.append(Band(band.leave, band.resume, PromptRouter(band.router), threshold=band.threshold, jump=band.jump))
    found = Exits(bands, gates.model, {"recipe": "FiRST (arXiv 2410.12513)"})
    return found if threshold is None else found.with_thresholds(threshold)


def generate(model: Any, inputs: Mapping[str, Any] | Tensor, exits: Exits, **options: Any) -> Any:
    """`model.generate` with a set of layers per sequence.

    Args:
        model: the model that the exits were made for.
        inputs: what a tokenizer returns (padded on the left), or input ids [batch, t].
        exits: of `exits`.
        options: of transformers' generate and of dyndepth.generate. Prompts run every layer; nothing is back-filled.

    Returns what transformers' generate returns; with `return_dict_in_generate=True`, `bands_taken` [batch, new tokens] says
    which bands: the same for all tokens of a sequence.
    """
    content = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    return model.generate(**content, custom_generate=entry.generate, exits=exits, **{"kv": "none", **options})
