"""LGViT (arXiv 2308.00255): exits of a vision transformer whose heads differ by depth, trained in two stages.

Shallow exits get a local perception head (convolutions on the map of patches), deep ones a global aggregation head (attention
among a part of them). Stage 1 trains everything; stage 2 freezes the backbone and its final head and lets the exits learn from
them. The published code answers one image at a time; here they leave a batch each at its own depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dyndepth.encoders import (
    DynamicEncoder,
    GlobalAggregationHead,
    LocalPerceptionHead,
    PatientConfidence,
    SampleExit,
    SampleExits,
    Samples,
    bind,
    facts_of,
)
from dyndepth.encoders.grid_heads import GridHead
from dyndepth.encoders.swin import Swin
from dyndepth.errors import ArgumentError
from dyndepth.exits import Entropy, Patience, TopProbability
from dyndepth.exits.criteria import Criterion
from dyndepth.recipes.gradient import Epoch, descend

#: The published rules with their thresholds for ViT: largest probability, entropy (the threshold is its negative), equal
#: answers in a row, and two exits in a row that are sure.
RULES: dict[str, tuple[Criterion, float]] = {
    "confidence": (TopProbability(), 0.865),
    "entropy": (Entropy(), -0.6),
    "patience": (Patience(), 7.0),
    "patient_confidence": (PatientConfidence(patience=2), 0.5),
}
#: Weights of stage 2: cross-entropy, distillation of the final logits, features of other and of the same kind.
CE, KD, HETERO, HOMO = 0.7, 0.3, 0.01, 0.01
TEMPERATURE = 2.0


def default_exits(layers: int) -> tuple[int, ...]:
    """The paper's relative depths: 4 to 11 of 12 layers; of Swin's 24 blocks every third from 4 on, and the last but one."""
    if layers == 24:
        return (4, 7, 10, 13, 16, 19, 22, 23)
    return tuple(range(max(1, layers // 3), layers))


def exits(
    model: Any, leave: Sequence[int] = (), *, rule: str = "confidence", threshold: float | None = None, heads: int = 8
) -> SampleExits:
    """Untrained exits: local perception in the first half of them, global aggregation in the second.

    The first half of the local ones has the depth-wise convolution; of the global ones the first half takes every second patch
    and the rest every third (for Swin, whose maps shrink by themselves, all and every second).

    Args:
        model: a ViT, DeiT or Swin classifier.
        leave: boundaries; by default the paper's relative depths.
        rule: confidence, entropy, patience or patient_confidence (RULES).
        threshold: for all exits; by default the published one.
        heads: of global aggregation; where they do not divide the width, the model's own number.
    """
    if rule not in RULES:
        raise ArgumentError(f"lgvit.exits: rule must be one of {', '.join(RULES)}, got {rule!r}")
    family = bind(model)
    classes = family.classes
    if classes is None:
        raise ArgumentError(f"lgvit.exits: {type(model).__name__} has no classifier; stage 2 learns from it")
    criterion, published = RULES[rule]
    chosen = sorted(leave or default_exits(family.depth))
    local = math.ceil(len(chosen) / 2)
    points = []
    for number, at in enumerate(chosen):
        grid, specials = _grid(family, at)
        width = family.width_at(at)
        head: GridHead
        if number < local:
            head = LocalPerceptionHead(width, classes, grid=grid, specials=specials, depthwise=number < math.ceil(local / 2))
        else:
            early = number - local < math.ceil((len(chosen) - local) / 2)
            stride = (1 if early else 2) if specials == 0 else (2 if early else 3)
            own = heads if width % heads == 0 else _own_heads(family, at)
            head = GlobalAggregationHead(width, classes, grid=grid, specials=specials, heads=own, stride=stride)
        points.append(SampleExit(at, head, criterion, published if threshold is None else threshold))
    return SampleExits(points, facts_of(model), record={"recipe": "LGViT (arXiv 2308.00255)"}).eval()


def joint_loss(found: Sequence[tuple[Samples, Tensor]], labels: Tensor, *, weighting: str = "mean") -> Tensor:
    """Stage 1: cross-entropies of all exits and the top, averaged; `weighting="depth"` weighs each by the layers below it.

    `found` is of DynamicEncoder.everywhere; labels int64 [n] in the caller's order.
    """
    if weighting not in ("mean", "depth"):
        raise ArgumentError(f"lgvit.joint_loss: weighting must be mean or depth, got {weighting!r}")
    weights = [1.0 if weighting == "mean" else float(samples.boundary) for samples, _ in found]
    losses = [F.cross_entropy(logits, labels[samples.ids]) for samples, logits in found]
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)


@dataclass(frozen=True)
class Distilled:
    """Stage 2's terms, each summed over its exits."""

    cross_entropy: Tensor
    distillation: Tensor
    hetero: Tensor
    homo: Tensor

    @property
    def total(self) -> Tensor:
        return CE * self.cross_entropy + KD * self.distillation + HETERO * self.hetero + HOMO * self.homo


