"""How many kernels a call of an op starts, by name: pure functions of sizes, beside the launch choices they follow from.

`library` counts products of the library (a GEMM each, whatever it starts for one) and norms in front of them. A test counts
real launches of every op's cases, and of whole passes, against these.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import launch

Counts = dict[str, int]
#: Payloads that one launch of the CUDA kernel moves, and rows that one of its blocks partitions.
_CUDA_PAYLOADS, _CUDA_ROWS = 16, 1024


def project_qkv(rows: int) -> Counts:
    return {"project_qkv": 1} if rows else {}


def backfill_kv(rows: int, layers: int) -> Counts:
    return {"backfill_kv": 1} if rows and layers else {}


def ragged_linear(rows: int, outputs: int) -> Counts:
    return {"ragged_linear": 1} if rows and outputs else {}


def router_score(rows: int) -> Counts:
    return {"router_score": 1} if rows else {}


def store_kv(rows: int) -> Counts:
    return {"store_kv": 1} if rows else {}


def ragged_attention(
    rows: int, kv_heads: int, group: int, head_dim: int, reach: int, device: launch.Device, itemsize: int = 2
) -> Counts:
    """A second kernel where the context is split. `reach`: positions that the block table holds, or the window if less."""
    if rows == 0:
        return {}
    splits = launch.ragged_attention(rows, kv_heads, group, head_dim, reach, device, itemsize).splits
    return {"attend": 1, "combine": 1} if splits > 1 else {"attend": 1}


def exit_stats(rows: int, words: int, gained: bool = False) -> Counts:
    """Two stages; above EXIT_STATS_HANDOVER rows the library's product of every chunk of words, and a pass over it."""
    if rows == 0:
        return {}
    if rows <= launch.EXIT_STATS_HANDOVER:
        return {"block_stats": 1, "fold": 1}
    chunks = launch.ceil_div(words, launch.EXIT_STATS_CHUNK)
    return {"library": chunks + gained, "logit_stats": chunks, "fold": 1}


def compact_rows(rows: int, payload_bytes: Sequence[int]) -> Counts:
    """Triton: one to partition, and one for every payload that is not empty. payload_bytes: of a row of each."""
    moves = sum(size > 0 for size in payload_bytes) if rows else 0
    return {"partition": 1, "move": moves} if moves else {"partition": 1}


def compact_rows_by_cuda(rows: int, payload_bytes: Sequence[int]) -> Counts:
    """CUDA C++: one for up to 16 payloads; from 1025 rows on one before that counts."""
    if rows == 0:
        return {}
    groups = launch.ceil_div(max(1, len(payload_bytes)), _CUDA_PAYLOADS)
    return {"compact_rows_once": groups} if rows <= _CUDA_ROWS else {"compact_rows_count": 1, "compact_rows_move": groups}
