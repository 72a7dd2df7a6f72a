"""Pages say what the files of docs/results say, their links lead somewhere, and their Python is Python."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path

import pytest
import tables

import dyndepth
from dyndepth.demo.weights import EXITS
from dyndepth.exits import Exits

ROOT = Path(__file__).resolve().parent.parent


PAGES = [*tables.pages(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@each_page
def test_tables_are_those_of_the_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.rendered(text) == text, "run `make results`, or `.venv/bin/python docs/tables.py` after changing a result"


def test_every_table_is_on_a_page() -> None:
    """A marker that was misspelt would render nothing and compare equal."""
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name, table in tables.TABLES.items():
        assert f"<!-- table: {name} -->\n{table(tables.RESULTS)}<!-- end of table -->" in pages


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@each_page
def test_python_blocks_parse_and_name_what_exists(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dyndepth":
                assert hasattr(dyndepth, node.attr), ast.unparse(node)


def test_the_shipped_certificate_is_the_documented_one() -> None:
    """What `make calibrate-demo` measured at its thresholds, for the risk and the confidence that the page names."""
    certificate = Exits.from_pretrained(EXITS).certificate
    found = json.loads((tables.RESULTS / "calibration.json").read_text())
    assert certificate is not None
    row = next(
        row for row in found["certified"]
        if (row["risk"], row["confidence"]) == (certificate["risk"], certificate["confidence"])
        and row["bound"] == certificate["method"].split(", ")[-1]
    )  # fmt: skip
    point = found["path"][row["point"]]
    assert certificate["thresholds"] == point["thresholds"]
    assert certificate["measured_risk"] == row["measured_risk"] == point["disagreement"]
    assert certificate["rows_x_layers"] == row["rows_x_layers"] == point["rows_x_layers"]
    assert (certificate["n"], certificate["data_hash"]) == (found["requests"], found["data_hash"])


def test_the_readme_says_it_all_on_its_first_screen() -> None:
    """What it is, how to run it, three lines of use and the demo's table with its machine, within thirty lines."""
    screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:30])
    for wanted in ("make demo", "make test", "custom_generate=dyndepth.generate", "<!-- end of table -->", "torch 2."):
        assert wanted in screen, wanted
