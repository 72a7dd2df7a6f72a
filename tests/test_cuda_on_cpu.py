"""csrc/cuda on the CPU: blocks of fibers with real barriers and warp collectives, in shuffled orders, and under sanitizers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import cuda_programs
import op_harness
import pytest
import torch

from dyndepth.cuda import accept_drafts, compact_rows
from dyndepth.op import REGISTRY
from dyndepth.testing import CASES, Case, assert_same

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

Arguments = tuple[Any, ...]

#: Arguments of each program that must pass, without the seed that comes last.
RIGHT: dict[str, list[Arguments]] = {
    "compact_rows": [
        (rows, pattern)
        for rows in (1, 2, 31, 32, 33, 1023, 1024, 1025, 4096)
        for pattern in ("none", "all", "away", "odd", "random")
    ],
    "accept_drafts": [
        *(("greedy", rows, most) for rows, most in [(1, 0), (9, 1), (40, 7), (20, 31), (20, 32), (20, 33), (9, 200)]),
        *(("drawn", 17, 3, words) for words in (1, 2, 31, 32, 33, 1023, 1024, 1025, 4096, 40_001)),
        *(("certain", 17, 3, words) for words in (1, 2, 33, 1025, 40_001)),
        ("drawn", 9, 0, 50),
        ("certain", 9, 0, 50),
        ("drawn", 12, 70, 5),
    ],
}
#: Too long to repeat with other seeds.
LONG: list[tuple[str, Arguments]] = [
    ("compact_rows", (70_000, "random")),
    ("accept_drafts", ("greedy", 70_000, 2)),
    ("accept_drafts", ("drawn", 3, 2, 128_256)),
]
SANITIZED: dict[str, list[Arguments]] = {
    "compact_rows": [(rows, "random") for rows in (1, 33, 1024, 3000)],
    "accept_drafts": [
        ("greedy", 20, 33),
        ("drawn", 8, 3, 33),
        ("drawn", 8, 3, 1100),
        ("certain", 8, 3, 1100),
        ("drawn", 3, 0, 5),
    ],
}
#: Runs of which at least one notices a kernel that is wrong.
TELLING: dict[str, list[Arguments]] = {
    "compact_rows": [(rows, "random") for rows in (70, 1024, 3000)],
    "accept_drafts": [("greedy", 30, 70), ("drawn", 12, 3, 40), ("certain", 12, 3, 40), ("drawn", 12, 3, 2100)],
}
MUTANTS = [
    ("compact_rows", "same & ((1u << lane) - 1)", "same & (1u << lane)"),
    ("compact_rows", "if (lane >= step) sum += other;", "sum += other;"),
    ("compact_rows", "first[3] = {sums[0], sums[2] + sums[1],", "first[3] = {sums[0], sums[2] + sums[0],"),
    ("compact_rows", "if (b < block) own[kind] += count;", "if (b <= block) own[kind] += count;"),
    ("compact_rows", "for (int i = thread; i < words; i += width)", "for (int i = thread; i <= words; i += width)"),
    ("compact_rows", "from + old_row * payload.from_stride", "from + old_row * payload.row_bytes"),
    ("accept_drafts", "first + __ffs(refused) - 1", "__ffs(refused) - 1"),
    ("accept_drafts", "length < 0 ? 0 : ", ""),
    ("accept_drafts", "(length < most ? length : most)", "length"),
    ("accept_drafts", "if (lane >= step) own += other;", "own += other;"),
    ("accept_drafts", "running > threshold", "running >= threshold"),
    ("accept_drafts", "(chosen > 0 ? skipped : 0)", "skipped"),
    ("accept_drafts", "(chosen > 0 ? skipped : 0)", "0"),
    ("accept_drafts", "sums[round % 2]", "sums[0]"),
    ("accept_drafts", "uniforms[most], sums + 2)", "uniforms[most], sums)"),
    ("accept_drafts", "threshold < total ? threshold : total - 1", "threshold"),
    ("accept_drafts", "token == without", "token == without + 1"),
    ("accept_drafts", "draft < 0 || ", ""),
    ("accept_drafts", "draft >= vocabulary", "draft > vocabulary"),
    ("accept_drafts", "if (kept < length)", "if (kept <= length)"),
    ("accept_drafts", "positive < 1.f ? positive : 1.f", "positive"),
    ("accept_drafts", "probability > 0.f ? probability : 0.f", "probability"),
    ("accept_drafts", "const double certain = q == nullptr", "const float certain = q == nullptr"),
    ("accept_drafts", "q + kept * q_place", "q"),
    ("accept_drafts", "p += row * p_row", "p += row * p_place * (most + 1)"),
]
BARRIERS = [(op, number) for op in RIGHT for number in range(cuda_programs.source(op).count(cuda_programs.BARRIER))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {op: cuda_programs.build(tmp_path_factory.mktemp("plain"), op, "-O2") for op in RIGHT}


def _name(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(("op", "arguments"), [(op, one) for op in RIGHT for one in RIGHT[op]], ids=_name)
def test_right_answers_in_any_order_of_threads(plain: dict[str, Path], op: str, arguments: Arguments) -> None:
    """Every value, and nothing written beside them; rows, strides and addresses that are multiples of little."""
    for seed in (1, 2):
        done = cuda_programs.run(plain[op], *arguments, seed)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("op", "arguments"), LONG, ids=_name)
def test_right_answers_at_length(plain: dict[str, Path], op: str, arguments: Arguments) -> None:
    done = cuda_programs.run(plain[op], *arguments, 3)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("op", sorted(SANITIZED))
def test_under_sanitizers(tmp_path: Path, op: str) -> None:
    """No byte read or written out of bounds, no misaligned word, no overflow."""
    program = cuda_programs.build(tmp_path, op, *cuda_programs.SANITIZERS)
    for arguments in SANITIZED[op]:
        done = cuda_programs.run(program, *arguments, 1)
        assert done.returncode == 0, done.stdout + done.stderr


def fails(op: str, program: Path) -> bool:
    return any(cuda_programs.run(program, *one, seed).returncode != 0 for seed in range(6) for one in TELLING[op])


@pytest.mark.parametrize(("op", "number"), BARRIERS)
def test_every_barrier_is_needed_and_its_loss_is_seen(tmp_path: Path, op: str, number: int) -> None:
    assert fails(op, cuda_programs.mutated(tmp_path, op, cuda_programs.without_barrier(op, number)))


@pytest.mark.parametrize(("op", "old", "new"), MUTANTS)
def test_wrong_kernels_are_seen(tmp_path: Path, op: str, old: str, new: str) -> None:
    text = cuda_programs.source(op)
    assert text.count(old) == 1
    assert fails(op, cuda_programs.mutated(tmp_path, op, text.replace(old, new)))


@pytest.fixture(scope="module")
def misuse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cuda_programs.build(tmp_path_factory.mktemp("misuse"), "misuse", "-O1")


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
        ("broadcast_from_outside", "__shfl_sync: reads a lane outside its mask"),
    ],
)
def test_misuse_is_caught(misuse: Path, kernel: str, message: str) -> None:
    done = cuda_programs.run(misuse, kernel)
    assert done.returncode == 1
    assert message in done.stdout


@pytest.mark.parametrize("kernel", ["right", "right_collectives"])
def test_a_right_kernel_passes(misuse: Path, kernel: str) -> None:
    assert cuda_programs.run(misuse, kernel).returncode == 0


def host_cases(op: str) -> list[Any]:
    """Those that a fiber per thread can afford."""
    return [pytest.param(op, case, id=f"{op}-{case.name}") for case in CASES[op] if not (case.large or case.gpu)]


@pytest.mark.parametrize(("op", "case"), [one for op in sorted(RIGHT) for one in host_cases(op)])
def test_host_and_kernel_together(folder: Path, op: str, case: Case) -> None:
    """The provider as a GPU would run it, launches aside: which kernel, how wide, and the arguments as bytes."""
    arguments = case.build()
    expected = op_harness._flat(REGISTRY[op].reference(**arguments))
    own = op_harness.copied(arguments)
    with cuda_programs.cuda_provider(op, folder) as kernels:
        found = op_harness._flat(REGISTRY[op](**own))
    rows = next(iter(arguments.values())).shape[0]
    assert bool(kernels.launched) == (rows > 0)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other.contiguous(), f"{op} {case.name}")


@pytest.mark.parametrize("name", ["greedy_long", "odd", "certain"])
def test_drafts_at_any_strides(folder: Path, name: str) -> None:
    arguments = next(case for case in CASES["accept_drafts"] if case.name == name).build()

    def spread(value: Any) -> Any:
        if value is None or value.dim() == 1:
            return value
        wide = value.new_zeros([3 * value.shape[1], 2 * value.shape[0], *[size + 5 for size in value.shape[2:]]])
        view = wide[::3, ::2].transpose(0, 1)
        return (view[..., 3:-2] if value.dim() == 3 else view).copy_(value)

    expected = REGISTRY["accept_drafts"].reference(**arguments)
    strided = {key: spread(value) for key, value in arguments.items()}
    with cuda_programs.cuda_provider("accept_drafts", folder):
        found = REGISTRY["accept_drafts"](**strided)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, name)


def test_drafts_python_knows_the_kernel_s_width() -> None:
    assert re.findall(r"constexpr int kWarps = (\d+);", cuda_programs.source("accept_drafts")) == [str(accept_drafts._WARPS)]


def test_python_fills_the_structures_that_the_kernel_reads(plain: dict[str, Path]) -> None:
    payload, payloads = compact_rows._PAYLOAD, compact_rows._PAYLOADS
    offsets = [payload.fields[name][1] for name in ("source", "target", "stride", "row_bytes", "unit")]
    mine = [payload.itemsize, *offsets, payloads.itemsize, payloads.fields["count"][1]]
    assert cuda_programs.run(plain["compact_rows"], "layout").stdout.split() == [str(value) for value in mine]
    limits = dict(re.findall(r"constexpr int (kBlockRows|kMaxPayloads) = (\d+);", cuda_programs.source("compact_rows")))
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
