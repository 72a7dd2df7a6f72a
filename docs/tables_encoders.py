"""Renderers of the tables of docs/encoders.md, part of tables.py."""

from __future__ import annotations

import json
from pathlib import Path


def encoder_layouts(results: Path) -> str:
    """What benchmarks/encoder_layouts.py found: a pass packed, padded and by transformers."""
    found = json.loads((results / "encoder_layouts.json").read_text(encoding="utf-8"))
    names = ("dtype", "lengths", "batch", "padding", "packed, ms", "padded, ms", "transformers, ms")
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    for row in found["rows"]:
        times = [f"{row[f'{name}_s'] * 1e3:.1f}" for name in ("packed", "padded", "transformers")]
        lines.append(f"| {row['dtype']} | {row['lengths']} | {row['batch']} | {row['padding']:.0%} | {' | '.join(times)} |")
    cpu = found["machine"]["cpu"]
    text = (
        f"Medians of {found['rounds']} rounds taken in turn, {found['threads']} threads, {cpu['name']} ({cpu['capability']})."
    )
    return "\n".join([*lines, "", text, ""])


TABLES = {"encoder_layouts": encoder_layouts}
