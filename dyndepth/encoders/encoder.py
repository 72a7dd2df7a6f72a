"""DynamicEncoder: a batch of whole samples, each leaving the encoder at its own depth."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.encoders.criteria import NUMBER, PonderDraw, SampleView
from dyndepth.encoders.exits import SampleExit, SampleExits, check_answers, prepared
from dyndepth.encoders.facts import check_facts
from dyndepth.encoders.family import bind, pack
from dyndepth.encoders.heads import SampleHead
from dyndepth.encoders.samples import Leavers, Samples
from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.exits.criteria import FixedDepth
from dyndepth.ops import ExitStats, exit_stats
from dyndepth.ops.exit_stats import stats_of_logits
from dyndepth.runtime.session import Work


@dataclass(frozen=True)
class Departure:
    """Samples that left together."""

    #: int64 [k], the caller's numbers, on the CPU.
    ids: Tensor
    #: Logits [k, classes]; per-token heads: [tokens, classes] in the order of `ids`.
    answers: Tensor
    #: int64 [k], tokens per sample, on the CPU.
    lengths: Tensor
    #: Layers that ran.
    boundary: int


class DynamicEncoder:
    """A Hugging Face encoder whose samples leave at their own depth.

        encoder = dyndepth.DynamicEncoder(model, exits)
        out = encoder(**tokenizer(texts, padding=True, return_tensors="pt"))
        out.logits, out.exit_layers, out.work

    Args:
        model: a transformers encoder, in eval mode (`dyndepth.encoders.FAMILIES` lists the types). It stays as it is.
        exits: made for it.
        layout: "packed" runs only real tokens, "padded" runs slabs [n, T, d], "auto" takes packed where the model's layers
            can and samples differ in length (docs/encoders.md has the measurement).
        compact: False runs every layer for every sample and picks answers afterwards: the same answers, for comparison.

    A sample's answer does not depend on the samples beside it, up to the rounding of products over other row counts. Samples
    are independent, so nothing is filled in for skipped layers. Between layers the host reads how many samples are left.
    """

    def __init__(self, model: Any, exits: SampleExits, *, layout: str = "auto", compact: bool = True) -> None:
        if not isinstance(exits, SampleExits):
            raise ArgumentError(f"DynamicEncoder: exits must be dyndepth.SampleExits, got {type(exits).__name__}")
        self.family = bind(model)
        if layout not in ("auto", "packed", "padded"):
            raise ArgumentError(f"DynamicEncoder: layout must be auto, packed or padded, got {layout!r}")
        if layout == "packed" and not self.family.packs:
            raise ArgumentError(f"DynamicEncoder: {type(model).__name__} cannot run packed, its layers look along time")
        check_facts(exits, self.family)
        if self.family.classes is None and exits.final is None:
            raise ExitsError(f"DynamicEncoder: {type(model).__name__} has no head of its own and the exits have no final head")
        for point in exits:
            check_answers(point.leave, point.head, point.criterion, self.answers_per_token(point.head))
            if self.answers_per_token(point.head) != self.answers_per_token(exits.final):
                raise ExitsError(
                    f"DynamicEncoder: the exit at {point.leave} and the top must both answer per token, or per sample"
                )
        self.model = model
        self.packed = self.family.packs and (layout == "packed" or (layout == "auto" and not self.family.uniform))
        self.compact = compact
        self.exits = exits
        some = next(iter(model.parameters()))
        self._exits = prepared(exits, some.device, some.dtype)
        self._at = {point.leave: point for point in self._exits}
        # Batch norms and dropout: what they do depends on the mode that the heads are in.
        self._by_mode = [
            part for part in self._exits.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm | nn.Dropout)
        ]
        self._draws = any(isinstance(point.criterion, PonderDraw) for point in self._exits)
        self._last_previous = max((e.leave for e in self._exits if e.criterion.needs_previous), default=0)

    @property
    def depth(self) -> int:
        """Layers of the model."""
        return self.family.depth

    @property
    def boundaries(self) -> list[int]:
        """Where samples may leave, ascending."""
        return sorted(self._at)

    @torch.no_grad()
    def __call__(
        self, *, labels: Tensor | None = None, depth: Tensor | None = None, numbers: Tensor | None = None, **inputs: Any
    ) -> Any:
        """Logits of a batch, in the caller's order.

        Args:
            labels: as transformers' classifiers take them; adds `loss` (not for CTC).
            depth: int64 [n], the boundary where each sample leaves under the criterion `fixed_depth`; -1 for the top.
            numbers: int64 [n], by which criteria that draw know a sample; its place in the call without.
            **inputs: what the model takes (`input_ids`, `attention_mask`, ...; `pixel_values`; `input_values`).
        """
        samples = self.begin(numbers=numbers, **inputs)
        n = samples.count
        if depth is not None:
            self._check_depth(depth, n)
        work = Work([0] * self.depth, n)
        samples, departures = self.advance(samples, work=work, depth=depth)
        if samples.count:
            departures.append(self.finish(samples))
        return self.output(departures, n, work, labels)

    # The parts of a pass: streams and split computing put them together in other ways.

    @torch.no_grad()
    def begin(self, *, numbers: Tensor | None = None, **inputs: Any) -> Samples:
        """The embedded batch at boundary 0; `numbers` as in a call."""
        if self.model.training:
            raise ArgumentError("DynamicEncoder: the model must be in eval mode, got training mode (call model.eval())")
        if any(part.training for part in self._by_mode):
            raise ArgumentError("DynamicEncoder: the exits must be in eval mode, got training mode (call exits.eval())")
        samples = pack(self.family.embed(**self.family.given(inputs)), packed_layout=self.packed)
        if numbers is not None and (numbers.dtype != torch.int64 or tuple(numbers.shape) != (samples.count,)):
            raise ArgumentError(
                f"DynamicEncoder: numbers must be int64 [{samples.count}], got {numbers.dtype} {list(numbers.shape)}"
            )
        if self._draws:
            known = samples.ids if numbers is None else numbers.cpu()[samples.ids]
            samples.carried[NUMBER] = known.to(samples.hidden.device)
        return samples

    def _check_depth(self, depth: Tensor, n: int) -> None:
        if depth.dim() != 1 or len(depth) != n:
            raise ArgumentError(f"DynamicEncoder: depth must be int64 [{n}], got {list(depth.shape)}")
        allowed = {
            -1,
            self.depth,
            *(leave for leave, point in self._at.items() if isinstance(point.criterion, FixedDepth)),
        }
        wrong = sorted(set(depth.tolist()) - allowed)
        if wrong:
            raise ArgumentError(
                f"DynamicEncoder: depth must be among {sorted(allowed)} (exits of fixed depth, or the top), got {wrong}"
            )

    @torch.no_grad()
    def advance(
        self, samples: Samples, until: int | None = None, *, work: Work | None = None, depth: Tensor | None = None
    ) -> tuple[Samples, list[Departure]]:
        """Run layers up to boundary `until` (the top by default), judging at it too.

        Returns the samples that are left and the groups that left, in the order of their leaving. `work` is added to.
        """
        until = self.depth if until is None else until
        if not samples.boundary <= until <= self.depth:
            raise ArgumentError(f"advance: until must be {samples.boundary} to {self.depth}, got {until}")
        departures: list[Departure] = []
        waiting = torch.zeros(samples.count, dtype=torch.bool)  # without compaction: those that have their answer
        for layer in range(samples.boundary, until):
            if samples.count == 0 or (not self.compact and bool(waiting.all())):
                break
            if work is not None:
                work.layers[layer] += samples.count
            samples = self.family.step(layer, samples)
            samples = replace(samples, boundary=layer + 1, carried=dict(samples.carried))
            found = self._at.get(layer + 1)
            if found is None:
                continue
            leaves, reading = self._judge(found, samples, depth)
            if not self.compact:
                leaves = leaves & ~waiting
                waiting = waiting | leaves
            left, gone = samples.split(leaves) if self.compact else (samples, samples.leavers(leaves))
            if len(gone.at):
                departures.append(self._departure(reading, gone))
                samples = left
        if not self.compact:
            samples, _ = samples.split(waiting)
        return replace(samples, boundary=until), departures

    @torch.no_grad()
    def finish(self, samples: Samples) -> Departure:
        """The answers of samples that ran every layer."""
        answers = _checked(self.final_answers(samples), self.depth)
        return Departure(samples.ids, answers, samples.lengths, self.depth)

    def final_answers(self, samples: Samples) -> Tensor:
        """Logits at the top: the exits' final head if there is one, else the model's own."""
        head = self._exits.final
        return self.family.finish(samples) if head is None else head(samples, self.family.finish)

    def everywhere(
        self, fork: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None, /, **inputs: Any
    ) -> list[tuple[Samples, Tensor]]:
        """Every exit's and the top's (samples, logits) with all layers run for all samples; differentiable.

        What training and calibration need. Samples stand in the order of `samples.ids` (shortest first), the same at all.
        `fork` is called at every exit with the residuals and the layers below: what it returns first is what the exit reads,
        what it returns second is what the layers above read (gradients may be scaled apart there). Gradients reach `exits`
        where they have the model's dtype and device; elsewhere a converted copy answers.
        """
        *below, top = self.states(fork, **inputs)
        found = [(each, point.head(each, self.family.finish)) for each, point in zip(below, self._exits, strict=True)]
        return [*found, (top, self.final_answers(top))]

    def states(self, fork: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None, /, **inputs: Any) -> list[Samples]:
        """The samples at every exit and at the top with all layers run for all of them; differentiable, `fork` as above."""
        embedded = self.family.embed(**self.family.given(inputs))
        samples = pack(embedded, packed_layout=self.packed)
        found: list[Samples] = []
        for layer in range(self.depth):
            samples = replace(self.family.step(layer, samples), boundary=layer + 1)
            if layer + 1 not in self._at:
                continue
            read = samples
            if fork is not None:
                seen, passed = fork(samples.hidden, layer + 1)
                read, samples = replace(samples, hidden=seen), replace(samples, hidden=passed)
            found.append(read)
        return [*found, samples]

    @torch.no_grad()
    def carried_at(self, boundary: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape per sample of all that criteria leave with samples that run on past `boundary`.

        Found by asking them: the exits judge a sample of zeros; no layer runs.
        """
        some = next(iter(self.model.parameters()))
        carried: dict[str, Tensor] = {NUMBER: torch.zeros(1, dtype=torch.int64, device=some.device)} if self._draws else {}
        for leave in self.boundaries:
            if leave > boundary:
                break
            point = self._at[leave]
            tokens = point.head.tokens
            hidden = torch.zeros(tokens, self.family.width_at(leave), device=some.device, dtype=some.dtype)
            samples = Samples(
                hidden if self.packed else hidden[None], torch.tensor([tokens]), torch.tensor([0]), leave, carried
            )
            self._judge(point, samples, torch.tensor([-1]))
            carried = dict(samples.carried)
        return {name: (value.dtype, tuple(value.shape[1:])) for name, value in carried.items()}

    # Judging.

    def _judge(self, point: SampleExit, samples: Samples, depth: Tensor | None) -> tuple[Tensor, _Reading]:
        """bool [count] on the CPU, and what the exit read."""
        reading = _Reading(point, samples, self.family.finish)
        previous = samples.carried.get("previous")
        carried = {name: value for name, value in samples.carried.items() if name != "previous"}
        pooled = samples.pooled(reading.head.pooling)
        view = SampleView(
            hidden=pooled,
            seq=samples.ids.to(pooled.device),
            step=_filled(samples.count, 0, torch.int32, pooled.device),
            previous=previous,
            stats=reading.stats,
            depth=None if depth is None else depth.to(pooled.device),
            leave=point.leave,
            layers=self.depth,
            carried=carried,
            answers=reading.answers,
            reduce=samples.reduce,
            lengths=samples.lengths,
            classes=self.exits.model.vocab_size,
        )
        leaves = point.criterion.leaves(view, _filled(samples.count, point.threshold, torch.float32, pooled.device)).cpu()
        samples.carried.clear()
        samples.carried.update(view.carried)
        if point.leave < self._last_previous:
            samples.carried["previous"] = pooled
        return leaves, reading

    def _departure(self, reading: _Reading, gone: Leavers) -> Departure:
        samples, at = reading.samples, gone.at
        if self.answers_per_token(reading.head):
            leaves = torch.zeros(samples.count, dtype=torch.bool).index_fill(0, at, True)
            at = torch.repeat_interleave(leaves, samples.lengths).nonzero()[:, 0]
        logits = reading.answers_of(at.to(samples.hidden.device))
        return Departure(gone.ids, logits, gone.lengths, samples.boundary)

    def output(self, departures: Sequence[Departure], n: int, work: Work, labels: Tensor | None = None) -> Any:
        """What a call returns, from the groups in which all `n` samples left."""
        from dyndepth.encoders.output import (
            DynamicCTCOutput,
            DynamicImageClassifierOutput,
            DynamicSequenceClassifierOutput,
        )

        boundaries = torch.zeros(n, dtype=torch.int32)
        for departed in departures:
            boundaries[departed.ids] = departed.boundary
        logits, lengths = assembled(departures, n, self.per_token)
        if self.per_token:
            if labels is not None:
                raise ArgumentError("DynamicEncoder: labels are not supported for answers per token")
            return DynamicCTCOutput(logits=logits, exit_layers=boundaries, work=work, frames=lengths)
        loss = None if labels is None else _loss(logits, labels, getattr(self.model.config, "problem_type", None))
        kind: Any = DynamicImageClassifierOutput if "pixel_values" in self.family.arguments else DynamicSequenceClassifierOutput
        return kind(loss=loss, logits=logits, exit_layers=boundaries, work=work)

    @property
    def per_token(self) -> bool:
        """Answers are per token (CTC)."""
        return self.answers_per_token(self.exits.final)

    def answers_per_token(self, head: SampleHead | None) -> bool:
        """Whether a head (None: the model's own) answers per token."""
        return self.family.per_token if head is None or head.per_token is None else head.per_token


