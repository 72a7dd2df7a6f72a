"""accept_drafts on a GPU: host side of csrc/cuda/accept_drafts.cu."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dyndepth.cuda import compiler

_WARPS = 32  # that share a sampled row


def accept_drafts(
    drafts: Tensor,
    lengths: Tensor,
    target: Tensor,
    draft_probs: Tensor | None = None,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments as in dyndepth.ops.accept_drafts, already checked."""
    rows, most = drafts.shape
    accepted = torch.empty(rows, dtype=torch.int32, device=drafts.device)
    token = torch.empty(rows, dtype=torch.int64, device=drafts.device)
    if rows == 0:
        return accepted, token
    device = drafts.get_device()
    # Kept until the launch is queued: torch's allocator reuses memory in stream order, so that is long enough.
    drafts, lengths = drafts.contiguous(), lengths.contiguous()
    first, out = (drafts.data_ptr(), lengths.data_ptr()), (accepted.data_ptr(), token.data_ptr())
    if uniforms is None:
        target = target.contiguous()
        arguments = (*first, target.data_ptr(), np.int64(most), *out)
        compiler.launch("accept_drafts", "accept_drafts_greedy", device, rows, 32, arguments)
        return accepted, token
    uniforms = uniforms.contiguous()
    p, q = _distributions(target), _distributions(draft_probs)
    sizes = np.int64(most), np.int64(target.shape[2])
    sampled = (*first, *p, *q, uniforms.data_ptr(), *sizes, *out)
    compiler.launch("accept_drafts", "accept_drafts_sampled", device, rows, 32 * _WARPS, sampled)
    return accepted, token


def _distributions(probabilities: Tensor | None) -> tuple[int, np.int64, np.int64]:
    """Address, and elements between rows and between positions."""
    if probabilities is None:
        return 0, np.int64(0), np.int64(0)
    return probabilities.data_ptr(), np.int64(probabilities.stride(0)), np.int64(probabilities.stride(1))
