"""Exact probabilities of all continuations of a small-vocabulary model, and samples held against them."""

from __future__ import annotations

import itertools
from typing import Any

import scipy.stats
import torch
from torch import Tensor

#: Size of the vocabulary.
SMALL = 7


def joint(model: Any, prompt: Tensor, warp: dict[str, Any], tokens: int) -> Tensor:
    """Exact probabilities [SMALL ** tokens] of all continuations, from transformers' own forward and processors."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper

    prefixes = torch.tensor(list(itertools.product(range(SMALL), repeat=tokens)))
    ids = torch.cat([prompt.expand(len(prefixes), -1), prefixes], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, prompt.shape[1] - 1 : -1]
    found = torch.ones(len(prefixes), dtype=torch.float64)
    for step in range(tokens):
        scores = TemperatureLogitsWarper(warp["temperature"])(ids, logits[:, step])
        if warp.get("top_k"):
            scores = TopKLogitsWarper(warp["top_k"])(ids, scores)
        chances = torch.softmax(scores.double(), dim=-1)
        found *= chances.gather(1, prefixes[:, step : step + 1])[:, 0]
    return found


def counted(made: Tensor) -> Tensor:
    """int64 [SMALL ** tokens]: how often each continuation is among `made` int64 [n, tokens]."""
    powers = SMALL ** torch.arange(made.shape[1] - 1, -1, -1)
    return torch.bincount((made * powers).sum(1), minlength=SMALL ** made.shape[1])


def check(counts: Tensor, wanted: Tensor) -> None:
    """A chi-square test of `counts` against probabilities; rare continuations are taken together."""
    expected = wanted * int(counts.sum())
    assert int(counts[wanted == 0].sum()) == 0, "tokens that a processor forbids"
    large = expected >= 8
    observed = torch.cat([counts[large], counts[~large].sum()[None]]).double()
    hoped = torch.cat([expected[large], expected[~large].sum()[None]])
    keep = hoped > 0
    result = scipy.stats.chisquare(
        observed[keep].numpy(), hoped[keep].numpy() * float(observed[keep].sum() / hoped[keep].sum())
    )
    assert result.pvalue > 1e-4, result
