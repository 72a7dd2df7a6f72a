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