def distilled(encoder: DynamicEncoder, inputs: Mapping[str, Tensor], labels: Tensor) -> Distilled:
    """Stage 2 on a batch. Gradients reach the exits only: the backbone and the final head are the teacher.

    - cross_entropy: of every exit.
    - distillation: KL(final || exit) at temperature 2, mean over samples and classes, times the temperature's square.
    - hetero: the first and the last head of each kind follow the last layer's patches (those that the stride leaves):
      KL between softmaxes over channels, summed over channels and averaged over patches. Heads of another width have no such
      term (Swin).
    - homo: heads follow the deepest of their kind: mean squared difference of their tokens for local perception, of the Gram
      matrices over channels for global aggregation, whose numbers of tokens differ.
    """
    with torch.no_grad():
        *states, top = encoder.states(**inputs)
        final = encoder.final_answers(top)
    heads = [point.head for point in encoder.exits]
    refined, logits = [], []
    for head, samples in zip(heads, states, strict=True):
        assert isinstance(head, GridHead)
        specials, image = head.parts(samples)
        refined.append(head.refined(image))
        logits.append(head.out(head.joined(refined[-1], specials)))
    wanted = labels[top.ids]
    zero = final.new_zeros(())
    hetero, homo = zero, zero
    for kind in (LocalPerceptionHead, GlobalAggregationHead):
        own = [at for at, head in enumerate(heads) if isinstance(head, kind)]
        for at in sorted({own[0], own[-1]}) if own else ():
            hetero = hetero + _hetero(heads[at], refined[at], top)
        for at in own[:-1]:
            homo = homo + _homo(refined[at], refined[own[-1]].detach(), gram=kind is GlobalAggregationHead)
    return Distilled(
        torch.stack([F.cross_entropy(each, wanted) for each in logits]).sum(),
        torch.stack([_kd(each, final) for each in logits]).sum(),
        hetero,
        homo,
    )


def train(
    model: Any,
    exits: SampleExits,
    epochs: Epoch,
    *,
    first: int = 1,
    second: int = 1,
    rate: float = 5e-5,
    decay: float = 0.05,
    weighting: str = "mean",
    alternating: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> SampleExits:
    """Both stages, in place: stage 1 changes the model and the exits, stage 2 the exits alone.

    Args:
        model, exits: of `exits`; both end in eval mode.
        epochs: called with 0, 1, ..., gives that epoch's batches of (inputs, labels).
        first, second: epochs of the stages; 0 leaves a stage out (a model that is trained already).
        rate, decay: of AdamW; the rate falls as a cosine in each stage.
        weighting: of stage 1, mean or depth.
        alternating: in stage 1 every second step trains the top alone.
        advance: called after every epoch.

    Returns the exits with facts of the trained model (weights shared with `exits`).
    """
    some = next(iter(model.parameters()))
    exits.to(some.device, some.dtype)
    encoder = DynamicEncoder(model, exits, layout="padded")
    changed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.train()
        exits.train()

        def joint(inputs: Mapping[str, Tensor], labels: Tensor, step: int) -> Tensor:
            found = encoder.everywhere(**inputs)
            return joint_loss(found[-1:] if alternating and step % 2 else found, labels, weighting=weighting)

        descend(
            [*changed, *exits.parameters()], joint, epochs, range(first), rate=rate, decay=decay, advance=advance
        )  # fmt: skip
        model.eval()
        descend(
            list(exits.parameters()),
            lambda inputs, labels, _: distilled(encoder, inputs, labels).total,
            epochs,
            range(first, first + second),
            rate=rate,
            decay=decay,
            advance=advance,
        )
    finally:
        model.eval()
        exits.eval()
    record = {**exits.record, "method": "LGViT, two stages", "epochs": [first, second]}
    return SampleExits(list(exits), facts_of(model), record=record).eval()


def _kd(logits: Tensor, final: Tensor) -> Tensor:
    taught = F.log_softmax(logits.float() / TEMPERATURE, -1)
    teacher = F.log_softmax(final.float() / TEMPERATURE, -1)
    return (teacher.exp() * (teacher - taught)).mean() * TEMPERATURE**2


def _hetero(head: Any, refined: Tensor, top: Samples) -> Tensor:
    if top.hidden.shape[-1] != head.channels or top.padded().shape[1] != head.specials + math.prod(head.grid):
        return refined.new_zeros(())
    image = head.parts(top)[1]
    patches = head.strided(image) if isinstance(head, GlobalAggregationHead) else image.flatten(2).transpose(1, 2)
    taught = F.log_softmax(refined.float(), -1).flatten(0, 1)
    teacher = F.log_softmax(patches.float(), -1).flatten(0, 1)
    return F.kl_div(taught, teacher, reduction="batchmean", log_target=True)


def _homo(refined: Tensor, deepest: Tensor, *, gram: bool) -> Tensor:
    if refined.shape[-1] != deepest.shape[-1] or (not gram and refined.shape != deepest.shape):
        return refined.new_zeros(())
    if not gram:
        return F.mse_loss(refined, deepest)
    mine, theirs = (tokens.transpose(1, 2) @ tokens / tokens.shape[1] for tokens in (refined, deepest))
    return F.mse_loss(mine, theirs)


def _grid(family: Any, boundary: int) -> tuple[tuple[int, int], int]:
    """(height, width) of the map of patches at a boundary, and the special tokens before it."""
    if isinstance(family, Swin):
        return family.places[boundary - 1].grid, 0
    if family.config.model_type not in ("vit", "deit"):
        raise ArgumentError(f"lgvit: the model must be a ViT, DeiT or Swin, got {type(family.model).__name__}")
    image, patch = (
        (size, size) if isinstance(size, int) else tuple(size) for size in (family.config.image_size, family.config.patch_size)
    )
    return (image[0] // patch[0], image[1] // patch[1]), 1 if family.config.model_type == "vit" else 2


def _own_heads(family: Any, boundary: int) -> int:
    if isinstance(family, Swin):
        stage = next(at for at, depth in enumerate(_sums(family.config.depths)) if boundary <= depth)
        return int(family.config.num_heads[stage])
    return int(family.config.num_attention_heads)


def _sums(values: Sequence[int]) -> list[int]:
    return [sum(values[: at + 1]) for at in range(len(values))]
