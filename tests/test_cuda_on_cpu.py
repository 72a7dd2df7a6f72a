"""csrc/cuda on the CPU: blocks of fibers with real barriers and warp collectives, in shuffled orders, and under sanitizers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dyndepth.cuda import compact_rows

HERE = Path(__file__).parent / "cuda_on_cpu"
SOURCE = HERE.parent.parent / "csrc" / "cuda" / "compact_rows.cu"
BARRIER = "__syncthreads();"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(folder: Path, program: str, *flags: str) -> Path:
    target = folder / program
    command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", *flags, "-o", str(target), str(HERE / f"{program}.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("plain"), "compact_rows", "-O2")


@pytest.mark.parametrize("pattern", ["none", "all", "away", "odd", "random"])
@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 1023, 1024, 1025, 4096])
def test_compact_rows(plain: Path, rows: int, pattern: str) -> None:
    """Order, counts and every byte of aligned, strided and misaligned payloads; nothing written beside them."""
    for seed in (1, 2):
        done = run(plain, rows, pattern, seed)
        assert done.returncode == 0, done.stdout


def test_compact_rows_of_many_blocks(plain: Path) -> None:
    done = run(plain, 70_000, "random", 3)
    assert done.returncode == 0, done.stdout


def test_compact_rows_under_sanitizers(tmp_path: Path) -> None:
    """No byte read or written out of bounds, no misaligned word, no overflow."""
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = build(tmp_path, "compact_rows", *flags)
    for rows in (1, 33, 1024, 3000):
        done = run(program, rows, "random", 1)
        assert done.returncode == 0, done.stdout + done.stderr


def mutated(folder: Path, text: str) -> Path:
    source = folder / "mutant.cu"
    source.write_text(text)
    return build(folder, "compact_rows", "-O1", "-Wno-error", f'-DSOURCE="{source}"')


def fails(program: Path) -> bool:
    return any(run(program, rows, "random", seed).returncode != 0 for rows in (70, 1024, 3000) for seed in range(6))


@pytest.mark.parametrize("number", range(SOURCE.read_text().count(BARRIER)))
def test_every_barrier_is_needed_and_its_loss_is_seen(tmp_path: Path, number: int) -> None:
    at = [match.start() for match in re.finditer(re.escape(BARRIER), SOURCE.read_text())][number]
    text = SOURCE.read_text()
    assert fails(mutated(tmp_path, text[:at] + text[at + len(BARRIER) :]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("same & ((1u << lane) - 1)", "same & (1u << lane)"),
        ("if (lane >= step) sum += other;", "sum += other;"),
        ("first[3] = {sums[0], sums[2] + sums[1],", "first[3] = {sums[0], sums[2] + sums[0],"),
        ("if (b < block) own[kind] += count;", "if (b <= block) own[kind] += count;"),
        ("for (int i = thread; i < words; i += width)", "for (int i = thread; i <= words; i += width)"),
        ("from + old_row * payload.from_stride", "from + old_row * payload.row_bytes"),
    ],
)
def test_wrong_kernels_are_seen(tmp_path: Path, old: str, new: str) -> None:
    text = SOURCE.read_text()
    assert text.count(old) == 1
    assert fails(mutated(tmp_path, text.replace(old, new)))


@pytest.fixture(scope="module")
def misuse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("misuse"), "misuse", "-O1")


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("missing_barrier", "wrong values"),
        ("unwritten_shared_memory", "wrong values"),
        ("divergent_barrier", "divergent barrier: threads of one block wait at lines"),
        ("waits_for_ever", "deadlock: nobody can run"),
        ("lane_not_in_its_mask", "the calling lane is not in its own mask"),
        ("mask_names_an_exited_lane", "the mask names a lane that has exited"),
        ("different_collectives", "lanes of one warp meet in different collectives"),
        ("shuffle_from_outside", "reads a lane outside its mask"),
    ],
)
def test_misuse_is_caught(misuse: Path, kernel: str, message: str) -> None:
    done = run(misuse, kernel)
    assert done.returncode == 1
    assert message in done.stdout


def test_a_right_kernel_passes(misuse: Path) -> None:
    assert run(misuse, "right").returncode == 0


def test_python_fills_the_structures_that_the_kernel_reads(plain: Path) -> None:
    payload, payloads = compact_rows._PAYLOAD, compact_rows._PAYLOADS
    offsets = [payload.fields[name][1] for name in ("source", "target", "stride", "row_bytes", "unit")]
    mine = [payload.itemsize, *offsets, payloads.itemsize, payloads.fields["count"][1]]
    assert run(plain, "layout").stdout.split() == [str(value) for value in mine]
    limits = dict(re.findall(r"constexpr int (kBlockRows|kMaxPayloads) = (\d+);", SOURCE.read_text()))
    assert limits == {"kBlockRows": str(compact_rows._BLOCK), "kMaxPayloads": str(compact_rows._MAX_PAYLOADS)}


def test_the_widest_word_that_everything_allows_is_chosen() -> None:
    base = torch.zeros(4096, dtype=torch.uint8)
    first = -base.data_ptr() % 16  # a place on a 16 byte boundary

    def unit(row_bytes: int, stride: int, offset: int) -> int:
        source = torch.as_strided(base, (3, row_bytes), (stride, 1), first + offset)
        table = compact_rows.describe([source], [torch.zeros(64 * 3, dtype=torch.uint8)[: 3 * row_bytes].view(3, row_bytes)])
        assert int(table["count"]) == 1
        entry = table["item"][0]
        assert (int(entry["source"]), int(entry["stride"]), int(entry["row_bytes"])) == (source.data_ptr(), stride, row_bytes)
        return int(entry["unit"])

    assert unit(32, 48, 0) == 16
    assert unit(32, 40, 0) == 4
    assert unit(32, 48, 4) == 4
    assert unit(32, 48, 1) == 1
    assert unit(7, 16, 0) == 1
    assert unit(12, 12, 0) == 4
    empty = compact_rows.describe([torch.zeros(3, 0)], [torch.zeros(3, 0)])
    assert int(empty["count"]) == 0
