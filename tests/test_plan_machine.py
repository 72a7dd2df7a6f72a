"""Figures that predictions stand on: machines and their cache, sizes of models, rates of exits."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import SMALL, TOY

from dyndepth import demo
from dyndepth.errors import ArgumentError, UnsupportedModelError
from dyndepth.exits import Band, Exits, FixedDepth, ModelFacts, TopProbability
from dyndepth.plan import Exit, Machine, Shape, Timing, curve, exits_of, measure, parse_rates
from dyndepth.plan.rates import SHORTLIST, occupancy, subset, work
from dyndepth.plan.shape import _PRODUCTS
from dyndepth.plan.sheets import names
from dyndepth.runtime import families
from dyndepth.runtime.family import family_of

# -- machines -----------------------------------------------------------------------------------------------------------


def test_product_by_hand() -> None:
    """1000 weights: 1 ms to read, 0.25 ms a row to compute, 10 us an op."""
    machine = dataclasses.replace(TOY, op_s=1e-5)
    assert [machine.product(1000, n) for n in (0, 1, 4, 8)] == pytest.approx([0, 1.01e-3, 1.01e-3, 2.01e-3])
    assert machine.product(1000, 1, count=7) == pytest.approx(1.07e-3)
    assert machine.product(0, 3) == 0
    assert machine.read(10) == pytest.approx(1e-5)
    assert machine.move(10) == pytest.approx(2e-5)
    assert dataclasses.replace(machine, copy=4e6).move(10) == pytest.approx(5e-6)
    assert machine.crossover() == pytest.approx(8)


def _table(*entries: tuple[int, int, int, float]) -> Machine:
    return dataclasses.replace(TOY, table=tuple(Timing(*entry) for entry in entries))


def test_a_table_is_fitted_and_interpolated() -> None:
    """Two sizes give a line exactly: 5 + 0.01 weights at 1 row, 7 + 0.02 at 4; between them in proportion, above by rows."""
    machine = _table((10, 10, 1, 6), (10, 40, 1, 9), (10, 10, 4, 9), (10, 40, 4, 15))
    assert [machine.product(1000, n) for n in (0, 1, 4)] == pytest.approx([0, 15, 27])
    assert machine.product(1000, 2) == pytest.approx(15 + 12 / 3)
    assert machine.product(1000, 8) == pytest.approx(7 + 0.04 * 1000)
    assert machine.product(1000, 4, count=3) == pytest.approx(3 * 7 + 20)
    assert machine.crossover() == pytest.approx(4)


def test_products_count_alike_whatever_their_size() -> None:
    """Relative errors: b = sum(x / y) / sum((x / y)**2) through the origin, since a line with b = 0.2 would start below it."""
    machine = _table((10, 10, 1, 10), (10, 20, 1, 20), (100, 100, 1, 2000))
    assert machine.product(100, 1) == pytest.approx(100 * (10 + 10 + 5) / (100 + 100 + 25))


def test_noise_does_not_make_fewer_rows_slower() -> None:
    """4 at one row and 2 at two: both are 3. One size tells nothing of the cost of a call."""
    machine = _table((10, 10, 1, 4), (10, 10, 2, 2), (10, 10, 4, 8))
    assert [machine.product(100, n) for n in (1, 2, 4)] == pytest.approx([3, 3, 8])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.floats(1e-6, 1)), min_size=1, max_size=12)
)
def test_products_never_fall_with_rows(entries: list[tuple[int, int, int, float]]) -> None:
    machine = _table(*entries)
    seconds = [machine.product(50, rows) for rows in range(16)]
    assert seconds[0] == 0 < seconds[1]
    assert all(one <= other * (1 + 1e-9) for one, other in itertools.pairwise(seconds))
    assert Machine.from_json(json.loads(json.dumps(machine.to_json()))) == machine


def test_named_machines() -> None:
    """An H100's sheet says 3.35 TB/s and 989 dense TFLOP/s in half precision, 67 in single."""
    half, single = Machine.named("h100-sxm"), Machine.named("h100-sxm", "float32")
    assert half.bandwidth == single.bandwidth == pytest.approx(0.9 * 3.35e12)
    assert (half.flops, single.flops) == pytest.approx((0.8 * 989e12, 0.8 * 67e12))
    assert {"h200", "a100-80gb", "b200", "mi300x", "l4"} <= set(names())
    assert all(Machine.named(name).flops > Machine.named(name, "float32").flops for name in names())


