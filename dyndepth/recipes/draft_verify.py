"""Draft & Verify (arXiv 2309.08168): lossless self-speculation that drafts with some of the model's own layers left out.

No training and no exit head: a drafting row skips a fixed set of layers and ends at the model's own head. The full model then
verifies all drafts at once. Which layers to leave out is found by measuring; drafting stops where a draft is unsure, by a
threshold that follows how many drafts hold. Greedy tokens are the full model's own, sampled ones have its distribution.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dyndepth.data.encode import encode
from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.exits import Always, Band, Exits
from dyndepth.runtime import entry
from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.confidence import Confidence
from dyndepth.runtime.fingerprint import facts_of

#: The published code's: at most so many drafts; drafting stops below a probability that begins at 0.6 and aims at nine in ten.
DRAFTS = 8
CONFIDENCE = Confidence(0.6, target=0.9, step=0.01, memory=0.5, inertia=0.9)


def exits(model: Any, layers: Sequence[int]) -> Exits:
    """Bands that leave out these layers (1 .. L - 1; the first layer always runs), for all drafts alike."""
    bound = bind(model)
    chosen = sorted(set(layers))
    if not chosen or len(chosen) != len(layers) or chosen[0] < 1 or chosen[-1] >= bound.depth:
        raise ArgumentError(
            f"draft_verify.exits: layers must be different numbers from 1 to {bound.depth - 1}, at least one, got "
            f"{list(layers)}"
        )
    bands = [Band(leave, resume, Always()) for leave, resume in _runs(chosen)]
    return Exits(bands, facts_of(bound), {"recipe": "Draft & Verify (arXiv 2309.08168)", "draft_verify": {"layers": chosen}})


def _runs(layers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[begin, end) of stretches of consecutive numbers."""
    for _, group in itertools.groupby(enumerate(layers), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in group]
        yield numbers[0], numbers[-1] + 1


@dataclasses.dataclass(frozen=True)
class Trial:
    """What drafting without some layers came to."""

    layers: tuple[int, ...]
    #: Tokens made, drafts made, and drafts that held.
    tokens: int
    drafted: int
    accepted: int
    #: Tokens per weight read, of what full depth makes per weight read, for one sequence at a time.
    gain: float


def gain(tokens: int, drafted: int, accepted: int, *, layers: int, skipped: int, head: float) -> float:
    """Tokens per weight read by drafting and verifying, of full depth's.

    A pass of a single sequence waits for the weights, whatever rows it has. A draft reads those of the layers that it runs and
    of the head; a verification, one per token that is not an accepted draft, those of the whole model:
    tokens (L + head) / (drafted (L - skipped + head) + (tokens - accepted) (L + head)).

    Args:
        tokens, drafted, accepted: counted over a generation.
        layers, skipped: of the model, and those that drafts leave out.
        head: weights of the LM head in layers.
    """
    full = layers + head
    return tokens * full / (drafted * (full - skipped) + (tokens - accepted) * full)


