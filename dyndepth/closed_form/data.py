"""Token sequences to learn from: given text, and the model's own continuations (what it will decode)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.runtime.entry import generate

#: Tokens per sequence of given text; longer texts are cut into pieces of this length.
TEXT_PIECE = 256
#: Of every eight sequences six fit maps and routers, one tunes thresholds, one reports.
FIT, TUNE, TEST = "fit", "tune", "test"
_SPLIT = (FIT, FIT, FIT, TUNE, FIT, FIT, FIT, TEST)


@dataclass(frozen=True)
class Corpus:
    """Sequences in the order they are used; `start[i]` is the first position that generation would judge."""

    tokens: list[Tensor]  # int64 [t] each, on the CPU
    start: list[int]
    split: list[str]

    def part(self, name: str) -> tuple[list[Tensor], list[int]]:
        chosen = [i for i, split in enumerate(self.split) if split == name]
        return [self.tokens[i] for i in chosen], [self.start[i] for i in chosen]

    def count(self, name: str | None = None) -> int:
        return sum(t.shape[0] for t, split in zip(self.tokens, self.split, strict=True) if name in (None, split))


def encode(texts: Sequence[str | Tensor], tokenizer: Any) -> list[Tensor]:
    """Texts to int64 [t]; tensors pass through."""
    encoded = []
    for number, text in enumerate(texts):
        if isinstance(text, Tensor):
            if text.dim() != 1 or text.is_floating_point():
                raise ArgumentError(f"fit: texts[{number}] must be a string or int64 [t], got {text.dtype} {list(text.shape)}")
            encoded.append(text.long().cpu())
            continue
        if tokenizer is None:
            raise ArgumentError(f"fit: texts[{number}] is a string, so a tokenizer is needed")
        encoded.append(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64))
    return encoded


def pieces(texts: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Pieces of at most TEXT_PIECE tokens, taken round-robin over the texts until `budget` tokens are there."""
    queues = [list(text.split(TEXT_PIECE)) for text in texts if text.shape[0] >= 2]
    chosen: list[Tensor] = []
    total = 0
    while total < budget and any(queues):
        for queue in queues:
            if queue and total < budget:
                piece = queue.pop(0)
                if piece.shape[0] >= 2:
                    chosen.append(piece[: max(2, budget - total)])
                    total += chosen[-1].shape[0]
    return chosen


def continuations(
    causal_lm: Any, prompts: Sequence[Tensor], budget: int, new_tokens: int, batch: int, advance: Callable[[int], None]
) -> tuple[list[Tensor], list[int]]:
    """Greedy continuations of `prompts` at full depth until `budget` tokens (prompts included) are there."""
    config = causal_lm.generation_config
    eos = config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    pad = config.pad_token_id if config.pad_token_id is not None else next(iter(ends), 0)
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
            max_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=pad, return_dict_in_generate=False,
        ).cpu()  # fmt: skip
        for row, prompt in enumerate(group):
            made = out[row, width:]
            stops = [i for i, token in enumerate(made.tolist()) if token in ends]
            made = made[: stops[0] + 1] if stops else made
            tokens.append(torch.cat([prompt, made]))
            start.append(prompt.shape[0] - 1)
            total += tokens[-1].shape[0]
            advance(tokens[-1].shape[0])
        if total >= budget:
            break
    return tokens, start


def corpus(own: tuple[list[Tensor], list[int]], text: list[Tensor], width: int, seed: int) -> Corpus:
    """Shuffle both kinds separately, deal each over the three splits, and refuse what cannot carry the estimates."""
    tokens: list[Tensor] = []
    start: list[int] = []
    split: list[str] = []
    generator = torch.Generator().manual_seed(seed)
    for part, starts in ((own[0], own[1]), (text, [min(16, t.shape[0] - 1) for t in text])):
        for dealt, i in enumerate(torch.randperm(len(part), generator=generator).tolist()):
            tokens.append(part[i])
            start.append(starts[i])
            split.append(_SPLIT[dealt % len(_SPLIT)])
    result = Corpus(tokens, start, split)
    # Below a few tokens per weight of one column the regression only memorises; 4 is where held-out error starts to fall.
    wanted = max(256, 4 * width)
    if result.count(FIT) < wanted or not result.part(TUNE)[0] or not result.part(TEST)[0]:
        raise NotEnoughDataError(
            f"fit: wanted at least {wanted} tokens to fit a width of {width} and 8 sequences, got {result.count(FIT)} in "
            f"{len(tokens)} sequences; give more texts or prompts"
        )
    return result
