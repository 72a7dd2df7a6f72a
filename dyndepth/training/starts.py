"""Where heads and jumps start: copies of layers, random weights, and closed-form maps that no gradient has to find again.

On SmolLM2-135M a ridge regression from an exit's residual to the final normed state agrees with the full model about as often
as Balcony's start does after a hundred thousand tokens of training, so `ridge` starts are the default.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dyndepth.closed_form.ridge import NormalEquations, solve_best
from dyndepth.errors import ArgumentError
from dyndepth.exits import JUMPS, AdapterJump, Band, JumpMap, MlpHead, MlpJump, NormHead, TranslatorHead
from dyndepth.exits.heads import HEADS, Head
from dyndepth.exits.maps import Jump
from dyndepth.exits.products import EPS
from dyndepth.ops._math import rms_normalise
from dyndepth.runtime.bind import Model
from dyndepth.runtime.bind_layer import optional
from dyndepth.runtime.block import block_head

#: Per head, the starts it can have; the first is the default. `zero` and `random` agree with the final norm alone, before
#: training. `+ridge` adds a readout in closed form to a copied layer; `last` alone is Balcony's, `copy` (the last layer and
#: the final norm) EE-Tuning's.
INITS: dict[str, tuple[str, ...]] = {
    "norm": ("none",),
    "translator": ("ridge", "zero"),
    "mlp": ("ridge", "random"),
    "block": ("next+ridge", "last+ridge", "random+ridge", "next", "last", "random", "copy"),
}


def start_head(
    kind: str, model: Model, leave: int, init: str, *, rank: int | None, inner: int | None, generator: torch.Generator
) -> Head:
    """A head before any data: what a ridge start does not decide. `readout` (see `fit_readout`) fills in the rest."""
    if kind not in HEADS:
        raise ArgumentError(f"train: head must be one of {', '.join(HEADS)}, got {kind!r}")
    if init not in INITS[kind]:
        raise ArgumentError(f"train: init of a {kind} head must be one of {', '.join(INITS[kind])}, got {init!r}")
    width, ready = model.hidden_size, model.ready_size
    if rank is not None and not 1 <= rank <= min(width, ready):
        raise ArgumentError(f"train: rank must be in [1, {min(width, ready)}], or 0 for the whole matrix, got {rank}")
    if kind == "norm":
        return NormHead()
    readout = TranslatorHead(width, ready, rank) if "ridge" in init or kind == "translator" else None
    if kind == "translator":
        assert readout is not None
        if readout.down is not None:
            readout.down.data.normal_(0, width**-0.5, generator=generator)
        return readout
    if kind == "mlp":
        head = MlpHead(width, inner or width, readout)
        head.up.data.normal_(0, width**-0.5, generator=generator)
        return head
    source = init.partition("+")[0]
    block = block_head(model, leave, "next" if source == "next" else "last")
    if source == "random":
        _randomise(block.layer, 0.0 if model.family.one_plus_gain else 1.0, generator)
    norm = optional(model.decoder, model.family.final_norm)
    if (readout is not None or init == "copy") and norm is not None:
        block.norm = copy.deepcopy(norm).requires_grad_(False)  # the readout corrects what the final norm makes of it
    block.readout = readout
    return block


def start_jump(kind: str, band: Band, inner: int | None, generator: torch.Generator) -> Jump | None:
    """A band's jump as a map of another kind that computes the same until a gradient changes it; the band's own if linear.

    `inner`: neurons of the feed-forward block(s); None takes the width for an mlp and a sixth of it per layer for an adapter.
    """
    if kind not in JUMPS:
        raise ArgumentError(f"train: jump must be one of {', '.join(JUMPS)}, got {kind!r}")
    if kind == JumpMap.kind:
        return band.jump
    if not isinstance(band.jump, JumpMap):
        raise ArgumentError(
            f"train: band [{band.leave}, {band.resume}) has no linear jump that a jump of kind {kind} could start from"
        )
    width = band.jump.weight.shape[0]
    jump: MlpJump | AdapterJump
    if kind == MlpJump.kind:
        jump = MlpJump(width, inner or width)
    else:
        jump = AdapterJump(width, band.resume - band.leave, inner or max(1, width // 6))
        jump.gate.data.normal_(0, width**-0.5, generator=generator)
    jump.up.data.normal_(0, width**-0.5, generator=generator)
    jump.linear = copy.deepcopy(band.jump)
    return jump


def fit_readout(readout: TranslatorHead, rows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Ridge regression of what `finish` leaves to explain, from the rms-normed stream; low rank by reduced-rank regression.

    Args:
        readout: filled in place.
        rows: (stream [n, d], finish(stream) [n, r], the full model's ready rows [n, r]) in parts. Every fifth row judges the
            penalty.

    Returns its relative squared error on those rows.
    """
    width, ready = readout.up.shape[1] if readout.down is None else readout.down.shape[1], readout.up.shape[0]
    fitting, held_out = NormalEquations(width, ready), NormalEquations(width, ready)
    for stream, finished, wanted in rows:
        x = rms_normalise(stream, EPS).float().cpu()
        y = (wanted.float() - finished.float()).cpu()
        mask = torch.arange(x.shape[0]) % 5 == 0
        fitting.add(x[~mask], y[~mask])
        held_out.add(x[mask], y[mask])
    weights, error = solve_best(fitting, held_out, {"readout": slice(None)})["readout"]
    weight, bias = weights[:-1].T, weights[-1]
    if readout.down is None:
        _fill(readout.up, weight)
        _fill(readout.bias, bias)
        return error
    # The best map of rank k in the metric of the features around their mean: truncated in the space where they are white.
    count = fitting.rows
    mean = fitting.gram[:-1, -1] / count
    covariance = fitting.gram[:-1, :-1] / count - torch.outer(mean, mean)
    # Directions in which features hardly vary, or not at all, are known no better than products of fp32 know them.
    variance, axes = torch.linalg.eigh(covariance)
    scale = variance.clamp_min(float(variance[-1]) * width * torch.finfo(torch.float32).eps).sqrt()
    left, values, right = torch.linalg.svd(weight.double() @ (axes * scale), full_matrices=False)
    rank = readout.down.shape[0]
    root = values[:rank].sqrt()
    up = left[:, :rank] * root
    down = (right[:rank] * root[:, None] / scale) @ axes.T
    _fill(readout.up, up)
    _fill(readout.down, down)
    _fill(readout.bias, fitting.cross[-1] / count - up @ (down @ mean))
    return error


def _fill(parameter: Tensor, value: Tensor) -> None:
    """Write in place: dtype and device stay the parameter's."""
    parameter.data.copy_(value)


def _randomise(layer: nn.Module, gain: float, generator: torch.Generator) -> None:
    """Matrices as for a fresh model (Balcony's `random` ablation); norms without effect, biases zero."""
    for name, parameter in layer.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02, generator=generator)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else gain)
