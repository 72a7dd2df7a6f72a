"""Renderers of docs/speed-zen5.md, part of tables.py: tables of docs/speed.md from docs/results/zen5."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tables_compare import compare_full_depth
from tables_speed import depth_efficiency, depth_efficiency_context1024, kernel_ratios
from tables_vision import encoder_depth


def _there(table: Callable[[Path], str], results: Path) -> str:
    return table(results / "zen5")


TABLES: dict[str, Callable[[Path], str]] = {
    f"{table.__name__}_zen5": partial(_there, table)
    for table in (compare_full_depth, depth_efficiency, depth_efficiency_context1024, kernel_ratios, encoder_depth)
}
