"""Public ops. Each file holds one op: contract, reference, fake and its providers' registration."""

from dyndepth.ops.accept_drafts import accept_drafts
from dyndepth.ops.backfill_kv import backfill_kv
from dyndepth.ops.compact_rows import compact_rows
from dyndepth.ops.exit_stats import ExitStats, exit_stats
from dyndepth.ops.project_qkv import project_qkv
from dyndepth.ops.ragged_attention import ragged_attention
from dyndepth.ops.ragged_linear import ragged_linear
from dyndepth.ops.router_score import router_score
from dyndepth.ops.store_kv import store_kv

__all__ = [
    "ExitStats",
    "accept_drafts",
    "backfill_kv",
    "compact_rows",
    "exit_stats",
    "project_qkv",
    "ragged_attention",
    "ragged_linear",
    "router_score",
    "store_kv",
]
