"""A stream of samples through an encoder: as some leave, others are admitted, so that layers always see full batches.

Samples that survive an exit wait at that boundary until `batch` of them are there, then run to the next exit together; new
ones are embedded only when no boundary has a full batch waiting. So every stretch of layers runs with full batches but for
the last ones of the stream (E3, Kaler et al. 2024: batches split at exits and merged again; here within one process).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dyndepth.encoders.criteria import NUMBER
from dyndepth.encoders.encoder import Departure, DynamicEncoder
from dyndepth.encoders.samples import Samples
from dyndepth.errors import ArgumentError
from dyndepth.runtime.session import Work

#: Per boundary, in the order of their coming: stretches that had run by then, and the samples.
Waiting = dict[int, deque[tuple[int, Samples]]]


@dataclass(frozen=True)
class Answer:
    """One sample's answer."""

    #: Number of the sample in the stream, from 0.
    number: int
    #: [classes], or [frames, classes] for answers per token.
    logits: Tensor
    #: Layers below the exit where it left; the number of layers if it reached the top.
    exit_layer: int


class SampleStream:
    """Continuous batching over depth.

        stream = SampleStream(encoder, batch=32)
        for answer in stream(batches):          # dicts of tensors, any sizes; answers come in the stream's order
            ...

    Args:
        encoder: a DynamicEncoder (compacting or not makes no difference here).
        batch: samples that a stretch of layers runs with.
        ordered: answers in the order of the samples; False gives each as soon as it is known.
        longest_wait: stretches that run before samples that wait go on in a batch that is not full, so that a rare deep
            sample answers on an endless stream too.

    The criterion `fixed_depth` belongs to calls that name depths and lets nobody leave here.

    `work` counts samples x layers, `batches` how often a stretch from a boundary ran with how many samples, by (boundary,
    samples). At most `batch` samples plus one admitted batch wait at each boundary. With `ordered`, answers that wait for an
    earlier sample are kept.
    """

    def __init__(self, encoder: DynamicEncoder, batch: int = 32, *, ordered: bool = True, longest_wait: int = 64) -> None:
        if batch < 1:
            raise ArgumentError(f"SampleStream: batch must be at least 1, got {batch}")
        if longest_wait < 1:
            raise ArgumentError(f"SampleStream: longest_wait must be at least 1, got {longest_wait}")
        self.encoder, self.batch, self.ordered, self.longest_wait = encoder, batch, ordered, longest_wait
        self.stops = [0, *encoder.boundaries, encoder.depth]
        self.work = Work([0] * encoder.depth)
        self.batches: Counter[tuple[int, int]] = Counter()
        self._ran = 0

    def __call__(self, inputs: Iterable[Mapping[str, Any]]) -> Iterator[Answer]:
        """Answers of all samples in `inputs`, an iterable of the encoder's keyword arguments."""
        waiting: Waiting = {stop: deque() for stop in self.stops[:-1]}
        source, admitted, due = iter(inputs), 0, 0
        kept: dict[int, Answer] = {}
        more = True
        while True:
            boundary = self._full(waiting)
            if boundary is None and more:
                given = next(source, None)
                if given is None:
                    more = False
                else:
                    samples = self.encoder.begin(**given)
                    samples = replace(samples, ids=samples.ids + admitted)
                    if NUMBER in samples.carried and "numbers" not in given:
                        samples.carried[NUMBER] = samples.carried[NUMBER] + admitted
                    waiting[0].append((self._ran, samples))
                    admitted += samples.count
                    self.work.rows += samples.count
                continue
            if boundary is None:  # the stream has ended: what is left goes up, the lowest first so that batches still merge
                boundary = next((stop for stop in waiting if waiting[stop]), None)
                if boundary is None:
                    return
            for departure in self._run(boundary, waiting):
                for answer in _answers(departure, self.encoder.per_token):
                    if not self.ordered:
                        yield answer
                    else:
                        kept[answer.number] = answer
            while due in kept:
                yield kept.pop(due)
                due += 1

    def _full(self, waiting: Waiting) -> int | None:
        """Who has waited too long; else the highest boundary with a full batch: what is nearly done goes first."""
        late = [(parts[0][0], stop) for stop, parts in waiting.items() if parts and self._ran - parts[0][0] > self.longest_wait]
        if late:
            return min(late)[1]
        full = [stop for stop, parts in waiting.items() if sum(part.count for _, part in parts) >= self.batch]
        return max(full, default=None)

    def _run(self, boundary: int, waiting: Waiting) -> list[Departure]:
        """Run one batch from a boundary to the next; survivors wait there."""
        samples = self._take(waiting[boundary])
        until = self.stops[self.stops.index(boundary) + 1]
        self.batches[boundary, samples.count] += 1
        self._ran += 1
        samples, departures = self.encoder.advance(samples, until, work=self.work)
        if samples.count and until == self.encoder.depth:
            departures.append(self.encoder.finish(samples))
        elif samples.count:
            waiting[until].append((self._ran, samples))
        return departures

    def _take(self, parts: deque[tuple[int, Samples]]) -> Samples:
        """The first `batch` samples that wait, shortest first so that equal lengths stand together."""
        taken: list[Samples] = []
        room = self.batch
        while parts and room:
            since, part = parts.popleft()
            if part.count > room:
                parts.appendleft((since, part.taken(torch.arange(room, part.count))))
                part = part.taken(torch.arange(room))
            taken.append(part)
            room -= part.count
        joined = Samples.concatenate(taken)
        order = torch.argsort(joined.lengths, stable=True)
        return joined if len(taken) == 1 else joined.taken(order)


def _answers(departure: Departure, per_token: bool) -> Iterator[Answer]:
    at = 0
    for place, number in enumerate(departure.ids.tolist()):
        length = int(departure.lengths[place])
        logits = departure.answers[at : at + length] if per_token else departure.answers[place]
        at += length
        yield Answer(number, logits, departure.boundary)
