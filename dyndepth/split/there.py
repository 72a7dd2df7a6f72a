"""The side that has the upper layers: takes samples off a link, runs them to the top and sends answers back."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from dyndepth.encoders import DynamicEncoder, Samples
from dyndepth.errors import ArgumentError, ExitsError, SplitError
from dyndepth.runtime.session import Work
from dyndepth.split import frames, payload
from dyndepth.split.frames import Frame, Kind, Limits
from dyndepth.split.here import failed, greet
from dyndepth.split.links import Link


class SplitServer:
    """Layers [boundary, L) of a `DynamicEncoder`, for one link.

        SplitServer(DynamicEncoder(model, exits), 6, link).serve()

    Args:
        encoder: with the model and exits that the other side has too; its exits above `boundary` judge here.
        boundary: layers that run on the other side.
        link: to it.
        timeout: seconds that one message may take.
        idle: seconds without a request after which `serve` gives up.
        limits: of what is taken from the other side; checked before anything of that size is allocated.

    A batch that cannot be used or run is answered with an error and the link goes on; a frame that cannot be read ends it,
    as nobody knows where the next one would begin.
    """

    def __init__(
        self,
        encoder: DynamicEncoder,
        boundary: int,
        link: Link,
        *,
        timeout: float = 30.0,
        idle: float = 600.0,
        limits: Limits | None = None,
    ) -> None:
        self.encoder, self.boundary, self.link = encoder, boundary, link
        self.timeout, self.idle = timeout, idle
        self.limits = Limits() if limits is None else limits
        self._carried = encoder.carried_at(boundary)
        greet(encoder, boundary, link, timeout, self.limits, first=False)

    def serve(self) -> int:
        """Answer until the other side says goodbye; batches answered. SplitError when the link breaks or is silent."""
        answered = 0
        try:
            while True:
                frame = self._next()
                if frame.kind == Kind.BYE:
                    return answered
                reply = self.answer(frame)
                frames.send(self.link, reply, self.timeout)
                answered += reply.kind == Kind.ANSWERS
        finally:
            self.link.close()

    def _next(self) -> Frame:
        try:
            frame = frames.receive(self.link, self.limits, self.timeout, idle=self.idle)
            if frame.kind not in (Kind.SAMPLES, Kind.BYE):
                raise SplitError(f"split: wanted samples, got {frame.kind.name}")
        except SplitError as error:
            with contextlib.suppress(SplitError):
                frames.send(self.link, failed(0, str(error)), min(self.timeout, 1.0))
            raise
        return frame

    def answer(self, frame: Frame) -> Frame:
        """The reply to a frame of samples: their answers, or what is wrong with them."""
        try:
            some = next(iter(self.encoder.model.parameters()))
            samples, depth = payload.decode(
                frame.payload,
                boundary=self.boundary,
                width=self.encoder.family.width_at(self.boundary),
                carried=self._carried,
                inputs=self.encoder.family.inputs_at(self.boundary),
                dtype=some.dtype,
                packed=self.encoder.packed,
                limits=self.limits,
            )
            made = self._run(_moved(samples, some.device), depth)
        except (SplitError, ArgumentError, ExitsError) as error:
            return failed(frame.number, str(error))
        except (RuntimeError, IndexError, KeyError, ValueError) as error:
            # What layers want beside residuals is the family's to know: shapes that do not fit show when it runs.
            return failed(frame.number, f"the batch could not be run: {type(error).__name__}: {error}")
        return Frame(Kind.ANSWERS, frame.number, made)

    @torch.no_grad()
    def _run(self, samples: Samples, depth: Tensor | None) -> bytes:
        asked = None
        if depth is not None:  # criteria look depths up by the caller's numbers
            asked = torch.full((int(samples.ids.max()) + 1,), -1).index_put((samples.ids,), depth)
        work = Work([0] * self.encoder.depth)
        left, departures = self.encoder.advance(samples, work=work, depth=asked)
        if left.count:
            departures.append(self.encoder.finish(left))
        made = payload.encode_answers(departures, work.layers)
        if len(made) > self.limits.payload_bytes:
            raise SplitError(f"split: answers of {len(made)} bytes, the limit is {self.limits.payload_bytes}")
        return made


def _moved(samples: Samples, device: torch.device) -> Samples:
    samples.hidden = samples.hidden.to(device)
    samples.carried = {name: value.to(device) for name, value in samples.carried.items()}
    samples.inputs = {name: value.to(device) for name, value in samples.inputs.items()}
    return samples
