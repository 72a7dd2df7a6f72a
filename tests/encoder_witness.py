"""A second witness for encoders: one sample at a time through transformers' own forward, the formulas in plain Python.

Nothing of dyndepth's encoders room is used but the parameters of heads and judges.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tiny_encoders import EXITS, alone
from torch import Tensor

from dyndepth.encoders import SampleExits


def states(model: Any, batch: dict[str, Tensor], row: int) -> tuple[list[Tensor], Tensor]:
    """Residuals [T, d] at every boundary of one sample alone, and the model's logits [classes]."""
    with torch.no_grad():
        out = model(**alone(batch, row), output_hidden_states=True)
    return [hidden[0] for hidden in out.hidden_states], out.logits[0]


def pooled(head: Any, hidden: Tensor) -> Tensor:
    return {"first": hidden[0], "mean": hidden.mean(0), "max": hidden.max(0).values}[head.pooling]


def answer(head: Any, hidden: Tensor) -> Tensor:
    """Logits [classes] of a linear head."""
    x = pooled(head, hidden)
    if head.norm is not None:
        x = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + head.norm.eps) * head.norm.weight + head.norm.bias
    if head.dense is not None:
        x = torch.tanh(head.dense.weight @ x + head.dense.bias)
    return (head.out.weight @ x + head.out.bias).detach()


def probabilities(logits: Tensor, temperature: float = 1.0) -> list[float]:
    values = [math.exp((float(z) - float(logits.max())) / temperature) for z in logits]
    return [value / sum(values) for value in values]


def entropy(p: list[float]) -> float:
    return -sum(value * math.log(value) for value in p if value > 0)


def scores(kind: str, exits: SampleExits, hidden: list[Tensor], row: int) -> list[float]:
    """What the criterion says at every exit if the sample never left; higher is safer."""
    return list(_scores(kind, exits, hidden, row))


def _scores(kind: str, exits: SampleExits, hidden: list[Tensor], row: int) -> Iterator[float]:
    count, before, cdf, rest, spent = 0, None, 0.0, 1.0, 0.0
    gate_rest = 1.0
    for point in exits:
        h = pooled(point.head, hidden[point.leave])
        logits = answer(point.head, hidden[point.leave])
        p = probabilities(logits)
        top = sorted(p, reverse=True)
        previous = None if before is None else before[0]
        if kind == "top_probability":
            yield top[0]
        elif kind == "margin":
            yield top[0] - top[1]
        elif kind == "entropy":
            yield -entropy(p)
        elif kind == "saturation":
            yield math.nan if previous is None else float(h @ previous / (h.norm() * previous.norm()))
        elif kind == "patience":
            same = before is not None and int(logits.argmax()) == int(before[1].argmax())
            count = count + 1 if same else 0
            yield float(count)
        elif kind == "regression_patience":
            near = before is not None and abs(float(logits[0] - before[1][0])) < point.criterion.tolerance
            count = count + 1 if near else 0
            yield float(count)
        elif kind in ("q_exit", "ponder_draw"):
            x = torch.cat([h, torch.zeros_like(h) if previous is None else previous])
            for layer in point.judge.body:
                x = layer(x)
            lam = float(torch.sigmoid(x).detach())
            cdf, rest = cdf + lam * rest, rest * (1 - lam)
            yield cdf if kind == "q_exit" else lam - uniform(row, point.leave, point.criterion.seed)
        elif kind == "exit_gate":
            half = probabilities(logits, 0.5)
            features = torch.tensor([top[0], entropy(p), top[0] - top[1], entropy(half)])
            g = float(torch.sigmoid(point.judge.weight[0] @ features + point.judge.bias[0]).detach())
            share = max(0.0, min(g, 1 - spent))
            a = min(max(share / gate_rest, 0.0), 1.0) if gate_rest > 0 else 1.0
            spent, gate_rest = spent + g, gate_rest * (1 - a)
            yield a
        else:
            raise AssertionError(kind)
        before = (h, logits)


def uniform(row: int, boundary: int, seed: int) -> float:
    """splitmix64's finaliser on unsigned whole numbers of any size."""
    word = (1 << 64) - 1
    x = (row * 0x1E3779B97F4A7C15 + boundary * 0x3F58476D1CE4E5B9 + seed) & word
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
    x ^= x >> 31
    return (x >> 40) / 2**24


def told(
    model: Any, exits: SampleExits, kind: str, batch: dict[str, Tensor], threshold: float, depth: list[int] | None = None
) -> tuple[Tensor, list[int]]:
    """Logits and exit boundaries of every sample, each computed alone."""
    logits, where = [], []
    count = len(next(iter(batch.values())))
    for row in range(count):
        hidden, final = states(model, batch, row)
        leaves: Callable[[int, int], bool]
        strict = kind == "q_exit"
        if kind == "fixed_depth":
            leaves = lambda _number, at, row=row: depth is not None and depth[row] == at  # noqa: E731
        elif kind in ("always", "never"):
            leaves = lambda _number, at: kind == "always" and at == EXITS[2]  # noqa: E731
        else:
            said = scores(kind, exits, hidden, row)
            leaves = lambda number, _at, said=said: said[number] > threshold or (not strict and said[number] == threshold)  # noqa: B023, E731
        for number, point in enumerate(exits):
            if leaves(number, point.leave):
                logits.append(answer(point.head, hidden[point.leave]))
                where.append(point.leave)
                break
        else:
            logits.append(final)
            where.append(model.config.num_hidden_layers)
    return torch.stack(logits), where


def middle(model: Any, exits: SampleExits, kind: str, batch: dict[str, Tensor], least: float = 1e-4) -> float:
    """The threshold that spreads the samples over the most exits, in the widest gap of scores (`least` or more) that does:
    rounding decides nothing. Counts have gaps of one and are reached exactly."""
    count = len(next(iter(batch.values())))
    table = [scores(kind, exits, states(model, batch, row)[0], row) for row in range(count)]
    ordered = sorted({value for said in table for value in said if value == value})
    if all(value == int(value) for value in ordered):
        return max(1.0, ordered[len(ordered) // 2])

    def spread(threshold: float) -> int:
        return len({next((n for n, value in enumerate(said) if value > threshold), -1) for said in table})

    gaps = [(spread((a + b) / 2), b - a, (a + b) / 2) for a, b in itertools.pairwise(ordered) if b - a > least]
    return max(gaps)[2]
