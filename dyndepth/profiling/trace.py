"""Spans as Chrome trace events: a file that Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyndepth.files import replacing
from dyndepth.profiling.timers import Span


def events(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Complete events, times in µs from the first span's begin, in order of begin."""
    ordered = sorted(spans, key=lambda span: (span.begin, -span.end))
    start = ordered[0].begin if ordered else 0
    pid = os.getpid()
    return [
        {
            "name": _name(span), "cat": span.part, "ph": "X", "ts": (span.begin - start) / 1e3,
            "dur": (span.end - span.begin) / 1e3, "pid": pid, "tid": 1, "args": _facts(span),
        }
        for span in ordered
    ]  # fmt: skip


def write(path: Path, spans: Sequence[Span], about: dict[str, Any]) -> None:
    """The trace at once or not at all; `about` is kept beside the events."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"traceEvents": events(spans), "displayTimeUnit": "ms", "otherData": about}) + "\n")


def _name(span: Span) -> str:
    facts = _facts(span)
    return f"layers [{facts['begin']}, {facts['end']})" if facts else span.name.strip("_")


def _facts(span: Span) -> dict[str, int]:
    return {} if span.layers is None else dict(zip(("begin", "end", "rows"), span.layers, strict=True))
