"""How good heads are on rows nobody trained on: agreement with the full model and KL, past tokens exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.runtime.score import HEAD_ROWS
from dyndepth.training.batches import Batches
from dyndepth.training.losses import Readout, kl
from dyndepth.training.skip import SkipStudent
from dyndepth.training.student import Student


@dataclass(frozen=True)
class Quality:
    """Over judged rows: share whose arg max is the full model's, and mean KL(full || exit) in nats (whole vocabulary)."""

    agreement: float
    kl: float
    rows: int


def mixed(weight: Tensor) -> torch.autocast:
    """Where fp32 heads run on a bf16 model's rows: products in bf16, as in training and, nearly, in the pass."""
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=weight.dtype == torch.bfloat16)


@torch.no_grad()
def evaluate(student: Student | SkipStudent, readout: Readout, batches: Batches, rows: int) -> dict[int, Quality]:
    """Quality per exit on the first sequences that together have `rows` judged rows."""
    exits = [int(leave) for leave in student.heads]
    agrees, divergence, seen = dict.fromkeys(exits, 0), dict.fromkeys(exits, 0.0), 0
    for number, batch in enumerate(batches.once()):
        chosen = student.rows(batch, -1 - number)  # steps that training never comes to
        wanted, answers = batch.ready[chosen[0]], batch.answers[chosen[0]]
        with mixed(readout.weight):
            found = student(batch, *chosen)
        for leave, ready in found.items():
            for begin in range(0, len(answers), HEAD_ROWS):
                part = slice(begin, begin + HEAD_ROWS)
                logits = readout(ready[part])
                agrees[leave] += int((logits.argmax(-1) == answers[part]).sum())
                divergence[leave] += float(kl(logits, readout(wanted[part])).sum(dtype=torch.float64))
        seen += wanted.shape[0]
        if seen >= rows:
            break
    return {leave: Quality(agrees[leave] / seen, divergence[leave] / seen, seen) for leave in exits}


def selective(scores: Tensor, agrees: Tensor, share: float) -> float:
    """Largest share of rows that can leave, most confident first, so that of those that leave `share` agree."""
    order = scores.argsort(descending=True, stable=True)
    right = agrees[order].double().cumsum(0) / torch.arange(1, len(scores) + 1)
    enough = (right >= share).nonzero()[:, 0]
    return 0.0 if len(enough) == 0 else float(enough[-1] + 1) / len(scores)