def search(
    model: Any,
    prompts: Sequence[str | Tensor],
    tokenizer: Any = None,
    *,
    drafts: int = 4,
    tokens: int = 32,
    most: int | None = None,
    width: int = 3,
    budget: int | None = None,
) -> Exits:
    """Which layers drafts should leave out, by measuring: greedy, from how many drafts hold.

    Each layer is left out alone first. Then, from the layer whose drafts hold most often, layers are added one at a time: of
    the `width` next ones in that order, the one with which `gain` is highest. It goes on to `most` layers, through sets that
    pay less than the one before, because leaving out few layers hardly ever pays; the best set that was seen is returned.

    Args:
        model: a supported transformers causal LM.
        prompts: texts, or token ids int64 [t], of the kind that will be continued.
        tokenizer: for texts.
        drafts: drafts before each verification, none of them stopped.
        tokens: new tokens per prompt and trial.
        most: layers to leave out at most; None is half of them.
        budget: trials (generations of all prompts) at most; None is as many as it takes, L - 1 + `width` times `most`.

    Returns exits whose record has the layers, the gain and every trial; a gain below 1 says that drafting does not pay with
    this model. Raises NotEnoughDataError without prompts.
    """
    bound = bind(model)
    most = bound.depth // 2 if most is None else most
    if not 1 <= most < bound.depth or min(width, drafts, tokens) < 1 or (budget is not None and budget < 1):
        raise ArgumentError(
            f"draft_verify.search: wanted most in [1, {bound.depth - 1}] and width, drafts, tokens, budget >= 1, got most "
            f"{most}, width {width}, drafts {drafts}, tokens {tokens}, budget {budget}"
        )
    inputs = _padded([ids for ids in encode(prompts, tokenizer, "draft_verify.search: prompts", special=True) if len(ids)])
    seen: list[Trial] = []

    def tried(layers: tuple[int, ...]) -> Trial | None:
        """None when the budget is spent."""
        if budget is not None and len(seen) >= budget:
            return None
        settings = {"do_sample": False, "max_new_tokens": tokens, "return_dict_in_generate": True, "pad_token_id": 0}
        out = generate(model, inputs, exits(model, layers), drafts=drafts, confidence=None, **settings)
        made, drafted, accepted = out.work.rows, int(out.drafted.sum()), int(out.accepted.sum())
        value = gain(made, drafted, accepted, layers=bound.depth, skipped=len(layers), head=head_in_layers(bound))
        seen.append(Trial(layers, made, drafted, accepted, value))
        return seen[-1]

    alone = [found for layer in range(1, bound.depth) if (found := tried((layer,))) is not None]
    ranked = [each.layers[0] for each in sorted(alone, key=lambda each: -each.accepted / max(each.drafted, 1))]
    chosen: tuple[int, ...] = (ranked.pop(0),)
    while len(chosen) < most and ranked:
        steps = [found for layer in ranked[:width] if (found := tried(tuple(sorted((*chosen, layer))))) is not None]
        if not steps:
            break
        best = max(steps, key=lambda each: each.gain)
        ranked = [layer for layer in ranked if layer not in best.layers]
        chosen = best.layers
    best = max((each for each in seen if len(each.layers) <= most), key=lambda each: each.gain)
    result = exits(model, best.layers)
    result.record["draft_verify"].update(
        {"gain": best.gain, "drafts": drafts, "trials": [dataclasses.asdict(each) for each in seen]}
    )
    return result


def head_in_layers(model: Model) -> float:
    """Weights of the LM head, in decoder layers."""
    layer = sum(parameter.numel() for each in model.layers for parameter in each.module.parameters()) / model.depth
    return sum(parameter.numel() for parameter in model.head.parameters()) / layer


def _padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Prompts int64 [t] as a batch padded on the left."""
    if not rows:
        raise NotEnoughDataError("draft_verify.search: wanted at least one prompt, got none")
    longest = max(row.shape[0] for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(longest - row.shape[0]), row]) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - row.shape[0]).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def generate(
    model: Any,
    inputs: Mapping[str, Any] | Tensor,
    exits: Exits,
    *,
    drafts: int = DRAFTS,
    confidence: float | Confidence | None = CONFIDENCE,
    **options: Any,
) -> Any:
    """`model.generate`, drafted by part of the model's layers and verified by all.

    Args:
        model: the model that the exits were made for.
        inputs: what a tokenizer returns (padded on the left), or input ids [batch, t].
        exits: of `exits` or `search`.
        drafts: the most drafts before they are verified.
        confidence: a sequence's drafting stops after a draft less likely than this; by default the paper's threshold that moves
            towards a share of drafts that hold. None never stops.
        options: of transformers' generate and of dyndepth.generate.

    Returns what transformers' generate returns; with `return_dict_in_generate=True` also `drafted` and `accepted` [batch].
    """
    content = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    return model.generate(
        **content, custom_generate=entry.generate, exits=exits, mode="lossless", drafts=drafts, confidence=confidence, **options
    )
