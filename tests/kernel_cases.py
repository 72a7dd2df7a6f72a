"""Which of our GPU kernels a case runs, and which values of the sizes that matter it brings: of rows that are computed."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from dyndepth.testing import CASES, Case

counts: Any = importlib.import_module("dyndepth.kernels.counts")
launch: Any = importlib.import_module("dyndepth.kernels.launch")


def said(op: str, given: dict[str, Any]) -> Counter[str]:
    """What counts.py says of a call with these arguments."""
    if op == "compact_rows":
        return Counter(counts.compact_rows(given["state"].shape[0], _row_bytes(given["payloads"])))
    if op == "exit_stats":
        return Counter(counts.exit_stats(given["hidden"].shape[0], _words(given), given.get("norm_gain") is not None))
    if op == "ragged_attention":
        return Counter(counts.ragged_attention(*_attention(given)))
    first = {"project_qkv": "x", "ragged_linear": "x", "router_score": "hidden", "store_kv": "k", "backfill_kv": "residual"}[op]
    more = {
        "ragged_linear": [given.get("weight", torch.empty(0)).shape[0]],
        "backfill_kv": [given.get("weight", torch.empty(0)).shape[0]],
    }
    found = Counter(getattr(counts, op)(given[first].shape[0], *more.get(op, [])))
    return found + _narrowed(op, given)


def _narrowed(op: str, given: dict[str, Any]) -> Counter[str]:
    """Maps of low rank read a product of the residual."""
    down = given.get("down") if op == "backfill_kv" else None
    return Counter() if down is None else Counter(counts.ragged_linear(len(given["residual"]), len(down)))


def composed(op: str, given: dict[str, Any]) -> bool:
    """Whether the library makes the products, and store_kv's kernel stores them."""
    dim, cos = given["pages"].shape[-1], given.get("cos")
    return dim % 2 == 1 or (cos is not None and cos.shape[-1] != dim // 2)


#: The argument that has as many rows as there are.
ROWS = {
    "compact_rows": "state", "exit_stats": "hidden", "router_score": "hidden", "ragged_attention": "q", "ragged_linear": "x",
    "store_kv": "k", "project_qkv": "x", "backfill_kv": "residual", "accept_drafts": "drafts",
}  # fmt: skip


def kernels(op: str, given: dict[str, Any]) -> set[str]:
    """Names of the kernels, `triton`'s."""
    if op in ("project_qkv", "backfill_kv") and composed(op, given) and len(given[ROWS[op]]):
        return {"store_kv", *_narrowed(op, given)}
    return {name for name in said(op, given) if name != "library"}


def by_fibers(op: str) -> list[Case]:
    """Cases that tests/test_cuda_hosts.py runs on the CUDA sources: those that a fiber per thread can afford."""
    return [case for case in CASES[op] if not (case.large or case.gpu)]


def cuda_kernels(op: str, given: dict[str, Any]) -> Counter[str]:
    """Launches of CUDA C++ kernels that a call makes, by name; tests/test_cuda_hosts.py counts them in every run."""
    rows = len(given[ROWS[op]])
    if op == "compact_rows":
        return Counter(counts.compact_rows_by_cuda(rows, _row_bytes(given["payloads"])))
    if rows == 0:
        return Counter()
    if op == "store_kv":
        return Counter([f"store_kv_{str(given['k'].dtype).removeprefix('torch.')}"])
    return Counter(["accept_drafts_greedy" if given["uniforms"] is None else "accept_drafts_sampled"])


def _row_bytes(payloads: list[Tensor]) -> list[int]:
    return [payload.numel() // max(1, payload.shape[0]) * payload.element_size() for payload in payloads]


def _words(given: dict[str, Any]) -> int:
    ids = given.get("vocab_ids")
    return len(given["head_weight"] if ids is None else ids)


def _attention(given: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments of the launch choice."""
    (rows, heads, dim), pages, window = given["q"].shape, given["pages"], given.get("window", 0)
    reach, kv_heads = given["block_table"].shape[1] * pages.shape[2], pages.shape[3]
    reach = min(reach, window) if window else reach
    return rows, kv_heads, heads // kv_heads, dim, reach, launch.Device(), given["q"].element_size()


def _edge(value: int, rows: int) -> str | None:
    """Which edge of [0, rows] a counter is; of fewer than three rows edges fall together."""
    return {0: "0", 1: "1", rows - 1: "n-1", rows: "n"}.get(value) if rows > 2 else None


def _counter(op: str, given: dict[str, Any]) -> int | None:
    if op == "compact_rows":  # what it finds out
        return int((given["state"] == 0).sum())
    counter = given.get("section" if op == "backfill_kv" else "live")
    return None if counter is None else int(counter[-1])


def _computed(op: str, given: dict[str, Any]) -> range:
    """The rows that a call computes something for. Keys and values are everybody's, whatever `live` is."""
    every = range(len(given[ROWS[op]]))
    if op == "backfill_kv":
        section = given["section"]
        return every if section is None else every[int(section[0]) : int(section.sum())]
    everybody = op in ("compact_rows", "store_kv", "project_qkv") or given.get("live") is None
    return every if everybody else every[: int(given["live"])]


def values(op: str, given: dict[str, Any]) -> dict[str, set[Any]]:
    """By kind of value those that this call brings. Of what nobody computes it brings nothing but the counter."""
    rows, live, computed = len(given[ROWS[op]]), _counter(op, given), _computed(op, given)
    found: dict[str, set[Any]] = {"live": set() if live is None else {_edge(live, rows)}}
    if len(computed) == rows:
        found["rows"] = {rows}
    if not computed:
        return found
    tensors = [(name, each) for name, value in given.items() for each in _flat([value]) if each.numel()]
    found["odd"] = {name for name, each in tensors if each.data_ptr() % 16}
    found["apart"] = {name for name, each in tensors if not each.is_contiguous()}
    found["with"] = {name for name in ("head_bias", "norm_gain", "vocab_ids") if given.get(name) is not None}
    found["with"] |= {name for name in ("softcap", "window") if given.get(name)}
    asked = min(len(given.get("q", given[ROWS[op]])), rows if live is None else live)
    if op in ("store_kv", "project_qkv") and asked == rows:
        found["queries"] = {rows}
    pages = given.get("pages")
    if pages is not None:
        found |= {"head_dim": {pages.shape[-1]}, "page": {pages.shape[-3]}}
        if "slots" in given:
            found["slot"] = {int(given["slots"][row]) < 0 for row in computed}
    if op == "ragged_attention":
        found |= _seen(given, computed)
    if op == "project_qkv" and asked:
        found["group"] = {given["q_weight"].shape[0] // given["k_weight"].shape[0]}
    if op == "exit_stats":
        found |= _blocks(given)
    return found


def _seen(given: dict[str, Any], computed: range) -> dict[str, set[Any]]:
    """Contexts of the rows that are computed, in pages and in splits."""
    page, window = given["pages"].shape[2], given.get("window", 0)
    config = launch.ragged_attention(*_attention(given))
    contexts = [int(given["pos"][row]) + 1 for row in computed]
    filled = set()
    for context in contexts:
        seen = min(context, window or context)
        share = launch.ceil_div(launch.ceil_div(seen, config.block_columns), config.splits) * config.block_columns
        filled.add((launch.ceil_div(seen, share), config.splits))
    return {
        "group": {given["q"].shape[1] // given["pages"].shape[3]},
        "pages with a tail": {tokens // page for tokens in contexts if tokens % page},
        "pages without": {tokens // page for tokens in contexts if tokens % page == 0},
        "filled of splits": filled,
    }


def _blocks(given: dict[str, Any]) -> dict[str, set[Any]]:
    """How words fall into programs, into products of the library, and what folds them."""
    rows, words = len(given["hidden"]), _words(given)
    block, chunks = launch.EXIT_STATS_BLOCK, launch.ceil_div(words, launch.EXIT_STATS_CHUNK)
    if rows <= launch.EXIT_STATS_HANDOVER:
        item = given["hidden"].element_size()
        block, chunks = launch.exit_stats(rows, given["hidden"].shape[1], words, launch.Device(), item).block_columns, 0
    return {
        "words": {"blocks and a part" if words > block and words % block else "others"},
        "products": {chunks},
        "rounds": {launch.ceil_div(launch.ceil_div(words, block), 256)},  # of the program that folds a row's blocks
    }


def _flat(value: Any) -> list[Tensor]:
    return (
        [value] if isinstance(value, Tensor) else [t for each in value for t in _flat(each)] if isinstance(value, list) else []
    )