class _Reading:
    """What an exit reads of the samples at its boundary, each part worked out when first asked for."""

    def __init__(self, point: SampleExit, samples: Samples, finish: Callable[[Samples], Tensor]) -> None:
        self.head, self.samples, self._finish = point.head, samples, finish
        # Not functools.cache: making three of those costs as much as judging does.
        self._features: Tensor | None = None
        self._answers: Tensor | None = None
        self._stats: ExitStats | None = None

    def features(self) -> Tensor | None:
        if self._features is None:
            self._features = self.head.features(self.samples)
        return self._features

    def answers(self) -> Tensor:
        """The logits of all samples (of all their tokens)."""
        if self._answers is None:
            self._answers = _checked(self.head(self.samples, self._finish), self.samples.boundary)
        return self._answers

    def answers_of(self, at: Tensor) -> Tensor:
        """Some of the logits; heads that end in one linear compute no others."""
        last = self.head.last
        if last is None:
            return self.answers().index_select(0, at)
        read = self.features()
        assert read is not None
        return _checked(last(read.index_select(0, at)), self.samples.boundary)

    def stats(self) -> ExitStats:
        if self._stats is None:
            last = self.head.last
            if last is None:
                self._stats = stats_of_logits(self.answers())
            else:
                read = self.features()
                assert read is not None
                self._stats = exit_stats(read.contiguous(), last.weight.contiguous(), head_bias=last.bias)
        return self._stats


