"""`dyndepth plan`, called as the command line calls it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_exits
import tiny_models
from typer.testing import CliRunner

import dyndepth.cli.plan
from dyndepth.cli.common import ERRORS, app
from dyndepth.demo.weights import EXITS
from dyndepth.plan import (
    Exit,
    Leaving,
    Machine,
    Shape,
    Sizes,
    exits_of,
    full_depth,
    measure,
    peak,
    predict,
    roofline,
)


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["plan", *arguments])
    if done.exception is not None:
        raise done.exception
    assert done.exit_code == 0
    return done.output


def facts(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("--json", *arguments))
    return found


def test_the_table() -> None:
    out = run("--machine", "h100-sxm", "--batch", "1,16")
    assert "SmolLM2-135M: 30 layers of 7.1 MB" in out
    assert "20: 10.2%, 23: 10.2% (equal at every band, from the rows x layers in the exits' record)" in out
    assert "predicted ms per step" in out
    assert out.count("don’t") == 4
    assert "batch 16: don’t. the best, " in out


def test_what_it_says_is_what_the_library_predicts() -> None:
    """At a rate of 80 % an exit after ten layers pays alone; the numbers are those of `predict`."""
    found = facts("--machine", "l4", "--rates", "10:0.8", "--batch", "1,8", "--context", "100")
    machine, shape = Machine.named("l4"), Shape.demo()
    assert [step["batch"] for step in found["steps"]] == [1, 8]
    for step in found["steps"]:
        rows = step["batch"]
        assert step["full_s"] == full_depth(machine, shape, rows, 100).seconds
        option = next(o for o in step["options"] if (o["policy"], o["heads"]) == ("all-out", "A"))
        assert option["seconds"] == predict(machine, shape, [Exit(10, 30, 0.8)], rows, 100, "all-out", "A").seconds
        assert option["gain"] == pytest.approx(step["full_s"] / option["seconds"] - 1)
    assert found["steps"][0]["advice"]["policy"] == "compaction"
    assert found["steps"][0]["advice"]["boundaries"] == [10]
    assert found["exits"] == [{"leave": 10, "resume": 30, "rate": 0.8, "head": 0, "words": 1024, "kv_rank": 0}]
    assert Machine.from_json(found["machine"]) == machine


def test_notes_say_what_would_gain() -> None:
    out = run("--machine", "h100-sxm", "--rates", "10:0.8", "--batch", "16")
    assert "batch 16: don’t." in out
    assert "shallow passes to a deep one would gain" in out
    assert "dyndepth.generate does not re-batch" in out
    free = ("--machine", "h100-sxm", "--rates", "10:0.8", "--batch", "1")
    assert "if rows that leave may emit shortlist words only" in run(*free)
    assert "compaction C at 10" in " ".join(run(*free, "--heads", "A,B,C").split())


def test_exits_and_rates() -> None:
    """An exits folder gives sizes and rates; rates on the command line win."""
    loaded = dyndepth.Exits.from_pretrained(EXITS)
    wanted = [
        {"leave": o.leave, "resume": o.resume, "rate": o.rate, "head": o.head, "words": o.words, "kv_rank": 0}
        for o in exits_of(loaded)
    ]
    assert facts("--machine", "l4")["exits"] == facts("--machine", "l4", "--exits", "demo")["exits"] == wanted
    assert facts("--machine", "l4", "--exits", str(EXITS))["exits"] == wanted
    given = facts("--machine", "l4", "--exits", "demo", "--rates", "23:0.5")
    assert given["exits"] == [{**wanted[1], "rate": 0.5}]
    assert given["rates"] == "as given"


def test_models_from_files(tmp_path: Path) -> None:
    tiny_models.shared("gpt2").config.save_pretrained(tmp_path)
    by_folder = facts("--machine", "l4", "--model", str(tmp_path))
    by_file = facts("--machine", "l4", "--config", str(tmp_path / "config.json"))
    assert by_folder == by_file
    assert by_folder["model"]["layers"] == 6
    assert by_folder["rates"].startswith("assumed")
    assert "curve:1:0" in facts("--machine", "l4", "--config", str(tmp_path), "--rates", "curve:1:0")["rates"]


def test_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measured once; `--again` measures anew."""
    calls = []

    def fake(dtype: str) -> Machine:
        calls.append(dtype)
        return Machine("mine", dtype, 1e10, 1e12, table=(dyndepth.plan.Timing(10, 10, 1, 1e-6),))

    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "measure", fake)
    for more in ((), (), ("--again",)):
        assert facts("--dtype", "float32", *more)["machine"]["name"] == "mine"
    assert calls == ["float32", "float32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--machine", "h1000"), "machine: wanted here or one of a10, .*, got 'h1000'"),
        (("--batch", "1,x"), "--batch: wanted numbers from 1 to 4096 such as 1,16,64, got '1,x'"),
        (("--batch", "0"), "--batch: wanted numbers from 1 to 4096"),
        (("--batch", "4097"), "--batch: wanted numbers from 1 to 4096"),
        (("--dtype", "int8"), "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (("--rates", "x"), "rates: wanted BOUNDARY:SHARE,... such as 20:0.15,23:0.1, got 'x'"),
        (("--rates", "curve:"), r"--rates: wanted curve:REACH\[:STEEPNESS\] such as curve:0.5:4, got 'curve:'"),
        (("--rates", "curve:1:2:3"), r"--rates: wanted curve:REACH\[:STEEPNESS\]"),
        (("--rates", "curve:2"), r"curve: wanted reach in \[0, 1\]"),
        (("--rates", "curve:0.5", "--exits", "demo"), "--rates: a curve brings its own exit points"),
        (("--rates", "21:0.5", "--exits", "demo"), "rates: no band leaves at boundary 21; boundaries of the exits are 20, 23"),
        (("--exits", "/nowhere"), "exits: /nowhere/exits.json does not exist"),
        (("--model", "/nowhere"), "model: there is no folder /nowhere"),
        (("--model", "nobody/has-this"), "model: nobody/has-this cannot be read: "),
        (("--config", "/nowhere.json"), "config: there is no file /nowhere.json"),
        (("--model", "demo", "--config", "x.json"), "plan: --model and --config exclude each other"),
        (("--heads", "A,D"), "plan: heads must be some of A, B, C, got A, D"),
        (("--margin", "1"), r"plan: margin must be in \[0, 1\), got 1.0"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ERRORS, match=message) as caught:
        run(*(() if "--machine" in arguments else ("--machine", "l4")), *arguments)
    assert "\n" not in str(caught.value)


def test_exits_of_another_model(tmp_path: Path) -> None:
    tiny_models.shared("gpt2").config.save_pretrained(tmp_path)
    with pytest.raises(ERRORS, match="--exits: made for a model of 30 layers, this one has 6"):
        run("--machine", "l4", "--config", str(tmp_path), "--exits", "demo")


LLAMA = ("--roofline", "--machine", "h100-sxm", "--batch", "1,8", "--context", "100", "--rates", "10:0.5,20:0.8")


def test_roofline() -> None:
    """Sheets' figures whole, rows that leave rounded: 4 of 8, then 3 of 4."""
    out = run(*LLAMA)
    for wanted in (
        "3.35 TB/s, 989 TFLOP/s",
        "Arithmetic, not measured",
        "backfill_kv: 15 layers",
        "exits, propagate",
        "of no exit",
    ):
        assert wanted in out
    found = facts(*LLAMA)
    assert found["about"] == "arithmetic, not measured"
    assert found["machine"] == peak("h100-sxm").to_json() | {"table": []}
    sizes, taken = Sizes.demo(), [Leaving(10, 4, 1024), Leaving(20, 3, 1024)]
    line = next(line for line in found["passes"] if (line["name"], line["rows"]) == ("exits, predict", 8))
    wanted = roofline.passes(sizes, 8, 100, taken)[1]
    assert line["calls"] == [dataclasses.asdict(call) for call in wanted.calls]
    assert (line["launches"], line["bound_s"]) == (wanted.launches, wanted.seconds(peak("h100-sxm")))
    op = next(op for op in found["ops"] if (op["what"], op["rows"]) == ("LM head", 8))
    assert op["bound_s"] == op["traffic"]["bytes"] / 3.35e12
    assert op["bound_by"] == "memory"


def test_roofline_of_other_models(tmp_path: Path) -> None:
    tiny_models.shared("qwen3").config.save_pretrained(tmp_path)
    found = facts("--roofline", "--machine", "l4", "--config", str(tmp_path), "--dtype", "float32")
    assert (found["model"]["layers"], found["model"]["qk_norm"]) == (6, True)
    assert found["machine"]["flops"] == 30.3e12
    tiny_models.shared("gpt2").config.save_pretrained(tmp_path)
    with pytest.raises(ERRORS, match=r"the roofline knows layers of llama, .*, got model type 'gpt2'"):
        run("--roofline", "--machine", "l4", "--config", str(tmp_path))


def test_roofline_of_bands_that_resume(tmp_path: Path) -> None:
    model = tiny_models.shared("llama")
    model.config.save_pretrained(tmp_path)
    tiny_exits.exits_of(model, tiny_exits.band(model, 1, 3)).save_pretrained(tmp_path / "exits")
    with pytest.raises(ERRORS, match=r"--roofline: rows leave for good; band \[1, 3\) resumes"):
        run("--roofline", "--machine", "l4", "--config", str(tmp_path), "--exits", str(tmp_path / "exits"), "--rates", "1:0.5")
