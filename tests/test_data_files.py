"""Texts from files, folders and datasets: every format, their order, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dyndepth.data import read_texts
from dyndepth.errors import ArgumentError, NotEnoughDataError


class Dataset:
    """As much of Hugging Face's Dataset as is asked for."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns = columns
        self.column_names: list[str] | None = list(columns)

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]


def _write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _jsonl(path: Path, *values: Any, key: str = "text") -> Path:
    return _write(path, "\n".join(json.dumps({key: value}) for value in values))


@pytest.mark.parametrize("suffix", [".txt", ".md", ".TXT"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    """As it is, but for a byte order mark and the line ends of Windows."""
    path = _write(tmp_path / f"a{suffix}", b"\xef\xbb\xbfone\r\ntwo\n\n\xc3\xa9 \xe2\x80\xa8 three\n")
    assert read_texts([path]) == read_texts([str(path)]) == ["one\ntwo\n\né \u2028 three\n"]


def test_jsonl_has_a_document_a_line(tmp_path: Path) -> None:
    """Lines end at line feeds only: U+2028 and U+0085 may stand in a JSON string."""
    lines = ['{"text": "one\\ntwo", "id": 3}\r', "", '{"text": "a\u2028b\u0085c"}', '{"text": " "}', '{"text": null}', ""]
    assert read_texts([_write(tmp_path / "a.jsonl", "\n".join(lines))]) == ["one\ntwo", "a\u2028b\u0085c"]
    assert read_texts([_jsonl(tmp_path / "b.jsonl", "x", "y", key="content")], key="content") == ["x", "y"]


def test_datasets_give_a_column() -> None:
    assert read_texts([Dataset(text=["one", "", None, "two"], id=[1, 2, 3, 4])]) == ["one", "two"]
    assert read_texts([Dataset(text=["one"], body=["two"])], key="body") == ["two"]


def test_folders_are_searched_in_order_without_what_is_hidden_or_unknown(tmp_path: Path) -> None:
    _write(tmp_path / "b.txt", "b")
    _write(tmp_path / "a" / "z.md", "a/z")
    _jsonl(tmp_path / "a" / "deep" / "x.jsonl", "a/deep/x 1", "a/deep/x 2")
    _write(tmp_path / "c.txt", "c")
    for left_out in (".hidden.txt", ".git/x.txt", "a/.cache/x.md", "c.html", "text", "empty.txt"):
        _write(tmp_path / left_out, "" if left_out == "empty.txt" else "wrong")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert read_texts([tmp_path]) == ["a/deep/x 1", "a/deep/x 2", "a/z", "b", "c"]


def test_sources_keep_their_order(tmp_path: Path) -> None:
    paths = [_write(tmp_path / f"{name}.txt", name) for name in "ab"]
    assert read_texts([paths[1], Dataset(text=["d"]), paths[0], tmp_path]) == ["b", "d", "a", "a", "b"]
    hidden = _write(tmp_path / ".cache" / ".x.txt", "asked for")
    assert read_texts([hidden, hidden.parent.parent]) == ["asked for", "a", "b"], "a path that is given is not searched for"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_that_is_not_utf_8_is_refused_where_it_stands(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path / name, '{"text": "é'.encode() + b"\xff")
    with pytest.raises(ArgumentError, match=rf"read_texts: {path} must be UTF-8, got byte 0xff at offset 12"):
        read_texts([tmp_path])
    _write(path, b"\xef\xbb\xbfab\xe9")  # offsets are the file's, mark included
    with pytest.raises(ArgumentError, match=r"got byte 0xe9 at offset 5"):
        read_texts([path])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 must be a JSON object with a key 'text'"),
        ('"text"', "line 2 must be a JSON object with a key 'text'"),
        ("[]", "line 2 must be a JSON object with a key 'text'"),
        ('{"messages": []}', "line 2 must be a JSON object with a key 'text'"),
        ('{"text": ["a"]}', "line 2, 'text' must be a string, got list"),
        ('{"text": "ab\\ud83d"}', "line 2, 'text' must be Unicode text, got half a pair at 2"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = _write(tmp_path / "a.jsonl", f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(ArgumentError, match=f"{path}: {message}"):
        read_texts([path])


def test_wrong_sources_are_refused(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ArgumentError, match=rf"read_texts: there is no file or folder {nowhere}"):
        read_texts([nowhere])
    for name, suffix in (("a.pdf", ".pdf"), ("README", "no suffix")):
        path = _write(tmp_path / name, "text")
        with pytest.raises(ArgumentError, match=rf"{path} must end in .txt, .md, .jsonl, .parquet, got {suffix}$"):
            read_texts([path])
    with pytest.raises(ArgumentError, match=r"a source must be a path or have columns, got int"):
        read_texts([3])
    for one in (tmp_path, str(tmp_path), Dataset(text=["a"])):
        with pytest.raises(ArgumentError, match=rf"sources must be a sequence .* got one {type(one).__name__}"):
            read_texts(one)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"Dataset must have a column 'text', got 'id', 'body'"):
        read_texts([Dataset(id=[1], body=["a"])])
    with pytest.raises(ArgumentError, match=r"Dataset, column 'text', row 1 must be a string, got int"):
        read_texts([Dataset(text=["a", 1])])
    stream = Dataset(text=["a"])
    stream.column_names = None
    with pytest.raises(ArgumentError, match=r"must have a column 'text', got none"):
        read_texts([stream])


def test_no_documents_are_not_enough(tmp_path: Path) -> None:
    _write(tmp_path / "a" / "b.txt", " \n")
    _write(tmp_path / "a" / "c.html", "text")
    with pytest.raises(NotEnoughDataError, match=rf"wanted at least one document, got none in {tmp_path}/a, Dataset"):
        read_texts([tmp_path / "a", Dataset(text=["", None])])
    with pytest.raises(NotEnoughDataError, match="got none in no sources"):
        read_texts([])


def test_parquet_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else found(name))
    _write(tmp_path / "a.parquet", b"PAR1")
    with pytest.raises(ModuleNotFoundError, match=r"a.parquet needs pyarrow: pip install 'dyndepth\[parquet\]'"):
        read_texts([tmp_path])


class Table:
    """As much of pyarrow as is asked for: its ParquetFile, and the table that it reads."""

    opened = 0

    def __init__(self, path: Path) -> None:
        content = path.read_text()
        if not content.startswith("{"):
            raise ValueError("Parquet magic bytes\nnot found in footer.")
        self.columns: dict[str, list[Any]] = json.loads(content)
        self.schema_arrow = ModuleType("schema")
        self.schema_arrow.names = list(self.columns)  # type: ignore[attr-defined]

    def __enter__(self) -> Table:
        Table.opened += 1
        return self

    def __exit__(self, *error: object) -> None:
        Table.opened -= 1

    def read(self, columns: list[str]) -> Table:
        self.columns = {name: self.columns[name] for name in columns}
        return self

    def column(self, name: str) -> Table:
        self.values = self.columns[name]
        return self

    def to_pylist(self) -> list[Any]:
        return self.values


def test_parquet_gives_a_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How pyarrow is called; the test below reads a file of its own making where it is installed."""
    parquet = ModuleType("pyarrow.parquet")
    parquet.ParquetFile = Table  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found("json" if name == "pyarrow" else name))
    path = _write(tmp_path / "a.parquet", json.dumps({"id": [1, 2, 3], "text": ["one", None, "two"]}))
    assert read_texts([tmp_path]) == ["one", "two"]
    with pytest.raises(ArgumentError, match=r"a.parquet must have a column 'body', got 'id', 'text'"):
        read_texts([path], key="body")
    with pytest.raises(ArgumentError, match=r"a.parquet, column 'id', row 0 must be a string, got int"):
        read_texts([path], key="id")
    assert Table.opened == 0, "files are closed, also after an error"
    with pytest.raises(ArgumentError, match=r"cannot be read as parquet: Parquet magic bytes not found in footer\.$"):
        read_texts([_write(path, "PAR0")])


def test_real_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["one", None, "é"]}), path)
    assert read_texts([path]) == ["one", "é"]
    with pytest.raises(ArgumentError, match=r"a.parquet must have a column 'body', got 'id', 'text'"):
        read_texts([path], key="body")
    _write(path, path.read_bytes()[:-9])
    with pytest.raises(ArgumentError, match="cannot be read as parquet"):
        read_texts([path])
