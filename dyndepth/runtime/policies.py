"""K,V policies: how rows that skip layers get K,V there, and which exits each policy can serve."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndepth.errors import ExitsError
from dyndepth.exits import Exits
from dyndepth.exits.criteria import HOLE_FREE, FixedDepth, PromptRouter, Schedule, View
from dyndepth.ops import ExitStats
from dyndepth.runtime.layer import Layer

#: `predict`: fitted maps of the exit residual. `propagate`: the skipped layers' own projections of it (CALM). `copy`: what the
#: last computed layer has (DYNAMAX, DREX). `recompute`: the row is parked and runs its other layers when a later token of its
#: sequence goes deeper (EE-LLM, FREE). `release`: its token is released early and the row goes on (Apparate). `none`: nothing
#: (only where no later row reads the holes).
KV_POLICIES = ("predict", "propagate", "copy", "recompute", "release", "none")
#: Policies under which every K,V that a row reads is the full model's own.
EXACT = ("recompute", "release")


def check_policy(exits: Exits | None, kv_policy: str) -> None:
    """Raise unless every band can run under this policy."""
    if kv_policy not in KV_POLICIES:
        raise ExitsError(f"kv must be one of {', '.join(KV_POLICIES)}, got {kv_policy!r}")
    for band in exits or ():
        name = f"band [{band.leave}, {band.resume})"
        if kv_policy == "predict" and band.kv is None and band.criterion.kind != "never":
            raise ExitsError(f"{name} has no K,V maps for kv='predict'; fit them or use kv='propagate'")
        if kv_policy == "none" and band.criterion.kind not in HOLE_FREE:
            raise ExitsError(
                f"kv='none' leaves holes that later rows of a sequence would read under criterion {band.criterion.kind} of "
                f"{name}; it works with {', '.join(HOLE_FREE)}"
            )
        if kv_policy in EXACT and band.resume != exits.model.layers:  # type: ignore[union-attr]
            raise ExitsError(
                f"kv={kv_policy!r} keeps every residual the full model's own, so rows may leave for good only; {name} resumes"
            )
        if kv_policy == "copy" and band.leave < 1:
            raise ExitsError(f"kv='copy' copies from the last computed layer; {name} has none before it")
    if kv_policy == "none" and exits is not None:
        _check_holes(exits)


def _check_holes(exits: Exits) -> None:
    """Under `none`, no step may run a layer that an earlier step of the sequence left out.

    Each criterion of HOLE_FREE alone never does that, but a schedule can keep rows from another band's boundary.
    """
    if any(isinstance(band.criterion, PromptRouter) for band in exits):
        if any(isinstance(band.criterion, Schedule) for band in exits):
            raise ExitsError(
                "kv='none' leaves holes that later rows of a sequence would read: a schedule beside bands that prompts decide, "
                "which keep rows from its boundaries"
            )
        return  # all tokens of a sequence go the same way
    steps = torch.arange(1 + max((b.criterion.length for b in exits if isinstance(b.criterion, Schedule)), default=0))
    zeros = torch.zeros_like(steps)
    resumes, ran = zeros, torch.ones(exits.model.layers, len(steps), dtype=torch.bool)
    for band in exits:
        if isinstance(band.criterion, FixedDepth):
            continue  # a request that names its depth is not judged by anything else, and the same at every step
        view = View(
            hidden=zeros, seq=zeros, step=steps, previous=None, stats=_no_stats, depth=None, leave=band.leave,
            layers=exits.model.layers,
        )  # fmt: skip
        leaves = (resumes <= band.leave) & band.criterion.leaves(view, band.thresholds(steps))
        ran[band.leave : band.resume] &= ~leaves
        resumes = torch.where(leaves, band.resume, resumes)
    if bool((ran[:, 1:] & ~ran[:, :-1]).any()):
        raise ExitsError(
            "kv='none' leaves holes that later rows of a sequence would read: with these bands a later step runs a layer that "
            "an earlier one skipped"
        )


def _no_stats() -> ExitStats:
    raise ExitsError("kv='none' works with criteria that read no logits")


def copy_last(pages: Tensor, slots: Tensor, leave: int, resume: int, layers: list[Layer]) -> None:
    """`copy`: K,V of layers [leave, resume) at `slots` become those of the last layer before `leave`.

    Keys are copied as they are stored, rotated; where layers rotate differently (Gemma 3), from the last layer before `leave`
    that rotates the same way, if there is one.
    """
    slots = slots[slots >= 0].long()
    flat = pages.flatten(2, 3)  # [layers, 2, slots, kv_heads, head_dim]
    for number in range(leave, resume):
        same = [below for below in range(leave) if layers[below].variant == layers[number].variant]
        flat[number, :, slots] = flat[same[-1] if same else leave - 1, :, slots]
