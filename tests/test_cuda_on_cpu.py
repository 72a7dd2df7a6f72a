"""csrc/cuda on the CPU: blocks of fibers with real barriers and warp collectives, in shuffled orders, and under sanitizers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import cuda_programs
import pytest

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
    "store_kv": [
        (dtype, *shape)
        for dtype in ("float32", "bfloat16", "float16")
        # rows, queries, heads, kv_heads, head_dim, rotary, elements before every first one
        for shape in (
            (1, 1, 4, 2, 16, 8, 0),
            (9, 4, 6, 2, 20, 5, 0),
            *((9, 9, 6, 2, 24, 8, shift) for shift in (0, 1, 4, 8)),
            (7, 0, 4, 2, 16, 0, 0),
            (7, 7, 4, 2, 15, 0, 0),
            (40, 40, 9, 3, 64, 32, 0),
            (5, 5, 1, 1, 1, 0, 1),
            (6, 3, 40, 8, 128, 64, 0),
        )
    ],
}
#: Too long to repeat with other seeds.
LONG: list[tuple[str, Arguments]] = [
    ("compact_rows", (70_000, "random")),
    ("accept_drafts", ("greedy", 70_000, 2)),
    ("accept_drafts", ("drawn", 3, 2, 128_256)),
    ("store_kv", ("bfloat16", 70_000, 70_000, 1, 1, 16, 8, 0)),
]
SANITIZED: dict[str, list[Arguments]] = {
    "compact_rows": [(rows, "random") for rows in (1, 33, 1024, 3000)],
    "accept_drafts": [
        ("greedy", 20, 33),
        *((kind, 10, 3, words) for kind in ("drawn", "certain") for words in (33, 1100)),
        ("drawn", 10, 0, 5),
    ],
    "store_kv": [
        (dtype, *shape)
        for dtype in ("float32", "bfloat16", "float16")
        for shape in ((9, 9, 6, 2, 24, 8, 0), (9, 4, 6, 2, 24, 8, 1), (9, 9, 6, 2, 20, 5, 0), (7, 7, 4, 2, 16, 0, 0))
    ],
}
#: Runs of which at least one notices a kernel that is wrong.
TELLING: dict[str, list[Arguments]] = {
    "compact_rows": [(rows, "random") for rows in (70, 1024, 3000)],
    "accept_drafts": [("greedy", 30, 70), ("drawn", 12, 3, 40), ("certain", 12, 3, 40), ("drawn", 12, 3, 2100)],
    "store_kv": [(dtype, 30, 20, 5, 2, 24, 8, 0) for dtype in ("float32", "bfloat16", "float16")],
}
MUTANTS = [
    ("compact_rows", "same & ((1u << lane) - 1)", "same & (1u << lane)"),
    ("compact_rows", "if (lane >= step) sum += other;", "sum += other;"),
    ("compact_rows", "among(p.kind, sums[0], sums[2] + sums[1],", "among(p.kind, sums[0], sums[2] + sums[0],"),
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
    ("store_kv", "row < a.q_rows && ", ""),
    ("store_kv", "a.live == nullptr || row < *a.live", "true"),
    ("store_kv", "(a.head_dim - a.rotary) /", "(a.head_dim - 2 * a.rotary) /"),
    ("store_kv", "!has_query : slot < 0", "!has_query : false"),
    ("store_kv", "} else if (slot >= 0) {", "} else {"),
    ("store_kv", "pages + a.plane + key", "pages + key"),
    ("store_kv", "a.k, row, kv_head", "a.k, row, head"),
    ("store_kv", "a * c.item[i] - b * s.item[i]", "a * c.item[i] + b * s.item[i]"),
    ("store_kv", "(sin + channel)", "(cos + channel)"),
    ("store_kv", "copy<kItems>(from, to, rotary + channel)", "copy<kItems>(from, to, channel)"),
    ("store_kv", "x == x ? ", "true ? "),
    ("store_kv", " + (bits >> 16 & 1u)", ""),
    ("store_kv", "0xfffu + (size >> 13 & 1u)", "0xfffu"),
    ("store_kv", "size > 0x7f800000u ? 0x7e00u : 0x7c00u", "0x7c00u"),
    ("store_kv", "size < (113u << 23)", "size < (112u << 23)"),
    ("store_kv", "size >= (143u << 23)", "size >= (144u << 23)"),
]
BARRIERS = [(op, number) for op in RIGHT for number in range(cuda_programs.source(op).count(cuda_programs.BARRIER))]


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_number_survives_its_conversions(plain: dict[str, Path], dtype: str) -> None:
    done = cuda_programs.run(plain["store_kv"], "every", dtype)
    assert done.returncode == 0, done.stdout
