"""Tile sizes from tables: measured on this machine (a user's cache), or found by compiling (checked in); rules otherwise.

A key names op, architecture, dtype, shape and a bucket of row counts, so what was found for a model serves any batch of it. A
table holds tile sizes only; grids follow from them and from the rows (launch.py). Files are JSON, one per architecture.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dyndepth import env
from dyndepth.files import replacing

#: Where entries come from, in the order of trust.
MEASURED, STATIC, RULE = "measured here", "static analysis, not measured", "rule"


@dataclass(frozen=True)
class Tiles:
    """What a table may choose; sizes a kernel does not have stay 1."""

    block_rows: int
    block_columns: int
    block_inner: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Key:
    """`dtype` is `half` (bfloat16 and float16 are the same to a launch) or `float32`; `rows` the end of a bucket."""

    op: str
    architecture: str
    dtype: str
    shape: tuple[int, ...]
    rows: int

    def __str__(self) -> str:
        return f"{self.op}|{self.dtype}|{'x'.join(map(str, self.shape))}|{self.rows}"


#: Set while tuning: tiles that a key must take, whatever tables say.
_pinned: dict[Key, Tiles] = {}


def lookup(key: Key, rule: Tiles) -> tuple[Tiles, str]:
    """The tiles for a key, and where they come from."""
    if key in _pinned:
        return _pinned[key], "pinned"
    if not key.architecture or env.launch() == "rules":
        return rule, RULE
    for source in (MEASURED, STATIC):
        entry = table(key.architecture, source).get(str(key))
        if entry is not None:
            return entry, source
    return rule, RULE


def chosen(key: Key, rule: Tiles) -> Tiles:
    """`lookup` for a launch."""
    return lookup(key, rule)[0]


@contextlib.contextmanager
def pinned(key: Key, tiles: Tiles) -> Iterator[None]:
    """Inside, launches of `key` take these tiles: for trying them out."""
    before = _pinned.get(key)
    _pinned[key] = tiles
    try:
        yield
    finally:
        if before is None:
            del _pinned[key]
        else:
            _pinned[key] = before


def path(architecture: str, source: str) -> Path:
    folder = env.cache_folder() / "launch" if source == MEASURED else Path(__file__).parent / "launch_tables"
    return folder / f"{architecture}.json"


@functools.cache
def table(architecture: str, source: str) -> dict[str, Tiles]:
    """Entries by key, read once; empty where there is no file. A file that is no table is an error, not a slow launch."""
    file = path(architecture, source)
    if not file.exists():
        return {}
    names = [each.name for each in fields(Tiles)]
    try:
        found = json.loads(file.read_text())["entries"]
        return {key: Tiles(**{name: int(entry[name]) for name in names}) for key, entry in found.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no launch table ({error}); remove it, or write it anew with `dyndepth tune`") from error


def write(file: Path, architecture: str, source: str, entries: dict[str, dict[str, Any]]) -> None:
    """Adds entries (tiles by their names, and whatever was found with them) to a table; a kill leaves the old one whole."""
    old: dict[str, Any] = json.loads(file.read_text())["entries"] if file.exists() else {}
    text = {"architecture": architecture, "source": source, "entries": dict(sorted((old | entries).items()))}
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(text, indent=1) + "\n")
    table.cache_clear()


def entry(tiles: Tiles, **facts: Any) -> dict[str, Any]:
    return {**asdict(tiles), **facts}
