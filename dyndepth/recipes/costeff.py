"""COST-EFF (Shen et al., EMNLP 2022, arXiv 2210.15523): narrower layers and exits between them, learned from a wide model.

A fine-tuned model teaches an assistant of its own width with exits after every layer. The assistant is then made narrower in
steps: heads and neurons that matter least to all exits go, the word embedding loses rank, and after every step what is left
learns from the assistant's answers, hidden states and attention. Depth stays: exits take care of it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndepth.encoders import DynamicEncoder, SampleExits, facts_of
from dyndepth.errors import ArgumentError
from dyndepth.exits.criteria import Entropy
from dyndepth.recipes.costeff_slender import FactoredEmbedding, Widths, factor, layers_of, load, prune, save, widths
from dyndepth.recipes.sample_heads import linear_exits
from dyndepth.training.encoder_losses import equilibrium, exit_losses, representation_mse, soft_ce
from dyndepth.training.encoder_states import Everywhere, chosen
from dyndepth.training.encoder_trainer import EncoderConfig, train_encoder

__all__ = ["Slender", "assist", "exits", "importance", "load", "prune", "save", "slenderise"]


def exits(
    model: Any,
    classes: int | None = None,
    *,
    entropy: float = 0.1,
    leave: Sequence[int] | None = None,
    pooling: str = "first",
) -> SampleExits:
    """Untrained exits: a pooler and a classifier each, left where the entropy is at most `entropy` nats (one for all)."""
    if not entropy >= 0:
        raise ArgumentError(f"costeff.exits: entropy must be 0 or more, got {entropy}")
    name = "COST-EFF (arXiv 2210.15523)"
    return linear_exits(model, classes, lambda _: Entropy(), -entropy, name, leave=leave, pooling=pooling, dense=True)


@dataclass(frozen=True)
class Seen:
    """What distillation compares, of one batch: both models with all exits, and their attention maps."""

    student: Everywhere
    teacher: Everywhere
    #: Per layer [tokens, heads, T]; empty where nobody asked.
    student_maps: list[Tensor] = dataclasses.field(default_factory=list)
    teacher_maps: list[Tensor] = dataclasses.field(default_factory=list)

    def hidden_mse(self) -> Tensor:
        """Of the residuals at every exit and the top, over tokens."""
        student, teacher = ([samples.tokens() for samples, _ in found] for found in (self.student, self.teacher))
        return representation_mse(student, teacher)

    def soft_ces(self, temperature: float) -> Tensor:
        """sum over exits and the top of soft_ce(student's exit, teacher's same exit)."""
        pairs = zip(self.student, self.teacher, strict=True)
        return torch.stack([soft_ce(mine, wanted, temperature) for (_, mine), (_, wanted) in pairs]).sum()


@contextmanager
def attention_maps(model: Any) -> Iterator[list[Tensor]]:
    """Within, passes in the padded layout leave every layer's attention probabilities [n, heads, T, T] in the list."""
    found: list[Tensor] = []
    before = model.config._attn_implementation_internal
    handles = [
        layer.attention.self.register_forward_hook(lambda _m, _i, out: found.append(out[1])) for layer in layers_of(model)
    ]
    model.config._attn_implementation_internal = "eager"
    try:
        yield found
    finally:
        model.config._attn_implementation_internal = before
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Within, the models are in eval mode; afterwards every part of them is in the mode that it had."""
    modes = [(part, part.training) for model in models for part in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _differentiable(weights: Sequence[Tensor]) -> Iterator[None]:
    flags = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)


def assist(
    model: Any,
    exits: SampleExits,
    teacher: Any,
    teacher_exits: SampleExits,
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    *,
    temperature: float = 1.0,
    represent: EncoderConfig | None = None,
    config: EncoderConfig | None = None,
    validation: tuple[Mapping[str, Tensor], Tensor] | None = None,
    folder: str | Path | None = None,
) -> SampleExits:
    """Train the teacher assistant: a multi-exit model of full width.

    First its hidden states learn to be the teacher's (mean squared error), then every exit learns the teacher's final answer:
    (sum soft CE(z_i / T, z_teacher / T) + sum CE) / 2, under gradient equilibrium.

    Args:
        model, exits: the assistant, changed in place; it may start as a copy of the teacher.
        teacher, teacher_exits: a fine-tuned model; of its exits only the top is read.
        represent: settings of the first part; None leaves it out, as for an assistant that starts as a copy.
        config: of the second.
        folder: checkpoints go to `folder`/represent and `folder`/answers.
    """
    config = config or EncoderConfig(base_lr=2e-5, lr=2e-4)
    taught = DynamicEncoder(teacher, _at_all(teacher, teacher_exits, exits))

    def watch(encoder: DynamicEncoder, batch: Mapping[str, Tensor]) -> Seen:
        with torch.no_grad():
            wanted = taught.everywhere(**batch)
        return Seen(encoder.everywhere(equilibrium(encoder.depth, encoder.boundaries), **batch), wanted)

    def answer(seen: Seen, labels: Tensor) -> Tensor:
        top = seen.teacher[-1][1]
        soft = torch.stack([soft_ce(logits, top, temperature) for _, logits in seen.student]).sum()
        return (soft + exit_losses(seen.student, labels).mean(0).sum()) / 2

    places = [None if folder is None else Path(folder) / name for name in ("represent", "answers")]
    with evaluating(teacher):
        if represent is not None:
            exits = train_encoder(
                model, exits, inputs, labels, lambda seen, _: seen.hidden_mse(), config=represent, watch=watch,
                validation=validation, folder=places[0],
            ).exits  # fmt: skip
        return train_encoder(
            model, exits, inputs, labels, answer, config=config, watch=watch, validation=validation, folder=places[1]
        ).exits


def _at_all(teacher: Any, teacher_exits: SampleExits, exits: SampleExits) -> SampleExits:
    """The teacher's top, with the other's heads in between: they are run and not read."""
    return SampleExits(list(exits), facts_of(teacher, teacher_exits.final), final=teacher_exits.final)


def importance(
    model: Any,
    exits: SampleExits,
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    teacher: Any,
    teacher_exits: SampleExits,
    *,
    batch: int = 32,
    temperature: float = 1.0,
) -> list[tuple[Tensor, Tensor]]:
    """Per layer (heads [h], neurons [m]): what the loss would change, to first order, without them, added up over all exits.

    Each exit has a loss of its own, 0.9 soft CE + 0.1 CE + the error of its hidden states (COST-EFF's weights). Its Taylor term
    for a head or neuron is |sum of weight x gradient| over the columns that carry it onward, which is the derivative by a
    factor on its output; terms of all exits and batches are added.
    """
    encoder, taught = DynamicEncoder(model, exits), DynamicEncoder(teacher, teacher_exits)
    layers = layers_of(model)
    sums = [
        (torch.zeros(layer.attention.self.num_attention_heads), torch.zeros(layer.intermediate.dense.out_features))
        for layer in layers
    ]
    carriers = [part.weight for layer in layers for part in (layer.attention.output.dense, layer.output.dense)]
    parts = [part for pair in sums for part in pair]
    with evaluating(model, teacher), _differentiable(carriers):
        for rows in torch.arange(len(labels)).split(batch):
            given, rows = chosen(inputs, rows)
            with torch.no_grad():
                wanted = taught.everywhere(**given)
            with torch.enable_grad():
                found = encoder.everywhere(**given)
                answers = labels[rows][found[0][0].ids]
                pairs = list(zip(found, wanted, strict=True))
                losses = [
                    0.9 * soft_ce(mine, theirs, temperature)
                    + 0.1 * exit_losses([(samples, mine)], answers).mean()
                    + representation_mse([samples.tokens()], [other.tokens()])
                    for (samples, mine), (other, theirs) in pairs
                ]
            for number, loss in enumerate(losses):
                slopes = torch.autograd.grad(loss, carriers, retain_graph=number + 1 < len(losses), allow_unused=True)
                for part, weight, slope in zip(parts, carriers, slopes, strict=True):
                    if slope is not None:  # layers above the exit
                        columns = (weight.detach() * slope).sum(0)
                        part += columns.reshape(len(part), -1).sum(1).abs().cpu()
    return sums


def most_important(scores: Sequence[tuple[Tensor, Tensor]], heads: int, neurons: int) -> list[Widths]:
    """The best `heads` and `neurons` of every layer."""
    found = []
    for per_head, per_neuron in scores:
        if not 1 <= heads <= len(per_head) or not 1 <= neurons <= len(per_neuron):
            raise ArgumentError(
                f"costeff: heads and neurons must be 1 to {len(per_head)} and {len(per_neuron)}, got {heads} and {neurons}"
            )
        best = [
            scored.argsort(descending=True, stable=True)[:count] for scored, count in ((per_head, heads), (per_neuron, neurons))
        ]
        found.append(Widths(*(tuple(sorted(each.tolist())) for each in best)))
    return found


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    return tuple(sorted(scores.argsort(descending=True, stable=True)[:count].tolist()))


@dataclass(frozen=True)
class Slender:
    """A narrower model with its exits."""

    model: Any
    exits: SampleExits
    #: Per layer, which of the assistant's heads and neurons are left.
    kept: list[Widths]


def slenderise(
    assistant: Any,
    assistant_exits: SampleExits,
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    *,
    heads: int,
    neurons: int,
    rank: int | None = None,
    steps: int = 3,
    temperature: float = 1.0,
    config: EncoderConfig | None = None,
    validation: tuple[Mapping[str, Tensor], Tensor] | None = None,
    samples: int = 512,
    folder: str | Path | None = None,
) -> Slender:
    """A narrower copy of the assistant, taught by it.

    In `steps` equal steps the least important heads and neurons go; the word embedding is factored with the first. After each
    step: sum over exits of soft CE(student, assistant's same exit) + MSE of hidden states + MSE of the attention maps of the
    heads that are left, under gradient equilibrium.

    Args:
        assistant, assistant_exits: stay as they are.
        heads, neurons: left per layer in the end; rank: of the word embedding, None leaves it.
        config: settings of the distillation after each step.
        samples: that importance is measured on, the first of `inputs`.
        folder: checkpoints go to `folder`/step-1 and on.
    """
    if steps < 1:
        raise ArgumentError(f"costeff.slenderise: steps must be at least 1, got {steps}")
    config = config or EncoderConfig(base_lr=5e-5, lr=2e-4)
    model, exits = copy.deepcopy(assistant), copy.deepcopy(assistant_exits)
    now = widths(model)
    kept = list(now)
    start = len(now[0].heads), len(now[0].neurons)
    if any((len(each.heads), len(each.neurons)) != start for each in now):
        raise ArgumentError("costeff.slenderise: layers of the assistant must be equally wide")
    if rank is not None and not isinstance(model.base_model.embeddings.word_embeddings, FactoredEmbedding):
        factor(model, rank)
    few = {name: value[:samples] for name, value in inputs.items()}
    for step in range(1, steps + 1):
        target = [round(a + (b - a) * step / steps) for a, b in zip(start, (heads, neurons), strict=True)]
        scores = importance(model, exits, few, labels[:samples], assistant, assistant_exits, temperature=temperature)
        chosen_now = most_important(scores, *target)
        prune(model, chosen_now)
        kept = [
            Widths(tuple(old.heads[i] for i in new.heads), tuple(old.neurons[i] for i in new.neurons))
            for old, new in zip(kept, chosen_now, strict=True)
        ]
        exits = SampleExits(exits, facts_of(model, exits.final), final=exits.final, record=exits.record)
        exits = _distil(
            model, exits, assistant, assistant_exits, kept, inputs, labels, temperature, config, validation,
            None if folder is None else Path(folder) / f"step-{step}",
        )  # fmt: skip
    about = {"heads": heads, "neurons": neurons, "rank": rank, "steps": steps}
    return Slender(
        model.eval(), SampleExits(exits, exits.model, final=exits.final, record={**exits.record, "slender": about}), kept
    )


def _distil(
    model: Any, exits: SampleExits, assistant: Any, assistant_exits: SampleExits, kept: Sequence[Widths],
    inputs: Mapping[str, Tensor], labels: Tensor, temperature: float, config: EncoderConfig,
    validation: tuple[Mapping[str, Tensor], Tensor] | None, folder: Path | None,
) -> SampleExits:  # fmt: skip
    taught = DynamicEncoder(assistant, assistant_exits, layout="padded")
    left = [torch.tensor(each.heads) for each in kept]

    def watch(encoder: DynamicEncoder, batch: Mapping[str, Tensor]) -> Seen:
        with attention_maps(assistant) as theirs, torch.no_grad():
            wanted = taught.everywhere(**batch)
        with attention_maps(encoder.model) as mine:
            found = encoder.everywhere(equilibrium(encoder.depth, encoder.boundaries), **batch)
        keep = found[0][0].keep()
        # Queries that are padding attend to something too, which nobody reads.
        maps = [each.transpose(1, 2)[keep] for each in mine]
        wished = [each.transpose(1, 2)[keep][:, which] for each, which in zip(theirs, left, strict=True)]
        return Seen(found, wanted, maps, wished)

    def loss(seen: Seen, _: Tensor) -> Tensor:
        return seen.soft_ces(temperature) + seen.hidden_mse() + representation_mse(seen.student_maps, seen.teacher_maps)

    with evaluating(assistant):
        return train_encoder(
            model, exits, inputs, labels, loss, config=config, watch=watch, validation=validation, layout="padded",
            folder=folder,
        ).exits  # fmt: skip
