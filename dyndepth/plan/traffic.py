"""Bytes that every op must move and FLOPs that it must do, from sizes alone.

One rule for all: what a call reads or writes counts once, whatever a cache would keep. Weights, row buffers, biases and what
is returned count whole; of paged K,V only entries that are written or seen, of rotary tables a row per token, of the block
table an entry per page that is walked. Weights that no row asks for are not read. FLOPs are two per multiply-add of products
and attention; norms, rotation and activations are left out. `item` is bytes of one number of the model's dtype;
tests/test_traffic.py holds these figures against the tensors of real calls.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Bytes of int32 (positions, slots, sequences, pages, counters), of float32 (tables, statistics, routers), of int64 ids.
_INT, _FLOAT, _LONG = 4, 4, 8
#: What exit_stats returns per row: an int64 and five floats.
_STATISTICS = _LONG + 5 * _FLOAT


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written, and FLOPs."""

    bytes: int
    flops: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, count: int) -> Traffic:
        return Traffic(self.bytes * count, self.flops * count)


#: `live` read on the device, what ops in graph style read beside their rows.
COUNTER = Traffic(_INT)


def project_qkv(
    rows: int, live: int, width: int, query: int, kv: int, rotary: int, item: int, *, bias: bool = False, gains: int = 0,
    counter: bool = False, stored: int | None = None,
) -> Traffic:  # fmt: skip
    """Queries of `live` of the rows, keys and values of all.

    Args:
        query, kv: numbers of q, and of k and v together, that a token has.
        rotary: pairs of channels that are rotated.
        gains: channels of a head where q and k are normed, 0 where they are not.
        counter: `live` is read on the device.
        stored: rows that have a slot, all if None: the others' keys and values are computed and written nowhere.
    """
    if rows == 0:
        return Traffic(_INT * counter)
    stored = rows if stored is None else stored
    asked = query if live else 0
    weights = (asked + kv) * (width + bias) * item + (1 + (live > 0)) * gains * _FLOAT
    moved = (rows * width + stored * kv + live * query) * item + rows * (2 * rotary * _FLOAT + 2 * _INT)
    return Traffic(weights + moved + _INT * counter, 2 * width * (live * query + rows * kv))


def store_kv(
    rows: int, queries: int, query: int, kv: int, rotary: int, item: int, *, stored: int | None = None,
    turned: int | None = None,
) -> Traffic:  # fmt: skip
    """Rotate q of the first `queries` rows and k of all, store k and v: the epilogue of other projections.

    Args:
        stored: rows that have a slot, all if None: the others' keys and values are not looked at.
        turned: rows with a query or a slot, all if None: the others need no angle.
    """
    stored, turned = rows if stored is None else stored, rows if turned is None else turned
    return Traffic(2 * (queries * query + stored * kv) * item + turned * 2 * rotary * _FLOAT + rows * 2 * _INT)


def ragged_attention(
    rows: int, tokens: int, heads: int, kv_heads: int, head_dim: int, item: int, *, window: int = 0, page_size: int = 16
) -> Traffic:
    """Rows of sequences of their own, each at position `tokens - 1`, seeing all tokens or the last `window`."""
    seen = min(tokens, window or tokens)
    pages = -(-tokens // page_size) - (tokens - seen) // page_size
    moved = (2 * heads + 2 * seen * kv_heads) * head_dim * item + (2 + pages) * _INT
    return Traffic(rows * moved, 4 * rows * seen * heads * head_dim)


def ragged_linear(
    rows: int, outputs: int, columns: int, item: int, *, biases: int = 0, gated: bool = False, residual: bool = False
) -> Traffic:
    """`x @ weight.T`, perhaps gated by a second product and added to a residual. biases: of the two products."""
    if rows == 0:
        return Traffic(0)
    weights = ((1 + gated) * columns + biases) * outputs
    moved = rows * (columns + outputs * (1 + residual))
    return Traffic((weights + moved) * item, 2 * (1 + gated) * rows * outputs * columns)


def exit_stats(
    rows: int, words: int, width: int, item: int, *, bias: bool = False, gain: bool = False, listed: bool = False
) -> Traffic:
    """Statistics over `words` words. gain: the norm comes first. listed: words are picked out of the head by id."""
    if rows == 0:
        return Traffic(0)
    weights = words * (width + bias) * item + gain * width * _FLOAT + listed * words * _LONG
    return Traffic(weights + rows * (width * item + _STATISTICS), 2 * rows * words * width)


def router_score(rows: int, neurons: int, width: int, item: int, *, cosine: bool = False, extra: int = 0) -> Traffic:
    """cosine: compared with the residual of an earlier boundary. extra: further fp32 features."""
    if rows == 0:
        return Traffic(0)
    weights = neurons * (width + 2 + cosine + extra) + 1
    moved = rows * (width * item * (1 + cosine) + (extra + 1) * _FLOAT)
    return Traffic(weights * _FLOAT + moved, 2 * rows * (neurons * (width + extra + 1) + 3 * cosine * width))


def kv_maps(outputs: int, width: int, rank: int = 0) -> int:
    """Numbers of K,V maps with so many outputs; rank 0: they read the whole residual."""
    return outputs * (rank or width) + rank * width


def backfill_kv(
    rows: int, layers: int, width: int, kv: int, rotary: int, item: int, *, bias: bool = False, variants: int = 0,
    stored: int | None = None, rank: int = 0,
) -> Traffic:  # fmt: skip
    """K,V of `layers` layers for rows that skip them.

    Args:
        variants: rotary tables that the layers use; 0 where there is one.
        stored: rows that have a slot, all if None: the others' keys and values are computed, not turned and written nowhere.
        rank: of maps that read a product of the residual; 0 where they read the residual itself.
    """
    if rows == 0:
        return Traffic(0)
    stored = rows if stored is None else stored
    maps = kv_maps(layers * kv, width, rank)
    weights = (maps + layers * kv * bias) * item + (layers * _INT if variants else 0)
    moved = rows * (width * item + 2 * _INT) + stored * (layers * kv * item + max(1, variants) * 2 * rotary * _FLOAT)
    return Traffic(weights + moved, 2 * rows * maps)


def compact_rows(rows: int, payload: int) -> Traffic:
    """`payload` bytes a row are read and written, an int8 of state read, the order and two counts written."""
    return Traffic(rows * (2 * payload + 1 + _INT) + 2 * _INT)


def elementwise(rows: int, width: int, item: int, *, read: int, gain: bool = False) -> Traffic:
    """What modules do number by number (norms, sums, activations): `read` buffers in, one out, perhaps a gain."""
    return Traffic(((read + 1) * rows + gain) * width * item if rows else 0)


def embedding(rows: int, width: int, item: int) -> Traffic:
    """A row of the table per token id."""
    return Traffic(rows * (2 * width * item + _LONG))
