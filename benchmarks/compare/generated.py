"""Systems behind transformers' `generate`: its caches, its self-speculation, and dyndepth's modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from compare.system import Cell, Output, System, counting
from dyndepth.exits import Band, Exits, Schedule
from dyndepth.runtime.entry import generate

Options = Callable[[Cell], dict[str, Any]]


class Forcing(LogitsProcessor):
    """Notes the arg max of every step and lets nothing but the wanted token through."""

    def __init__(self, forced: Tensor) -> None:
        self.forced = forced
        self.said: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted = self.forced[:, len(self.said)]
        self.said.append(scores.argmax(-1))
        return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0.0)


class Generated(System):
    """A call of `model.generate`; `options` are what makes it this system."""

    def __init__(self, system: str, mode: str, options: Options, note: str = "") -> None:
        self.system, self.mode, self.options, self.note = system, mode, options, note

    def generate(self, cell: Cell, new_tokens: int, forced: Tensor | None = None) -> Output:
        fixed: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "return_dict_in_generate": True}
        forcing = None if forced is None else Forcing(forced)
        fixed |= {"min_new_tokens": new_tokens} if forcing is None else {"logits_processor": LogitsProcessorList([forcing])}
        out = cell.model.generate(**cell.inputs, **self.options(cell), **fixed)
        work = getattr(out, "work", None)
        tokens = out.sequences[:, cell.width :] if forcing is None else torch.stack(forcing.said, dim=1)
        return Output(tokens, 1.0 if work is None else work.fraction, getattr(out, "exit_layers", None))


class SelfSpeculation(Generated):
    """LayerSkip's drafting from an early exit of the same model, as transformers has it."""

    system, mode = "transformers", "self-speculation"
    note = "its text is verified, so its agreement is that of transformers' dynamic cache; work counts drafts and checks"

    def __init__(self) -> None:
        super().__init__(self.system, self.mode, lambda cell: {"assistant_early_exit": min(exit_points(cell.exits))}, self.note)

    def refuses(self, cell: Cell) -> str | None:
        if cell.batch != 1:
            return f"assistant_early_exit works for one prompt, got {cell.batch}"
        return None if exit_points(cell.exits) else "there is no exit to draft from"

    def generate(self, cell: Cell, new_tokens: int, forced: Tensor | None = None) -> Output:
        if forced is None:
            out = super().generate(cell, new_tokens)
            out.share = None  # a call without counting does not tell
            return out
        with counting(cell.model, cell.width) as count:
            super().generate(cell, new_tokens)
        answers = Generated(self.system, self.mode, lambda cell: {}).generate(cell, new_tokens, forced)
        answers.share = count.rows / (cell.batch * new_tokens * cell.layers)
        return answers


class Lossless(Generated):
    """dyndepth's own self-speculation, exits as they are."""

    system, mode = "dyndepth", "lossless"
    note = "its text is verified, so its agreement is full depth's; work counts drafts and checks"

    def __init__(self, drafts: int = 2) -> None:
        super().__init__(self.system, self.mode, lambda cell: {
            "custom_generate": generate, "exits": cell.exits, "mode": "lossless", "drafts": drafts,
        }, self.note)  # fmt: skip

    def generate(self, cell: Cell, new_tokens: int, forced: Tensor | None = None) -> Output:
        if forced is None:
            return super().generate(cell, new_tokens)
        # Drafts would be asked about prefixes that the forced text does not have: what verifies is judged.
        answers = full_depth().generate(cell, new_tokens, forced)
        answers.share = super().generate(cell, new_tokens).share
        return answers


def exit_points(exits: Exits) -> list[int]:
    """Boundaries where rows can leave for good."""
    return [band.leave for band in exits if band.resume == exits.model.layers]


def scheduled(exits: Exits, share: float, steps: int) -> Exits:
    """SkipDecode's schedule over the exits' boundaries: depth falls with the position until the lowest exit.

    How fast is chosen so that `steps` tokens run about `share` of rows x layers.
    """
    layers, points = exits.model.layers, exit_points(exits)

    def mean(length: int) -> float:
        depths = [layers - (layers - min(points)) * min(step / length, 1) for step in range(steps)]
        return sum(min((point for point in points if depth <= point), default=layers) for depth in depths) / (steps * layers)

    length = min(range(1, 4 * steps + 1), key=lambda candidate: abs(mean(candidate) - share))
    rule = Schedule(first=layers, last=min(points), length=length)
    bands = [Band(band.leave, layers, rule, head=band.head) for band in exits if band.resume == layers]
    return Exits(bands, exits.model)


def _static(cell: Cell) -> dict[str, Any]:
    # transformers makes every static cache as long as the longest that the model has ever had, an earlier cell's included.
    vars(cell.model).pop("_previous_max_cache_length", None)
    return {"cache_implementation": "static"}


def transformers_systems() -> list[System]:
    return [
        Generated("transformers", "dynamic cache", lambda cell: {}),
        Generated("transformers", "static cache", _static),
        SelfSpeculation(),
    ]


def _ours(mode: str, options: Options, note: str = "") -> Generated:
    return Generated("dyndepth", mode, lambda cell: {"custom_generate": generate} | options(cell), note)


def full_depth() -> Generated:
    """What agreement is measured against."""
    return _ours("full depth", lambda cell: {})


def dyndepth_systems(points: list[int]) -> list[System]:
    """`points`: boundaries where the exits leave for good, each a fixed depth of its own."""
    return [
        full_depth(),
        _ours("dynamic", lambda cell: {"exits": cell.exits}),
        *(_ours(kv, lambda cell, kv=kv: {"exits": cell.exits, "kv": kv}) for kv in ("propagate", "recompute")),  # type: ignore[misc]
        Lossless(),
        *(_ours(f"fixed depth {at}", lambda cell, at=at: {"exits": cell.exits, "depth": at}) for at in points),  # type: ignore[misc]
        _ours("shortlist", lambda cell: {"exits": cell.shortlisted}),
        _ours(
            "schedule",
            lambda cell: {"exits": scheduled(cell.exits, cell.dynamic_share, cell.new_tokens), "kv": "none"},
            "SkipDecode's rule: depth by position, the same for every row, as much work as dynamic",
        ),
    ]
