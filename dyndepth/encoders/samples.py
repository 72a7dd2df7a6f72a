"""Samples: the live batch of an encoder pass, where a row is a whole sample with a length of its own.

Two layouts hold the residuals. *Packed* is `[tokens, d]`, the samples one after the other: nothing is spent on padding, and
every layer whose attention goes through transformers' attention interface can run it. *Padded* is `[n, T, d]`, for layers
that look along time in other ways (convolutions, relative positions). Either way the samples that still run are the whole of
it: `split` moves them together, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.op import cpp_allowed
from dyndepth.ops import _cpp

#: How one vector stands for a sample: its first token, or the mean or the maximum over its tokens.
POOLINGS = ("first", "mean", "max")


@dataclass(frozen=True, slots=True)
class Leavers:
    """Samples that leave at a boundary, in their order there; int64 [k] each, on the CPU."""

    #: Their places among the samples at the boundary.
    at: Tensor
    #: Tokens of each.
    lengths: Tensor
    #: The caller's numbers.
    ids: Tensor


@dataclass
class Samples:
    """Samples at one boundary. `lengths` and `ids` live on the CPU: the shapes of a pass follow from them."""

    #: Packed [tokens, d] or padded [n, T, d]; padded entries past a sample's length are unspecified.
    hidden: Tensor
    #: int64 [n], tokens of each sample, at least 1.
    lengths: Tensor
    #: int64 [n], the caller's numbers of the samples.
    ids: Tensor
    #: Layers that ran.
    boundary: int = 0
    #: What criteria left with the samples at earlier boundaries, [n, ...] per name.
    carried: dict[str, Tensor] = field(default_factory=dict)
    #: What the family's layers want beside the residuals, [n, ...] per name.
    inputs: dict[str, Tensor] = field(default_factory=dict)
    #: What follows from `lengths`, worked out once for all layers that they pass.
    known: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    #: Pooled residuals, [n, d] by pooling (a criterion and its head read the same ones), and what they were made of.
    read: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.known.get("lengths") is not self.lengths:
            self.known = {"lengths": self.lengths}
        if self.read.get("hidden") is not self.hidden or self.read.get("lengths") is not self.lengths:
            self.read = {"hidden": self.hidden, "lengths": self.lengths}

    def fact(self, name: str, work_out: Callable[[], Any]) -> Any:
        """Something that follows from `lengths` alone; worked out on the first call."""
        if name not in self.known:
            self.known[name] = work_out()
        return self.known[name]

    @property
    def shortest(self) -> int:
        """Tokens of the shortest sample."""
        found: int = self.fact("shortest", lambda: int(self.lengths.numpy().min()))
        return found

    @property
    def count(self) -> int:
        return len(self.ids)

    @property
    def packed(self) -> bool:
        return self.hidden.dim() == 2

    @property
    def total(self) -> int:
        """Tokens of all samples, padding left out."""
        return int(self.lengths.sum())

    @property
    def starts(self) -> Tensor:
        """int64 [n], on the CPU: where each sample begins in the packed layout."""
        found: Tensor = self.fact("starts", lambda: torch.from_numpy(_starts(self.lengths.numpy())))
        return found

    def keep(self) -> Tensor:
        """bool [n, T]: the tokens of the padded layout that are not padding."""
        longest = int(self.lengths.max()) if self.packed else self.hidden.shape[1]
        return (torch.arange(longest) < self.lengths[:, None]).to(self.hidden.device)

    def owners(self) -> Tensor:
        """int64 [tokens]: the sample (0..n-1) of each token in packed order."""
        return torch.repeat_interleave(torch.arange(self.count), self.lengths).to(self.hidden.device)

    def tokens(self) -> Tensor:
        """[tokens, d] without padding, whatever the layout."""
        return self.hidden if self.packed else self.hidden[self.keep()]

    def padded(self) -> Tensor:
        """[n, T, d], zero past each sample's end if it has to be made."""
        if not self.packed:
            return self.hidden
        if self.count and self.shortest * self.count == len(self.hidden):
            return self.hidden.unflatten(0, (self.count, -1))
        keep = self.keep()
        # index_put, not assignment: gradients flow when recipes train heads through it.
        empty = self.hidden.new_zeros(*keep.shape, self.hidden.shape[-1])
        return empty.index_put(keep.nonzero(as_tuple=True), self.hidden)

    def first(self, tokens: int = 1) -> Tensor:
        """[n, tokens, d]: the first tokens of every sample (class and distillation tokens stand there)."""
        if tokens > 1 and self.count and self.shortest < tokens:
            raise ArgumentError(f"samples: wanted at least {tokens} tokens per sample, got {self.shortest}")
        if not self.packed:
            return self.hidden[:, :tokens]
        at = (self.starts[:, None] + torch.arange(tokens)).flatten() if tokens > 1 else self.starts
        return self.hidden.index_select(0, at.to(self.hidden.device)).unflatten(0, (-1, tokens))

    def pooled(self, how: str = "first") -> Tensor:
        """[n, d], one vector per sample, in the dtype of the residuals; sums are fp32."""
        if how not in POOLINGS:
            raise ArgumentError(f"samples: pooling must be one of {', '.join(POOLINGS)}, got {how!r}")
        if torch.is_grad_enabled():  # what one caller differentiates another may want without a graph
            return self._pooled(how)
        if how not in self.read:
            self.read[how] = self._pooled(how)
        return self.read[how]

    def _pooled(self, how: str) -> Tensor:
        if how == "first":
            return self.first()[:, 0]
        if how == "mean":
            return self.reduce(self.tokens()).to(self.hidden.dtype)
        return self.padded().masked_fill(~self.keep()[..., None], -torch.inf).amax(1)

    def reduce(self, values: Tensor) -> Tensor:
        """Means over each sample's tokens: values [tokens, ...] -> fp32 [n, ...]."""
        sums = values.new_zeros(self.count, *values.shape[1:], dtype=torch.float32)
        lengths = self.lengths.to(values.device).view(-1, *[1] * (values.dim() - 1))
        return sums.index_add(0, self.owners(), values.float()) / lengths

    def split(self, leaves: Tensor) -> tuple[Samples, Leavers]:
        """Those that run on and those that do not, in their order; `leaves` is bool [n] on the CPU. Moves are exact.

        Survivors alone move: compact_rows would keep those that leave behind them, unread, for twice the bytes.
        """
        if self._splits_in_one_call():
            split = torch.ops.dyndepth_cpp.split_samples.default
            hidden, lengths, ids, *found = split(self.hidden, self.lengths, self.ids, leaves, self.packed)
            gone = Leavers(*found)
            if len(gone.at) == 0:
                return self, gone
        else:
            gone = self.leavers(leaves)
            if len(gone.at) == 0:
                return self, gone
            stay = ~leaves
            lengths, ids = self.lengths[stay], self.ids[stay]
            kept = torch.repeat_interleave(stay, self.lengths) if self.packed else stay
            hidden = self.hidden.index_select(0, kept.nonzero()[:, 0].to(self.hidden.device))
        if not self.packed:
            hidden = hidden[:, : int(lengths.max()) if len(lengths) else 1]
        left = replace(self, hidden=hidden, lengths=lengths, ids=ids, carried={}, inputs={})
        if self.carried or self.inputs:
            at = (~leaves).nonzero()[:, 0].to(self.hidden.device)
            left.carried = {name: value.index_select(0, at) for name, value in self.carried.items()}
            left.inputs = {name: value.index_select(0, at) for name, value in self.inputs.items()}
        return left, gone

    def leavers(self, leaves: Tensor) -> Leavers:
        """Those for whom `leaves`, bool [n] on the CPU, is true."""
        at = leaves.nonzero()[:, 0]
        return Leavers(at, self.lengths[at], self.ids[at])

    def _splits_in_one_call(self) -> bool:
        """csrc/cpu/split_samples.cpp: two to three fifths of what the same steps take one by one between two layers.

        It is the encoders' compact_rows: who forces another provider for that op gets PyTorch's steps here.
        """
        hidden = self.hidden
        if hidden.device.type != "cpu" or not hidden.is_contiguous() or torch.is_grad_enabled():
            return False
        if torch.compiler.is_compiling() or _cpp.drops_tangents():
            return False
        return cpp_allowed("compact_rows") and _cpp.missing() is None

    @staticmethod
    def concatenate(parts: Sequence[Samples]) -> Samples:
        """Samples of several batches that wait at the same boundary, as one batch."""
        first = parts[0]
        for part in parts[1:]:
            if part.boundary != first.boundary or part.packed != first.packed:
                raise ArgumentError(
                    f"samples: only batches at one boundary and in one layout can be joined, got boundaries "
                    f"{first.boundary} and {part.boundary}"
                )
        if len(parts) == 1:
            return first
        if first.packed:
            hidden = torch.cat([part.hidden for part in parts])
        else:
            longest = max(part.hidden.shape[1] for part in parts)
            hidden = torch.cat([_stretched(part.hidden, longest) for part in parts])
        return replace(
            first,
            hidden=hidden,
            lengths=torch.cat([part.lengths for part in parts]),
            ids=torch.cat([part.ids for part in parts]),
            carried={name: torch.cat([part.carried[name] for part in parts]) for name in first.carried},
            inputs={name: torch.cat([part.inputs[name] for part in parts]) for name in first.inputs},
        )

    def taken(self, at: Tensor) -> Samples:
        """Some of the samples, by position (int64, CPU), in that order."""
        device = self.hidden.device
        there = at.to(device)
        if self.packed:
            starts = self.starts
            rows = [torch.arange(int(starts[i]), int(starts[i] + self.lengths[i])) for i in at.tolist()]
            hidden = self.hidden[torch.cat(rows).to(device) if rows else torch.zeros(0, dtype=torch.int64, device=device)]
        else:
            longest = int(self.lengths[at].max()) if len(at) else 1
            hidden = self.hidden[there, :longest]
        return replace(
            self,
            hidden=hidden,
            lengths=self.lengths[at],
            ids=self.ids[at],
            carried={name: value[there] for name, value in self.carried.items()},
            inputs={name: value[there] for name, value in self.inputs.items()},
        )


def _starts(lengths: Any) -> Any:
    """Where each sample begins, from numpy int64 [n]."""
    return lengths.cumsum() - lengths


def _stretched(hidden: Tensor, longest: int) -> Tensor:
    missing = longest - hidden.shape[1]
    return hidden if missing == 0 else torch.nn.functional.pad(hidden, (0, 0, 0, missing))
