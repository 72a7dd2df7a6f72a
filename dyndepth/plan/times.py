"""Seconds of the parts of a pass on n rows, for one machine and model, and their means over binomial row counts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from dyndepth.plan import traffic
from dyndepth.plan.machine import Machine
from dyndepth.plan.rates import SHORTLIST, Exit
from dyndepth.plan.shape import Shape

#: A: the full LM head judges, and its tokens are those of the rows that leave. B: a router judges (on the residual, or on a
#: shortlist's statistics), and one LM head at the end of the pass serves every row. C: a shortlist judges and gives the
#: tokens of rows that leave: they can emit no other word, so C changes what a model can say.
HEADS = ("A", "B", "C")

#: Ops of a layer beside its products: two norms, rotary and K,V store, attention, activation, product of gates, two sums.
LAYER_OPS = 8
#: Norm and arg max around the LM head.
HEAD_OPS = 2
#: Ops of judging beside products: norm, statistics, score, comparison, count.
JUDGE_OPS = 5
#: Ops of a partition: states, order, and five buffers that move.
PARTITION_OPS = 7
#: Norm, rotary and store around the back-fill's product.
BACKFILL_OPS = 2


class Times:
    """Every part is 0 for no rows: an empty layer reads nothing."""

    def __init__(self, machine: Machine, shape: Shape) -> None:
        self.machine, self.shape = machine, shape
        self._series: dict[tuple[object, ...], np.ndarray] = {}

    def layer(self, n: int) -> float:
        """One layer without its K,V reads."""
        return self.machine.product(self.shape.layer, n, self.shape.products) + self._ops(LAYER_OPS, n)

    def reads(self, tokens: float) -> float:
        """K,V of so many tokens of one layer."""
        return self.machine.read(tokens * self.shape.kv)

    def head(self, n: int) -> float:
        """Final norm, LM head, arg max."""
        return self.machine.product(self.shape.head, n) + self._ops(HEAD_OPS, n)

    def judge(self, one: Exit, heads: str, n: int) -> float:
        """Judging n rows at an exit: its head, the words looked at, the read of the count."""
        if n <= 0:
            return 0.0
        product = self.machine.product
        seconds = self.machine.sync_s + self._ops(JUDGE_OPS, n)
        if one.resume < self.shape.layers:  # a router on the residual: there is no head below the top
            return seconds
        if heads == "A":
            return seconds + product(one.head, n) + product(self.shape.head, n)
        words = one.words if heads == "B" else min(one.words or SHORTLIST, self.shape.vocab)
        if words:
            seconds += product(one.head, n) + product(words * self.shape.ready, n)
        return seconds

    def leave(self, one: Exit, heads: str, n: int) -> float:
        """What n rows that leave cost: K,V of skipped layers in one product, and a head or jump that judging did not run."""
        weights = traffic.kv_maps((one.resume - one.leave) * self.shape.kv, self.shape.width, one.kv_rank)
        seconds = self.machine.product(weights, n) + self._ops(BACKFILL_OPS, n)
        if one.resume < self.shape.layers or (heads == "B" and not one.words):
            seconds += self.machine.product(one.head, n)
        return seconds

    def partition(self, n: int) -> float:
        """Compacting n rows: residuals and head-ready rows move."""
        return self._ops(PARTITION_OPS, n) + self.machine.move(n * (self.shape.width + self.shape.ready))

    def mean_layer(self, rows: int, share: float) -> float:
        """E[layer(n)], n ~ Bin(rows, share)."""
        return self._mean(("layer",), rows, share, self.layer)

    def mean_head(self, rows: int, share: float) -> float:
        """E[head(n)]."""
        return self._mean(("head",), rows, share, self.head)

    def mean_judge(self, one: Exit, heads: str, rows: int, share: float) -> float:
        """E[judge(one, heads, n)]."""
        return self._mean(("judge", _key(one), heads), rows, share, functools.partial(self.judge, one, heads))

    def mean_leave(self, one: Exit, heads: str, rows: int, share: float) -> float:
        """E[leave(one, heads, n)]."""
        return self._mean(("leave", _key(one), heads), rows, share, functools.partial(self.leave, one, heads))

    def _ops(self, count: int, n: int) -> float:
        return count * self.machine.op_s if n > 0 else 0.0

    def _mean(self, key: tuple[object, ...], rows: int, share: float, part: Callable[[int], float]) -> float:
        series = self._series.get((rows, *key))
        if series is None:
            series = self._series[rows, *key] = np.array([part(n) for n in range(rows + 1)])
        return float(chances(rows, share) @ series)


def _key(one: Exit) -> tuple[int, ...]:
    return one.leave, one.resume, one.head, one.words, one.kv_rank


def chances(rows: int, share: float) -> np.ndarray:
    """float64 [rows + 1]: binomial probabilities of 0..rows."""
    return _chances(rows, min(1.0, max(0.0, share)))


@functools.lru_cache(maxsize=4096)
def _chances(rows: int, share: float) -> np.ndarray:
    if share in (0.0, 1.0):
        return np.eye(rows + 1)[round(rows * share)]
    counts = np.arange(rows + 1)
    choices = np.array([math.lgamma(rows + 1) - math.lgamma(n + 1) - math.lgamma(rows - n + 1) for n in range(rows + 1)])
    found = np.exp(choices + counts * math.log(share) + (rows - counts) * math.log1p(-share))
    return np.asarray(found / found.sum())


def any_of(rows: int, share: float) -> float:
    """The chance that at least one of the rows is there."""
    return 1 - (1 - min(1.0, max(0.0, share))) ** rows


def some_but_not_all(rows: int, leaving: float, staying: float) -> float:
    """The chance that of the rows that are live (shares leaving + staying) some leave and some stay."""
    return max(0.0, any_of(rows, leaving) + any_of(rows, staying) - any_of(rows, leaving + staying))
