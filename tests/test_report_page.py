"""The report's files: figures with their panels, a page that stands alone, everything replaced in one step."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_reports import SMALL, Words, every_score, one, prompts

from dyndepth.exits import Exits
from dyndepth.report import FILES, figures, page, report, table
from dyndepth.report.measure import CLOSED, GIVEN

HOSTILE = '<script>alert("x")</script><img src=http://example.com/a.png> $\\frac{$'


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.tiny("llama")


@pytest.fixture(scope="module")
def exits(model: Any) -> Exits:
    return every_score(model)


@pytest.fixture(scope="module")
def made(model: Any, exits: Exits, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("report")
    facts = report(model, exits, prompts(13), Words(), folder, **SMALL)
    return facts, folder


def test_files_hold_the_same(made: Any) -> None:
    facts, folder = made
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    assert json.loads((folder / "report.json").read_text(), parse_constant=refuse) == facts
    assert facts["machine"]["packages"]["torch"] == torch.__version__
    assert facts["settings"]["kv"] == "predict"
    assert facts["notes"] == []


def test_the_picture_has_its_panels(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib
    from matplotlib.image import imread

    facts, folder = made
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 13.0)
    for theme in (figures.LIGHT, figures.DARK):
        figure = figures.draw(facts, theme)
        titles = [axis.get_title(loc="left") for axis in figure.get_axes() if axis.get_visible()]
        assert titles[0] == "risk and work"
        assert titles[1].startswith("risk and speed")
        reliable = [title for title in titles if title.startswith("[")]
        assert [title.partition(")")[0] for title in reliable] == ["[2, 5", "[3, 6", "[4, 6", "[5, 6"], "[1, 3) is silent"
        assert titles[-1].startswith("layers run, by kind of token")
        assert len(titles) == 7
        assert figure.get_facecolor() == matplotlib.colors.to_rgba(theme.paper)
    work = figure.get_axes()[0]
    path = work.containers[0].lines[0]
    assert path.get_xdata().tolist() == [100 * point["rows_x_layers"] for point in facts["frontier"]["points"]]
    assert path.get_ydata().tolist() == [100 * point["disagreement"] for point in facts["frontier"]["points"]]
    bars = figure.get_axes()[-1].patches
    names = [label.get_text() for label in figure.get_axes()[-1].get_yticklabels()]
    assert len(bars) == len(names) * len(facts["histogram"]["layers"])
    assert sum(bar.get_width() for bar in bars) == pytest.approx(100 * len(names))
    assert matplotlib.rcParams["font.size"] == 13, "nobody's settings change"
    assert imread(folder / "report.png").shape[1] > 1000


class Reader(html.parser.HTMLParser):
    """Notes tags, attributes and text; checks that tags close in order."""

    VOID = ("meta", "img", "source", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def assert_alone(reader: Reader) -> None:
    """Nothing is loaded, nothing runs."""
    assert {tag for tag, _ in reader.seen}.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    for tag, attributes in reader.seen:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "srcset", "href", "poster", "data", "action"):
                assert str(value).startswith("data:image/png;base64,"), (tag, name)


def test_the_page_stands_alone(made: Any) -> None:
    facts, folder = made
    text = (folder / "report.html").read_text()
    reader = read(text)
    assert_alone(reader)
    assert "url(" not in text
    assert "@import" not in text
    assert "http:" not in text.replace("data:image/png", "")
    assert len([1 for tag, _ in reader.seen if tag == "img"]) == len([1 for tag, _ in reader.seen if tag == "source"]) == 3
    assert all(attributes.get("alt") for tag, attributes in reader.seen if tag == "img")
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in reader.seen if tag == "th")
    tables = [tag for tag, _ in reader.seen if tag in ("table", "caption")]
    assert tables.count("table") == tables.count("caption") > 6
    for point in facts["frontier"]["points"]:
        assert f"{point['disagreement']:.2%}" in reader.text
        assert f"{point['rows_x_layers']:.1%}" in reader.text
    assert "None: nothing is promised of these thresholds" in reader.text
    assert torch.__version__ in reader.text


def test_hostile_names_are_text(exits: Exits, tmp_path: Path) -> None:
    model = tiny_models.tiny("llama")
    model.config._name_or_path = HOSTILE
    record = {"method": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}}
    given = Exits(exits.bands, exits.model, record)
    facts = report(model, given, [HOSTILE, "two"], Words(), tmp_path, **SMALL)
    assert facts["model"]["name"] == HOSTILE
    reader = read((tmp_path / "report.html").read_text())
    assert_alone(reader)
    assert len([1 for tag, _ in reader.seen if tag == "img"]) == 3
    assert reader.text.count(HOSTILE) >= 5, "title, heading, record, prompt"


def test_a_folder_is_named_without_its_place(model: Any, made: Any, tmp_path: Path) -> None:
    assert made[0]["model"]["name"] == "llama"
    model.config._name_or_path = str(tmp_path / "mine")
    try:
        facts = report(model, one(model, float("inf")), prompts(2), None, tmp_path, **SMALL)
    finally:
        model.config._name_or_path = ""
    assert facts["model"]["name"] == "mine"
    assert str(tmp_path) not in (tmp_path / "report.html").read_text()
    assert facts["notes"] == ["Without a tokenizer the kinds of tokens are unknown."]
    assert sum(facts["histogram"]["rows"]["other"]) == facts["prompts"]["judged_rows"]


def test_a_certificate_is_told_and_drawn(model: Any, tmp_path: Path) -> None:
    exits = one(model, 0.5)
    exits.record = {
        "certificate": {
            "certified": True, "loss": "disagreement", "risk": 0.25, "confidence": 0.9, "method": "by hand", "n": 99,
            "measured_risk": 0.2, "rows_x_layers": 0.9, "kv": "propagate", "thresholds": [0.5],
        }
    }  # fmt: skip
    facts = report(model, exits, prompts(3), Words(), tmp_path, **SMALL)
    text = read((tmp_path / "report.html").read_text()).text
    assert "Certified: expected disagreement at most 0.25 with 90% confidence (by hand, n 99" in text
    assert facts["notes"] == ["This report used K,V policy predict: the certificate does not speak for it."]
    assert facts["notes"][0] in text
    figure = figures.draw(facts)
    assert "certified bound, 90%" in labels(figure)
    assert any(list(line.get_ydata()) == [25.0, 25.0] for line in figure.get_axes()[0].get_lines())
    changed = report(model, exits.with_thresholds(0.4), prompts(3), Words(), tmp_path, **SMALL)
    assert changed["exits"]["certificate"] is None
    wanted = {"path of thresholds", CLOSED, GIVEN, "rounding alone", "full depth, without exits"}
    assert set(labels(figures.draw(changed))) == wanted


def labels(figure: Any) -> list[str]:
    """Of the frontier's legend."""
    return [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()]


def test_old_files_stay_until_new_ones_are_whole(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FILES:
        (tmp_path / name).write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(page, "render", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            report(model, one(model, float("inf")), prompts(2), None, tmp_path, **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    assert all((tmp_path / name).read_text() == "old" for name in FILES)
    with monkeypatch.context() as patch:  # a disk that fills up while the numbers are written
        patch.setattr(Path, "write_bytes", lambda self, content: (self.write_text("half"), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            report(model, one(model, float("inf")), prompts(2), None, tmp_path, **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    assert all((tmp_path / name).read_text() == "old" for name in FILES)
    report(model, one(model, float("inf")), prompts(2), None, tmp_path, **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    assert not any((tmp_path / name).read_bytes() == b"old" for name in FILES)


def test_the_table_fits_eighty_columns(made: Any) -> None:
    from rich.console import Console

    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(table(made[0]))
    printed = capture.get().splitlines()
    assert not any("…" in line for line in printed)
    for point in made[0]["frontier"]["points"]:
        rates = point["tokens_per_s"]
        wanted = [point["name"], f"{point['disagreement']:.2%}", f"{rates['p10']:.0f}-{rates['p90']:.0f}"]
        assert any(all(each in line for each in wanted) for line in printed), wanted
