"""The run that tests/test_training_kill.py shoots at; a module of its own, so that a fresh process can import it by name."""

from __future__ import annotations

import functools
from typing import Any

import torch


def run(folder: str) -> None:
    """In a process of its own: train on the tiny model, exits and all."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    import tiny_models

    import dyndepth
    from dyndepth.training import TeacherCache, TrainConfig

    build: Any = functools.partial(TeacherCache.build, shard_rows=200)
    TeacherCache.build = build  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(3, tiny_models.VOCABULARY, (24,), generator=generator) for _ in range(300)]
    config = TrainConfig(
        exits=(2, 4), corpus=6000, own=0.5, new_tokens=16, tokens=16_000, batch=400, frequent=40, random=40, evaluate_every=2,
        checkpoint_every=1, evaluate_rows=500,
    )  # fmt: skip
    dyndepth.train(tiny_models.tiny("llama"), texts, output=folder, config=config, progress=False)
