"""Launch choices from tables: keys, order of trust, broken files; the search, timed by a formula; the tables shipped."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dyndepth.cli import app
from dyndepth.cli.tune import DEVICES
from dyndepth.errors import BackendError
from dyndepth.plan import Sizes
from dyndepth.tuning import OPS, Problem, gpu, problems, search

launch: Any = importlib.import_module("dyndepth.kernels.launch")
tables: Any = importlib.import_module("dyndepth.kernels.tables")
SHIPPED = ("sm_80", "sm_90", "sm_100", "gfx942")
START = tables.Tiles(16, 64, 64, 4, 4)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path))
    monkeypatch.delenv("DYNDEPTH_LAUNCH", raising=False)
    tables.table.cache_clear()
    yield
    tables.table.cache_clear()


def _device(name: str) -> Any:
    return launch.Device(*DEVICES[name], name)


def test_keys_have_buckets_of_rows_and_no_batch_size() -> None:
    h100 = _device("sm_90")
    keys = {rows: str(launch.key_of("ragged_linear", h100, 2, (4096, 4096, 1), rows)) for rows in (1, 16, 17, 32, 1024, 5000)}
    assert keys[1] == keys[16] == "ragged_linear|half|4096x4096x1|16"
    assert keys[17] == keys[32] == "ragged_linear|half|4096x4096x1|32"
    assert keys[1024] == keys[5000] == "ragged_linear|half|4096x4096x1|1024"
    assert "float32" in str(launch.key_of("ragged_linear", h100, 4, (4096, 4096, 1), 1))


@pytest.mark.parametrize("op", OPS)
def test_a_measured_entry_beats_a_shipped_one_and_both_the_rules(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = next(each for each in problems(Sizes.known("Llama-3-8B"), [16]) if each.op == op)
    device = _device("sm_90")
    rule, source = problem.chosen(dataclasses.replace(device, architecture="sm_89"))
    assert source == tables.RULE
    shipped, source = problem.chosen(device)
    assert source == tables.STATIC
    mine = dataclasses.replace(shipped, num_warps=1 if shipped.num_warps > 1 else 2)
    file = tables.path("sm_90", tables.MEASURED)
    tables.write(file, "sm_90", tables.MEASURED, {str(problem.key(device)): tables.entry(mine, seconds=1e-6)})
    assert problem.chosen(device) == (mine, tables.MEASURED)
    assert problem.config(device).num_warps == mine.num_warps, "and that is what is launched"
    with tables.pinned(problem.key(device), START):
        assert problem.chosen(device) == (START, "pinned")
    monkeypatch.setenv("DYNDEPTH_LAUNCH", "rules")
    assert problem.chosen(device)[1] == tables.RULE
    assert rule.block_rows == 16


def test_grids_follow_from_the_tiles_of_a_table() -> None:
    device = _device("sm_90")
    for problem in problems(Sizes.known("Llama-3-8B"), [16]):
        rule = problem.chosen(device)[0]
        half = dataclasses.replace(rule, block_columns=rule.block_columns // 2)
        before = problem.config(device)
        with tables.pinned(problem.key(device), half):
            after = problem.config(device)
        assert after.block_columns * 2 == before.block_columns
        if problem.op == "exit_stats":
            assert after.grid == (1, 2 * before.grid[1])
        elif problem.op in ("project_qkv", "backfill_kv"):
            assert after.grid == (2 * before.grid[0], 1)
        elif problem.op == "ragged_linear":
            tiles = -(-problem.sizes[0] // after.block_columns)
            assert after.grid == (min(tiles, 4 * 132),)
        else:
            assert after.grid[:2] == before.grid[:2]
            assert after.splits >= before.splits


@pytest.mark.parametrize("text", ["", "[]", '{"entries": {"a": {"block_rows": 1}}}', '{"entries": {"a": 3}}'])
def test_a_broken_table_is_named(text: str) -> None:
    file = tables.path("sm_86", tables.MEASURED)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    problem = problems(Sizes.known("Llama-3-8B"), [16])[0]
    with pytest.raises(ValueError, match=r"launch/sm_86.json is no launch table .*`dyndepth tune`"):
        problem.config(_device("sm_86"))


def test_writing_adds_to_a_table() -> None:
    file = tables.path("sm_80", tables.MEASURED)
    tables.write(file, "sm_80", tables.MEASURED, {"one": tables.entry(START)})
    tables.write(file, "sm_80", tables.MEASURED, {"two": tables.entry(dataclasses.replace(START, num_warps=8), seconds=1.0)})
    assert set(tables.table("sm_80", tables.MEASURED)) == {"one", "two"}
    assert json.loads(file.read_text())["source"] == "measured here"
    assert [each.name for each in file.parent.iterdir()] == ["sm_80.json"], "nothing half-written stays"


def test_the_search_finds_what_a_formula_hides() -> None:
    """The least at 128 columns, 32 inner, 2 warps, 3 stages; some tiles cannot run; every one is timed once."""
    asked: list[Any] = []

    def cost(tiles: Any) -> float | None:
        asked.append(tiles)
        if tiles.block_columns * tiles.num_stages > 400:
            return None
        steps = (tiles.block_columns / 128, 32 / tiles.block_inner, tiles.num_warps / 2)
        return 1.0 + sum(abs(step - 1 / step) for step in steps) + abs(tiles.num_stages - 3)

    found = search("ragged_linear", START, cost)
    assert found is not None
    assert found.tiles == tables.Tiles(16, 128, 32, 2, 3)
    assert (found.cost, found.tried) == (1.0, len(asked))
    assert found.start == cost(START)
    assert len(set(asked[:-1])) == len(asked) - 1


def test_the_search_does_not_follow_noise_and_ends() -> None:
    found = search("ragged_linear", START, lambda tiles: 1.0 if tiles == START else 0.99)
    assert found is not None
    assert found.tiles == START, "one percent is noise"
    count = iter(range(10**6))
    found = search("ragged_linear", START, lambda tiles: 0.5 ** next(count), most=20)
    assert found is not None
    assert found.tried == 20
    assert search("exit_stats", START, lambda tiles: None) is None


def test_sizes_that_are_the_problem_s_stay() -> None:
    seen: set[Any] = set()
    search("ragged_attention", START, lambda tiles: seen.add((tiles.block_rows, tiles.block_inner)) or 1.0)  # type: ignore[func-returns-value]
    assert seen == {(16, 64)}


@pytest.mark.parametrize("architecture", SHIPPED)
def test_shipped_tables(architecture: str) -> None:
    """Made by `make launch-table`: of this architecture, said not to be measured, at fault nowhere, and what is launched."""
    file = tables.path(architecture, tables.STATIC)
    found = json.loads(file.read_text())
    assert (found["architecture"], found["source"]) == (architecture, "static analysis, not measured")
    device = _device(architecture)
    for entry in found["entries"].values():
        assert entry["shared"] <= device.shared_bytes
        assert "seconds" not in entry
    for name in ("SmolLM2-135M", "Llama-3-8B", "Qwen3-8B"):
        for problem in problems(Sizes.known(name), [16, 64]):
            assert problem.chosen(device)[1] == tables.STATIC
            entry = found["entries"][str(problem.key(device))]
            if problem.op == "ragged_linear":
                assert (entry["spilled"], entry["matrix"] > 0, entry["load"] >= 16) == (0, True, True)


def test_problems_are_the_launches_of_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key and rule of a problem are those that the op's own host function asks tables with."""

    class AskedError(Exception):
        pass

    def ask(*asked: Any) -> None:
        raise AskedError(*asked)

    device = _device("sm_90")
    monkeypatch.setattr(launch, "chosen", ask)
    monkeypatch.setattr(launch.Device, "of", staticmethod(lambda tensor: device))
    for name in ("SmolLM2-135M", "Qwen3-8B"):
        for problem in problems(Sizes.known(name), [16, 64]):
            with pytest.raises(AskedError) as asked:
                problem.call("meta", launch.torch.bfloat16)()
            with pytest.raises(AskedError) as said:
                problem.config(device)
            assert asked.value.args == said.value.args, problem
            assert asked.value.args[0] == problem.key(device)