def test_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_SIZES", ((16, 24), (32, 48)))
    monkeypatch.setattr(measure, "_ROWS", (1, 3))
    monkeypatch.setattr(measure, "_BURST", 2048)
    found = measure.measure("bfloat16", pool_bytes=2**18, read_bytes=2**12, rounds=2)
    assert {(t.outputs, t.columns, t.rows) for t in found.table} == {(16, 24, 1), (16, 24, 3), (32, 48, 1), (32, 48, 3)}
    assert min(found.bandwidth, found.flops, found.copy, found.op_s) > 0
    assert str(torch.get_num_threads()) in found.source


def test_weights_are_not_handed_out_twice_in_a_row() -> None:
    pool = measure._Pool(torch.arange(10))
    assert [pool.take(4).tolist() for _ in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Dtypes that were really measured; the cache folder is empty."""
    calls: list[str] = []

    def fake(dtype: str) -> Machine:
        calls.append(dtype)
        return dataclasses.replace(TOY, dtype=dtype, table=(Timing(2, 3, 1, 1e-6 * len(calls)),))

    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "measure", fake)
    return calls


def test_measured_once(measured: list[str]) -> None:
    first = Machine.measure("bfloat16")
    assert Machine.measure("bfloat16") == first
    assert measured == ["bfloat16"]
    assert Machine.measure("float32").dtype == "float32"
    assert Machine.measure("bfloat16", again=True) != first
    assert measured == ["bfloat16", "float32", "bfloat16"]
    assert [path.suffix for path in measure.cache_file("float32").parent.iterdir()] == [".json", ".json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: text.replace(f'"version": {measure.VERSION}', '"version": 0'),
        lambda text: text.replace('"bandwidth": 2000000.0', '"bandwidth": -1.0'),
        lambda text: text.replace('"rows": 1', '"rows": "x"'),
        lambda text: text.replace('"table"', '"tables"'),
        lambda text: text.replace(" threads", " knots"),
    ],
    ids=["empty", "truncated", "another", "version", "negative", "text", "missing", "other-machine"],
)
def test_a_damaged_cache_is_measured_again(measured: list[str], damage: Any) -> None:
    Machine.measure("bfloat16")
    path = measure.cache_file("bfloat16")
    broken = damage(path.read_text())
    assert broken != path.read_text()
    path.write_text(broken)
    again = Machine.measure("bfloat16")
    assert measured == ["bfloat16"] * 2
    assert Machine.measure("bfloat16") == again
    assert len(measured) == 2


def test_another_machine_has_another_file(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = measure.cache_file("bfloat16")
    monkeypatch.setattr(measure, "cpu_name", lambda: "another")
    assert measure.cache_file("bfloat16") != before


def test_a_cache_that_cannot_be_written(measured: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path / "file"))
    assert Machine.measure("bfloat16").dtype == "bfloat16"


# -- models -------------------------------------------------------------------------------------------------------------


def test_every_family_has_a_shape() -> None:
    assert sorted(_PRODUCTS) == sorted(
        kind for family in vars(families).values() for kind in getattr(family, "model_types", ())
    )


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_sizes_are_the_modules(name: str) -> None:
    """Weights of matrices counted in a real model."""
    model = tiny_models.shared(name)
    family, shape = family_of(model.config.model_type), Shape.of(model)
    layer: Any = model.get_submodule(f"{family.decoder}.{family.layers}.0")
    matrices = [
        module.weight for module in layer.modules() if getattr(module, "weight", None) is not None and module.weight.dim() == 2
    ]
    assert (shape.layer, shape.products) == (sum(matrix.numel() for matrix in matrices), len(matrices))
    out = getattr(model.get_submodule(family.decoder), "project_out", None)
    head = model.get_output_embeddings().weight
    assert shape.head == head.numel() + (0 if out is None else out.weight.numel())
    assert (shape.layers, shape.vocab, shape.ready) == (tiny_models.LAYERS, *head.shape)
    grouped = "num_key_value_heads" in tiny_models.CONFIGS[name][1]
    assert shape.kv == (2 * 2 * 14 if grouped else 2 * 42)


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("llama", ()),
        ("mistral", (9,) * 6),
        ("phi3", (11,) * 6),
        ("gemma2", (7, 0) * 3),
        ("gemma3", (7, 0) * 3),
        ("qwen2", (7, 0) * 3),
    ],
)
def test_windows(name: str, windows: tuple[int, ...]) -> None:
    shape = Shape.of(tiny_models.shared(name).config)
    assert shape.windows == windows
    assert shape.reach(20) == sum(min(window or 20, 20) for window in windows or (20,) * 6)
    assert shape.reach(20, 1, 3) == sum(min(window or 20, 20) for window in (windows or (20,) * 6)[1:3])


def test_the_demo_is_known_without_weights() -> None:
    """30 layers of 576 x (576 + 2 x 192 + 576 + 3 x 1536) weights, 49152 words of 576, three K,V heads of 64."""
    shape = Shape.demo()
    assert (shape.layers, shape.layer, shape.head, shape.kv) == (30, 576 * (1536 + 4608), 49152 * 576, 384)


@pytest.mark.demo_model
def test_the_demo_is_what_is_loaded() -> None:
    model, _ = demo.load_model()
    assert Shape.of(model, "x") == dataclasses.replace(Shape.demo(), name="x")


def test_reading_a_config(tmp_path: Path) -> None:
    config = tiny_models.shared("gpt2").config
    config.save_pretrained(tmp_path)
    wanted = Shape.of(config, tmp_path.name)
    assert Shape.read(tmp_path) == Shape.read(tmp_path / "config.json") == wanted


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, ArgumentError, "config: there is no file .*config.json"),
        ("{", ArgumentError, "config: .*config.json is no JSON"),
        ("[]", ArgumentError, "config.json must be a JSON object with a key `model_type`"),
        ("{}", ArgumentError, "config.json must be a JSON object with a key `model_type`"),
        ('{"model_type": "bert"}', UnsupportedModelError, "plan: model type 'bert' is not supported; supported: gemma2, "),
        ('{"model_type": "llama", "num_hidden_layers": 0}', ArgumentError, "layers must be a positive integer, got 0"),
        ('{"model_type": "llama", "hidden_size": "wide"}', ArgumentError, "config: "),
    ],
)
def test_configs_that_are_wrong(tmp_path: Path, text: str | None, error: type[Exception], message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=message):
        Shape.read(tmp_path)


# -- rates --------------------------------------------------------------------------------------------------------------


def test_rates_by_hand() -> None:
    assert parse_rates("23:0.1, 20:0.15", 30) == (Exit(20, 30, 0.15, words=SHORTLIST), Exit(23, 30, 0.1, words=SHORTLIST))
    # 15 % leave out a third of the layers, 10 % of the others 7 of 30.
    assert work(parse_rates("20:0.15,23:0.1", 30), 30) == pytest.approx(1 - 0.15 * 10 / 30 - 0.85 * 0.1 * 7 / 30)


def test_subsets_keep_who_is_sure() -> None:
    """Half leave at 2 and half of the rest at 4: without 2, three quarters leave at 4; without 4, half at 2."""
    both = [Exit(2, 6, 0.5), Exit(4, 6, 0.5), Exit(1, 2, 0.3)]
    assert subset(both, [4], 6)[0].rate == pytest.approx(0.75)
    assert subset(both, [2], 6)[0].rate == pytest.approx(0.5)
    assert subset(both, [1, 2, 4], 6) == (both[2], both[0], both[1])
    assert subset([Exit(2, 6, 1.0), Exit(4, 6, 0.5)], [2, 4], 6)[1].rate == 0


def test_curve() -> None:
    """Shares by boundary e are reach (e / layers)**steepness."""
    found = curve(30, 0.5, 4.0)
    gone = 1.0
    for one in found:
        gone *= 1 - one.rate
        assert 1 - gone == pytest.approx(0.5 * (one.leave / 30) ** 4)
    assert len(found) == 6
    assert [one.leave for one in curve(2)] == [1]
    assert occupancy(curve(30, 1.0, 0.0), 30)[0][-1] == 0


def _exits(bands: list[Band], record: dict[str, Any]) -> Exits:
    return Exits(bands, ModelFacts("llama", 6, 48, 200), record)


def test_rates_from_a_record() -> None:
    """The demo's certificate says which share of rows x layers was run: equal rates at both bands give as much."""
    exits = demo.load_exits()
    certificate = exits.certificate
    assert certificate is not None
    found = exits_of(exits)
    assert [(one.leave, one.resume, one.head, one.words) for one in found] == [(20, 30, 576**2, 1024), (23, 30, 576**2, 1024)]
    assert found[0].rate == found[1].rate > 0
    assert work(found, 30) == pytest.approx(certificate["rows_x_layers"])
    # With other thresholds the certificate is void, and what fit tested speaks.
    assert work(exits_of(exits.with_thresholds(0.5)), 30) == pytest.approx(exits.record["test"]["rows_x_layers"])
    given = exits_of(exits, {23: 0.4})
    assert [(one.leave, one.rate, one.words) for one in given] == [(23, 0.4, 1024)]


def test_closed_bands_and_whole_vocabularies() -> None:
    bands = [Band(2, 6, TopProbability()), Band(3, 6, TopProbability(), threshold=0.5), Band(4, 6), Band(5, 6, FixedDepth())]
    found = exits_of(_exits(bands, {"tune": {"rows_x_layers": 0.9}}))
    assert [(one.rate > 0, one.words) for one in found] == [(False, 200), (True, 200), (False, 0), (True, 0)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_rates("20", 30), "rates: wanted BOUNDARY:SHARE,... such as 20:0.15,23:0.1, got '20'"),
        (lambda: parse_rates("20:x", 30), "rates: wanted BOUNDARY:SHARE,... such as 20:0.15,23:0.1, got '20:x'"),
        (lambda: parse_rates("", 30), "rates: wanted BOUNDARY:SHARE,... such as 20:0.15,23:0.1, got ''"),
        (lambda: parse_rates("30:0.1", 30), r"rates: boundary must be in \[1, 29\] for a model of 30 layers, got 30"),
        (lambda: parse_rates("3:1.1", 30), r"rates: a share must be in \[0, 1\], got 1.1 at boundary 3"),
        (lambda: parse_rates("3:nan", 30), r"rates: a share must be in \[0, 1\], got nan at boundary 3"),
        (lambda: parse_rates("3:0.1,3:0.2", 30), "rates: two bands leave at boundary 3; a boundary has at most one"),
        (lambda: occupancy([Exit(3, 9, 0.1)], 6), r"rates: band \[3, 9\) is above the model's 6 layers"),
        (lambda: Exit(3, 3, 0.1), "exit at 3: wanted 1 <= leave < resume, got resume 3"),
        (lambda: Exit(3, 4, -0.1), r"exit at 3: rate must be in \[0, 1\], got -0.1"),
        (lambda: Exit(3, 4, 0.1, head=-1), "exit at 3: head, words and kv_rank must not be negative, got -1, 0, 0"),
        (lambda: curve(30, 2.0), r"curve: wanted reach in \[0, 1\] and steepness >= 0, got 2.0, 4.0"),
        (lambda: curve(1), "curve: wanted at least two layers and one point, got 1, 6"),
        (
            lambda: exits_of(demo.load_exits(), {21: 0.1}),
            "rates: no band leaves at boundary 21; boundaries of the exits are 20, 23",
        ),
        (lambda: exits_of(_exits([Band(2, 6)], {})), "exits: their record says nothing of rows x layers; give rates, or run"),
        (lambda: dataclasses.replace(SMALL, kv=0), "shape: kv must be a positive integer, got 0"),
        (lambda: dataclasses.replace(SMALL, windows=(3,)), "shape: windows must name 4 layers, got 1"),
        (lambda: Machine("x", "int8", 1, 1), "machine: dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (lambda: dataclasses.replace(TOY, flops=float("nan")), "machine: flops must be finite and at least 1, got nan"),
        (lambda: dataclasses.replace(TOY, op_s=-1.0), "machine: op_s must be finite and at least 0, got -1.0"),
        (lambda: _table((1, 1, 0, 1.0)), "machine: a timing must have positive sizes and seconds, got Timing"),
        (lambda: Machine.from_json({"name": "x"}), "machine: wanted what Machine.to_json gives: 'table'"),
        (lambda: Machine.named("h1000"), "machine: wanted here or one of a10, .*, got 'h1000'"),
        (lambda: Machine.measure("int8"), "machine: dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (lambda: Shape.of(transformers.BertConfig()), "plan: model type 'bert' is not supported"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises((ArgumentError, UnsupportedModelError), match=message):
        call()
