"""router_score in Triton: one program per row; norm, two layers and sigmoid in one go."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch


@triton.jit
def _router_score(
    hidden, weight1, bias1, weight2, bias2, previous, cosine_weight, extra, extra_weight, live, scores, eps, rows,
    WIDTH: tl.constexpr, NEURONS: tl.constexpr, EXTRAS: tl.constexpr, BLOCK_NEURONS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    SILU: tl.constexpr, HAS_LIVE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    count = rows
    if HAS_LIVE:
        count = tl.minimum(tl.load(live), rows)
    if row >= count:
        return
    row = row.to(tl.int64)
    neuron, inner = tl.arange(0, BLOCK_NEURONS), tl.arange(0, BLOCK_INNER)
    known = neuron < NEURONS
    z = tl.zeros((BLOCK_NEURONS,), tl.float32)
    square = tl.zeros((BLOCK_INNER,), tl.float32)
    other = tl.zeros((BLOCK_INNER,), tl.float32)
    both = tl.zeros((BLOCK_INNER,), tl.float32)
    for start in range(0, WIDTH, BLOCK_INNER):
        column = start + inner
        inside = column < WIDTH
        x = tl.load(hidden + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight1 + neuron[:, None] * WIDTH + column[None, :], mask=known[:, None] & inside[None, :], other=0.0)
        z += tl.sum(w * x[None, :], axis=1)
        square += x * x
        if cosine_weight is not None:
            before = tl.load(previous + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
            other += before * before
            both += before * x
    length = tl.sum(square, axis=0)
    z = z / tl.sqrt(length / WIDTH + eps) + tl.load(bias1 + neuron, mask=known, other=0.0)
    if cosine_weight is not None:
        norms = tl.maximum(tl.sqrt(length), 1e-20) * tl.maximum(tl.sqrt(tl.sum(other, axis=0)), 1e-20)
        z += tl.load(cosine_weight + neuron, mask=known, other=0.0) * (tl.sum(both, axis=0) / norms)
    if extra is not None:
        for feature in range(EXTRAS):
            value = tl.load(extra + row * EXTRAS + feature)
            z += tl.load(extra_weight + neuron * EXTRAS + feature, mask=known, other=0.0) * value
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    logit = tl.sum(z * tl.load(weight2 + neuron, mask=known, other=0.0), axis=0) + tl.load(bias2)
    tl.store(scores + row, 1.0 / (1.0 + tl.exp(-logit)))


def router_score(
    hidden: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    previous: Tensor | None = None,
    cosine_weight: Tensor | None = None,
    extra: Tensor | None = None,
    extra_weight: Tensor | None = None,
    eps: float = 1e-6,
    silu: bool = True,
    live: Tensor | None = None,
) -> Tensor:
    """Host side; arguments as in dyndepth.ops.router_score, already checked."""
    rows, width = hidden.shape
    scores = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return scores
    neurons = weight1.shape[0]
    config = launch.router_score(rows, width, neurons)
    _router_score[config.grid](
        hidden, weight1, bias1, weight2, bias2, previous, cosine_weight, extra, extra_weight, live, scores, eps, rows,
        WIDTH=width, NEURONS=neurons, EXTRAS=0 if extra is None else extra.shape[1], BLOCK_NEURONS=config.block_columns,
        BLOCK_INNER=config.block_inner, SILU=silu, HAS_LIVE=live is not None, num_warps=config.num_warps,
    )  # fmt: skip
    return scores
