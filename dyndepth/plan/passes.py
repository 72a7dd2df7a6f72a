"""The calls of one decode pass: which ops and modules run, how often, what each moves.

As the runtime makes them where layers run through their modules (dyndepth/runtime/layer.py), which is what a GPU does and what
a CUDA graph records. tests/test_roofline.py runs a model and finds these calls and no others. Left out, as small: bookkeeping
of rows (counters, states, comparisons of scores), casts, the choice of a token. A call is one op or one module's product, norm,
sum or activation; a provider may start more than one kernel for it, and one call of C++ stands for many on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dyndepth.errors import ArgumentError
from dyndepth.plan import traffic
from dyndepth.plan.leaving import Leaving, by_boundary
from dyndepth.plan.sizes import Sizes
from dyndepth.plan.traffic import Traffic

KV = ("predict", "propagate")
#: Bytes of a row that are no residual: sequence, position, slot, step and index (int32), and whether it may leave.
ROW_FACTS = 5 * 4 + 1


@dataclass(frozen=True)
class Call:
    """`count` calls that move the same: an op of dyndepth.ops, `embedding`, `norm`, `product`, `add`, `activation`, `gate`,
    `scale` (by one number); in graph style `normalise` and `cosine`, and `select`, `gather`, `scatter`, `copy`, `fill`."""

    op: str
    where: str
    traffic: Traffic
    count: int = 1


def calls(
    sizes: Sizes, rows: int, context: int, exits: Sequence[Leaving] = (), *, kv: str = "predict", item: int = 2,
    page_size: int = 16,
) -> list[Call]:  # fmt: skip
    """One decode pass over `rows` sequences whose newest token is number `context` (it sees so many, itself included).

    Args:
        exits: where rows leave for good, through the final norm; a boundary that nobody leaves at is judged all the same.
            Empty: full depth.
        kv: what gives rows that left their K,V: `predict` or `propagate`.
        item: bytes of a number of the model's dtype.
    """
    if rows < 1 or context < 1:
        raise ArgumentError(f"plan: wanted at least one row and a context of at least 1, got {rows}, {context}")
    if kv not in KV:
        raise ArgumentError(f"plan: kv must be one of {', '.join(KV)}, got {kv!r}")
    strange = [each for each in exits if not each.plain]
    if strange:
        raise ArgumentError(
            "plan: of passes in slices only exits for good through the final norm, judged by a router or by statistics, are "
            f"known, got {strange[0]}; graph_calls knows the others"
        )
    return list(_Pass(sizes, rows, context, by_boundary(sizes, rows, exits), kv, item, page_size).calls())


def total(found: Sequence[Call]) -> tuple[int, Traffic]:
    """(number of calls, what they move together)."""
    return sum(call.count for call in found), sum((call.traffic * call.count for call in found), Traffic(0))


@dataclass(frozen=True)
class _Pass:
    sizes: Sizes
    rows: int
    context: int
    exits: dict[int, Leaving]
    kv: str
    item: int
    page_size: int

    def calls(self) -> Iterator[Call]:
        s, live, done = self.sizes, self.rows, 0
        yield from embedded(s, self.rows, self.item)
        stops = [*self.exits, s.layers]
        for begin, end in zip([0, *stops], stops, strict=False):
            if begin in self.exits and live:
                one = self.exits[begin]
                yield from self._boundary(one, live)
                live -= one.rows
            if live:
                yield from self._layers(begin, end, live)
            elif self.kv == "propagate" and not done:
                done = end
                yield from self._propagate(begin)
        if live:
            yield self._norm("top", live)
        yield self._product("top", self.rows, s.vocab, s.width)
        yield from capped(s, self.rows, self.item)

    def _layers(self, begin: int, end: int, live: int) -> Iterator[Call]:
        s, item = self.sizes, self.item
        carried = self.rows if self.kv == "propagate" else live
        where, count = f"layers {begin} to {end - 1}", end - begin
        yield self._norm(where, carried, count)
        yield self._project(where, carried, live, count)
        for window in dict.fromkeys(s.windows[begin:end] or (0,)):
            alike = s.windows[begin:end].count(window) if s.windows else count
            moved = traffic.ragged_attention(
                live, self.context, s.heads, s.kv_heads, s.head_dim, item, window=window, page_size=self.page_size
            )
            yield Call("ragged_attention", where, moved, alike)
        yield self._product(where, live, s.width, s.query, s.out_bias, count)
        yield self._norm(where, live, (1 + 2 * s.sandwich) * count)
        yield self._product(where, live, s.inner, s.width, s.mlp_bias, 2 * count)
        yield Call("activation", where, traffic.elementwise(live, s.inner, item, read=1), count)
        yield Call("gate", where, traffic.elementwise(live, s.inner, item, read=2), count)
        yield self._product(where, live, s.width, s.inner, s.mlp_bias, count)
        yield Call("add", where, traffic.elementwise(live, s.width, item, read=2), 2 * count)

    def _boundary(self, one: Leaving, live: int) -> Iterator[Call]:
        """Judging, moving, heads and, under `predict`, K,V of those that leave."""
        s, item, where = self.sizes, self.item, f"boundary {one.leave}"
        if one.words:
            yield self._norm(where, live)
            yield Call("exit_stats", where, traffic.exit_stats(live, one.words, s.width, item))
        else:
            yield Call("router_score", where, traffic.router_score(live, one.neurons, s.width, item))
        if not one.rows:
            return
        yield Call("compact_rows", where, traffic.compact_rows(self.rows, s.width * item + ROW_FACTS))
        if not one.words:
            yield self._norm(where, one.rows)
        if self.kv == "predict":
            moved = traffic.backfill_kv(
                one.rows, s.layers - one.leave, s.width, s.kv, s.rotary, item, bias=True,
                variants=s.tables(one.leave, s.layers), rank=one.kv_rank,
            )  # fmt: skip
            yield Call("backfill_kv", where, moved)

    def _propagate(self, begin: int) -> Iterator[Call]:
        """Nobody is left: K,V of all layers above for all rows, in one product unless K is normed."""
        s, where, count = self.sizes, f"layers {begin} to {self.sizes.layers - 1}", self.sizes.layers - begin
        if not s.qk_norm:
            moved = traffic.backfill_kv(
                self.rows, count, s.width, s.kv, s.rotary, self.item, bias=s.qkv_bias, variants=s.tables(begin, s.layers)
            )
            yield Call("backfill_kv", where, moved)
            return
        yield self._norm(where, self.rows, count)
        yield self._project(where, self.rows, 0, count)

    def _project(self, where: str, rows: int, live: int, count: int) -> Call:
        s = self.sizes
        moved = traffic.project_qkv(
            rows, live, s.width, s.query, s.kv, s.rotary, self.item, bias=s.qkv_bias,
            gains=s.head_dim if s.qk_norm else 0, counter=live < rows,
        )  # fmt: skip
        return Call("project_qkv", where, moved, count)

    def _norm(self, where: str, rows: int, count: int = 1) -> Call:
        return Call("norm", where, traffic.elementwise(rows, self.sizes.width, self.item, read=1, gain=True), count)

    def _product(self, where: str, rows: int, outputs: int, columns: int, bias: bool = False, count: int = 1) -> Call:
        return Call("product", where, traffic.ragged_linear(rows, outputs, columns, self.item, biases=bias), count)


def embedded(sizes: Sizes, rows: int, item: int) -> Iterator[Call]:
    """Embeddings of a token a row, scaled where the model scales them (by a number of its dtype)."""
    yield Call("embedding", "bottom", traffic.embedding(rows, sizes.width, item))
    if sizes.scaled:
        yield Call("scale", "bottom", traffic.elementwise(rows, sizes.width, item, read=1) + Traffic(item))


def capped(sizes: Sizes, rows: int, item: int) -> Iterator[Call]:
    """Logits divided by the cap, tanh of them, times the cap."""
    if sizes.softcap:
        moved = traffic.elementwise(rows, sizes.vocab, item, read=1)
        yield Call("scale", "top", moved, 2)
        yield Call("activation", "top", moved)
