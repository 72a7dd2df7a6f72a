"""Text that the model writes itself: the distribution it will decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dyndepth.runtime.entry import generate
from dyndepth.runtime.session import Work


def continuations(
    causal_lm: Any,
    prompts: Sequence[Tensor],
    budget: int,
    new_tokens: int,
    batch: int,
    advance: Callable[[int], None],
    works: list[Work] | None = None,
    **options: Any,
) -> tuple[list[Tensor], list[int]]:
    """Greedy continuations of `prompts` until `budget` tokens (prompts included) are there; up to and with an EOS token.

    At full depth unless `options` (of dyndepth.generate) say otherwise. Each batch's work goes to `works`.
    """
    ends = end_tokens(causal_lm)
    pad = causal_lm.generation_config.pad_token_id
    pad = pad if pad is not None else next(iter(ends), 0)
    tokens: list[Tensor] = []
    start: list[int] = []
    total = 0
    for begin in range(0, len(prompts), batch):
        group = prompts[begin : begin + batch]
        group = group[: max(1, -(-(budget - total) // new_tokens))]
        width = max(prompt.shape[0] for prompt in group)
        ids = torch.stack([torch.nn.functional.pad(p, (width - p.shape[0], 0), value=pad) for p in group])
        mask = torch.stack([(torch.arange(width) >= width - p.shape[0]).long() for p in group])
        out = causal_lm.generate(
            input_ids=ids.to(causal_lm.device), attention_mask=mask.to(causal_lm.device), custom_generate=generate,
            max_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=pad, return_dict_in_generate=True, **options,
        )  # fmt: skip
        if works is not None:
            works.append(out.work)
        sequences = out.sequences.cpu()
        for row, prompt in enumerate(group):
            made = sequences[row, width:]
            stops = [i for i, token in enumerate(made.tolist()) if token in ends]
            made = made[: stops[0] + 1] if stops else made
            tokens.append(torch.cat([prompt, made]))
            start.append(prompt.shape[0] - 1)
            total += tokens[-1].shape[0]
            advance(tokens[-1].shape[0])
        if total >= budget:
            break
    return tokens, start


def end_tokens(causal_lm: Any) -> set[int]:
    """Tokens that end what the model writes, by its generation config."""
    eos = causal_lm.generation_config.eos_token_id
    return set(eos if isinstance(eos, list) else [] if eos is None else [eos])
