"""`dyndepth demo --task NAME`: whole samples that leave an encoder at their own depth, on data that is trained on here.

A task is a module of this folder with `run(folder, *, batches, repetitions) -> dict`. It makes its model (once, kept in the
cache folder), measures with `dyndepth.demo.tasks.measure`, and writes `<task>.json` and `<task>.png`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyndepth.errors import ArgumentError
from dyndepth.files import require, writable

_KNOWN = ("image", "speech", "text")


def tasks() -> list[str]:
    """Names of the tasks that are here."""
    return [name for name in _KNOWN if importlib.util.find_spec(f"{__name__}.{name}") is not None]


def run_task(name: str, folder: Path, *, batches: Sequence[int] = (1, 8, 32, 128), repetitions: int = 5) -> dict[str, Any]:
    """Run a task's demo; returns what it wrote to `<folder>/<name>.json`."""
    if name not in tasks():
        raise ArgumentError(f"demo: task must be one of {', '.join(tasks())}, got {name!r}")
    if not batches or min(batches) < 1 or repetitions < 1:
        raise ArgumentError(f"demo: batches and repetitions must be at least 1, got {list(batches)} and {repetitions}")
    require("transformers", "the demo needs transformers: pip install 'dyndepth[demo]'")
    require("matplotlib", "the demo's picture needs matplotlib: pip install 'dyndepth[demo]'")
    writable(folder)
    found: dict[str, Any] = importlib.import_module(f"{__name__}.{name}").run(folder, batches=batches, repetitions=repetitions)
    return found
