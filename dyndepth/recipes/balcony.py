"""Balcony (arXiv 2503.05005): one frozen model, several depths. A decoder layer of its own at each exit, a budget per request.

The paper runs a whole batch at one depth. Here every request has its own: `generate` decodes them together, and each gets the
tokens it would get alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dyndepth import training
from dyndepth.errors import ArgumentError
from dyndepth.exits import Band, Exits, FixedDepth
from dyndepth.runtime import entry
from dyndepth.runtime.bind import bind
from dyndepth.runtime.block import block_head
from dyndepth.runtime.fingerprint import facts_of
from dyndepth.training import TrainConfig

#: Where the paper's models of 32 layers have their exits (its 1B ablation: 4, 8 and 12 of 16).
_SHARES = (15 / 32, 18 / 32, 21 / 32)
#: The whole model's name, and those of its exits from the deepest down; below XS come 2XS, 3XS, ...
_FULL, _NAMES = "XL", ("L", "M", "S", "XS")

Budget = str | int | None


def default_exits(layers: int) -> tuple[int, ...]:
    """The paper's relative depths; in a model of few layers some fall together."""
    return tuple(sorted({min(max(1, round(layers * share)), layers - 1) for share in _SHARES}))


def settings(layers: int, exits: Sequence[int] = (), **changes: Any) -> TrainConfig:
    """The paper's training as a TrainConfig; `changes` (corpus, tokens, batch, ...) go on top.

    Blocks start as copies of the last layer; KL(full || exit) over the whole vocabulary at temperature 1, no cross-entropy,
    all exits alike; 5e-4 with 1 % warm-up and a cosine. `loss="sampled_kl"` looks at a part of the vocabulary per step, which
    is many times cheaper; `ce_weight` adds cross-entropy with the text.
    """
    paper = {
        "exits": tuple(exits) or default_exits(layers), "head": "block", "init": "last", "loss": "kl", "ce_weight": 0.0,
        "weighting": "equal", "lr": 5e-4, "warmup": 0.01,
    }  # fmt: skip
    return TrainConfig.of(paper | changes)


def start(model: Any, exits: Sequence[int] = ()) -> Exits:
    """Balcony before training: copies of the last layer, each with the input norm of the layer after the exit."""
    bound = bind(model)
    chosen = tuple(exits) or default_exits(bound.depth)
    bands = [Band(leave, bound.depth, FixedDepth(), head=block_head(bound, leave)) for leave in chosen]
    return Exits(bands, facts_of(bound))


def train(
    model: Any,
    texts: Sequence[str | Tensor] = (),
    tokenizer: Any = None,
    *,
    output: str | Path,
    exits: Sequence[int] | None = None,
    prompts: Sequence[str | Tensor] | None = None,
    config: TrainConfig | None = None,
    progress: bool = True,
) -> Exits:
    """Train exit blocks of a frozen model against its own answers; a killed run goes on where it was (dyndepth.train).

    Args:
        model: a supported transformers causal LM in eval mode; it is not changed.
        texts, prompts, output: as for dyndepth.train.
        exits: boundaries; None takes the config's, or the paper's relative depths.
        config: what `settings` makes; its head must be a block.

    Returns the exits, left only by requests that name their depth, as saved in `output`/exits.
    """
    layers = bind(model).depth
    config = settings(layers) if config is None else config
    if config.head != "block":
        raise ArgumentError(
            f"balcony.train: config.head must be block, got {config.head!r}; balcony.settings(layers, ...) makes such a config"
        )
    config = dataclasses.replace(config, exits=tuple(exits or config.exits or default_exits(layers)))
    trained = training.train(model, texts, tokenizer, output=output, prompts=prompts, config=config, progress=progress)
    result = static(trained)
    result.record = {**trained.record, "recipe": "Balcony (arXiv 2503.05005)"}
    result.save_pretrained(Path(output) / "exits")
    return result


def static(exits: Exits) -> Exits:
    """The same heads, left only by requests that name their depth. Bands that resume and K,V maps are left out: unused."""
    if all(isinstance(band.criterion, FixedDepth) for band in exits):
        return exits
    top = exits.model.layers
    bands = [Band(band.leave, top, FixedDepth(), head=band.head) for band in exits if band.resume == top]
    return Exits(bands, exits.model, exits.record)


def budgets(exits: Exits) -> dict[str, int]:
    """Depth (layers below the exit) by name, shallowest first: S, M, L for three exits, and XL for the whole model.

    Names count from the deepest exit, L, down: one exit is L, two are M and L, a fourth is XS, a fifth 2XS.
    """
    top = exits.model.layers
    points = [band.leave for band in exits if band.resume == top]
    names = [_NAMES[at] if at < len(_NAMES) else f"{at - 2}XS" for at in range(len(points))]
    return dict(zip(reversed(names), points, strict=True)) | {_FULL: top}


def generate(
    model: Any,
    inputs: Mapping[str, Any] | Tensor,
    exits: Exits,
    budget: Budget | Sequence[Budget] = "M",
    **options: Any,
) -> Any:
    """`model.generate` at a depth per request: a row runs the layers below its exit and the exit's block, nothing else.

    Args:
        model: the model that the exits were trained for.
        inputs: what a tokenizer returns (padded on the left), or input ids [batch, t].
        exits: of `train`; of others the exit heads are used, at the depths named.
        budget: for all requests or one per request: a name (`budgets`), a depth, or None for the whole model.
        options: of transformers' generate and of dyndepth.generate. Unless they say otherwise prompts run no deeper than the
            answers (`prompt="dynamic"`), and layers above the exit get no K,V (`kv="none"`): all tokens of a request leave at
            one depth, so nobody reads there.

    Returns what transformers' generate returns.
    """
    depth: int | list[int]
    if budget is None or isinstance(budget, str | int):
        depth = _depth(budget, exits)
    else:
        depth = [_depth(each, exits) for each in budget]
    content = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    chosen = {"kv": "none", "prompt": "dynamic", **options}
    return model.generate(**content, custom_generate=entry.generate, exits=static(exits), depth=depth, **chosen)


def _depth(budget: Budget, exits: Exits) -> int:
    if budget is None:
        return exits.model.layers
    if not isinstance(budget, str):
        return budget
    known = budgets(exits)
    if budget not in known:
        names = ", ".join(f"{name} ({depth})" for name, depth in known.items())
        raise ArgumentError(f"balcony.generate: budget must be one of {names}, a depth or None, got {budget!r}")
    return known[budget]
