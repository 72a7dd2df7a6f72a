"""EE-LLM (arXiv 2312.04916): several exits under the largest probability, and exact K,V by recomputing tokens that left.

A token leaves at the first exit whose largest probability reaches the threshold. It is parked there with its residual, and
runs its other layers in the pass in which a later token of its sequence goes deeper: no K,V is ever approximate. Heads and
their training are those of EE-Tuning (dyndepth.recipes.ee_tuning).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits, TopProbability
from dyndepth.recipes import ee_tuning
from dyndepth.runtime import entry
from dyndepth.runtime.session import DEFAULT_PENDING


def default_exits(layers: int) -> tuple[int, ...]:
    """A quarter and a half of the depth: 8 and 16 of 32 (the paper's 7B model), 6 and 12 of 24 (1.3B)."""
    return tuple(sorted({max(1, round(layers / 4)), max(1, round(layers / 2))} - {layers}))


def exits(model: Any, leave: Sequence[int] = (), *, heads: Exits | None = None, threshold: float = 1.0) -> Exits:
    """Exits under the largest probability of their own logits.

    Args:
        model: a supported transformers causal LM.
        leave: boundaries; by default those of the heads, else a quarter and a half of the depth.
        heads: trained heads (`ee_tuning.train`, `dyndepth.train`), of which `leave` may name some; without them the model's
            final norm and LM head read the residual (EE-LLM's norm exits), which wants a base that was trained for it.
        threshold: smallest largest probability that leaves; 1 lets only tokens go that are sure beyond rounding.
    """
    chosen = tuple(leave) if leave or heads is not None else default_exits(model.config.num_hidden_layers)
    found = ee_tuning.exits(model, chosen, heads=heads, threshold=threshold)
    return Exits(found.bands, found.model, {**found.record, "recipe": "EE-LLM (arXiv 2312.04916)"})


def generate(
    model: Any,
    inputs: Mapping[str, Any] | Tensor,
    exits: Exits,
    *,
    threshold: float | Sequence[float] | None = None,
    pending: int = DEFAULT_PENDING,
    **options: Any,
) -> Any:
    """`model.generate` with K,V recomputation: every residual that is judged or read is the full model's own.

    Args:
        model: the model that the exits were made for.
        inputs: what a tokenizer returns (padded on the left), or input ids [batch, t].
        exits: of `exits`; bands that leave for good under the largest probability.
        threshold: one for all exits or one per exit; None takes what the exits have. Above 1 nobody leaves.
        pending: tokens of a sequence that may be parked; the next one then runs every layer and takes them along.
        options: of transformers' generate and of dyndepth.generate. Sampling draws from the logits of the exit.

    Returns what transformers' generate returns. Raises ArgumentError for exits under another criterion, ExitsError for bands
    that resume below the top.
    """
    other = [band for band in exits if not isinstance(band.criterion, TopProbability)]
    if other:
        raise ArgumentError(
            f"ee_llm.generate: exits must be judged by top_probability, got {other[0].criterion.kind} at boundary "
            f"{other[0].leave}; ee_llm.exits(model, heads=...) makes such exits"
        )
    chosen = exits if threshold is None else exits.with_thresholds(threshold)
    content = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    return model.generate(**content, custom_generate=entry.generate, exits=chosen, kv="recompute", pending=pending, **options)
