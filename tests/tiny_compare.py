"""The comparison's systems and cells over tiny models."""

from __future__ import annotations

import functools
from typing import Any

import tiny_exits
import tiny_models
import torch
from compare import run as runner
from compare import shortlist
from compare.generated import dyndepth_systems, transformers_systems
from compare.naive import Naive
from compare.system import Cell, System

from dyndepth.exits import Exits

BATCH, NEW = 3, 5
KEY = ("float32", BATCH, 18)


def exits_of(model: Any, *, threshold: float = 0.5) -> Exits:
    """Two exits that leave for good, as the demo's do."""
    return tiny_exits.exits_of(
        model, tiny_exits.band(model, 3, 6, threshold=threshold), tiny_exits.band(model, 5, 6, head="mlp", threshold=threshold)
    )


def subject_of(dtype: str = "float32") -> runner.Subject:
    model = tiny_models.tiny("llama", getattr(torch, dtype))
    free = model.generate(**tiny_models.prompts(BATCH), max_new_tokens=3, do_sample=False, eos_token_id=None)
    model.generation_config.eos_token_id = int(free[0, -1])  # full depth would end an answer in its middle
    exits = exits_of(model)
    words = shortlist.shortlisted(model, exits, tiny_models.prompts(4, seed=9), 4, words=50)
    return runner.Subject(model, exits, words.with_thresholds(0.3), lambda batch, width: tiny_models.prompts(batch, width))


@functools.cache
def shared() -> Cell:
    return subject_of().cell(BATCH, 18, NEW)


def single() -> Cell:
    return subject_of().cell(1, 18, NEW)


def ours() -> list[System]:
    return [*dyndepth_systems([3, 5]), *transformers_systems(), Naive(together=True), Naive(together=False)]


def named(mode: str) -> System:
    return next(system for system in ours() if system.mode == mode)
