"""Exits judged by the top probability over a shortlist of frequent tokens, with thresholds found on prompts of their own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compare.system import Cell
from dyndepth.exits import Band, Exits, TopProbability
from dyndepth.runtime.bind import bind

WORDS = 4096
#: Share of the tokens that leave which must agree with full depth: what the demo's exits were certified for.
AGREEMENT = 0.95


def frequent(exits: Exits, vocabulary: int, count: int) -> Tensor:
    """int64 [count]: the exits' own shortlists first, then the lowest ids (byte-pair merges are numbered by frequency)."""
    known = [int(word) for band in exits if band.shortlist is not None for word in band.shortlist]
    return torch.tensor(sorted(list(dict.fromkeys([*known, *range(vocabulary)]))[:count]))


def shortlisted(model: Any, exits: Exits, inputs: dict[str, Tensor], new_tokens: int, words: int = WORDS) -> Exits:
    """The exits that leave for good, their heads and K,V maps, judged over the shortlist.

    A threshold is the lowest at which AGREEMENT of the tokens above it agree, over full depth's answers to `inputs`.
    """
    ids = frequent(exits, model.config.vocab_size, min(words, model.config.vocab_size))
    found = model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    cell = Cell(model, inputs, new_tokens, found.shape[1], exits, exits)
    bands = [band for band in exits.prepared(model.device, model.dtype) if band.resume == cell.layers and not band.has_block]
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {band.leave: [] for band in bands}
    bound = bind(model)
    weight = model.get_output_embeddings().weight
    for prompt, row in zip(cell.prompts, found, strict=True):
        sequence = torch.cat([prompt, row[cell.width :]])
        with torch.no_grad():
            out = model(input_ids=sequence[None], output_hidden_states=True)
            judged = slice(prompt.shape[0] - 1, -1)
            full = out.logits[0, judged].argmax(-1)
            for band in bands:
                ready = band.head_or_norm()(out.hidden_states[band.leave][0, judged], bound.finish)
                score = torch.nn.functional.linear(ready, weight[ids]).float().softmax(-1).amax(-1)
                seen[band.leave].append((score, bound.argmax(ready) == full))
    made = []
    for band in bands:
        score, agrees = (torch.cat(parts) for parts in zip(*seen[band.leave], strict=True))
        made.append(
            Band(
                band.leave, band.resume, TopProbability(), threshold=lowest_threshold(score, agrees, AGREEMENT),
                head=band.head, kv=band.kv, shortlist=ids,
            )
        )  # fmt: skip
    return Exits(made, exits.model)


def lowest_threshold(score: Tensor, agrees: Tensor, wanted: float) -> float:
    """The lowest score such that `wanted` of the rows at or above it agree; inf if there is none."""
    ordered, order = score.sort(descending=True, stable=True)
    share = agrees[order].double().cumsum(0) / torch.arange(1, len(score) + 1)
    last = torch.ones_like(agrees)
    last[:-1] = ordered[:-1] != ordered[1:]  # rows of one score leave together
    good = (share >= wanted) & last
    return float(ordered[good.nonzero()[-1, 0]]) if bool(good.any()) else math.inf
