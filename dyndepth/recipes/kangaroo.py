"""Kangaroo (arXiv 2404.18911): lossless self-speculation that stops drafting where the draft is unsure.

A shallow exit with an adapter drafts tokens. Drafting ends where the largest probability of the exit falls below a threshold,
or at a number of drafts; the layers above then verify all of them at once. Greedy tokens are the full model's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dyndepth import training
from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits, TopProbability
from dyndepth.recipes import balcony, ee_tuning
from dyndepth.runtime import entry
from dyndepth.runtime.bind import bind
from dyndepth.training import TrainConfig

#: The paper's: drafting stops below this largest probability, and after so many drafts.
THRESHOLD, DRAFTS = 0.6, 6


def default_exit(layers: int) -> int:
    """The paper's relative depth: after layer 2 of 32."""
    return max(1, round(layers * 2 / 32))


def settings(layers: int, leave: int | None = None, **changes: Any) -> TrainConfig:
    """One block head, trained on a frozen base towards the full model's distribution; `changes` go on top.

    The loss is KL(full || exit), whose gradient is that of the cross-entropy with the full model's distribution; the rest is
    Balcony's (dyndepth.recipes.balcony.settings).
    """
    return balcony.settings(layers, (default_exit(layers) if leave is None else leave,), **changes)


def exits(model: Any, leave: int | None = None, *, heads: Exits | None = None, threshold: float = THRESHOLD) -> Exits:
    """The drafting exit, judged by its largest probability.

    Args:
        model: a supported transformers causal LM.
        leave: its boundary; by default that of the heads, else the paper's relative depth.
        heads: exits with a trained head there (`train`, dyndepth.train, balcony.train); without them the model's final norm
            and LM head draft, which a base from LayerSkip was trained for.
        threshold: drafting stops where the largest probability is below it.

    Raises ArgumentError for heads at several boundaries without `leave`: one exit drafts.
    """
    points = [] if heads is None else [band.leave for band in heads if band.resume == heads.model.layers]
    if leave is None and len(points) > 1:
        raise ArgumentError(f"kangaroo.exits: one exit drafts; name it with leave, one of {points}")
    chosen = (leave,) if leave is not None else tuple(points) or (default_exit(model.config.num_hidden_layers),)
    found = ee_tuning.exits(model, chosen, heads=heads, threshold=threshold)
    return Exits(found.bands, found.model, {**found.record, "recipe": "Kangaroo (arXiv 2404.18911)"})


def train(
    model: Any,
    texts: Sequence[str | Tensor] = (),
    tokenizer: Any = None,
    *,
    output: str | Path,
    leave: int | None = None,
    prompts: Sequence[str | Tensor] | None = None,
    config: TrainConfig | None = None,
    progress: bool = True,
) -> Exits:
    """Train the adapter of a frozen model against its own answers; a killed run goes on where it was (dyndepth.train).

    Args:
        model: a supported transformers causal LM in eval mode; it is not changed.
        texts, prompts, output: as for dyndepth.train.
        leave: boundary of the exit; None takes the config's, or the paper's relative depth.
        config: what `settings` makes.

    Returns the exits as saved in `output`/exits.
    """
    layers = bind(model).depth
    config = settings(layers, leave) if config is None else config
    points = (leave,) if leave is not None else config.exits or (default_exit(layers),)
    if len(points) != 1:
        raise ArgumentError(f"kangaroo.train: config.exits must be one boundary, got {points}")
    config = dataclasses.replace(config, exits=points)
    trained = training.train(model, texts, tokenizer, output=output, prompts=prompts, config=config, progress=progress)
    result = exits(model, heads=trained)
    result.save_pretrained(Path(output) / "exits")
    return result


def generate(
    model: Any,
    inputs: Mapping[str, Any] | Tensor,
    exits: Exits,
    *,
    threshold: float | None = None,
    drafts: int = DRAFTS,
    **options: Any,
) -> Any:
    """`model.generate`, drafted by the exit and verified by the layers above it.

    Args:
        model: the model that the exits were made for.
        inputs: what a tokenizer returns (padded on the left), or input ids [batch, t].
        exits: of `exits`: one exit under the largest probability.
        threshold: drafting of a sequence stops at its first token below it; that token is the full model's to say. 0 never
            stops, above 1 never drafts. None takes the exit's.
        drafts: the most drafts before they are verified.
        options: of transformers' generate and of dyndepth.generate.

    Returns what transformers' generate returns: greedy tokens are the full model's, sampled ones have its distribution; with
    `return_dict_in_generate=True` also `drafted` and `accepted` [batch]. Raises ArgumentError for other exits.
    """
    if len(exits) != 1 or not isinstance(exits.bands[0].criterion, TopProbability):
        kinds = ", ".join(f"{band.criterion.kind} at {band.leave}" for band in exits)
        raise ArgumentError(
            f"kangaroo.generate: exits must be one under top_probability (kangaroo.exits), got {kinds or 'none'}"
        )
    chosen = exits if threshold is None else exits.with_thresholds(threshold)
    content = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    return model.generate(**content, custom_generate=entry.generate, exits=chosen, mode="lossless", drafts=drafts, **options)
