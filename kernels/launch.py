"""Launch choice: pure functions from a problem to a frozen record. Printable, testable without a GPU.

A batch size is never part of a choice, only buckets of row counts: an engine that pads to powers of two must not meet a new
kernel at every step. Rules come first; a table may overrule the tile sizes of a key (tables.py), grids follow from them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .tables import Key, Tiles, chosen

#: Above this many rows the head product is compute-bound and the library's job.
EXIT_STATS_HANDOVER = 128
#: Words per library product (logits of 512 rows in bf16: 16 MiB) and per program of the pass over them; the first is a
#: multiple of the second.
EXIT_STATS_CHUNK, EXIT_STATS_BLOCK = 16384, 2048
#: Rows of ragged_linear that meet a weight while it is in L2; a multiple of its tallest tile.
RAGGED_LINEAR_GROUP = 1024


@dataclass(frozen=True)
class Device:
    """What a choice may depend on."""

    #: Streaming multiprocessors (compute units).
    processors: int = 132
    #: Shared memory (LDS) that one program can have: 227 KiB on sm_90 and sm_100, 163 on sm_80, 99 on sm_86, 89 and 120; 64 on
    #: gfx942 and 160 on gfx950. What asks for more fails at its first launch.
    shared_bytes: int = 232448
    #: Threads that run in step, one warp (wavefront): 32 on NVIDIA, 64 on CDNA.
    lanes: int = 32
    #: sm_90, gfx942, ...: whose tables to ask. Empty: none, rules alone.
    architecture: str = ""

    @staticmethod
    def of(tensor: Tensor) -> Device:
        """The tensor's device; the default for tensors on the CPU (Triton's interpreter)."""
        return _known(tensor.device.index or 0) if tensor.is_cuda else Device()


@functools.cache
def _known(index: int) -> Device:
    facts = torch.cuda.get_device_properties(index)
    most = getattr(facts, "shared_memory_per_block_optin", 0) or getattr(facts, "shared_memory_per_block", 0)
    name = getattr(facts, "gcnArchName", "").partition(":")[0] if torch.version.hip else f"sm_{facts.major}{facts.minor}"
    return Device(facts.multi_processor_count, most or 49152, getattr(facts, "warp_size", 32), name)


@dataclass(frozen=True)
class LaunchConfig:
    """A kernel's grid and tile sizes; sizes a kernel does not have stay 1."""

    grid: tuple[int, ...]
    num_warps: int
    num_stages: int = 2
    block_rows: int = 1
    block_columns: int = 1
    block_inner: int = 1
    splits: int = 1


def power_of_two(value: int, least: int = 1) -> int:
    """The smallest power of two that is at least `value` and `least`."""
    return max(least, 1 << max(0, value - 1).bit_length())


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def fitting(device: Device, itemsize: int, tile_rows: int, inner: int, stages: int, least_inner: int = 16) -> tuple[int, int]:
    """(inner, stages): the deepest pipeline, then the widest step over the inner dimension, that shared memory holds.

    A stage holds `tile_rows` rows of `inner` elements, operands of one step. Two stages overlap loading with computing,
    so the inner dimension shrinks before the pipeline gets shorter than that. A quarter is left for layout conversions.
    """
    room = device.shared_bytes * 3 // 4

    def bytes_of(stages: int) -> int:
        return stages * tile_rows * inner * itemsize

    while stages > 2 and bytes_of(stages) > room:
        stages -= 1
    while inner > least_inner and bytes_of(stages) > room:
        inner //= 2
    return inner, stages


def row_bucket(rows: int, most: int = 64) -> int:
    """Rows per tile: 16 (the least a tensor core takes), 32 or 64."""
    return min(most, power_of_two(rows, 16))


def key_of(op: str, device: Device, itemsize: int, shape: tuple[int, ...], rows: int) -> Key:
    """What tables know a launch by: of the rows the power of two from 16 to 1024 that holds them."""
    bucket = min(RAGGED_LINEAR_GROUP, power_of_two(rows, 16))
    return Key(op, device.architecture, "half" if itemsize < 4 else "float32", shape, bucket)


