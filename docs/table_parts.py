"""What renderers of tables share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def header(*names: str) -> list[str]:
    """The first two lines of a table."""
    return ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def machine(found: dict[str, Any]) -> str:
    """What a result with a `machine` (dyndepth.info) was measured on."""
    cpu = found["machine"]["cpu"]
    return f"{cpu['name']} ({cpu['capability']}), torch {found['machine']['packages']['torch']}."


def percent(value: float | None) -> str:
    """A share in percent, or a dash where it is not known."""
    return "–" if value is None else f"{value:.1%}"


def drafts(row: dict[str, Any]) -> str:
    """Drafts that held, of those that were made; a dash where there were none."""
    return f"{row['accepted']} of {row['drafted']}" if row["drafted"] else "–"


def demo_rows(found: dict[str, Any], samples: str, metric: str) -> list[str]:
    """Lines of what `dyndepth demo --task` measured: every way at every batch size."""
    lines = header("batch", "system", f"{samples}/s (p10–p90)", "samples × layers", metric, "agreement")
    for row in found["rows"]:
        lines.append(
            f"| {row['batch']} | {row['system']}, {row['mode']} | {row['samples_per_s_median']:.0f} "
            f"({row['samples_per_s_p10']:.0f}–{row['samples_per_s_p90']:.0f}) | {row['samples_x_layers']:.1%} "
            f"| {row['quality']:.1%} | {row['agreement']:.1%} |"
        )
    return lines
