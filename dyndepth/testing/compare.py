"""Moves are compared bit for bit; arithmetic against the error that PyTorch itself makes in the working dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_same(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Bitwise equality, dtype and shape included; NaNs with equal bits are equal."""
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, wanted {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, wanted {list(expected.shape)}"
    a, b = (t.contiguous().cpu() for t in (actual, expected))
    if a.numel() and a.dtype != torch.bool:
        a, b = a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)
    assert torch.equal(a, b), f"{what}: {int((a != b).sum())} of {a.numel()} bytes differ"


def assert_as_exact_as(
    actual: Tensor,
    reference: Tensor,
    truth: Tensor,
    *,
    what: str = "result",
    factor: float = 2.0,
    working: torch.dtype | None = None,
) -> None:
    """`actual` is at most `factor` times as far from `truth` as `reference` is, in the mean square and at the worst entry.

    `reference` is PyTorch's answer in the working dtype, `truth` the answer in higher precision. Half the dtype's epsilon
    (relative to the root mean square of truth; one epsilon for the worst entry) is always allowed: that is the rounding of
    the result itself, and a reference may be exact by luck. `working` names the dtype if results are wider than what they
    were computed in (statistics in float32 of bfloat16 products). Infinities and NaNs must sit in the same places.

    The mean square of fewer than 8 finite numbers is no average: they are allowed a whole epsilon there, too, or one number of
    the reference that happens to be exact would ask for the same luck (one entropy, 1e-8 off, beside one 8e-8 off).
    """
    assert actual.dtype == reference.dtype, f"{what}: dtype {actual.dtype}, wanted {reference.dtype}"
    assert actual.shape == truth.shape, f"{what}: shape {list(actual.shape)}, wanted {list(truth.shape)}"
    if actual.numel() == 0:
        return
    a, r, t = (x.detach().cpu().double() for x in (actual, reference, truth))
    finite = torch.isfinite(t)
    assert torch.equal(torch.isfinite(a), finite), f"{what}: finite in other places than the truth"
    assert torch.equal(a[~finite].nan_to_num(nan=0.5), t[~finite].nan_to_num(nan=0.5)), f"{what}: other infinities"
    a, r, t = a[finite], r[finite], t[finite]
    if t.numel() == 0:
        return
    epsilon = torch.finfo(working or actual.dtype).eps
    scale = float(t.pow(2).mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny))
    mine, theirs = (float((x - t).pow(2).mean().sqrt()) / scale for x in (a, r))
    allowed = epsilon / (2 if t.numel() >= 8 else 1)
    assert mine <= factor * theirs + allowed, f"{what}: rms error {mine:.3e}, PyTorch's own {theirs:.3e}"
    mine, theirs = (float((x - t).abs().max()) / scale for x in (a, r))
    assert mine <= factor * theirs + epsilon, f"{what}: worst error {mine:.3e}, PyTorch's own {theirs:.3e}"
