"""The calls of one decode pass in graph style, with what each moves: buffers keep their rows, ops read `live` on the device.

As dyndepth/runtime/graph.py makes them for layers of Llama's and Gemma's kind, with heads, jumps and criteria of every kind;
tests/test_graph_traffic.py runs passes that count and finds these calls and no others. A call is the same call whoever leaves,
but what it moves follows who is live there: ops read and write live rows alone, and no weight if there is none; modules (norms,
products of heads and jumps) and what keeps buffers in shape (`select`, `gather`, `scatter`, `copy`, `fill`: PyTorch's where,
index, index_copy, clone, zeros and full) move all rows. Left out are integers of rows, and casts. Above 128 rows Triton's
`exit_stats` hands products over to the library, which knows no `live`: it moves more than is said here. `normalise` is the norm
without a gain in front of a map, `cosine` that of two residuals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dyndepth.errors import ArgumentError
from dyndepth.plan import traffic
from dyndepth.plan.leaving import Leaving, by_boundary
from dyndepth.plan.passes import Call, capped, embedded
from dyndepth.plan.sizes import Sizes
from dyndepth.plan.traffic import COUNTER, Traffic

#: K,V policies that the pass has.
KV = ("predict", "propagate", "none")

#: Bytes of a row that moves beside the residual: sequence, position, slot, step, index, resume, left at (int32), may leave.
ROW_FACTS = 7 * 4 + 1
#: A bool and an int64 per row of a mask and of an index; bytes of a float32.
_MASK, _INDEX, _FLOAT = 1, 8, 4


def graph_calls(
    sizes: Sizes, rows: int, context: int, exits: Sequence[Leaving] = (), *, count: int | None = None, kv: str = "predict",
    item: int = 2, page_size: int = 16,
) -> list[Call]:  # fmt: skip
    """One pass over buffers of `rows` rows (a bucket), embedding and LM head included.

    Args:
        context: tokens that every row sees, itself included.
        exits: open bands, and how many rows leave at each; those that nobody leaves at are judged too.
        count: rows that are real; the others are padding without a slot. None: all.
        kv: what gives rows that left their K,V: `predict`, `propagate`, or `none`.
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
        yield from embedded(s, n, self.item)
        yield self._each("copy", "bottom", s.width, 1)
        yield self._each("fill", "bottom", s.width, 0)
        resumes = {one.resume for one in self.exits.values() if one.resume is not None}
        stops = sorted({*self.exits, *resumes, s.layers})
        for begin, end in zip([0, *stops], stops, strict=False):
            if begin in resumes:
                yield from self._resume(begin)
                live += sum(one.rows for one in self.exits.values() if one.resume == begin)
            if begin in self.exits:
                yield from self._boundary(self.exits[begin], live)
                live -= self.exits[begin].rows
            yield from self._layers(begin, end, live)
        yield self._norm("top")
        yield from self._placed("top")
        yield Call("product", "top", traffic.ragged_linear(n, s.vocab, s.width, self.item))
        yield from capped(s, n, self.item)

    def _layers(self, begin: int, end: int, live: int) -> Iterator[Call]:
        s, item, count = self.sizes, self.item, end - begin
        where = f"layers {begin} to {end - 1}"
        yield self._norm(where, (2 + 2 * s.sandwich) * count)
        yield self._project(where, live, self.real if self.kv == "propagate" else live, count)
        for window in dict.fromkeys(s.windows[begin:end] or (0,)):
            yield self._attention(where, live, window, s.windows[begin:end].count(window) if s.windows else count)
        for outputs, columns, biases, gated in (
            (s.width, s.query, int(s.out_bias), False),
            (s.inner, s.width, 2 * s.mlp_bias, True),
            (s.width, s.inner, int(s.mlp_bias), False),
        ):
            residual = not gated and not s.sandwich
            moved = traffic.ragged_linear(live, outputs, columns, item, biases=biases, gated=gated, residual=residual)
            yield Call("ragged_linear", where, moved + COUNTER, count)
        if s.sandwich:  # the sum comes after the norm, which no epilogue makes
            yield self._each("add", where, s.width, 2, 2 * count)
        yield self._select(where, count)

    def _resume(self, boundary: int) -> Iterator[Call]:
        """Rows whose band ends here: the jump of each, of all rows, and a choice; then they move to the runners."""
        where = f"boundary {boundary}"
        for one in self.exits.values():
            if one.resume == boundary and one.jump:
                yield from self._jump(one, where)
                yield self._select(where)
        yield self._moved(where, [leave for leave in self.exits if leave < boundary])

    def _boundary(self, one: Leaving, live: int) -> Iterator[Call]:
        """Judging, results of those that leave for good, the partition and, under `predict`, K,V of those that leave."""
        s, item, where = self.sizes, self.item, f"boundary {one.leave}"
        first = one.leave == min(self.exits)
        if one.head == "block":
            yield self._norm(where)
            yield self._project(where, 0, self.real)
        if one.words:
            yield from self._heads(one, live, where)
            yield Call("exit_stats", where, traffic.exit_stats(live, one.words, s.width, item) + COUNTER)
        if one.routed and not (one.previous and first):
            judged = traffic.router_score(live, one.neurons, s.width, item, cosine=one.previous, extra=one.features)
            yield Call("router_score", where, judged + COUNTER)
        if one.previous and not one.routed and not first:
            yield Call("cosine", where, Traffic(self.rows * (2 * s.width * item + _FLOAT)))
        if self._compares:  # from boundary to boundary
            yield self._select(where)
            if first:
                yield self._each("fill", where, s.width, 0)
        if one.resume is None:
            if not one.words:
                yield from self._heads(one, live if one.rows else 0, where)
            yield from self._placed(where)
        yield self._moved(where, [leave for leave in self.exits if leave <= one.leave])
        if self.kv == "predict":
            end = s.layers if one.resume is None else one.resume
            moved = traffic.backfill_kv(
                one.rows, end - one.leave, s.width, s.kv, s.rotary, item, bias=True, variants=s.tables(one.leave, end),
                rank=one.kv_rank,
            )  # fmt: skip
            yield Call("backfill_kv", where, moved + COUNTER * 2)

    # -- heads and jumps: modules, of all rows ----------------------------------------------------------------------------

    def _heads(self, one: Leaving, live: int, where: str) -> Iterator[Call]:
        s = self.sizes
        if one.head == "block":
            yield from self._block(one, live, where)
        if one.head == "mlp":
            yield self._normalised(where)
            yield from self._fed(one.inner, where)
            yield self._each("add", where, s.width, 2)
        yield self._norm(where)
        rank = one.inner if one.head == "translator" else one.readout
        if rank is not None and one.head != "norm":
            yield self._normalised(where)
            if rank:
                yield self._product(where, rank, s.width)
            yield self._product(where, s.width, rank or s.width, biased=True)
            yield self._each("add", where, s.width, 2)

    def _block(self, one: Leaving, live: int, where: str) -> Iterator[Call]:
        """A decoder layer through its modules; its K,V are there already."""
        s = self.sizes
        yield self._norm(where, 2 + 2 * s.sandwich)
        yield self._project(where, live, 0)
        yield self._attention(where, live, s.windows[one.source] if s.windows else 0)
        yield self._product(where, s.width, s.query, biased=s.out_bias)
        yield self._product(where, s.inner, s.width, 2, biased=s.mlp_bias)
        yield self._each("activation", where, s.inner, 1)
        yield self._each("gate", where, s.inner, 2)
        yield self._product(where, s.width, s.inner, biased=s.mlp_bias)
        yield self._each("add", where, s.width, 2, 2)

    def _jump(self, one: Leaving, where: str) -> Iterator[Call]:
        s, end = self.sizes, one.resume or self.sizes.layers
        if one.jump in ("linear", "mlp", "adapter"):
            yield self._normalised(where)
            yield self._product(where, s.width, s.width, biased=True)
            yield self._each("add", where, s.width, 2)
        if one.jump == "mlp":
            yield self._normalised(where)
            yield from self._fed(one.inner, where)
            yield self._each("add", where, s.width, 2)
        if one.jump in ("adapter", "adapter alone"):
            layers = end - one.leave
            yield self._normalised(where, layers)
            yield from self._fed(one.inner, where, layers, gated=True)
            yield self._each("add", where, s.width, 2, layers)

    def _fed(self, inner: int, where: str, count: int = 1, gated: bool = False) -> Iterator[Call]:
        """A feed-forward block without biases."""
        yield self._product(where, inner, self.sizes.width, (1 + gated) * count)
        yield self._each("activation", where, inner, 1, count)
        if gated:
            yield self._each("gate", where, inner, 2, count)
        yield self._product(where, self.sizes.width, inner, count)

    # -- single calls -------------------------------------------------------------------------------------------------------

    @property
    def _compares(self) -> bool:
        """Whether rows carry the residual of the boundary before."""
        return any(one.previous for one in self.exits.values())

    def _moved(self, where: str, judged: list[int]) -> Call:
        """Every buffer, that of what criteria carried from the judged boundaries too."""
        payload = self.sizes.width * self.item + ROW_FACTS + sum(carried(self.sizes, self.exits.values(), judged, self.item))
        return Call("compact_rows", where, traffic.compact_rows(self.rows, payload))

    def _placed(self, where: str) -> Iterator[Call]:
        """Head-ready rows of some, into results in the caller's order: read those there, choose, write all."""
        index, width = Traffic(self.rows * _INDEX), self.sizes.width
        yield Call("gather", where, traffic.elementwise(self.rows, width, self.item, read=1) + index)
        yield self._select(where)
        yield Call("scatter", where, traffic.elementwise(self.rows, width, self.item, read=2) + index)

    def _project(self, where: str, live: int, stored: int, count: int = 1) -> Call:
        s = self.sizes
        moved = traffic.project_qkv(
            self.rows, live, s.width, s.query, s.kv, s.rotary, self.item, bias=s.qkv_bias,
            gains=s.head_dim if s.qk_norm else 0, counter=True, stored=stored,
        )  # fmt: skip
        return Call("project_qkv", where, moved, count)

    def _attention(self, where: str, live: int, window: int, count: int = 1) -> Call:
        s = self.sizes
        moved = traffic.ragged_attention(
            live, self.context, s.heads, s.kv_heads, s.head_dim, self.item, window=window, page_size=self.page_size
        )
        return Call("ragged_attention", where, moved + COUNTER, count)

    def _product(self, where: str, outputs: int, columns: int, count: int = 1, *, biased: bool = False) -> Call:
        return Call("product", where, traffic.ragged_linear(self.rows, outputs, columns, self.item, biases=biased), count)

    def _select(self, where: str, count: int = 1) -> Call:
        moved = traffic.elementwise(self.rows, self.sizes.width, self.item, read=2)
        return Call("select", where, moved + Traffic(self.rows * _MASK), count)

    def _norm(self, where: str, count: int = 1) -> Call:
        return Call("norm", where, traffic.elementwise(self.rows, self.sizes.width, self.item, read=1, gain=True), count)

    def _normalised(self, where: str, count: int = 1) -> Call:
        return Call("normalise", where, Traffic(self.rows * self.sizes.width * (self.item + _FLOAT)), count)

    def _each(self, op: str, where: str, width: int, read: int, count: int = 1) -> Call:
        return Call(op, where, traffic.elementwise(self.rows, width, self.item, read=read), count)


def carried(sizes: Sizes, exits: Iterable[Leaving], judged: Sequence[int], item: int) -> tuple[int, ...]:
    """Bytes of a row, by tensor, that move beside ROW_FACTS once these boundaries have judged: which bands a row skipped, where
    a router asks; the residual of the boundary before; what criteria leave."""
    every = list(exits)
    bits = (8,) if any(one.history for one in every) else ()
    previous = (sizes.width * item,) if judged and any(one.previous for one in every) else ()
    left = dict.fromkeys(one.carried for one in every if one.leave in judged and one.carried)
    return (*bits, *previous, *(size for sizes_ in left for size in sizes_))
