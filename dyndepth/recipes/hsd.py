"""Hierarchical Skip Decoding (arXiv 2403.14919): more layers are left out as the text grows, level by level, evenly spread.

Nothing is trained and nothing judged. Layers are put in a hierarchy, halves, then halves of halves, so that any number of them
lies evenly over the depth. At every level of length more of that order is left out. The sets are nested, so all K,V that a
token reads are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.exits import Always, Band, Exits, Schedule
from dyndepth.runtime import entry
from dyndepth.runtime.bind import bind
from dyndepth.runtime.fingerprint import facts_of


def order(layers: int) -> list[int]:
    """0 .. layers - 1 such that any first few lie evenly: every second one, then every second of those between, and so on.

    The numbers sorted by their binary digits read backwards (van der Corput's sequence).
    """
    bits = max(1, (layers - 1).bit_length())
    return sorted(range(layers), key=lambda number: int(f"{number:0{bits}b}"[::-1], 2))


def skipped_at(step: int, *, layers: int, least: int, length: int, levels: int, bottom: int, top: int) -> list[int]:
    """Layers that the token at `step` leaves out, ascending, as `exits` has them.

    At level k = floor(levels min(step / length, 1)) it is ceil(k / levels (layers - least)) of the middle ones.
    """
    level = min(levels * step // length, levels)
    count = math.ceil(level * (layers - least) / levels)
    return sorted(bottom + number for number in order(layers - bottom - top)[:count])


def exits(model: Any, least: int, length: int, *, levels: int = 4, bottom: int = 1, top: int = 1) -> Exits:
    """Bands of one layer each that open level by level (`skipped_at`).

    Args:
        model: a supported transformers causal LM of L layers.
        least: layers that tokens of the last level run.
        length: the step (tokens generated before) at which the last level begins; level k begins at k length / levels.
        levels: levels above the first one, which leaves nothing out.
        bottom, top: layers at the ends that always run, at least 1 each.
    """
    bound = bind(model)
    depth = bound.depth
    if not (bottom >= 1 and top >= 1 and bottom + top <= least < depth and length >= levels >= 1):
        raise ArgumentError(
            f"hsd.exits: wanted bottom, top >= 1, bottom + top <= least < {depth} and length >= levels >= 1, got bottom "
            f"{bottom}, top {top}, least {least}, length {length}, levels {levels}"
        )
    shape = {"layers": depth, "least": least, "length": length, "levels": levels, "bottom": bottom, "top": top}
    begins: dict[int, int] = {}
    for level in range(1, levels + 1):
        at = math.ceil(level * length / levels)
        for layer in skipped_at(at, **shape):
            begins.setdefault(layer, at)
    # A schedule that falls by one over `at` steps reaches the boundary's own number at step `at` and not before.
    bands = [Band(layer, layer + 1, Schedule(layer + 1, layer, at) if at else Always()) for layer, at in begins.items()]
    return Exits(bands, facts_of(bound), {"recipe": "Hierarchical Skip Decoding (arXiv 2403.14919)", "hsd": shape})


def generate(model: Any, inputs: Mapping[str, Any] | Tensor, exits: Exits, **options: Any) -> Any:
    """`model.generate` with ever fewer layers.

    Args:
        model: the model that the exits were made for.
        inputs: what a tokenizer returns (padded on the left), or input ids [batch, t].
        exits: of `exits`.
        options: of transformers' generate and of dyndepth.generate. Prompts run every layer; nothing is back-filled.

    Returns what transformers' generate returns.
    """
    content = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    return model.generate(**content, custom_generate=entry.generate, exits=exits, **{"kv": "none", **options})
