"""The side that has the inputs: embeds, runs the first layers, sends what is left, and puts answers together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.encoders import Departure, DynamicEncoder, Samples, facts_of
from dyndepth.encoders.criteria import SampleCriterion
from dyndepth.encoders.exits import prepared
from dyndepth.errors import ArgumentError, SplitError
from dyndepth.runtime.session import Work
from dyndepth.split import frames, payload
from dyndepth.split.frames import Frame, Kind, Limits
from dyndepth.split.links import Link

#: Entries of each of the model's tensors that both sides compare when they meet.
_ENTRIES = 256


@dataclass
class Traffic:
    """What went over the link, headers included."""

    #: Samples and tokens that travelled.
    samples: int = 0
    tokens: int = 0
    #: Bytes in each direction.
    sent: int = 0
    received: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.samples + other.samples, self.tokens + other.tokens, self.sent + other.sent, self.received + other.received
        )


class SplitEncoder:
    """A `DynamicEncoder` whose upper layers run in another process (`SplitServer`).

        split = SplitEncoder(DynamicEncoder(model, exits), 6, link, wire="int8")
        out = split(**inputs)     # as encoder(**inputs); split.traffic says what travelled

    Args:
        encoder: with the model and exits that the server has too.
        boundary: layers that run here; exits up to it judge here.
        link: to the server.
        wire: precision of residuals on the way: fp32, bf16, fp16, or int8 (one scale per token).
        timeout: seconds that a message, and an answer, may take.
        limits: of what is taken from the server.

    With a wire that holds the model's dtype exactly, answers are those of the encoder in one process: the same samples go
    through the same layers in the same batch. Nothing is sent when no sample is left.

    Raises SplitError when the server is silent, refuses, or sends something unusable; the link is then closed, except after
    an error that the server reported for one batch.
    """

    def __init__(
        self,
        encoder: DynamicEncoder,
        boundary: int,
        link: Link,
        *,
        wire: str = "fp16",
        timeout: float = 30.0,
        limits: Limits | None = None,
    ) -> None:
        if wire not in payload.WIRES:
            raise ArgumentError(f"SplitEncoder: wire must be one of {', '.join(payload.WIRES)}, got {wire!r}")
        self.encoder, self.boundary, self.wire = encoder, boundary, wire
        self.link, self.timeout = link, timeout
        self.limits = Limits() if limits is None else limits
        #: Of the last call, and of all.
        self.traffic, self.total = Traffic(), Traffic()
        self._number = 0
        greet(encoder, boundary, link, timeout, self.limits, first=True)

    @torch.no_grad()
    def __call__(self, *, labels: Tensor | None = None, depth: Tensor | None = None, **inputs: Any) -> Any:
        """As DynamicEncoder's call."""
        encoder = self.encoder
        samples = encoder.begin(**inputs)
        n = samples.count
        if n > self.limits.samples:
            raise ArgumentError(f"SplitEncoder: a batch may have {self.limits.samples} samples, got {n}")
        if depth is not None and (depth.dim() != 1 or len(depth) != n):
            raise ArgumentError(f"SplitEncoder: depth must be int64 [{n}], got {list(depth.shape)}")
        work = Work([0] * encoder.depth, n)
        samples, departures = encoder.advance(samples, self.boundary, work=work, depth=depth)
        self.traffic = Traffic()
        if samples.count:
            answers, layers = self._there(samples, None if depth is None else depth.cpu()[samples.ids])
            departures += answers
            work.layers = [a + b for a, b in zip(work.layers, layers.tolist(), strict=True)]
            self.total += self.traffic
        return encoder.output(departures, n, work, labels)

    def _there(self, samples: Samples, depth: Tensor | None) -> tuple[list[Departure], Tensor]:
        self._number = (self._number + 1) % 2**32
        message = Frame(Kind.SAMPLES, self._number, payload.encode(samples, self.wire, depth))
        self.traffic = Traffic(samples.count, samples.total)
        try:
            self.traffic.sent = frames.send(self.link, message, self.timeout)
            frame = frames.receive(self.link, self.limits, self.timeout)
            self.traffic.received = frame.size
            if frame.kind not in (Kind.ANSWERS, Kind.ERROR) or frame.number != self._number:
                raise SplitError(f"split: wanted the answer to request {self._number}, got {frame.kind.name} {frame.number}")
            departures, layers = ([], torch.zeros(0)) if frame.kind == Kind.ERROR else self._read(frame, samples)
        except SplitError:
            self.link.close()  # what is still on its way belongs to nobody, and who sends nonsense once is not asked again
            raise
        if frame.kind == Kind.ERROR:
            raise SplitError(f"split: the other side says: {reason(frame)}")
        device = samples.hidden.device
        return [Departure(d.ids, d.answers.to(device), d.lengths, d.boundary) for d in departures], layers

    def _read(self, frame: Frame, samples: Samples) -> tuple[list[Departure], Tensor]:
        encoder = self.encoder
        return payload.decode_answers(
            frame.payload,
            samples,
            depth=encoder.depth,
            classes=encoder.exits.model.vocab_size,
            per_token=encoder.per_token,
            limits=self.limits,
        )

    def close(self) -> None:
        """Tell the server that nothing follows, and give the link up."""
        try:
            frames.send(self.link, Frame(Kind.BYE, 0), self.timeout)
        except SplitError:
            pass  # it is gone already
        finally:
            self.link.close()

    def __enter__(self) -> SplitEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def identity(encoder: DynamicEncoder, boundary: int) -> bytes:
    """32 bytes that are the same for two sides that can work together.

    They cover the boundary; the model's facts, dtype and spaced entries of every parameter and buffer; of every exit, and of
    the final head, whatever decides an answer: thresholds, criteria with their settings, heads and judges with all weights
    as they run. `SampleExits.record` decides none.
    """
    some = next(iter(encoder.model.parameters()))
    exits = prepared(encoder.exits, some.device, some.dtype)
    points = []
    for point in exits:
        criterion = point.criterion
        fields = {field.name: getattr(criterion, field.name) for field in dataclasses.fields(criterion)}
        settings = criterion.module_settings() if point.judge is not None and isinstance(criterion, SampleCriterion) else None
        fields.pop("module", None)
        points.append(
            [
                point.leave,
                repr(point.threshold),
                [criterion.kind, fields],
                [point.head.kind, point.head.settings, digest(point.head)],
                None if point.judge is None else [settings, digest(point.judge)],
            ]
        )
    final = exits.final
    made = {
        "facts": repr(facts_of(encoder.model, encoder.exits.final)),
        "dtype": str(some.dtype),
        "model": digest(encoder.model, at_most=_ENTRIES),
        "exits": points,
        "final": None if final is None else [final.kind, final.settings, digest(final)],
        "boundary": boundary,
    }
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).digest()


