"""Encoder tasks of the demo: what is compared answers the same samples, the loop is the papers' loop, splits never overlap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dyndepth.calibration import calibrate_samples
from dyndepth.demo.tasks import digits, run_task, tasks
from dyndepth.demo.tasks.measure import DYNAMIC, FULL, LOOP, STREAM, WAITING, Problem, accuracy, measure, run_and_write
from dyndepth.demo.tasks.plain import together
from dyndepth.encoders import DynamicEncoder, SampleExits
from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.exits import Patience, Saturation

pytest.importorskip("transformers")


def model_and_exits() -> tuple[Any, SampleExits]:
    """Random weights, large enough that images leave at different exits."""
    model = digits.vit(seed=4, layers=5, width=16)
    exits = digits.linear_exits(model, (1, 2, 4), seed=5)
    for point in exits:
        head: Any = point.head
        head.out.weight.data *= 6
    return model, exits.eval()


def images(n: int) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(n))


def problem(n: int = 23, threshold: float = 0.6) -> Problem:
    model, exits = model_and_exits()
    x = images(n)
    labels = model(pixel_values=x).logits.argmax(-1)
    encoder = DynamicEncoder(model, exits.with_thresholds(threshold))
    return Problem("image", encoder, lambda numbers: {"pixel_values": x[list(numbers)]}, n, accuracy(labels))


@pytest.mark.parametrize("criterion", ["confidence", "patience", "saturation"])
def test_the_loop_alone_answers_as_the_dynamic_batch_does(criterion: str) -> None:
    """With one sample there is nobody to wait for: also under criteria that remember."""
    model, exits = model_and_exits()
    chosen = {
        "confidence": exits.with_thresholds(0.6),
        "patience": exits.with_criterion(Patience(), 1),
        "saturation": exits.with_criterion(Saturation(), 0.7),
    }[criterion]
    encoder = DynamicEncoder(model, chosen)
    x = images(20)
    out = encoder(pixel_values=x)
    assert len(set(out.exit_layers.tolist())) > 1
    for at in range(20):
        (logits,), layers = together(encoder, {"pixel_values": x[at : at + 1]})
        assert layers == int(out.exit_layers[at])
        assert torch.allclose(logits, out.logits[at], atol=1e-5)


def test_a_batch_that_waits_leaves_where_all_are_sure_at_once() -> None:
    found = problem(12)
    encoder = found.encoder
    x = images(12)
    everywhere = [logits for _, logits in encoder.everywhere(pixel_values=x)]
    for size in (2, 3, 12):
        for at in range(0, 12, size):
            own = slice(at, at + size)
            sure = [bool((logits[own].softmax(-1).amax(-1) >= 0.6).all()) for logits in everywhere[:-1]]
            wanted = sure.index(True) if True in sure else 3
            logits, layers = together(encoder, {"pixel_values": x[own]})
            assert layers == (1, 2, 4, 5)[wanted]
            assert torch.allclose(torch.stack(logits), everywhere[wanted][own], atol=1e-5)


def test_every_way_is_measured_and_what_it_ran_is_counted() -> None:
    found = problem()
    rows = {(row.batch, row.mode): row for row in measure(found, (1, 4), 1)}
    assert list(rows) == [
        (1, FULL), (1, LOOP), (1, DYNAMIC), (4, FULL), (4, WAITING), (4, DYNAMIC), (4, STREAM),
    ]  # fmt: skip
    assert rows[4, FULL].quality == rows[4, FULL].agreement == rows[4, FULL].samples_x_layers == 1
    out = found.encoder(**found.collate(range(23)))
    share = int(out.exit_layers.sum()) / (5 * 23)
    for key in ((1, LOOP), (1, DYNAMIC), (4, DYNAMIC), (4, STREAM)):
        assert rows[key].samples_x_layers == pytest.approx(share)
        assert rows[key].quality == rows[1, LOOP].quality == rows[key].agreement
    assert share < rows[4, WAITING].samples_x_layers <= 1
    assert all(row.samples == 23 and row.samples_per_s_p10 <= row.samples_per_s_median for row in rows.values())


def test_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    found = run_and_write(problem(), tmp_path, (1, 4), 1, {"model": "tiny"}, "twenty-three images")
    assert json.loads((tmp_path / "image.json").read_text()) == found
    assert found["facts"] == {"model": "tiny", "threads": torch.get_num_threads(), "repetitions": 1}
    assert len(found["rows"]) == 7
    assert (tmp_path / "image.png").read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr().out
    assert all(mode in said for mode in (FULL, LOOP, WAITING, DYNAMIC, STREAM))


def test_digits_are_split_once() -> None:
    pytest.importorskip("sklearn")
    parts = digits.digits()
    assert {name: len(part) for name, part in parts.items()} == digits.SIZES
    numbers = torch.cat([part.numbers for part in parts.values()])
    assert torch.equal(numbers.sort().values, torch.arange(1797))
    pixels = torch.cat([part.pixels for part in parts.values()]).flatten(1)
    assert len(torch.unique(pixels, dim=0)) == 1797  # no image is there twice, under two numbers
    assert -1 <= float(pixels.min()) < float(pixels.max()) <= 1
    assert torch.equal(digits.digits()["test"].numbers, parts["test"].numbers)


def test_training_is_the_same_every_time() -> None:
    pytest.importorskip("sklearn")
    state = torch.get_rng_state()
    (one, exits), (two, _) = digits.trained(1), digits.trained(1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    DynamicEncoder(one, exits)  # made for the trained weights
    assert not any(parameter.requires_grad for parameter in [*one.parameters(), *exits.parameters()])


def test_thresholds_are_certified_on_real_decisions() -> None:
    """The oracle counts, threshold by threshold, images whose early answer is not full depth's."""
    model, exits = model_and_exits()
    x = images(200)
    path = [0.999, 0.9, 0.7, 0.5]
    found = calibrate_samples(model, exits, [{"pixel_values": part} for part in x.split(64)], risk=0.4, path=path)
    certificate = found.record["certificate"]
    full = model(pixel_values=x).logits.argmax(-1)
    for value, tested in zip(path, certificate["tested"], strict=False):
        out = DynamicEncoder(model, exits.with_thresholds(value))(pixel_values=x)
        assert tested["loss"] == pytest.approx(float((out.logits.argmax(-1) != full).float().mean()))
        assert tested["samples_x_layers"] == pytest.approx(out.work.fraction)
    passed = [tested for tested in certificate["tested"] if tested["p_value"] <= 0.05]
    assert certificate["certified"] == bool(passed)
    assert 1 <= len(passed) < len(certificate["tested"]) <= len(path)
    assert [point.threshold for point in found] == passed[-1]["thresholds"] == certificate["thresholds"]
    assert certificate["measured_risk"] == passed[-1]["loss"] <= 0.4
    assert certificate["n"] == 200


def test_exits_close_where_nothing_can_be_certified() -> None:
    model, exits = model_and_exits()
    found = calibrate_samples(model, exits, [{"pixel_values": images(20)}], risk=0.01)
    assert not found.record["certificate"]["certified"]
    assert {point.threshold for point in found} == {float("inf")}


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"task must be one of .*image.*, got 'video'"):
        run_task("video", tmp_path)
    assert "image" in tasks()
    with pytest.raises(ArgumentError, match="batches and repetitions must be at least 1"):
        run_task("image", tmp_path, batches=(0,))
    model, exits = model_and_exits()
    with pytest.raises(NotEnoughDataError, match="at least one sample"):
        calibrate_samples(model, exits, [])
    with pytest.raises(ArgumentError, match="do not share a finite highest score"):
        calibrate_samples(model, exits.with_criterion(Patience(), 1), [{"pixel_values": images(1)}])
    with pytest.raises(ArgumentError, match="path must be numbers or vectors of 3"):
        calibrate_samples(model, exits, [{"pixel_values": images(1)}], path=[[0.5]])
