"""What is compared: a cell (one setting) and a system (one way of generating in it)."""

from __future__ import annotations

import functools
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyndepth.exits import Exits
from dyndepth.runtime.entry import generate


@dataclass
class Cell:
    """Prompts that every system continues greedily by the same number of tokens."""

    model: Any
    #: input_ids and attention_mask, int64 [batch, width], padded on the left.
    inputs: dict[str, Tensor]
    new_tokens: int
    #: Longest prompt plus new tokens.
    context: int
    exits: Exits
    #: The same exits judged by the top probability over a shortlist of the vocabulary.
    shortlisted: Exits

    @property
    def batch(self) -> int:
        return self.inputs["input_ids"].shape[0]

    @property
    def width(self) -> int:
        return self.inputs["input_ids"].shape[1]

    @property
    def layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def prompts(self) -> list[Tensor]:
        """Per row, its token ids [t] without padding."""
        kept = self.inputs["attention_mask"].bool()
        return [ids[row] for ids, row in zip(self.inputs["input_ids"], kept, strict=True)]

    @functools.cached_property
    def dynamic_share(self) -> float:
        """Share of rows x layers that the exits leave, for policies that are to do as much work."""
        fixed = {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens, "do_sample": False}
        out = self.model.generate(
            **self.inputs, custom_generate=generate, exits=self.exits, return_dict_in_generate=True, **fixed
        )
        return float(out.work.fraction)


@dataclass
class Output:
    #: int64 [batch, new tokens]; with forced tokens the arg max of every position, which may cover fewer rows.
    tokens: Tensor
    #: Share of rows x layers run, of new tokens x batch x layers; None where the system does not tell.
    share: float | None = None
    #: Where every token left, int [batch, new tokens]; None where nothing leaves.
    exit_layers: Tensor | None = None


class System:
    """One way of generating. `system` and `mode` name it in every table."""

    system = ""
    mode = ""
    #: What a reader must know about its figures.
    note = ""

    @property
    def name(self) -> str:
        return f"{self.system}, {self.mode}"

    def missing(self) -> str | None:
        """Why it cannot run here at all, or None."""
        return None

    def refuses(self, cell: Cell) -> str | None:
        """Why it cannot run this cell, or None."""
        return None

    def generate(self, cell: Cell, new_tokens: int, forced: Tensor | None = None) -> Output:
        """Continues every prompt by `new_tokens` tokens, end-of-sequence tokens suppressed.

        With `forced` (int64 [batch, new tokens]) these tokens follow whatever the system says; what it would have said,
        end-of-sequence tokens included, is returned.
        """
        raise NotImplementedError

    def switches(self) -> int:
        """Involuntary context switches so far of the process that works."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw

    def close(self) -> None:
        """Give back what outlives a cell (processes)."""


class Count:
    """Rows that ran the MLPs of a model's layers, prompts left out but for their last token."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.rows = 0

    def add(self, hidden: Tensor) -> None:
        batch, length = hidden.shape[:2] if hidden.dim() == 3 else (1, hidden.shape[0])
        self.rows += batch * (length if length < self.width else length - self.width + 1)


@contextmanager
def counting(model: Any, width: int) -> Iterator[Count]:
    """Counts rows with hooks for the time of the block. Passes of at least `width` tokens are taken to hold the prompt."""
    count = Count(width)

    def hook(module: Any, arguments: tuple[Any, ...]) -> None:
        count.add(arguments[0])

    handles = [layer.mlp.register_forward_pre_hook(hook) for layer in model.get_decoder().layers]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def end_ids(model: Any) -> list[int]:
    """The model's end-of-sequence tokens."""
    eos = model.generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def suppressed(logits: Tensor, ends: list[int]) -> Tensor:
    """Logits [n, V] without end-of-sequence tokens, as min_new_tokens leaves them."""
    return logits.index_fill(1, torch.tensor(ends, dtype=torch.int64), -torch.inf) if ends else logits
