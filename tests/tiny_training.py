"""Data and runs of training on the tiny models, shared by its tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
import torch
from torch import Tensor

import dyndepth
from dyndepth.data import Piece
from dyndepth.exits import Exits
from dyndepth.runtime.bind import bind
from dyndepth.training.batches import Batches
from dyndepth.training.cache import TeacherCache
from dyndepth.training.config import TrainConfig
from dyndepth.training.trainer import metrics


def texts(count: int, length: int = 24, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator) for _ in range(count)]


def batches(folder: Path, name: str = "llama", exits: tuple[int, ...] = (2, 4), count: int = 40) -> Batches:
    pieces = [Piece(text, 3, str(i)) for i, text in enumerate(texts(count, 20))]
    cache = TeacherCache.build(bind(tiny_models.shared(name)), pieces, exits, folder, top=8)
    return Batches(cache, range(count), 100, 0, exits)


SETTINGS = {
    "exits": [2, 4], "corpus": 3000, "new_tokens": 16,
    "tokens": 12_000, "batch": 400, "lr": 3e-3, "evaluate_every": 5, "checkpoint_every": 5,
    "frequent": 40, "random": 40, "evaluate_rows": 400,
}  # fmt: skip


def train(folder: Path, name: str = "llama", **changes: Any) -> Exits:
    config = TrainConfig.of(SETTINGS | changes)
    return dyndepth.train(tiny_models.shared(name), texts(800), output=folder, config=config, progress=False)


def looks(folder: Path) -> list[dict[str, Any]]:
    return [entry["validation"] for entry in metrics(folder / "run") if "validation" in entry]