def _checked(answers: Tensor, boundary: int) -> Tensor:
    if math.isnan(answers.amax()):  # a NaN is the maximum of whatever holds one
        raise ArgumentError(f"DynamicEncoder: logits after layer {boundary} hold NaN")
    return answers


@functools.lru_cache(maxsize=128)
def _one(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives whoever asked first
        return torch.full((1,), value, dtype=dtype, device=device)


def _filled(count: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count] times `value`; who writes into it gets an error. Making a tensor between layers costs as much as judging does."""
    return _one(value, dtype, device).expand(count)


def assembled(departures: Sequence[Departure], n: int, per_token: bool) -> tuple[Tensor, Tensor]:
    """Logits [n, classes] ([n, longest, classes], zero past the end, if per token) in the caller's order, and lengths [n]."""
    some = departures[0].answers
    lengths = torch.zeros(n, dtype=torch.int64)
    for departed in departures:
        lengths[departed.ids] = departed.lengths
    if not per_token:
        logits = some.new_zeros(n, some.shape[-1])
        for departed in departures:
            logits[departed.ids.to(some.device)] = departed.answers
        return logits, lengths
    logits = some.new_zeros(n, int(lengths.max()), some.shape[-1])
    for departed in departures:
        rows = torch.repeat_interleave(departed.ids, departed.lengths)
        offsets = torch.arange(len(rows)) - torch.repeat_interleave(
            departed.lengths.cumsum(0) - departed.lengths, departed.lengths
        )
        logits[rows.to(some.device), offsets.to(some.device)] = departed.answers
    return logits, lengths


def _loss(logits: Tensor, labels: Tensor, problem: str | None) -> Tensor:
    """transformers' loss of a classifier: regression, one label, or several."""
    classes = logits.shape[1]
    if problem is None:
        whole = labels.dtype in (torch.int64, torch.int32)
        problem = "regression" if classes == 1 else "single_label_classification" if whole else "multi_label_classification"
    if problem == "regression":
        return torch.nn.functional.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
    if problem == "single_label_classification":
        if labels.shape != logits.shape[:1] or int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise ArgumentError(f"DynamicEncoder: labels must be [{len(logits)}] below {classes}, got {labels.tolist()}")
        return torch.nn.functional.cross_entropy(logits, labels.long())
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
