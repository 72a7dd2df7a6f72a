"""Renderer of the table of docs/split.md, part of tables.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def split(results: Path) -> str:
    """What docs/examples/split.py found: what travels in each precision, and what it does to the answers."""
    found = _load(results / "split.json")
    lines = _header("wire", "sent", "of all samples in fp32", "answers received", "accuracy", "answer of one process")
    for row in found["wires"]:
        lines.append(
            f"| {row['wire']} | {row['sent_bytes'] / 1024:.1f} KiB | {row['sent_bytes'] / found['all_fp32_bytes']:.1%} "
            f"| {row['received_bytes'] / 1024:.1f} KiB | {row['accuracy']:.1%} | {row['same_answer']:.1%} |"
        )
    some = found["wires"][0]
    text = (
        f"{found['model']}, {found['samples']} held-out digits in batches of {found['batch']}, cut after layer "
        f"{found['boundary']}, exits at probability {found['threshold']:g}: {some['samples']} samples travel. One process: "
        f"accuracy {found['accuracy_one_process']:.1%}."
    )
    return "\n".join([*lines, "", text, ""])


TABLES = {"split": split}


def _header(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