def test_problems_are_buckets_once() -> None:
    found = problems(Sizes.known("SmolLM2-135M"), [1, 7, 16, 33, 64])
    assert sorted({problem.rows for problem in found}) == [16, 64]
    assert len(found) == len(set(found)) == 7 * 2


def test_the_command_line_prints_choices_and_refuses() -> None:
    run = CliRunner().invoke
    shown = run(app, ["info", "--launch", "sm_90", "--rows", "16", "--json"])
    assert shown.exit_code == 0, shown.output
    rows = json.loads(shown.output)
    assert {row["op"] for row in rows} == {"project_qkv", "backfill_kv", "ragged_attention", "ragged_linear", "exit_stats"}
    assert {row["source"] for row in rows} == {tables.STATIC}
    assert "128 x" in run(app, ["info", "--launch", "sm_90", "--rows", "256"]).output
    assert "--launch knows sm_80" in str(run(app, ["info", "--launch", "sm_1"]).exception)
    assert "ops are project_qkv" in str(run(app, ["tune", "Llama-3-8B", "--ops", "fold"]).exception)
    assert "wanted positive numbers" in str(run(app, ["tune", "Llama-3-8B", "--rows", "0"]).exception)


@pytest.mark.skipif(gpu.missing() is None, reason="there is a GPU")
def test_tuning_without_a_gpu_says_so() -> None:
    with pytest.raises(BackendError, match="tune: torch sees no GPU, and launches are timed on one"):
        next(gpu.tune([Problem("exit_stats", "", 16, (128, 64))], launch.torch.bfloat16))
