"""Lower bounds of ops and of whole passes: bytes over bandwidth or FLOPs over the peak, whichever takes longer.

The roofline (Williams et al. 2009) of every call by itself: arithmetic on sizes and data sheets, nothing is measured. A pass
takes at least the sum of its calls' bounds, as one call waits for the one before; launches come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dyndepth.plan import traffic
from dyndepth.plan.leaving import Leaving
from dyndepth.plan.machine import Machine
from dyndepth.plan.passes import ROW_FACTS, Call, calls, total
from dyndepth.plan.rates import SHORTLIST
from dyndepth.plan.sizes import Sizes
from dyndepth.plan.traffic import Traffic

MEMORY, COMPUTE = "memory", "compute"
#: Passes that are set against each other; the first is the graphed pass without exits.
PASSES = ("no exit", "exits, predict", "exits, propagate")


@dataclass(frozen=True)
class OpLine:
    """One op at one number of rows. `what` says in words what it does there."""

    op: str
    what: str
    rows: int
    traffic: Traffic


@dataclass(frozen=True)
class PassLine:
    """One pass: number of calls (launches of a graph), of them calls of dyndepth's ops, and what they move."""

    name: str
    rows: int
    calls: tuple[Call, ...]

    @property
    def launches(self) -> int:
        return total(self.calls)[0]

    @property
    def traffic(self) -> Traffic:
        return total(self.calls)[1]

    def seconds(self, machine: Machine) -> float:
        """Sum of the bounds of its calls."""
        return sum(call.count * bound(machine, call.traffic)[0] for call in self.calls)


def bound(machine: Machine, moved: Traffic) -> tuple[float, str]:
    """(seconds, MEMORY or COMPUTE): what the call takes at least, and what it waits for."""
    memory, compute = moved.bytes / machine.bandwidth, moved.flops / machine.flops
    return (memory, MEMORY) if memory >= compute else (compute, COMPUTE)


def ops(sizes: Sizes, rows: int, context: int, item: int = 2, page_size: int = 16) -> list[OpLine]:
    """Every op on `rows` rows of a decode pass, each row with `context` tokens of K,V; the same order for every row count.

    `router_score` has one neuron, a shortlist SHORTLIST words, `backfill_kv` the upper half of the layers; products and
        `ragged_attention` are one layer's, of one without a window if there is one; `store_kv` is what follows projections that
    `project_qkv` does not take.
    """
    s, half = sizes, sizes.layers - sizes.layers // 2
    window = min(s.windows, default=0)  # 0, all tokens, is the smallest
    gains = s.head_dim if s.qk_norm else 0
    found = {
        ("project_qkv", "one layer"): traffic.project_qkv(
            rows, rows, s.width, s.query, s.kv, s.rotary, item, bias=s.qkv_bias, gains=gains
        ),
        ("store_kv", "one layer"): traffic.store_kv(rows, rows, s.query, s.kv, s.rotary, item),
        ("ragged_attention", "one layer"): traffic.ragged_attention(
            rows, context, s.heads, s.kv_heads, s.head_dim, item, window=window, page_size=page_size
        ),
        ("ragged_linear", "output projection"): traffic.ragged_linear(
            rows, s.width, s.query, item, biases=s.out_bias, residual=True
        ),
        ("ragged_linear", "gate and up"): traffic.ragged_linear(
            rows, s.inner, s.width, item, biases=2 * s.mlp_bias, gated=True
        ),
        ("ragged_linear", "down projection"): traffic.ragged_linear(
            rows, s.width, s.inner, item, biases=s.mlp_bias, residual=True
        ),
        ("ragged_linear", "LM head"): traffic.ragged_linear(rows, s.vocab, s.width, item),
        ("exit_stats", "whole vocabulary"): traffic.exit_stats(rows, s.vocab, s.width, item),
        ("exit_stats", f"shortlist of {min(SHORTLIST, s.vocab)}"): traffic.exit_stats(
            rows, min(SHORTLIST, s.vocab), s.width, item
        ),
        ("router_score", "one neuron"): traffic.router_score(rows, 1, s.width, item),
        ("compact_rows", "buffers of a pass"): traffic.compact_rows(rows, s.width * item + ROW_FACTS),
        ("backfill_kv", f"{half} layers"): traffic.backfill_kv(rows, half, s.width, s.kv, s.rotary, item, bias=True),
    }
    return [OpLine(op, what, rows, moved) for (op, what), moved in found.items()]


def passes(
    sizes: Sizes, rows: int, context: int, exits: Sequence[Leaving] | None = None, item: int = 2, page_size: int = 16
) -> list[PassLine]:
    """The pass without exits, and with exits under `predict` and `propagate`; one line each, in the order of PASSES.

    `exits` None: a router at half of the layers, where half of the rows leave (rounded up).
    """
    if exits is None:
        exits = [Leaving(sizes.layers // 2, -(-rows // 2))]
    asked = [((), "predict"), (exits, "predict"), (exits, "propagate")]
    return [
        PassLine(name, rows, tuple(calls(sizes, rows, context, taken, kv=kv, item=item, page_size=page_size)))
        for name, (taken, kv) in zip(PASSES, asked, strict=True)
    ]
