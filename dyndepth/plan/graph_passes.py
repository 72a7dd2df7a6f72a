"""The calls of one decode pass in graph style, with what each moves: buffers keep their rows, ops read `live` on the device.

As dyndepth/runtime/graph.py makes them for layers of Llama's kind; tests/test_graph_traffic.py runs passes that count and finds
these calls and no others. A call is the same call whoever leaves, but what it moves follows who is live there: ops read and
write live rows alone, and no weight if there is none; modules (norms) and what keeps buffers in shape (`select`, `gather`,
`scatter`, `copy`, `fill`: PyTorch's where, index, index_copy, clone, zeros) move all rows. Left out are integers of rows. Above
128 rows Triton's `exit_stats` hands products over to the library, which knows no `live`: it moves more than is said here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dyndepth.errors import ArgumentError
from dyndepth.plan import traffic
from dyndepth.plan.passes import KV, Call, Leaving, Sizes, by_boundary
from dyndepth.plan.traffic import COUNTER, Traffic

#: Bytes of a row that moves beside the residual: sequence, position, slot, step, index, resume, left at (int32), may leave.
ROW_FACTS = 7 * 4 + 1
#: A bool and an int64 per row of a mask and of an index.
_MASK, _INDEX = 1, 8


def graph_calls(
    sizes: Sizes, rows: int, context: int, exits: Sequence[Leaving] = (), *, count: int | None = None, kv: str = "predict",
    item: int = 2, page_size: int = 16,
) -> list[Call]:  # fmt: skip
    """One pass over buffers of `rows` rows (a bucket), embedding and LM head included.

    Args:
        context: tokens that every row sees, itself included.
        exits: boundaries of open bands, and how many rows leave there for good; those that nobody leaves at are judged too.
        count: rows that are real; the others are padding without a slot. None: all.
        kv: what gives rows that left their K,V: `predict` or `propagate`.
        item: bytes of a number of the model's dtype.
    """
    real = rows if count is None else count
    if not 0 <= real <= rows or rows < 1 or context < 1:
        raise ArgumentError(
            f"plan: wanted at least one row, a context of at least 1 and a count in [0, rows], got {rows}, {context}, {count}"
        )
    if kv not in KV:
        raise ArgumentError(f"plan: kv must be one of {', '.join(KV)}, got {kv!r}")
    return list(_GraphPass(sizes, rows, real, context, by_boundary(sizes, real, exits), kv, item, page_size).calls())


@dataclass(frozen=True)
class _GraphPass:
    sizes: Sizes
    rows: int
    real: int
    context: int
    exits: dict[int, Leaving]
    kv: str
    item: int
    page_size: int

    def calls(self) -> Iterator[Call]:
        s, n, live = self.sizes, self.rows, self.real
        yield Call("embedding", "bottom", traffic.embedding(n, s.width, self.item))
        yield Call("copy", "bottom", traffic.elementwise(n, s.width, self.item, read=1))
        yield Call("fill", "bottom", traffic.elementwise(n, s.width, self.item, read=0))
        stops = [*self.exits, s.layers]
        for begin, end in zip([0, *stops], stops, strict=False):
            if begin in self.exits:
                yield from self._boundary(self.exits[begin], live)
                live -= self.exits[begin].rows
            yield from self._layers(begin, end, live)
        yield self._norm("top")
        yield from self._placed("top")
        yield Call("product", "top", traffic.ragged_linear(n, s.vocab, s.width, self.item))

    def _layers(self, begin: int, end: int, live: int) -> Iterator[Call]:
        s, item, count = self.sizes, self.item, end - begin
        where = f"layers {begin} to {end - 1}"
        yield self._norm(where, 2 * count)
        stored = self.real if self.kv == "propagate" else live
        moved = traffic.project_qkv(
            self.rows, live, s.width, s.query, s.kv, s.rotary, item, bias=s.qkv_bias,
            gains=s.head_dim if s.qk_norm else 0, counter=True, stored=stored,
        )  # fmt: skip
        yield Call("project_qkv", where, moved, count)
        for window in dict.fromkeys(s.windows[begin:end] or (0,)):
            alike = s.windows[begin:end].count(window) if s.windows else count
            moved = traffic.ragged_attention(
                live, self.context, s.heads, s.kv_heads, s.head_dim, item, window=window, page_size=self.page_size
            )
            yield Call("ragged_attention", where, moved + COUNTER, alike)
        for outputs, columns, biases, gated in (
            (s.width, s.query, int(s.out_bias), False),
            (s.inner, s.width, 2 * s.mlp_bias, True),
            (s.width, s.inner, int(s.mlp_bias), False),
        ):
            moved = traffic.ragged_linear(live, outputs, columns, item, biases=biases, gated=gated, residual=not gated)
            yield Call("ragged_linear", where, moved + COUNTER, count)
        yield self._select(where, count)

    def _boundary(self, one: Leaving, live: int) -> Iterator[Call]:
        """Judging, results of those that leave, the partition and, under `predict`, K,V of those that leave."""
        s, item, where = self.sizes, self.item, f"boundary {one.leave}"
        yield self._norm(where)  # before statistics, or for those whom a router lets go
        if one.words:
            yield Call("exit_stats", where, traffic.exit_stats(live, one.words, s.width, item) + COUNTER)
        else:
            yield Call("router_score", where, traffic.router_score(live, one.neurons, s.width, item) + COUNTER)
        yield from self._placed(where)
        yield Call("compact_rows", where, traffic.compact_rows(self.rows, s.width * item + ROW_FACTS))
        if self.kv == "predict":
            moved = traffic.backfill_kv(one.rows, s.layers - one.leave, s.width, s.kv, s.rotary, item, bias=True)
            yield Call("backfill_kv", where, moved + COUNTER * 2)

    def _placed(self, where: str) -> Iterator[Call]:
        """Head-ready rows of some, into results in the caller's order: read those there, choose, write all."""
        index, width = Traffic(self.rows * _INDEX), self.sizes.width
        yield Call("gather", where, traffic.elementwise(self.rows, width, self.item, read=1) + index)
        yield self._select(where)
        yield Call("scatter", where, traffic.elementwise(self.rows, width, self.item, read=2) + index)

    def _select(self, where: str, count: int = 1) -> Call:
        moved = traffic.elementwise(self.rows, self.sizes.width, self.item, read=2)
        return Call("select", where, moved + Traffic(self.rows * _MASK), count)

    def _norm(self, where: str, count: int = 1) -> Call:
        return Call("norm", where, traffic.elementwise(self.rows, self.sizes.width, self.item, read=1, gain=True), count)
