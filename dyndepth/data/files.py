"""Texts from files, folders and datasets."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.files import require


def read_texts(sources: Sequence[Any], *, key: str = "text") -> list[str]:
    """Documents of all sources, in their order; empty ones are left out.

    Args:
        sources: files, folders, and objects with columns like Hugging Face's `datasets.Dataset` (`column_names`, and
            `source[name]` is a column). `.txt` and `.md` are one document each; `.jsonl` has one JSON object a line and
            `.parquet` (needs pyarrow) one row a document. A folder is searched with the folders in it, sorted by name;
            hidden files, links to folders and files of other kinds are left out.
        key: where objects, rows and datasets keep the text; null is an empty document.

    Raises ArgumentError for a path that does not exist, a file of another kind, text that is not UTF-8, a missing key and
    a value that is no string; NotEnoughDataError when no document is left; ModuleNotFoundError for `.parquet` without
    pyarrow.
    """
    if isinstance(sources, str | os.PathLike) or hasattr(sources, "column_names"):
        raise ArgumentError(f"read_texts: sources must be a sequence of paths or datasets, got one {type(sources).__name__}")
    texts = [text for source in sources for text in _documents(source, key) if text.strip()]
    if not texts:
        names = [type(source).__name__ if hasattr(source, "column_names") else str(source) for source in sources]
        raise NotEnoughDataError(f"read_texts: wanted at least one document, got none in {', '.join(names) or 'no sources'}")
    return texts


def _documents(source: Any, key: str) -> Iterator[str]:
    if hasattr(source, "column_names"):
        _check(key, source.column_names, type(source).__name__)
        yield from _column(source[key], f"{type(source).__name__}, column {key!r}")
        return
    if not isinstance(source, str | os.PathLike):
        raise ArgumentError(f"read_texts: a source must be a path or have columns, got {type(source).__name__}")
    path = Path(source)
    if not path.exists():
        raise ArgumentError(f"read_texts: there is no file or folder {path}")
    if not path.is_dir() and path.suffix.lower() not in _READERS:
        raise ArgumentError(f"read_texts: {path} must end in {', '.join(_READERS)}, got {path.suffix or 'no suffix'}")
    for file in _inside(path) if path.is_dir() else [path]:
        yield from _READERS[file.suffix.lower()](file, key)


def _inside(folder: Path) -> Iterator[Path]:
    """Files of a known kind. Not `rglob`: that passes over folders it may not read."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.is_symlink():  # it could lead back here
                yield from _inside(path)
        elif path.suffix.lower() in _READERS:
            yield path


def _whole(path: Path, key: str) -> Iterator[str]:
    content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        raise ArgumentError(f"read_texts: {path} must be UTF-8, got {byte}") from None
    yield text.removeprefix("\ufeff").replace("\r\n", "\n")


def _lines(path: Path, key: str) -> Iterator[str]:
    for text in _whole(path, key):
        for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split at U+2028, which JSON allows
            if not line.strip():
                continue
            try:
                value = json.loads(line)[key]
            except (ValueError, KeyError, TypeError):
                raise ArgumentError(f"read_texts: {path}: line {number} must be a JSON object with a key {key!r}") from None
            yield _text(value, f"{path}: line {number}, {key!r}")


def _rows(path: Path, key: str) -> Iterator[str]:
    require("pyarrow", f"read_texts: {path} needs pyarrow: pip install 'dyndepth[parquet]'")
    try:
        with importlib.import_module("pyarrow.parquet").ParquetFile(path) as file:
            _check(key, file.schema_arrow.names, str(path))
            values = file.read(columns=[key]).column(key).to_pylist()
    except ArgumentError:
        raise
    except ValueError as error:  # pyarrow's for a damaged file
        raise ArgumentError(f"read_texts: {path} cannot be read as parquet: {' '.join(str(error).split())}") from error
    yield from _column(values, f"{path}, column {key!r}")


#: Reader of a file, by its suffix.
_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {".txt": _whole, ".md": _whole, ".jsonl": _lines, ".parquet": _rows}


def _check(key: str, columns: Iterable[str] | None, where: str) -> None:
    names = list(columns or ())  # a stream may not know its columns
    if key not in names:
        raise ArgumentError(f"read_texts: {where} must have a column {key!r}, got {', '.join(map(repr, names)) or 'none'}")


def _column(values: Iterable[Any], where: str) -> Iterator[str]:
    for row, value in enumerate(values):
        yield _text(value, f"{where}, row {row}")


def _text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ArgumentError(f"read_texts: {where} must be a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair, which no tokenizer takes
        raise ArgumentError(f"read_texts: {where} must be Unicode text, got half a pair at {error.start}") from None
    return value
