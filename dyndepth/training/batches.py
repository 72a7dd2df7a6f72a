"""Batches of whole sequences from a teacher cache, in an order that is a function of seed and step alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import NotEnoughDataError
from dyndepth.training.cache import Shard, TeacherCache


@dataclass(frozen=True)
class Batch:
    """Rows of whole sequences, one after the other. Losses look at `judged` rows only: those that generation would judge."""

    lengths: list[int]
    residual: dict[int, Tensor]  # per boundary [rows, d]
    judged: Tensor  # bool [rows]
    ready: Tensor  # [rows, ready]
    top_ids: Tensor  # int64 [rows, k]
    answers: Tensor  # int64 [rows], the full model's arg max
    top_logits: Tensor  # float32 [rows, k]
    logsumexp: Tensor  # float32 [rows]
    labels: Tensor  # int64 [rows], -100 where the text ends

    def padded(self, boundary: int) -> Tensor:
        """[sequences, longest, d]: residuals of each sequence, padded at its end."""
        parts = self.residual[boundary].split(self.lengths)
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)

    def unpadded(self, values: Tensor) -> Tensor:
        """[rows, ...] of [sequences, longest, ...]: `padded` undone."""
        return torch.cat([values[i, :length] for i, length in enumerate(self.lengths)])

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()
        }
        moved["residual"] = {e: value.to(device) for e, value in self.residual.items()}
        return Batch(**moved)


class Batches:
    """Deals the sequences of a cache, `parts` (indices of sequences) of them, into batches of about `rows` rows on `device`.

    Step s of the endless run is always the same batch: every epoch has its own permutation, so a run that resumes at a step
    needs no other state.
    """

    def __init__(
        self,
        cache: TeacherCache,
        parts: Sequence[int],
        rows: int,
        seed: int,
        boundaries: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        self.cache, self.rows, self.seed, self.boundaries = cache, rows, seed, list(boundaries)
        self.device = torch.device(device)
        self.places, lengths, starts = _places(cache)
        self.parts = list(parts)
        self.lengths, self.starts = [lengths[i] for i in self.parts], [starts[i] for i in self.parts]
        if not self.parts:
            raise NotEnoughDataError("train: wanted at least one sequence in every split, got none")
        self._shard = functools.lru_cache(maxsize=None)(cache.shard)  # mapped files: keeping them open keeps nothing in memory

    @property
    def steps_per_epoch(self) -> int:
        return max(1, min(len(self.parts), round(sum(self.lengths) / self.rows)))

    @property
    def judged_per_step(self) -> float:
        """Judged rows of a batch, on average."""
        return sum(n - start for n, start in zip(self.lengths, self.starts, strict=True)) / self.steps_per_epoch

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return self.of(self._dealt(epoch)[number])

    def once(self) -> Iterator[Batch]:
        """Every sequence once, in the order of `parts`."""
        group: list[int] = []
        for i in range(len(self.parts)):
            group.append(i)
            if sum(self.lengths[j] for j in group) >= self.rows or i == len(self.parts) - 1:
                yield self.of(group)
                group = []

    def of(self, which: Sequence[int]) -> Batch:
        """A batch of some of the sequences."""
        chosen = [(self._shard(shard), row) for shard, row in (self.places[self.parts[i]] for i in which)]
        lengths = [self.lengths[i] for i in which]

        def rows(take: str) -> Tensor:
            return torch.cat([getattr(s, take)[r : r + n] for (s, r), n in zip(chosen, lengths, strict=True)])

        residual = {
            e: torch.cat([s.residual[e][r : r + n] for (s, r), n in zip(chosen, lengths, strict=True)]) for e in self.boundaries
        }
        judged = torch.cat([torch.arange(n) >= self.starts[i] for i, n in zip(which, lengths, strict=True)])
        labels = torch.cat([_labels(s, r, n) for (s, r), n in zip(chosen, lengths, strict=True)])
        batch = Batch(
            lengths=lengths,
            residual=residual,
            judged=judged,
            ready=rows("ready"),
            top_ids=rows("top_ids").long(),
            answers=rows("answers").long(),
            top_logits=rows("top_logits"),
            logsumexp=rows("logsumexp"),
            labels=labels,
        )
        return batch if self.device.type == "cpu" else batch.to(self.device)

    def frequencies(self, words: int) -> Tensor:
        """int64 [words]: how often each is the full model's answer at a judged row."""
        counts = torch.zeros(words, dtype=torch.int64)
        for i, length in enumerate(self.lengths):
            shard, row = self.places[self.parts[i]]
            answers = self._shard(shard).answers[row + self.starts[i] : row + length]
            counts += torch.bincount(answers.long(), minlength=words)
        return counts

    @functools.lru_cache(maxsize=4)  # noqa: B019 (lives as long as the run)
    def _dealt(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.parts), generator=generator)
        lengths = torch.tensor(self.lengths)[order]
        # A sequence belongs where its middle falls when all rows are cut into equal parts.
        middle = lengths.cumsum(0) - lengths / 2
        which = (middle * self.steps_per_epoch / lengths.sum()).long().clamp_max(self.steps_per_epoch - 1)
        dealt = [order[which == step].tolist() for step in range(self.steps_per_epoch)]
        # A sequence longer than a part leaves the next one empty; then parts are equal in sequences.
        return dealt if all(dealt) else [part.tolist() for part in order.tensor_split(self.steps_per_epoch)]


def _places(cache: TeacherCache) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Per sequence (shard, first row), its length, and the first position that is judged."""
    places, lengths, starts = [], [], []
    for number, shard in enumerate(cache):
        row = 0
        for length, start in zip(shard.lengths.tolist(), shard.start.tolist(), strict=True):
            places.append((number, row))
            lengths.append(length)
            starts.append(start)
            row += length
    return places, lengths, starts


def _labels(shard: Shard, row: int, length: int) -> Tensor:
    return torch.cat([shard.tokens[row + 1 : row + length].long(), torch.tensor([-100])])
