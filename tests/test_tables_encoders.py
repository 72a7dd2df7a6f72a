"""Tables of encoders say of their figures what the files say: how settings were chosen, how long models were trained."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import encoder_image
import encoder_speech
import encoder_text
import mue
import pytest
import splitformer
import tables
import tables_encoder_systems
import tables_encoder_text
import tables_encoders
from table_parts import load


def found(name: str) -> Any:
    return load(tables.RESULTS / f"{name}.json")


def test_speech_is_timed_at_thresholds_that_calibration_chose() -> None:
    speech = found("encoder_speech")
    chosen = tables_encoders.chosen_on_calibration(speech)
    assert speech["rows"]
    for row in speech["rows"]:
        assert row["threshold"] == chosen[row["criterion"]]["threshold"]
        assert speech["speed"][row["criterion"]][str(row["batch"])]["machine"]["cpu"]
    assert {name: row["threshold"] for name, row in chosen.items()} == {
        name: encoder_speech.chosen(speech, name) for name in chosen
    }


def test_blocks_of_speeds_name_their_runs() -> None:
    """Two machines, two thread counts: both stand beside the table, each with its criterion."""
    text = tables_encoders.encoder_speech(tables.RESULTS)
    for criterion, sizes in found("encoder_speech")["speed"].items():
        for run in sizes.values():
            assert re.search(rf"{criterion}( and \w+)* on {run['threads']} threads", text)
    assert "only within a block and batch size" in text


def test_what_is_said_of_systems_is_what_benchmarks_say() -> None:
    text, vision = found("encoder_text"), found("mue")
    assert text["about"] == {name: list(parts) for name, parts in encoder_text.ABOUT.items()}
    assert text["chosen"] == encoder_text.CHOSEN
    assert vision["chosen"] == mue.CHOSEN
    # Every training of a table is one that `make encoder-text` does.
    places = {"COST-EFF, assistant": "costeff-assistant", "COST-EFF": "costeff", "EERO": "deebert"}
    for row in text["rows"]:
        if row["with_model"]:
            place = places.get(row["system"], row["system"].lower())
            wanted = (encoder_text.UPDATES | encoder_text.STAGES)[place], encoder_text.STARTED[place]
            assert (row["updates"], row["started"]) == wanted
            assert row.get("steps") == (encoder_text.STEPS if place == "costeff" else None)


def row(system: str, setting: str, held: float, work: float, **more: Any) -> dict[str, Any]:
    return {
        "system": system, "setting": setting, "with_model": False, "accuracy": held - 0.01, "samples_x_layers": work,
        "held_out": {"accuracy": held, "samples_x_layers": work}, **more,
    }  # fmt: skip


def test_a_setting_is_within_a_point_or_says_that_it_is_not() -> None:
    rows = [row("A", "full depth", 0.93, 1.0), row("A", "near", 0.925, 0.6), row("A", "nearer", 0.929, 0.8)]
    text = {"batch": 32, "rows": rows, "about": {"A": ["", "runs", "differs"]}}
    assert tables_encoder_text.figures(text, "A") == "91.5% at 60% (near; full depth 92.0%; model frozen)"
    far = [rows[0], row("A", "far", 0.9, 0.6), row("A", "less far", 0.91, 0.8)]
    assert "less far, the most accurate: none is within a point" in tables_encoder_text.figures({**text, "rows": far}, "A")
    trained = [one | {"with_model": True, "updates": 7, "started": "somewhere"} for one in rows]
    said = tables_encoder_text.figures({**text, "rows": trained}, "A")
    assert said.endswith("; model trained, 7 updates of 32 from somewhere)")
    assert tables_encoder_text.figures({**text, "rows": []}, "A") == "not measured"


def test_what_has_no_figure_is_not_among_what_runs() -> None:
    text = {"batch": 32, "about": {"A": ["", "narrow layers", "differs"]}}
    more = {"updates": 4, "started": "a copy"}
    rows = [row("A", "full depth", 0.93, 1.0, **more), row("A", "near", 0.925, 0.6, **more)]
    for one in rows:
        one["with_model"] = True
    assistant = [one | {"system": "A, assistant"} for one in rows]
    assert tables_encoder_text.runs_here({**text, "rows": assistant}, "A").endswith("without a figure: narrow layers")
    assert "its assistant only" in tables_encoder_text.figures({**text, "rows": assistant}, "A")
    both = [*assistant, *(one | {"products": 0.45, "steps": 3} for one in rows)]
    assert tables_encoder_text.runs_here({**text, "rows": both}, "A") == "narrow layers"
    said = tables_encoder_text.figures({**text, "rows": both}, "A")
    assert "45% of the wide layers' products" in said
    assert "3 times 4 updates of 32" in said


def test_states_that_are_updated_and_thresholds_that_are_missing_are_shown(tmp_path: Path) -> None:
    results = copy.deepcopy(found("dynamax"))
    results["rows"] = [
        one | {"threshold": None, "states_updated": 0.25} for one in results["rows"] if one["wanted"] == 0.9
    ]  # fmt: skip
    (tmp_path / "dynamax.json").write_text(json.dumps(results))
    lines = tables.TABLES["dynamax"](tmp_path).splitlines()
    cells = [line.split(" | ") for line in lines if line.startswith("| 90% |")]
    assert len(cells) == len(results["rows"])
    assert all(line[3] == "none found" and line[6] == "25.0%" for line in cells)
    assert "(and 25% updated)" in tables_encoder_systems._dynamax(tmp_path)


def test_splitformer_is_beside_the_model_that_was_trained_as_long(tmp_path: Path) -> None:
    rows = [
        {"exits": [{"wer": first, "operations": low}, {"wer": last, "operations": high}]}
        for first, last, low, high in ((0.9, 0.5, 10, 40), (0.7, 0.45, 10, 40), (0.6, 0.4, 12, 44))
    ]
    (tmp_path / "splitformer.json").write_text(json.dumps({"steps": 5, "batch": 3, "rows": rows}))
    assert tables_encoder_systems._splitformer(tmp_path) == (
        "WER at the first exit 60.0% (without 70.0%; 20% more operations), at the top 40.0% (without 45.0%; 10% more "
        "operations), after 5 more steps of 3 for both"
    )
    assert found("splitformer")["chosen"] == splitformer.CHOSEN
    assert [(row["model"], bool(row["steps"])) for row in found("splitformer")["rows"]] == [
        ("conformer", False), ("conformer", True), ("splitformer", True),
    ]  # fmt: skip


def test_the_point_of_an_image_system_is_chosen_on_other_images(tmp_path: Path) -> None:
    """Least work within a point of full depth on the calibration images, whatever the test images say."""
    rows = [
        {"system": "A", "point": point, "accuracy": accuracy, "work": work, "samples_per_s_median": rate,
         "calibration": {"accuracy": other, "work": work}}
        for point, accuracy, other, work, rate in (
            ("full depth", 0.97, 0.96, 1.0, 100), ("near", 0.90, 0.955, 0.4, 250), ("far", 0.97, 0.93, 0.2, 500),
        )
    ]  # fmt: skip
    (tmp_path / "encoder_image.json").write_text(json.dumps({"rows": rows}))
    said = tables_encoder_systems._image("A")(tmp_path)
    assert said == "90.0% at 40% of the work (near; full depth 97.0%), 2.5 times the images/s"
    assert found("encoder_image")["chosen"] == encoder_image.CHOSEN


def test_depth_efficiency_says_how_sure_it_is(tmp_path: Path) -> None:
    cell = {
        "exits": [4], "rate": 0.5, "samples_x_layers": 0.8, "by_tokens_s": 0.02, "perfect_s": 0.01, "saved_s": 0.009,
        "efficiency": 0.9, "efficiency_p25": 0.7, "efficiency_p75": 1.1, "nobody_s": 0.1, "from_s": 0.1,
    }  # fmt: skip
    row = {"model": "vit", "dtype": "float32", "layout": "padded", "batch": 32, "rounds": 16, "full_s": 0.2, "cells": [cell]}
    results = {"rows": [row], "settings": {"threads": 2}, "machine": found("encoder_image")["machine"]}
    (tmp_path / "encoder_depth_efficiency.json").write_text(json.dumps(results))
    line = tables.TABLES["encoder_depth"](tmp_path).splitlines()[2]
    # 1.96 standard errors of a median, 1.2533 sigma / sqrt(16), with sigma the quartiles' distance over 1.349.
    sure = 100 * 1.96 * 1.2533 * (0.4 / 1.349) / 4
    assert f"| 20.0 | 10.0 | 9.0 | 90% (70%–110%) | {sure:.0f} | +0.0% |" in line


@pytest.mark.parametrize("page", ["encoders.md", "encoders-text.md"])
def test_both_tables_of_systems_say_how_settings_were_chosen(page: str) -> None:
    assert tables_encoder_text.SETTINGS in (tables.ROOT / "docs" / page).read_text(encoding="utf-8")
