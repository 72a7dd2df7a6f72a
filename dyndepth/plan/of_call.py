"""What one call of an op must move and compute, from its arguments: sizes of tensors, and positions, slots and counters."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dyndepth.plan import traffic
from dyndepth.plan.traffic import COUNTER, Traffic


def of_call(op: str, arguments: dict[str, Any]) -> Traffic:
    """`arguments` by the names of the op's schema; what is left out is None. Integers must have values, floats need none.

    Counters are looked at: rows at or past `live`, or outside of a section, are not charged. Raises KeyError for ops that the
    planner has no figures for (`accept_drafts`, whose work depends on what is accepted).
    """
    a = _Given(arguments)
    return _OPS[op](a) + COUNTER * ((a["live"] is not None) + 2 * (a["section"] is not None))


class _Given(dict[str, Any]):
    def __missing__(self, name: str) -> None:
        return None

    def live(self, rows: int) -> int:
        return rows if self["live"] is None else min(max(int(self["live"]), 0), rows)

    @property
    def rotary(self) -> int:
        return 0 if self["cos"] is None else int(self["cos"].shape[-1])


def _project_qkv(a: _Given) -> Traffic:
    x, gain = a["x"], a["q_gain"]
    rows, width = x.shape
    return traffic.project_qkv(
        rows, a.live(rows), width, a["q_weight"].shape[0], 2 * a["k_weight"].shape[0], a.rotary, x.element_size(),
        bias=a["q_bias"] is not None, gains=0 if gain is None else len(gain), stored=int((a["slots"] >= 0).sum()),
    )  # fmt: skip


def _store_kv(a: _Given) -> Traffic:
    q, k, stored = a["q"], a["k"], a["slots"] >= 0
    queries = a.live(len(q))
    return traffic.store_kv(
        len(k), queries, q.shape[1:].numel(), 2 * k.shape[1:].numel(), a.rotary, q.element_size(), stored=int(stored.sum()),
        turned=queries + int(stored[queries:].sum()),
    )  # fmt: skip


def _ragged_attention(a: _Given) -> Traffic:
    (rows, heads, head_dim), pages = a["q"].shape, a["pages"]
    found = Traffic(0)
    for pos in a["pos"][: a.live(rows)].tolist():
        found += traffic.ragged_attention(
            1, pos + 1, heads, pages.shape[3], head_dim, pages.element_size(), window=a["window"] or 0, page_size=pages.shape[2]
        )
    return found


def _ragged_linear(a: _Given) -> Traffic:
    x, (outputs, columns) = a["x"], a["weight"].shape
    return traffic.ragged_linear(
        a.live(len(x)), outputs, columns, x.element_size(), biases=sum(a[name] is not None for name in ("bias", "gate_bias")),
        gated=a["gate_weight"] is not None, residual=a["residual"] is not None,
    )  # fmt: skip


def _exit_stats(a: _Given) -> Traffic:
    hidden, ids = a["hidden"], a["vocab_ids"]
    return traffic.exit_stats(
        a.live(len(hidden)), len(a["head_weight"] if ids is None else ids), hidden.shape[1], hidden.element_size(),
        bias=a["head_bias"] is not None, gain=a["norm_gain"] is not None, listed=ids is not None,
    )  # fmt: skip


def _router_score(a: _Given) -> Traffic:
    hidden, (neurons, width) = a["hidden"], a["weight1"].shape
    return traffic.router_score(
        a.live(len(hidden)), neurons, width, hidden.element_size(), cosine=a["cosine_weight"] is not None,
        extra=0 if a["extra"] is None else a["extra"].shape[1],
    )  # fmt: skip


def _compact_rows(a: _Given) -> Traffic:
    rows = len(a["state"])
    payload = sum(_bytes(each) for each in a["payloads"])
    return traffic.compact_rows(rows, payload // rows if rows else 0)


def _backfill_kv(a: _Given) -> Traffic:
    residual, section, slots = a["residual"], a["section"], a["slots"]
    if section is not None:
        begin, count = section.tolist()
        slots = slots[max(begin, 0) : max(begin + max(count, 0), 0)]
    variants = 0 if a["variant"] is None or a["cos"] is None else len(a["variant"].unique())
    return traffic.backfill_kv(
        len(slots), len(a["weight"]), residual.shape[1], 2 * a["weight"].shape[2], a.rotary, residual.element_size(),
        bias=a["bias"] is not None, variants=variants, stored=int((slots >= 0).sum()),
        rank=0 if a["down"] is None else len(a["down"]),
    )  # fmt: skip


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


_OPS = {
    "project_qkv": _project_qkv, "store_kv": _store_kv, "ragged_attention": _ragged_attention, "ragged_linear": _ragged_linear,
    "exit_stats": _exit_stats, "router_score": _router_score, "compact_rows": _compact_rows, "backfill_kv": _backfill_kv,
}  # fmt: skip
