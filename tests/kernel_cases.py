"""Which of Triton's kernels a case runs, and which values of the sizes that matter it brings."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import torch
from torch import Tensor

counts: Any = importlib.import_module("dyndepth.kernels.counts")
launch: Any = importlib.import_module("dyndepth.kernels.launch")


def said(op: str, given: dict[str, Any]) -> Counter[str]:
    """What counts.py says of a call with these arguments."""
    if op == "compact_rows":
        payloads = [payload.numel() // max(1, payload.shape[0]) * payload.element_size() for payload in given["payloads"]]
        return Counter(counts.compact_rows(given["state"].shape[0], payloads))
    if op == "exit_stats":
        ids = given.get("vocab_ids")
        words = given["head_weight"].shape[0] if ids is None else ids.shape[0]
        return Counter(counts.exit_stats(given["hidden"].shape[0], words, given.get("norm_gain") is not None))
    if op == "ragged_attention":
        (rows, heads, dim), pages = given["q"].shape, given["pages"]
        reach, window = given["block_table"].shape[1] * pages.shape[2], given.get("window", 0)
        reach = min(reach, window) if window else reach
        kv_heads = pages.shape[3]
        device = launch.Device()
        return Counter(
            counts.ragged_attention(rows, kv_heads, heads // kv_heads, dim, reach, device, given["q"].element_size())
        )
    first = {"project_qkv": "x", "ragged_linear": "x", "router_score": "hidden", "store_kv": "k", "backfill_kv": "residual"}[op]
    more = {
        "ragged_linear": [given.get("weight", torch.empty(0)).shape[0]],
        "backfill_kv": [given.get("weight", torch.empty(0)).shape[0]],
    }
    return Counter(getattr(counts, op)(given[first].shape[0], *more.get(op, [])))


def composed(op: str, given: dict[str, Any]) -> bool:
    """Whether the library makes the products, and store_kv's kernel stores them."""
    dim, cos = given["pages"].shape[-1], given.get("cos")
    return dim % 2 == 1 or (cos is not None and cos.shape[-1] != dim // 2)


#: The argument that has as many rows as there are.
ROWS = {
    "compact_rows": "state", "exit_stats": "hidden", "router_score": "hidden", "ragged_attention": "q", "ragged_linear": "x",
    "store_kv": "k", "project_qkv": "x", "backfill_kv": "residual",
}  # fmt: skip


def kernels(op: str, given: dict[str, Any]) -> set[str]:
    """Names of the kernels, `triton`'s."""
    if op in ("project_qkv", "backfill_kv") and composed(op, given) and len(given[ROWS[op]]):
        return {"store_kv"}
    return {name for name in said(op, given) if name != "library"}


def _edge(value: int, rows: int) -> str | None:
    """Which edge of [0, rows] a counter is; of fewer than three rows edges fall together."""
    return {0: "0", 1: "1", rows - 1: "n-1", rows: "n"}.get(value) if rows > 2 else None


def _counter(op: str, given: dict[str, Any]) -> int | None:
    if op == "compact_rows":  # what it finds out
        return int((given["state"] == 0).sum())
    if op == "backfill_kv":
        return None if given["section"] is None else int(given["section"][1])
    return None if given["live"] is None else int(given["live"])


def values(op: str, given: dict[str, Any]) -> dict[str, set[Any]]:
    """By kind of value those that this call brings."""
    tensors = [each for each in _flat(list(given.values())) if each.numel()]
    rows = len(given[ROWS[op]])
    live = _counter(op, given)
    found: dict[str, set[Any]] = {
        "rows": {rows},
        "live": set() if live is None else {_edge(live, rows)},
        "lie": {"dense" if each.is_contiguous() else "apart" for each in tensors}
        | {"odd address" for each in tensors if each.element_size() > 1 and each.data_ptr() % 16},
    }
    pages = given.get("pages")
    if pages is not None:
        found |= {"head_dim": {pages.shape[-1]}, "page": {pages.shape[-3]}}
        if "slots" in given:
            found["slot"] = set((given["slots"] < 0).tolist())
    if op == "ragged_attention":
        found["group"] = {given["q"].shape[1] // pages.shape[3]}
        seen = [pos + 1 for pos in given["pos"].tolist()]
        found["pages with a tail"] = {tokens // pages.shape[2] for tokens in seen if tokens % pages.shape[2]}
        found["pages without"] = {tokens // pages.shape[2] for tokens in seen if tokens % pages.shape[2] == 0}
    if op == "project_qkv":
        found["group"] = {given["q_weight"].shape[0] // given["k_weight"].shape[0]}
    if op == "exit_stats":
        words = len(given["head_weight"] if given["vocab_ids"] is None else given["vocab_ids"])
        block = launch.EXIT_STATS_BLOCK
        if rows <= launch.EXIT_STATS_HANDOVER:
            block = launch.exit_stats(rows, given["hidden"].shape[1], words, launch.Device(), 4).block_columns
        found["words"] = {"blocks and a part" if words % block else "whole blocks"}
    return found


def _flat(value: Any) -> list[Tensor]:
    return (
        [value] if isinstance(value, Tensor) else [t for each in value for t in _flat(each)] if isinstance(value, list) else []
    )
