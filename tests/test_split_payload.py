"""Payloads and frames: exact sizes, round trips, precisions, and any bytes at all are an answer or a SplitError."""

from __future__ import annotations

import json
import socket
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyndepth.encoders import Departure, Samples
from dyndepth.errors import ArgumentError, SplitError
from dyndepth.split import Limits, TcpLink, frame_bytes, frames, payload
from dyndepth.split.frames import Frame, Kind

WIDTH = 6
CARRIED = {"count": (torch.int64, ()), "previous": (torch.float32, (WIDTH,))}
#: Of one extent the batch decides.
INPUTS = {"bias": (torch.float32, (None,))}
SMALL = Limits(payload_bytes=1 << 20, samples=64)


def _samples(lengths: list[int], seed: int = 0, scale: float = 1.0) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    n, tokens = len(lengths), sum(lengths)
    return Samples(
        torch.randn(tokens, WIDTH, generator=generator) * scale,
        torch.tensor(lengths),
        torch.randperm(40, generator=generator)[:n],
        2,
        {"count": torch.arange(n), "previous": torch.randn(n, WIDTH, generator=generator)},
        {"bias": torch.randn(n, 2, generator=generator)},
    )


def _decode(data: bytes, *, packed: bool = True, limits: Limits = SMALL) -> tuple[Samples, Tensor | None]:
    return payload.decode(
        data, boundary=2, width=WIDTH, carried=CARRIED, inputs=INPUTS, dtype=torch.float32, packed=packed, limits=limits
    )


_lengths = st.lists(st.integers(1, 7), min_size=1, max_size=9)


@settings(max_examples=40, deadline=None)
@given(_lengths, st.booleans(), st.booleans())
def test_samples_arrive_as_they_were(lengths: list[int], asked: bool, packed: bool) -> None:
    samples = _samples(lengths)
    depth = torch.arange(len(lengths)) if asked else None
    found, came = _decode(payload.encode(samples, "fp32", depth), packed=packed)
    assert torch.equal(found.tokens(), samples.hidden)
    assert found.packed == packed
    assert torch.equal(found.lengths, samples.lengths)
    assert torch.equal(found.ids, samples.ids)
    assert found.boundary == 2
    assert {k: v.tolist() for k, v in found.carried.items()} == {k: v.tolist() for k, v in samples.carried.items()}
    assert torch.equal(found.inputs["bias"], samples.inputs["bias"])
    assert came is None if depth is None else came is not None and torch.equal(came, depth)


@settings(max_examples=30, deadline=None)
@given(_lengths, st.sampled_from(payload.WIRES), st.booleans())
def test_the_size_is_known_beforehand(lengths: list[int], wire: str, asked: bool) -> None:
    samples = _samples(lengths)
    depth = torch.zeros(len(lengths), dtype=torch.int64) if asked else None
    made = Frame(Kind.SAMPLES, 1, payload.encode(samples, wire, depth))
    assert frame_bytes(payload.layout_of(samples, wire, depth=asked)) == made.size == 32 + len(made.payload)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bias", torch.zeros(3, 2, dtype=torch.float64), r"inputs.bias must be float32 \[3, 2\], got float64 \[3, 2\]"),
        ("bias", torch.zeros(3, 2, dtype=torch.float8_e4m3fn), r"inputs.bias must be float32 \[3, 2\], got float8_e4m3fn"),
        ("bias", torch.zeros(3, 2, dtype=torch.complex64), "inputs.bias must be float32"),
        ("bias", torch.zeros(2, 2), r"inputs.bias must be float32 \[3, 2\], got float32 \[2, 2\]"),
        ("bias", torch.zeros(3), r"inputs.bias must be float32 \[3, 0\], got float32 \[3\]"),
        ("bias", torch.zeros(3, 2, 1), r"inputs.bias must be float32 \[3, 2\], got float32 \[3, 2, 1\]"),
        ("bias", torch.full((3, 2), torch.nan), "inputs.bias holds NaN or infinity"),
        ("bias", None, "inputs.bias is missing"),
        ("more", torch.zeros(3, 2), "nobody asked for inputs.more"),
    ],
)
def test_only_what_layers_leave_is_taken(name: str, value: Tensor | None, message: str) -> None:
    samples = _samples([3, 1, 2])
    if value is None:
        del samples.inputs[name]
    else:
        samples.inputs[name] = value
    with pytest.raises(SplitError, match=message):
        _decode(payload.encode(samples, "fp32"))


def test_precisions() -> None:
    """int8 is within half a step of max / 127 per token; casts are torch's; a row of zeros stays zero."""
    samples = _samples([3, 4, 2], scale=5.0)
    samples.hidden[4] = 0
    exact = samples.hidden
    for wire, kind in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        assert torch.equal(_decode(payload.encode(samples, wire))[0].hidden, exact.to(kind).float())
    found = _decode(payload.encode(samples, "int8"))[0].hidden
    step = exact.abs().amax(1, keepdim=True) / 127
    assert bool(((found - exact).abs() <= step * 0.5001).all())
    assert bool(((found - exact).abs() > step * 0.3).any())
    assert not bool(found[4].any())
    values, scale = payload.quantised(torch.tensor([[1.0, -2.54, 0.01], [0.0, 0.0, 0.0]]))
    assert values.tolist() == [[50, -127, 0], [0, 0, 0]]
    assert scale.tolist() == pytest.approx([0.02, 0.0])


