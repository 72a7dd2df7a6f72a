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
