"""The losses of all exits on a batch and their gradients at the head-ready rows, a few rows of logits at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.training import losses
from dyndepth.training.batches import Batch
from dyndepth.training.config import TrainConfig
from dyndepth.training.losses import Readout, Words

#: Logits alive at a time; beyond some tens of megabytes they only leave the caches.
_LOGITS = 1 << 22


@dataclass(frozen=True)
class Targets:
    """Some rows of a batch, as losses see them."""

    ready: Tensor
    top_ids: Tensor
    top_logits: Tensor
    logsumexp: Tensor
    labels: Tensor

    @classmethod
    def of(cls, batch: Batch, which: Tensor) -> Targets:
        return cls(*(getattr(batch, name)[which] for name in ("ready", "top_ids", "top_logits", "logsumexp", "labels")))

    def __len__(self) -> int:
        return self.ready.shape[0]

    def __getitem__(self, part: slice) -> Targets:
        return Targets(*(value[part] for value in vars(self).values()))


@dataclass(frozen=True)
class Objective:
    """Settings and the frozen LM head; `frequent` are the words that sampled losses always see."""

    config: TrainConfig
    readout: Readout
    frequent: Tensor  # int64

    def __call__(
        self, ready: dict[int, Tensor], batch: Batch, which: Tensor, step: int, rows: int | None = None
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Per exit, the loss of the rows `which` (bool [rows]) and its gradient by `ready[exit]` [count, r].

        Divided by `rows`: those of the whole update, so that every token counts alike whatever batch it came in; None takes
        the rows of this batch.

        The logits of a whole batch would be gigabytes: their part of the graph lives for some rows only, and the heads' part
        starts from these gradients.
        """
        targets = Targets.of(batch, which)
        readout, words = self._words(step)
        count = len(targets) if rows is None else rows
        total = {leave: torch.zeros((), device=head.device) for leave, head in ready.items()}
        gradient = {leave: torch.zeros_like(head) for leave, head in ready.items()}
        size = max(1, _LOGITS // readout.words)
        for begin in range(0, len(targets), size):
            part = slice(begin, begin + size)
            loss = self._loss(readout, words, targets[part])
            for leave, head in ready.items():
                with torch.enable_grad():
                    leaf = head[part].detach().requires_grad_(True)
                    found = loss(leaf).sum() / count
                    (gradient[leave][part],) = torch.autograd.grad(found, leaf)
                total[leave] += found.detach()
        return total, gradient

    def _words(self, step: int) -> tuple[Readout, Tensor | None]:
        """The head restricted to the words of a step (a function of seed and step), and their weight; else all of it."""
        if self.config.loss != "sampled_kl":
            return self.readout, None
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_033 + step)
        words = Words.draw(self.readout.words, self.frequent, self.config.random, generator)
        return self.readout.restricted(words.ids), words.weight.to(self.readout.weight.device)

    def _loss(self, readout: Readout, words: Tensor | None, targets: Targets) -> Callable[[Tensor], Tensor]:
        """float32 [n] per row from head-ready rows; what depends on the teacher alone is computed once for all exits."""
        kind, share = self.config.loss, self.config.ce_weight
        with torch.no_grad():
            teacher = readout(targets.ready) if kind in ("kl", "sampled_kl") else None

        def per_row(ready: Tensor) -> Tensor:
            logits = None if kind == "state" else readout(ready)
            if kind == "state":
                found = losses.state(ready, targets.ready)
            elif kind == "top_kl":
                assert logits is not None
                found = losses.top_kl(logits, targets.top_ids, targets.top_logits, targets.logsumexp)
            elif kind == "ce":
                assert logits is not None
                found = losses.cross_entropy(logits, targets.labels)
            else:
                assert logits is not None
                assert teacher is not None
                found = losses.kl(logits, teacher, words)
            if share:
                whole = logits if logits is not None and words is None else self.readout(ready)
                found = found + share * losses.cross_entropy(whole, targets.labels)
            return found

        return per_row
