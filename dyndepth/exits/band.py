"""A band: layers that some rows skip, with everything needed to skip them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dyndepth.errors import ExitsError
from dyndepth.exits.criteria import Criterion, Decay, Never, RouterScore
from dyndepth.exits.heads import BlockHead, Head, NormHead
from dyndepth.exits.maps import AdapterJump, Jump, KVMap


class Band(nn.Module):
    """Rows leave at boundary `leave` and resume at boundary `resume`; an early exit has `resume` = number of layers.

    Args:
        leave, resume: boundaries; boundary e has e layers before it. 1 <= leave < resume.
        criterion: which rows take the band (dyndepth.exits.criteria).
        threshold: a scored criterion's rows leave at or above it; `inf` closes the band.
        head: an early exit's head; `NormHead()` by default. A band that resumes has none.
        jump: the residual at `resume` from the one at `leave`; None is the identity.
        kv: maps for the K,V policy `predict`; without them the band can only run under `propagate` or `none`.
        decay: CALM's position-dependent threshold, for criteria whose scores are shares (at most 1).
        shortlist: int64 [v], the vocabulary ids whose logits a logit criterion looks at; None is the whole vocabulary. The
            token itself always comes from the full head, once, at the end of the pass.
    """

    def __init__(
        self,
        leave: int,
        resume: int,
        criterion: Criterion | None = None,
        *,
        threshold: float = math.inf,
        head: Head | None = None,
        jump: Jump | None = None,
        kv: KVMap | None = None,
        decay: Decay | None = None,
        shortlist: Tensor | None = None,
    ) -> None:
        super().__init__()
        if type(leave) is not int or type(resume) is not int or not 1 <= leave < resume:
            raise ExitsError(f"band: wanted 1 <= leave < resume, got leave {leave}, resume {resume}")
        name = f"band [{leave}, {resume})"
        if math.isnan(threshold):
            raise ExitsError(f"{name}: threshold must not be NaN")
        if head is not None and jump is not None:
            raise ExitsError(f"{name}: a head (leaves for good) and a jump (resumes) exclude each other")
        if isinstance(jump, AdapterJump) and jump.up.shape[0] != resume - leave:
            raise ExitsError(f"{name}: wanted adapters of {resume - leave} layers, got {jump.up.shape[0]}")
        if kv is not None and kv.weight.shape[0] != resume - leave:
            raise ExitsError(f"{name}: wanted K,V maps of {resume - leave} layers, got {kv.weight.shape[0]}")
        history = () if criterion is None else criterion.history
        if any(not 1 <= boundary < leave for boundary in history):
            raise ExitsError(f"{name}: a router's history names boundaries in [1, {leave}), got {list(history)}")
        if decay is not None and criterion is not None and (not criterion.scored or criterion.most != 1):
            raise ExitsError(f"{name}: decay is made for scores in [0, 1], which criterion {criterion.kind} does not give")
        self.leave = leave
        self.resume = resume
        self.criterion = criterion or Never()
        self.threshold = float(threshold)
        self.decay = decay
        self.head = head
        self.jump = jump
        self.kv = kv
        if shortlist is not None and (shortlist.dim() != 1 or shortlist.dtype != torch.int64 or shortlist.shape[0] < 2):
            raise ExitsError(f"{name}: shortlist must be int64 [v] with v >= 2, got {shortlist.dtype} {list(shortlist.shape)}")
        self.shortlist = None if shortlist is None else nn.Parameter(shortlist, requires_grad=False)
        # Registered so that .to() and state_dict() reach it; the criterion itself is a frozen record.
        self.router = criterion.router if isinstance(criterion, RouterScore) else None

    def head_or_norm(self) -> Head:
        return NormHead() if self.head is None else self.head

    @property
    def has_block(self) -> bool:
        return isinstance(self.head, BlockHead)

    def thresholds(self, step: Tensor) -> Tensor:
        """float32 [rows]."""
        if self.decay is None:
            return torch.full_like(step, self.threshold, dtype=torch.float32)
        return self.decay.apply(self.threshold, step)

    def validate(self, layers: int, vocab_size: int) -> None:
        """Checks that need the model's sizes: what ends the network has a head, what resumes has none."""
        name = f"band [{self.leave}, {self.resume})"
        if self.resume > layers:
            raise ExitsError(f"{name}: the model has {layers} layers")
        if self.resume < layers and self.head is not None:
            raise ExitsError(f"{name}: resumes below the top (layer {layers}), so it cannot have an exit head")
        if self.resume == layers and self.jump is not None:
            raise ExitsError(f"{name}: leaves for good, so it wants a head, not a jump map")
        if self.shortlist is not None and not 0 <= int(self.shortlist.min()) <= int(self.shortlist.max()) < vocab_size:
            raise ExitsError(f"{name}: shortlist must hold ids in [0, {vocab_size})")
        if self.criterion.needs_logits and self.resume < layers:
            raise ExitsError(
                f"{name}: criterion {self.criterion.kind} reads the exit head's logits, and only bands that leave for good "
                "have a head"
            )

    def extra_repr(self) -> str:
        return f"[{self.leave}, {self.resume}), criterion={self.criterion.kind}, threshold={self.threshold:.4g}"
