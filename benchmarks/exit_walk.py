"""What rows of a split say at exits, and which of them leave at a price; past tokens exact.

A row leaves where the disagreement that its confidence leaves to be expected, per layer saved, is at most the price: one
number for all exits. How true confidence is comes from a tuning split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dyndepth.calibration.reliability import Reliability
from dyndepth.ops import ExitStats
from dyndepth.ops.exit_stats import stats_of_logits
from dyndepth.runtime.bind import Model
from dyndepth.runtime.score import HEAD_ROWS
from dyndepth.training.batches import Batches
from dyndepth.training.evaluate import mixed
from dyndepth.training.student import Student
from dyndepth.training.trainer import readout_of

#: Per exit, columns of rows.
Split = Mapping[int, Mapping[str, Tensor]]


def judged(model: Model, student: Student, batches: Batches, words: Tensor, limit: int) -> dict[int, dict[str, Tensor]]:
    """Per exit, of judged rows: documents, agreement, confidences from the whole vocabulary, statistics over the shortlist
    `words`, residuals."""
    readout = readout_of(model)
    parts: dict[int, dict[str, list[Any]]] = {int(leave): {} for leave in student.heads}
    seen = documents = 0
    for batch in batches.once():
        with mixed(batch.ready):
            ready = student(batch, batch.judged)
        answers = batch.answers[batch.judged]
        count = len(batch.lengths)
        document = torch.repeat_interleave(torch.arange(documents, documents + count), torch.tensor(batch.lengths))
        documents += count
        for leave, rows in ready.items():
            into = parts[leave]
            into.setdefault("document", []).append(document[batch.judged])
            for begin in range(0, len(answers), HEAD_ROWS):
                logits = readout(rows[begin : begin + HEAD_ROWS])
                stats, short = stats_of_logits(logits), stats_of_logits(logits[:, words])
                top, second = (torch.exp(value - stats.logsumexp) for value in (stats.top1, stats.top2))
                into.setdefault("agrees", []).append(stats.argmax == answers[begin : begin + HEAD_ROWS])
                into.setdefault("top1", []).append(top)
                into.setdefault("margin", []).append(top - second)
                into.setdefault("short", []).append(torch.stack([value.double() for value in short], dim=1))
            into.setdefault("residual", []).append(batch.residual[leave][batch.judged])
        seen += len(answers)
        if seen >= limit:
            break
    return {leave: {name: torch.cat(values) for name, values in into.items()} for leave, into in parts.items()}


def stats_of(columns: Tensor) -> ExitStats:
    """Statistics over a shortlist, as `judged` keeps them."""
    parts = columns.unbind(1)
    return ExitStats(parts[0].long(), *(part.float() for part in parts[1:]))


def calibrated(scores: Tensor, agrees: Tensor) -> Callable[[Tensor], Tensor]:
    """Score -> share that agreed among rows with such a score."""
    bins = Reliability.of(scores.double().numpy(), agrees.numpy(), bins=40)
    edges, share = torch.from_numpy(bins.edges[1:-1]), torch.from_numpy(bins.agreement).cummax(0).values
    return lambda values: share[torch.searchsorted(edges, values.double().contiguous(), right=True)]


def walk(depth: int, chance: Mapping[int, Tensor], split: Split, price: float) -> tuple[Tensor, Tensor]:
    """(bool [rows] agrees, int64 [rows] layers run) when rows leave where the disagreement they expect per layer saved is at
    most `price`."""
    rows = len(next(iter(chance.values())))
    layers = torch.full((rows,), depth)
    right = torch.ones(rows, dtype=torch.bool)
    for leave in sorted(chance):
        goes = (layers == depth) & (1 - chance[leave] <= price * (depth - leave))
        layers[goes] = leave
        right = torch.where(goes, split[leave]["agrees"], right)
    return right, layers


def price_of(depth: int, chance: Mapping[int, Tensor], split: Split, share: float) -> float:
    """The highest price at which at least `share` of the rows agree."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        agreement = float(walk(depth, chance, split, middle)[0].double().mean())
        low, high = (middle, high) if agreement >= share else (low, middle)
    return low