def digest(module: nn.Module, at_most: int | None = None) -> str:
    """SHA-256 of a module's parameters and buffers by name, all entries or `at_most` spaced ones of each.

    Tensors of a subclass (packed or quantised by a third party) are left out: their bytes are nobody else's to read.
    """
    made = hashlib.sha256()
    for name, value in module.state_dict().items():
        if type(value) not in (Tensor, nn.Parameter):
            continue
        flat = value.detach().flatten()
        if at_most is not None and len(flat) > at_most:
            flat = flat[torch.linspace(0, len(flat) - 1, at_most, dtype=torch.float64).long().to(flat.device)]
        made.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        made.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def greet(encoder: DynamicEncoder, boundary: int, link: Link, timeout: float, limits: Limits, *, first: bool) -> None:
    """Both sides say what they have, one `first`; SplitError, and a closed link, where it differs."""
    if not 1 <= boundary < encoder.depth:
        raise ArgumentError(f"split: boundary must be 1 to {encoder.depth - 1}, got {boundary}")
    own = identity(encoder, boundary)
    try:
        if first:
            frames.send(link, Frame(Kind.HELLO, 0, own), timeout)
        hello = frames.receive(link, limits, timeout)
        if not first:  # even to a stranger: it learns so that the two do not fit
            frames.send(link, Frame(Kind.HELLO, 0, own), timeout)
        if hello.kind != Kind.HELLO or hello.payload != own:
            raise SplitError(
                f"split: both sides must have the same model, dtype, exits and boundary (here {boundary}); the other differs"
            )
    except SplitError:
        link.close()
        raise


def failed(number: int, text: str) -> Frame:
    """An error as a frame: plain text, cut at 1000 bytes."""
    return Frame(Kind.ERROR, number, text.encode()[:1000])


def reason(frame: Frame) -> str:
    """The text of an error, whatever bytes it holds."""
    return "".join(c if c.isprintable() else "?" for c in frame.payload[:1000].decode(errors="replace"))
