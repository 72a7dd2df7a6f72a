"""EE-Tuning (arXiv 2402.00518, heads of EE-LLM, arXiv 2312.04916): exits tuned on a frozen model with the text's next tokens.

Rows leave where the exit's largest probability reaches a threshold, judged row by row. Skipped layers get their K,V by
propagation; EE-LLM recomputes them, or fills them by a pipeline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dyndepth import training
from dyndepth.errors import ArgumentError
from dyndepth.exits import Band, Exits, TopProbability
from dyndepth.exits.heads import Head
from dyndepth.runtime.bind import bind
from dyndepth.runtime.fingerprint import check_exits, facts_of
from dyndepth.training import TrainConfig

#: The kinds of head that have something to tune, and where each starts: as the copies that EE-Tuning starts from would
#: answer. A silent MLP and a silent correction leave the final norm, which all share; a block copies the last layer and it.
STARTS = {"mlp": "random", "block": "copy", "translator": "zero"}


def default_exits(layers: int) -> tuple[int, ...]:
    """Every eighth of the depth, as the paper's 13B model has them."""
    return tuple(sorted({round(layers * part / 8) for part in range(1, 8)} - {0, layers}))


def settings(layers: int, exits: Sequence[int] = (), *, head: str = "mlp", **changes: Any) -> TrainConfig:
    """The paper's tuning as a TrainConfig; `changes` (corpus, tokens, batch, ...) go on top.

    Cross-entropy with the given text's own next tokens, weighed by relative depth, at 1e-4. `own=` adds text that the model
    writes itself, `loss="kl"` learns from the whole distribution of the full model instead of one word.
    """
    if head not in STARTS:
        raise ArgumentError(
            f"ee_tuning.settings: head must be one of {', '.join(STARTS)}, got {head!r}; a norm head shares all it has with "
            "the model and is used as it is (ee_tuning.exits)"
        )
    paper = {
        "exits": tuple(exits) or default_exits(layers), "head": head, "init": STARTS[head], "loss": "ce",
        "weighting": "ee_tuning", "lr": 1e-4, "own": 0.0,
    }  # fmt: skip
    return TrainConfig.of(paper | changes)


def exits(model: Any, leave: Sequence[int] = (), *, heads: Exits | None = None, threshold: float = 1.0) -> Exits:
    """Exits under the largest probability: norm heads at `leave`, or given trained heads at their boundaries.

    `threshold` 1 lets only rows leave that are sure beyond rounding; a better one comes from dyndepth.calibrate.
    """
    bound = bind(model)
    found: dict[int, Head] = {}
    if heads is not None:
        check_exits(heads, bound)
        found = {band.leave: band.head_or_norm() for band in heads if band.resume == bound.depth}
    chosen = tuple(leave) or tuple(found) or default_exits(bound.depth)
    if heads is not None and not set(chosen) <= set(found):
        raise ArgumentError(f"ee_tuning.exits: leave must be boundaries of the heads {sorted(found)}, got {list(chosen)}")
    bands = [Band(at, bound.depth, TopProbability(), threshold=threshold, head=found.get(at)) for at in chosen]
    record = {} if heads is None else heads.record
    return Exits(bands, facts_of(bound), {**record, "recipe": "EE-Tuning (arXiv 2402.00518)"})


def train(
    model: Any,
    texts: Sequence[str | Tensor] = (),
    tokenizer: Any = None,
    *,
    output: str | Path,
    leave: Sequence[int] | None = None,
    prompts: Sequence[str | Tensor] | None = None,
    config: TrainConfig | None = None,
    progress: bool = True,
) -> Exits:
    """Tune exit heads of a frozen model; a killed run goes on where it was (dyndepth.train).

    Args:
        model: a supported transformers causal LM in eval mode; it is not changed.
        texts, prompts, output: as for dyndepth.train.
        leave: boundaries of the exits; None takes the config's, or eighths of the depth.
        config: what `settings` makes.

    Returns exits under the largest probability with threshold 1, as saved in `output`/exits.
    """
    layers = bind(model).depth
    config = settings(layers) if config is None else config
    if config.head not in STARTS:
        raise ArgumentError(f"ee_tuning.train: config.head must be one of {', '.join(STARTS)}, got {config.head!r}")
    config = dataclasses.replace(config, exits=tuple(leave or config.exits or default_exits(layers)))
    trained = training.train(model, texts, tokenizer, output=output, prompts=prompts, config=config, progress=progress)
    result = exits(model, heads=trained)
    result.save_pretrained(Path(output) / "exits")
    return result
