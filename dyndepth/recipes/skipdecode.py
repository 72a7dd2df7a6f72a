"""SkipDecode (arXiv 2307.02628): depth by position, never rising, the same for every row of a step.

Lower-middle layers are skipped, more of them the later the token; the layers at the top and a few at the bottom always run. As
the layers that a token runs are among those of every token before it, all K,V that it reads are there, and nothing is
back-filled. Rows of a step go the same way, so a batch stays whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.exits import Band, Exits, Schedule
from dyndepth.runtime import entry
from dyndepth.runtime.bind import bind
from dyndepth.runtime.fingerprint import facts_of

#: Bands that one set of exits can hold.
_MOST_BANDS = 62


def exits(model: Any, least: int, length: int, *, most: int | None = None, warmup: int = 1) -> Exits:
    """Bands of one layer each, from `warmup` up, that open one after the other as the step grows.

    A token at step t (tokens generated before it) runs d(t) = ceil(most - (most - least) min(t / length, 1)) layers: the first
    `warmup` and the last d(t) - `warmup`. It skips the L - d(t) layers between.

    Args:
        model: a supported transformers causal LM of L layers.
        least, most: layers that the last and the first new token run; `most` is L by default.
        length: the step from which on `least` layers run.
        warmup: layers at the bottom that always run, at least 1.

    The mean depth over `length` tokens is about (most + least) / 2, which is how the paper meets a budget (`least_for`).
    """
    bound = bind(model)
    depth = bound.depth
    most = depth if most is None else most
    if not (1 <= warmup < least <= most <= depth and length >= 1):
        raise ArgumentError(
            f"skipdecode.exits: wanted 1 <= warmup < least <= most <= {depth} and length >= 1 (the top layer always runs), got "
            f"warmup {warmup}, least {least}, most {most}, length {length}"
        )
    if depth - least > _MOST_BANDS:
        raise ArgumentError(f"skipdecode.exits: at most {_MOST_BANDS} layers can be skipped, got {depth - least}")
    bands = []
    for skipped in range(depth - least):
        # The layer above this boundary is skipped when more than `skipped` layers are left out: d(t) <= L - 1 - skipped. A
        # Schedule compares its falling line with the boundary's own number, so the line is shifted by the difference.
        leave = warmup + skipped
        shift = leave - (depth - 1 - skipped)
        bands.append(Band(leave, leave + 1, Schedule(first=most + shift, last=least + shift, length=length)))
    record = {
        "recipe": "SkipDecode (arXiv 2307.02628)",
        "skipdecode": {"most": most, "least": least, "length": length, "warmup": warmup},
    }
    return Exits(bands, facts_of(bound), record)


def depth_at(step: int, *, most: int, least: int, length: int) -> int:
    """Layers that the token at `step` runs, as `exits` has them."""
    return math.ceil(most - (most - least) * min(step / length, 1))


def least_for(budget: float, layers: int, *, most: int | None = None, warmup: int = 1) -> int:
    """The `least` whose line from `most` has `budget` (a share of `layers`) as its mean; raises ArgumentError if none has."""
    most = layers if most is None else most
    least = math.ceil(2 * budget * layers - most - 1e-9)
    if not warmup < least <= most:
        low, high = (most + warmup + 1) / 2 / layers, most / layers
        raise ArgumentError(f"skipdecode.least_for: budget must be in [{low:.3f}, {high:.3f}] of {layers} layers, got {budget}")
    return least


def generate(model: Any, inputs: Mapping[str, Any] | Tensor, exits: Exits, **options: Any) -> Any:
    """`model.generate` at a depth that falls with the step.

    Args:
        model: the model that the exits were made for.
        inputs: what a tokenizer returns (padded on the left), or input ids [batch, t].
        exits: of `exits`.
        options: of transformers' generate and of dyndepth.generate. Prompts run every layer, and nothing is back-filled
            (`kv="none"`); `prompt="dynamic"` runs them as deep as the first new token.

    Returns what transformers' generate returns. Raises ExitsError for exits under which a token would read K,V that nobody
    wrote.
    """
    content = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    return model.generate(**content, custom_generate=entry.generate, exits=exits, **{"kv": "none", **options})