def _config(grid: tuple[int, ...], tiles: Tiles, splits: int = 1) -> LaunchConfig:
    sizes = (tiles.block_rows, tiles.block_columns, tiles.block_inner)
    return LaunchConfig(grid, tiles.num_warps, tiles.num_stages, *sizes, splits)


def exit_stats(rows: int, width: int, words: int, device: Device, itemsize: int = 2) -> LaunchConfig:
    """One program per block of words for all rows of a tile: the head is read once per tile of 64 rows."""
    block_rows = row_bucket(rows)
    block_columns = 128 if block_rows <= 32 else 64
    if ceil_div(words, block_columns) < 2 * device.processors:
        block_columns = max(32, block_columns // 2)
    inner, stages = fitting(device, itemsize, block_rows + block_columns, min(128, power_of_two(width, 16)), 4)
    # fp32 products run without tensor cores: their operands fill the registers of four warps. So does float16 on sm_120, where
    # 64 rows beside a counter on the device spilled.
    few = block_columns <= 64 and itemsize < 4 and device.architecture != "sm_120"
    rule = Tiles(block_rows, block_columns, inner, 4 if few else 8, stages)
    tiles = chosen(key_of("exit_stats", device, itemsize, (words, width), rows), rule)
    return _config((ceil_div(rows, tiles.block_rows), ceil_div(words, tiles.block_columns)), tiles)


def projection(
    rows: int, width: int, heads: int, half: int, whole_head: bool, device: Device, itemsize: int = 2
) -> LaunchConfig:
    """Tiles of rotary pairs: channels i and i + half of a head meet in one program. `half` is head_dim / 2 rounded up.

    `whole_head` (a norm over each head follows) forbids splitting a head's pairs over programs.
    """
    block_rows = row_bucket(rows)
    pairs = power_of_two(half, 16)
    while not whole_head and pairs > 16 and heads * ceil_div(half, pairs) < 2 * device.processors:
        pairs //= 2
    inner, stages = fitting(device, itemsize, block_rows + 2 * pairs, min(128, power_of_two(width, 16)), 4)
    rule = Tiles(block_rows, pairs, inner, 4 if itemsize < 4 else 8, stages)  # warps as in exit_stats
    tiles = chosen(key_of("projection", device, itemsize, (heads, half, width, int(whole_head)), rows), rule)
    return _config((heads * ceil_div(half, tiles.block_columns), ceil_div(rows, tiles.block_rows)), tiles)


def ragged_linear(rows: int, outputs: int, width: int, gated: bool, device: Device, itemsize: int = 2) -> LaunchConfig:
    """Programs that stay: as many as run at once, each walks over tiles [block_rows, block_columns] of the output.

    `rows` is the buffer's length: how many of them are live is known to the device alone. Up to 64 rows are a matter of reading
    weights: one tile holds all of them, and tiles get narrow until every processor has two to read. More rows are arithmetic:
    large tiles, smaller ones only while more than a quarter of the processors would have none.
    """
    bucket, weights = min(RAGGED_LINEAR_GROUP, power_of_two(rows, 16)), 2 if gated else 1
    exact = itemsize >= 4  # without tensor cores operands lie in registers: smaller tiles, more warps
    shapes = [(128, 128), (128, 64), (64, 64), (64, 32)] if bucket > 64 else [(bucket, columns) for columns in (64, 32, 16)]
    if device.architecture == "sm_100" and not gated:  # sums come out of tensor memory whole: beside a residual 128 x 128 spill
        shapes = [shape for shape in shapes if shape != (128, 128)]
    shapes = [(min(height, 64), min(columns, 64)) for height, columns in shapes] if exact else shapes
    wanted = device.processors * 3 // 4 if bucket > 64 else 2 * device.processors
    for block_rows, columns in shapes:
        block_columns = max(16, block_rows // 2, columns // weights)
        if bucket // block_rows * ceil_div(outputs, block_columns) >= wanted:
            break
    # A cache line of every row at a time. Tables may choose another per bucket of rows: sums are in one order within a bucket.
    line = min(128 // itemsize, power_of_two(width, 16))
    # Few rows: one weight needs a deeper pipeline to have as many bytes under way as two. CDNA pays for depth in scalar
    # registers: beyond this they spill.
    depth = 4 if gated or block_rows > 32 else 6
    if device.lanes > 32:
        depth = 2 if exact else 3
    # No more warps than a tile has pieces of a matrix instruction, 16 x 8: the others would repeat what one of them does.
    warps = min(8 if bucket > 64 or exact else 4, block_rows * block_columns // 128)
    aligned = width * itemsize % 16 == 0
    inner, stages = fitting(device, itemsize, block_rows + weights * block_columns, line, depth if aligned else 1)
    if aligned:  # with more warps the smaller operand would be loaded in pieces of less than 16 bytes a lane
        warps = max(1, min(warps, min(block_rows, block_columns) * inner * itemsize // (16 * device.lanes)))
    else:  # rows that begin anywhere are loaded by elements, which a pipeline or few warps would hold in registers
        warps = 8
    rule = Tiles(block_rows, block_columns, inner, warps, stages)
    tiles = chosen(key_of("ragged_linear", device, itemsize, (outputs, width, weights), rows), rule)
    count = ceil_div(rows, tiles.block_rows) * ceil_div(outputs, tiles.block_columns)
    return _config((min(count, (1 if tiles.block_rows > 64 else 4) * device.processors),), tiles)


def ragged_attention(
    rows: int, kv_heads: int, group: int, head_dim: int, reach: int, device: Device, itemsize: int = 2
) -> LaunchConfig:
    """One program per row, K,V head and split of the context; splits fill the machine when rows are few.

    `reach` is how far the block table reaches: contexts are read on the device, so the split count comes from the bound.
    """
    # Keys per step: K and V of a stage are what shared memory holds, and here the keys are what can shrink.
    block_columns, stages = fitting(device, itemsize, 2 * power_of_two(head_dim, 16), 64 if head_dim <= 128 else 32, 3)
    rule = Tiles(power_of_two(group, 16), block_columns, power_of_two(head_dim, 16), 4, stages)
    tiles = chosen(key_of("ragged_attention", device, itemsize, (kv_heads, group, head_dim), rows), rule)
    most = max(1, ceil_div(reach, 4 * tiles.block_columns))
    wanted = ceil_div(4 * device.processors, max(1, rows * kv_heads))
    splits = max(1, min(most, wanted, 64))
    return _config((rows, kv_heads, splits), tiles, splits)


def router_score(rows: int, width: int, neurons: int) -> LaunchConfig:
    """One program per row; the weights are small and stay in cache."""
    block_columns = power_of_two(neurons)
    return LaunchConfig(
        grid=(rows,),
        num_warps=4,
        block_columns=block_columns,
        block_inner=max(16, min(power_of_two(width), 8192 // block_columns)),
    )


def store_kv(rows: int, heads: int, kv_heads: int, head_dim: int) -> LaunchConfig:
    """One small program per row and head."""
    return LaunchConfig(grid=(rows, heads + kv_heads), num_warps=1, block_columns=power_of_two(head_dim))


def compact_rows(rows: int) -> LaunchConfig:
    """The partition is one program's work at any row count: state is one byte per row."""
    return LaunchConfig(grid=(1,), num_warps=4 if rows <= 1024 else 8, block_rows=min(1024, power_of_two(rows, 16)))


def move_rows(rows: int, row_words: int) -> LaunchConfig:
    """Rows of 4-byte words, one program per row and chunk of 2048 words."""
    block = min(2048, power_of_two(row_words, 32))
    return LaunchConfig(grid=(rows, ceil_div(row_words, block)), num_warps=4 if block > 256 else 1, block_columns=block)
