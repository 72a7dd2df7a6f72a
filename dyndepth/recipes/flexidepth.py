"""FlexiDepth (arXiv 2503.23798): a gate per layer; tokens that skip a layer pass a light map, and their K,V are computed there.

Bands of one layer, each with a router and a linear map in place of the layer. Under `kv="propagate"` a row that skips layer j
gets the K,V that layer j's own norm and projections make of its residual: those that it would have had, had it run the layer,
so rows that do not skip read nothing approximate of the layer itself. Maps and routers are fitted in closed form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dyndepth.closed_form.fitting import fit_maps, residuals_at
from dyndepth.closed_form.measure import Sample
from dyndepth.closed_form.progress import Progress
from dyndepth.closed_form.router import fit_router
from dyndepth.closed_form.search import Candidate, label
from dyndepth.data import FIT, TUNE, Corpus, gather
from dyndepth.errors import ArgumentError
from dyndepth.exits import Band, Exits, Router, RouterScore
from dyndepth.exits.maps import Jump
from dyndepth.runtime import entry
from dyndepth.runtime.bind import bind
from dyndepth.runtime.fingerprint import facts_of

_RECORD = {"recipe": "FlexiDepth (arXiv 2503.23798)"}


def gated_layers(layers: int) -> list[int]:
    """The upper half, as in the paper, but for the last one: what skips that leaves for good."""
    return list(range(max(1, layers // 2), layers - 1))


def exits(model: Any, gates: Mapping[int, tuple[Router, Jump | None]], threshold: float | Sequence[float] = 0.5) -> Exits:
    """A gate per layer.

    Args:
        model: a supported transformers causal LM of L layers.
        gates: by layer (1 .. L - 2), the router, whose score is the chance that the layer is not needed, and the map that takes
            the layer's place (None: the residual as it is).
        threshold: rows skip a layer where its router's score reaches it; one, or one per layer, ascending.
    """
    bound = bind(model)
    for layer in gates:
        if not 1 <= layer < bound.depth - 1:
            raise ArgumentError(f"flexidepth.exits: layers must be in [1, {bound.depth - 1}), got {layer}")
    bands = [Band(layer, layer + 1, RouterScore(router), threshold=1.0, jump=jump) for layer, (router, jump) in gates.items()]
    return Exits(bands, facts_of(bound), dict(_RECORD)).with_thresholds(threshold)


def fit(
    model: Any,
    texts: Sequence[str | Tensor] | Corpus = (),
    tokenizer: Any = None,
    *,
    skip: float = 0.25,
    layers: Sequence[int] | None = None,
    prompts: Sequence[str | Tensor] | None = None,
    tokens: int = 16384,
    own: float = 0.5,
    seed: int = 0,
    progress: bool = True,
) -> Exits:
    """Gates in closed form: maps by ridge regression, routers by logistic regression, one threshold for a wanted share.

    The maps take residuals before a layer to those after it. Rows that skip one layer at random say whether the token is the
    full model's nevertheless, and routers learn to predict that, so that their scores are chances and compare over layers.

    Args:
        model, texts, tokenizer, prompts, tokens, own, seed, progress: as for dyndepth.fit.
        skip: share of (row, gated layer) pairs whose score reaches the threshold, judged on the full model's residuals.
        layers: those with a gate; None is `gated_layers`.
    """
    bound = bind(model)
    chosen = gated_layers(bound.depth) if layers is None else sorted(set(layers))
    if not chosen or not 1 <= chosen[0] <= chosen[-1] < bound.depth - 1 or not 0 < skip < 1:
        raise ArgumentError(
            f"flexidepth.fit: wanted layers in [1, {bound.depth - 1}), at least one, and skip in (0, 1), got {chosen}, {skip}"
        )
    report = Progress(progress)
    facts = facts_of(bound)
    with report, torch.no_grad():
        with report.stage("continuing prompts", round(tokens * own)) as advance:
            data = gather(
                model, texts, tokenizer, prompts, "flexidepth.fit", tokens=tokens, own=own, new_tokens=128, batch=32, seed=seed,
                learned=(), advance=advance,
            )  # fmt: skip
        found = fit_maps(bound, data, [(layer, layer + 1) for layer in chosen], report)
        sample, tune = (Sample.of(model, *data.part(name)) for name in (FIT, TUNE))
        with report.stage("labelling rows", 2) as advance:
            labels = label(found, sample, facts, 1, lambda: advance(1))
        routers, scores = _routers(bound, found, labels, sample, tune)
        threshold = float(torch.cat(scores).quantile(1 - skip))
    gates = {c.band.leave: (router, c.band.jump) for c, router in zip(found, routers, strict=True)}
    for _, jump in gates.values():
        assert jump is not None
        jump.to(bound.dtype)
    result = exits(model, gates, threshold)
    result.record["flexidepth"] = {"skip": skip, "tokens": data.count(), "documents": sorted(data.documents)}
    return result


def _routers(
    model: Any, found: Sequence[Candidate], labels: Sequence[Any], sample: Sample, tune: Sample
) -> tuple[list[Router], list[Tensor]]:
    """Per candidate, its router and the scores of the judged rows of `tune`."""
    boundaries = [candidate.band.leave for candidate in found]
    fitting, tuning = (residuals_at(model, each.tokens, boundaries) for each in (sample, tune))
    routers: list[Router] = []
    scores: list[Tensor] = []
    for candidate, labelled in zip(found, labels, strict=True):
        residual = fitting[candidate.band.leave].to(model.dtype)[labelled.rows]
        router, _ = fit_router(residual, labelled.agrees, labelled.rows % 5 == 0)
        routers.append(router)
        scores.append(router(tuning[candidate.band.leave].to(model.dtype)[tune.judged]))
    return routers, scores


def generate(model: Any, inputs: Mapping[str, Any] | Tensor, exits: Exits, **options: Any) -> Any:
    """`model.generate` with gated layers; K,V of rows that skip are the layer's own, of their residual.

    Args:
        model: the model that the exits were made for.
        inputs: what a tokenizer returns (padded on the left), or input ids [batch, t].
        exits: of `exits` or `fit`.
        options: of transformers' generate and of dyndepth.generate. Prompts run every layer; `prompt="dynamic"` gates them too,
            as the paper does.

    Returns what transformers' generate returns; with `return_dict_in_generate=True` also `layers_run` [batch, new tokens].
    """
    content = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    return model.generate(**content, custom_generate=entry.generate, exits=exits, **{"kv": "propagate", **options})
