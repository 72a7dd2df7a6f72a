"""What the tests of reports share: a tokenizer, prompts, exits with every kind of score."""

from __future__ import annotations

from typing import Any

import tiny_exits
import torch

from dyndepth.exits import Band, Decay, Entropy, Exits, Margin, Saturation, TopProbability
from dyndepth.runtime.bind import bind
from dyndepth.runtime.block import block_head

SMALL: dict[str, Any] = {"new_tokens": 6, "batch": 5, "repetitions": 1, "progress": False}


class Words:
    """A tokenizer of ten spellings; ids below three are special."""

    all_special_ids = (0, 1, 2)
    spellings = (" the", "ing", "12", ".", " \n", "é", " co-op", "日本", "a1", "�")

    def decode(self, ids: list[int]) -> str:
        return "".join(self.spellings[i % 10] for i in ids)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 90 for letter in text]}


def prompts(count: int, seed: int = 0) -> list[torch.Tensor]:
    """Different ones, of ragged lengths from two tokens up."""
    generator = torch.Generator().manual_seed(seed)
    ragged = [torch.randint(3, 90, (1 + number % 7,), generator=generator) for number in range(count)]
    return [torch.cat([prompt, torch.tensor([3 + number])]) for number, prompt in enumerate(ragged)]


def every_score(model: Any) -> Exits:
    """Every kind of score but patience; a band that resumes, a block head, a shortlist and a decay."""
    block = block_head(bind(model), 4)
    for parameter in block.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    return tiny_exits.exits_of(
        model,
        tiny_exits.band(model, 1, 3, Saturation(), threshold=0.5),  # silent: nothing was judged before
        tiny_exits.band(model, 2, 5, threshold=0.9),
        tiny_exits.band(model, 3, 6, TopProbability(), threshold=0.9, shortlist=torch.arange(3, 200, 2), decay=Decay(4.0, 8)),
        Band(4, 6, Margin(), threshold=0.9, head=block, kv=tiny_exits.band(model, 4, 6).kv),
        tiny_exits.band(model, 5, 6, Entropy(), threshold=-0.2, head="mlp"),
    )


def one(model: Any, threshold: float, criterion: Any = None) -> Exits:
    return tiny_exits.exits_of(model, tiny_exits.band(model, 3, 6, criterion or TopProbability(), threshold=threshold))
