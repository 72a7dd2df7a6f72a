"""exit_stats in Triton, two stages. One: a program per block of words multiplies all rows of a tile with it and keeps seven
numbers per row. Two: a program per row folds the blocks. The head is read once per tile of rows; no logit is written.

The RMSNorm in front is folded in: gains multiply the rows as they are loaded, the root mean square divides the products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .numerics import tanh


@triton.jit
def _block_stats(
    hidden, weight, bias, gain, ids, live, parts, best, eps, softcap, rows, words, blocks, weight_row,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    HAS_LIVE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    count = rows
    if HAS_LIVE:
        count = tl.minimum(tl.load(live), rows)
    # Row tiles vary fastest: programs that share a block of the head run together and find it in L2.
    block = tl.program_id(1)
    if tl.program_id(0) * BLOCK_ROWS >= count:
        return
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    word = block * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    row_mask, word_mask = row < count, word < words
    name = word.to(tl.int64)
    if ids is not None:
        name = tl.load(ids + word, mask=word_mask, other=0)
    inner = tl.arange(0, BLOCK_INNER)
    logits = tl.zeros((BLOCK_ROWS, BLOCK_WORDS), tl.float32)
    square = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, WIDTH, BLOCK_INNER):
        column = start + inner
        inside = column < WIDTH
        x = tl.load(hidden + row[:, None] * WIDTH + column[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0)
        if gain is not None:
            wide = x.to(tl.float32)
            square += tl.sum(wide * wide, axis=1)
            x = (wide * tl.load(gain + column, mask=inside, other=0.0)[None, :]).to(x.dtype)
        w = tl.load(weight + name[:, None] * weight_row + column[None, :], mask=word_mask[:, None] & inside[None, :], other=0.0)
        if EXACT:
            logits = tl.dot(x, tl.trans(w), logits, input_precision="ieee")
        else:
            logits = tl.dot(x, tl.trans(w), logits)
    if gain is not None:
        logits *= (1.0 / tl.sqrt(square / WIDTH + eps))[:, None]
    if bias is not None:
        logits += tl.load(bias + name, mask=word_mask, other=0.0).to(tl.float32)[None, :]
    if softcap > 0:
        logits = softcap * tanh(logits / softcap)
    logits = tl.where(word_mask[None, :], logits, float("-inf"))
    _write_parts(logits, parts, best, row, row_mask, rows, block, blocks, block * BLOCK_WORDS)


@triton.jit
def _write_parts(logits, parts, best, row, row_mask, rows, block, blocks, first_word):
    """Seven numbers per row of a tile of logits, into parts [6, rows, blocks] and best [rows, blocks]."""
    peak = tl.max(logits, axis=1)
    at = tl.argmax(logits, axis=1, tie_break_left=True)
    lane = tl.arange(0, logits.shape[1])[None, :]
    second = tl.max(tl.where(lane == at[:, None], float("-inf"), logits), axis=1)
    # -inf - -inf is NaN: a block whose logits are all -inf counts from 0 and adds nothing.
    gap = logits - tl.where(peak == float("-inf"), 0.0, peak)[:, None]
    e = tl.exp(gap)
    weighted = tl.where(gap < -100.0, 0.0, gap) * e  # -inf times 0 must be 0; NaN stays and spoils the row
    target = row.to(tl.int64) * blocks + block
    plane = rows.to(tl.int64) * blocks
    tl.store(parts + target, peak, mask=row_mask)
    tl.store(parts + plane + target, second, mask=row_mask)
    tl.store(parts + 2 * plane + target, tl.sum(e, axis=1), mask=row_mask)
    tl.store(parts + 3 * plane + target, tl.sum(weighted, axis=1), mask=row_mask)
    tl.store(parts + 4 * plane + target, tl.sum(e * e, axis=1), mask=row_mask)
    tl.store(parts + 5 * plane + target, tl.sum(2.0 * weighted * e, axis=1), mask=row_mask)
    tl.store(best + target, first_word + at, mask=row_mask)


@triton.jit
def _logit_stats(
    logits, live, parts, best, softcap, rows, words, blocks, first_block, row_stride,
    BLOCK_WORDS: tl.constexpr, HAS_LIVE: tl.constexpr,
):  # fmt: skip
    """The same numbers from logits that a library product wrote (many rows): a program per row and block of words."""
    count = rows
    if HAS_LIVE:
        count = tl.minimum(tl.load(live), rows)
    if tl.program_id(0) >= count:
        return
    row = tl.program_id(0) + tl.arange(0, 1)
    block = tl.program_id(1)
    word = block * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    z = tl.load(logits + row[:, None].to(tl.int64) * row_stride + word[None, :], mask=(word < words)[None, :], other=0.0)
    z = z.to(tl.float32)
    if softcap > 0:
        z = softcap * tanh(z / softcap)
    z = tl.where((word < words)[None, :], z, float("-inf"))
    first = first_block + block
    _write_parts(z, parts, best, row, row < rows, rows, first, blocks, first * BLOCK_WORDS)


@triton.jit
def _fold(
    parts, best, ids, live, argmax, top1, top2, logsumexp, entropy, entropy_half, rows, blocks, words,
    BLOCK: tl.constexpr, HAS_LIVE: tl.constexpr,
):  # fmt: skip
    """One program per row folds its blocks, each lane first on its own."""
    row = tl.program_id(0)
    count = rows
    if HAS_LIVE:
        count = tl.minimum(tl.load(live), rows)
    if row >= count:
        return
    plane = rows.to(tl.int64) * blocks
    parts += row.to(tl.int64) * blocks
    best += row.to(tl.int64) * blocks
    lane = tl.arange(0, BLOCK)
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    seconds = tl.full((BLOCK,), float("-inf"), tl.float32)
    wins = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, blocks, BLOCK):
        block = start + lane
        mask = block < blocks
        peak = tl.load(parts + block, mask=mask, other=float("-inf"))
        second = tl.load(parts + plane + block, mask=mask, other=float("-inf"))
        seconds = tl.maximum(tl.maximum(seconds, second), tl.minimum(peaks, peak))
        # Strictly better: the lowest position wins a tie, lanes walk upwards.
        wins = tl.where(peak > peaks, tl.load(best + block, mask=mask, other=0), wins)
        peaks = tl.maximum(peaks, peak)
    top = tl.max(peaks, axis=0)
    word = tl.min(tl.where(peaks == top, wins, 2147483647), axis=0)
    winner = tl.argmax(((peaks == top) & (wins == word)).to(tl.int32), axis=0)
    runner_up = tl.max(tl.where(lane == winner, seconds, tl.maximum(peaks, seconds)), axis=0)
    mass = tl.zeros((BLOCK,), tl.float32)
    slope = tl.zeros((BLOCK,), tl.float32)
    mass2 = tl.zeros((BLOCK,), tl.float32)
    slope2 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCK):
        block = start + lane
        mask = block < blocks
        own = tl.load(parts + block, mask=mask, other=float("-inf"))
        # Sums of a block are relative to its own peak; one that far below adds nothing that fp32 can hold.
        delta = tl.maximum(tl.where(own == float("-inf"), 0.0, own) - top, -80.0)
        shrink = tl.where(mask, tl.exp(delta), 0.0)
        m = tl.load(parts + 2 * plane + block, mask=mask, other=0.0)
        s = tl.load(parts + 3 * plane + block, mask=mask, other=0.0)
        m2 = tl.load(parts + 4 * plane + block, mask=mask, other=0.0)
        s2 = tl.load(parts + 5 * plane + block, mask=mask, other=0.0)
        mass += shrink * m
        slope += shrink * (s + delta * m)
        mass2 += shrink * shrink * m2
        slope2 += shrink * shrink * (s2 + 2.0 * delta * m2)
    total, total2 = tl.sum(mass, axis=0), tl.sum(mass2, axis=0)
    log_mass = tl.log(total)
    broken = tl.where(log_mass != log_mass, log_mass, 0.0)
    name = tl.minimum(word, words - 1).to(tl.int64)  # a row of NaN found no word
    if ids is not None:
        name = tl.load(ids + name)
    tl.store(argmax + row, name)
    tl.store(top1 + row, top + broken)
    tl.store(top2 + row, runner_up + broken)
    tl.store(logsumexp + row, top + log_mass)
    tl.store(entropy + row, log_mass - tl.sum(slope, axis=0) / total)
    tl.store(entropy_half + row, tl.log(total2) - tl.sum(slope2, axis=0) / total2)


def exit_stats(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    norm_gain: Tensor | None = None,
    eps: float = 1e-6,
    vocab_ids: Tensor | None = None,
    softcap: float = 0.0,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Host side; arguments as in dyndepth.ops.exit_stats, already checked."""
    rows, width = hidden.shape
    words = head_weight.shape[0] if vocab_ids is None else vocab_ids.shape[0]
    argmax = torch.empty(rows, dtype=torch.int64, device=hidden.device)
    numbers = [torch.empty(rows, dtype=torch.float32, device=hidden.device) for _ in range(5)]
    result = (argmax, numbers[0], numbers[1], numbers[2], numbers[3], numbers[4])
    if rows == 0:
        return result
    if rows > launch.EXIT_STATS_HANDOVER:
        parts, best, blocks = _parts_from_library(
            hidden, head_weight, head_bias, norm_gain, eps, vocab_ids, softcap, words, live
        )
    else:
        config = launch.exit_stats(rows, width, words, launch.Device.of(hidden), hidden.element_size())
        blocks = config.grid[1]
        parts, best = _scratch(rows, blocks, hidden.device)
        _block_stats[config.grid](
            hidden, head_weight, head_bias, norm_gain, vocab_ids, live, parts, best, eps, softcap, rows, words, blocks,
            head_weight.stride(0),
            WIDTH=width, BLOCK_ROWS=config.block_rows, BLOCK_WORDS=config.block_columns, BLOCK_INNER=config.block_inner,
            HAS_LIVE=live is not None, EXACT=hidden.dtype == torch.float32, num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip
    _fold[(rows,)](
        parts, best, vocab_ids, live, *result, rows, blocks, words,
        BLOCK=min(256, launch.power_of_two(blocks)), HAS_LIVE=live is not None, num_warps=4,
    )  # fmt: skip
    return result


def _scratch(rows: int, blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(6, rows, blocks, dtype=torch.float32, device=device),
        torch.empty(rows, blocks, dtype=torch.int32, device=device),
    )


def _parts_from_library(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    norm_gain: Tensor | None,
    eps: float,
    vocab_ids: Tensor | None,
    softcap: float,
    words: int,
    live: Tensor | None,
) -> tuple[Tensor, Tensor, int]:
    """Many rows: the product is compute-bound and the library's; its logits exist for one chunk of words at a time."""
    rows = hidden.shape[0]
    chunk, block = launch.EXIT_STATS_CHUNK, launch.EXIT_STATS_BLOCK
    blocks = launch.ceil_div(words, block)
    parts, best = _scratch(rows, blocks, hidden.device)
    if norm_gain is not None:
        hidden = torch.nn.functional.rms_norm(hidden.float(), hidden.shape[1:], norm_gain, eps).to(hidden.dtype)
    for start in range(0, words, chunk):
        which = slice(start, min(start + chunk, words))
        names = which if vocab_ids is None else vocab_ids[which]
        logits = torch.nn.functional.linear(hidden, head_weight[names], None if head_bias is None else head_bias[names])
        count = logits.shape[1]
        _logit_stats[(rows, launch.ceil_div(count, block))](
            logits, live, parts, best, softcap, rows, count, blocks, start // block, logits.stride(0),
            BLOCK_WORDS=block, HAS_LIVE=live is not None, num_warps=8,
        )  # fmt: skip
    return parts, best, blocks