def test_what_a_precision_cannot_hold_is_said_before_it_is_sent() -> None:
    with pytest.raises(ArgumentError, match=r"residuals after layer 2 reach .*, 'fp16' cannot hold it"):
        payload.encode(_samples([2, 2], scale=1e6), "fp16")
    assert _decode(payload.encode(_samples([2, 2], scale=1e6), "int8"))[0].count == 2
    broken = _samples([2])
    broken.hidden[0, 0] = float("nan")
    for wire in payload.WIRES:
        with pytest.raises(ArgumentError, match="cannot hold it"):
            payload.encode(broken, wire)
    with pytest.raises(ArgumentError, match="wire must be one of fp32, bf16, fp16, int8, got 'int4'"):
        payload.encode(_samples([2]), "int4")


@pytest.mark.parametrize("per_token", [False, True])
def test_answers_arrive_as_they_were(per_token: bool) -> None:
    sent = _samples([3, 1, 2, 4])
    groups = [([2, 0], 4), ([1], 3), ([3], 4)]
    departures = []
    for rows, layer in groups:
        lengths = sent.lengths[rows]
        count = int(lengths.sum()) if per_token else len(rows)
        departures.append(Departure(sent.ids[rows], torch.randn(count, 5), lengths, layer))
    found, work = payload.decode_answers(
        payload.encode_answers(departures, [0, 0, 4, 3]), sent, depth=4, classes=5, per_token=per_token, limits=SMALL
    )
    assert work.tolist() == [0, 0, 4, 3]
    answers: dict[int, tuple[list[list[float]], int]] = {}
    for source in (departures, found):
        at_all = {}
        for departed in source:
            at = 0
            for row, number in enumerate(departed.ids.tolist()):
                many = int(departed.lengths[row]) if per_token else 1
                at_all[number] = (departed.answers[at : at + many].tolist(), departed.boundary)
                at += many
            assert at == len(departed.answers)
        assert not answers or answers == at_all
        answers = at_all
    assert len(answers) == 4


_WHOLE = payload.encode(_samples([3, 1, 2]), "int8", torch.zeros(3, dtype=torch.int64))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_are_samples_or_an_error(data: st.DataObject) -> None:
    """Damage of every kind to a payload: bytes changed, cut, added, or all made up. Nothing else is raised."""
    kind = data.draw(st.sampled_from(["flip", "cut", "add", "junk", "header"]))
    made = bytearray(_WHOLE)
    if kind == "flip":
        for at in data.draw(st.lists(st.integers(0, len(made) - 1), min_size=1, max_size=6)):
            made[at] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del made[data.draw(st.integers(0, len(made) - 1)) :]
    elif kind == "add":
        made += data.draw(st.binary(min_size=1, max_size=30))
    elif kind == "junk":
        made = bytearray(data.draw(st.binary(max_size=80)))
    else:
        length = struct.unpack("<Q", made[:8])[0]
        told = json.loads(made[8 : 8 + length])
        name = data.draw(st.sampled_from(sorted(told)))
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        whole = st.integers(-(2**63), 2**64)
        told[name][key] = data.draw(
            st.sampled_from(["F64", "BOOL", "F8_E4M3", "X"])
            if key == "dtype"
            else st.lists(whole | st.integers(0, 9), max_size=4)
        )
        text = json.dumps(told).encode()
        made = bytearray(struct.pack("<Q", len(text)) + text) + made[8 + length :]
    try:
        samples, _ = _decode(bytes(made))
    except SplitError:
        return
    assert samples.hidden.shape == (int(samples.lengths.sum()), WIDTH)
    assert bool(torch.isfinite(samples.hidden).all())
    assert samples.ids.unique().numel() == samples.count <= SMALL.samples


@settings(max_examples=120, deadline=None)
@given(st.binary(max_size=90), st.booleans())
def test_any_stream_is_a_frame_or_an_error(junk: bytes, begins_well: bool) -> None:
    """Whatever arrives and then ends: a frame or a SplitError, at once."""
    frame = Frame(Kind.SAMPLES, 3, b"0123456789")
    good = frames.header(frame) + frame.payload
    here, there = socket.socketpair()
    with here, there:
        there.sendall(good[: 20 + len(junk) % 23] + junk if begins_well else junk)
        there.shutdown(socket.SHUT_WR)
        try:
            found = frames.receive(TcpLink(here), Limits(payload_bytes=64), 5.0)
        except SplitError:
            return
        assert found == frame


def test_a_damaged_answer_is_an_error() -> None:
    sent = _samples([3, 1])
    whole = payload.encode_answers([Departure(sent.ids, torch.zeros(2, 5), sent.lengths, 4)], [0, 0, 2, 2])
    for cut in range(0, len(whole), 7):
        with pytest.raises(SplitError):
            payload.decode_answers(whole[:cut], sent, depth=4, classes=5, per_token=False, limits=SMALL)
