"""Split computing: two processes answer as one does, only what is left travels, and nothing a peer sends does harm."""

from __future__ import annotations

import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from split_worker import BOUNDARY, LAYERS, SECONDS, WIDTH, encoder, inputs
from torch import Tensor

from dyndepth.encoders import Samples
from dyndepth.errors import ArgumentError, SplitError
from dyndepth.split import GlooLink, Limits, Link, SplitEncoder, SplitServer, TcpLink
from dyndepth.split import frames as framing
from dyndepth.split.frames import Frame, Kind
from dyndepth.split.here import identity

LENGTHS = [9, 2, 5, 9, 1, 5, 7, 3, 4, 6, 8, 2]
NAMES = ("patience", "entropy", "saturation", "q_exit", "ponder", "depth")


@contextmanager
def _process(kind: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(Path(__file__).parent / "split_worker.py"), kind, str(torch.get_num_threads()), *arguments]
    worker = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        yield worker
    finally:
        worker.kill()
        worker.wait()


def _alike(found: Any, wanted: Any) -> None:
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.exit_layers, wanted.exit_layers)
    assert found.work.layers == wanted.work.layers
    assert found.work.rows == wanted.work.rows


def _by_hand(samples: Samples, depth: bool) -> int:
    """Bytes of the fp32 frame, counted from the format: 32 + 8 + JSON padded to eights + numbers."""
    tokens, n = samples.total, samples.count
    numbers: dict[str, tuple[str, int, list[int]]] = {
        "boundary": ("I64", 8, [1]), "ids": ("I64", 8, [n]), "lengths": ("I64", 8, [n]), "hidden": ("F32", 4, [tokens, WIDTH]),
    }  # fmt: skip
    if depth:
        numbers["depth"] = ("I64", 8, [n])
    for name, value in samples.carried.items():
        kinds = {torch.float32: ("F32", 4), torch.int64: ("I64", 8), torch.int32: ("I32", 4)}
        numbers[f"carried.{name}"] = (*kinds[value.dtype], list(value.shape))
    told, at = {}, 0
    for name, (kind, size, shape) in sorted(
        numbers.items(), key=lambda item: ({"I64": 0, "F32": 1, "I32": 2}[item[1][0]], item[0])
    ):
        count = size
        for extent in shape:
            count *= extent
        told[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + count]}
        at += count
    described = len(json.dumps(told, separators=(",", ":")))
    return 32 + 8 + described + -described % 8 + at


def test_two_processes_answer_as_one() -> None:
    """Every criterion with state, over a socket: the same bits, exits and work; bytes are those counted by hand."""
    listening = socket.create_server(("127.0.0.1", 0))
    asked = torch.tensor([1, 3, 4, -1, 2, 5, -1, 4, 3, 1, 4, -1])
    batch = inputs(LENGTHS)
    with _process("tcp", str(listening.getsockname()[1]), *NAMES) as worker:
        for name in NAMES:
            whole = encoder(name)
            depth = asked if name == "depth" else None
            wanted = whole(depth=depth, **batch)
            left = [int((wanted.exit_layers == at).sum()) for at in range(1, LAYERS + 1)]
            assert sum(left[:BOUNDARY]) > 0, left
            assert sum(left[BOUNDARY:]) > 1, left
            with SplitEncoder(whole, BOUNDARY, TcpLink.accept(listening, SECONDS), wire="fp32", timeout=SECONDS) as split:
                _alike(split(depth=depth, **batch), wanted)
                samples, _ = whole.advance(whole.begin(**batch), BOUNDARY, depth=depth)
                assert (split.traffic.samples, split.traffic.tokens) == (sum(left[BOUNDARY:]), samples.total)
                assert split.traffic.sent == _by_hand(samples, depth is not None)
                if name == "depth":  # nobody is left: nothing travels
                    everyone = torch.full((len(LENGTHS),), 2)
                    _alike(split(depth=everyone, **batch), whole(depth=everyone, **batch))
                    assert split.traffic.sent == split.traffic.received == 0
                one = {key: value[:1] for key, value in batch.items()}
                _alike(split(**one), whole(**one))
        assert worker.wait(SECONDS) == 0


def test_over_torch_distributed() -> None:
    """The same over gloo, in every precision; then the other process dies, and the next call says so at once."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = str(listening.getsockname()[1])
    whole, batch = encoder("entropy"), inputs(LENGTHS)
    wanted = whole(**batch)
    deep = wanted.exit_layers > BOUNDARY
    with _process("gloo", port, "entropy") as worker:
        link = GlooLink(0, listening=listening, timeout=SECONDS)
        split = SplitEncoder(whole, BOUNDARY, link, wire="fp32", timeout=SECONDS)
        _alike(split(**batch), wanted)
        sizes, errors = {}, {}
        for wire in ("fp32", "fp16", "bf16", "int8"):
            split.wire = wire
            out = split(**batch)
            same = deep & (out.exit_layers == wanted.exit_layers)
            assert torch.equal(out.logits[~deep], wanted.logits[~deep])
            assert int(same.sum()) >= int(deep.sum()) - 1
            sizes[wire] = split.traffic.sent
            errors[wire] = float((out.logits - wanted.logits)[same].abs().max())
        tokens = split.traffic.tokens
        assert errors["fp32"] == 0 < errors["fp16"] < errors["bf16"]
        assert 0 < errors["int8"] < 0.2
        saved = {wire: sizes["fp32"] - size for wire, size in sizes.items()}
        assert saved["fp16"] - tokens * WIDTH * 2 in range(-8, 17)  # the description is a few characters shorter or longer
        assert saved["bf16"] == saved["fp16"] or saved["bf16"] == saved["fp16"] - 8
        assert saved["int8"] - tokens * (WIDTH * 3 - 4) in range(-100, 1)
        worker.kill()
        worker.wait()
        began = time.monotonic()
        with pytest.raises(SplitError, match="link: could not"):
            split(**batch)
        with pytest.raises(SplitError, match="the link is closed"):
            split(**batch)
        assert time.monotonic() - began < 10


def test_nobody_comes() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(SplitError, match=r"nobody connected within 0\.1 s"):
        TcpLink.accept(listening, 0.1)
    port = listening.getsockname()[1]
    listening.close()
    with pytest.raises(SplitError, match=rf"no connection to 127.0.0.1:{port} within 0\.2 s"):
        TcpLink.connect("127.0.0.1", port, 0.2)
    with pytest.raises(SplitError, match=r"the other process did not come to 127.0.0.1:\d+ within 1 s"):
        GlooLink(0, timeout=1.0)
    with pytest.raises(SplitError, match="rank must be 0 or 1, got 2"):
        GlooLink(2)


# Below, both sides are in this process: what is sent is what no SplitEncoder would send.


def _pair() -> tuple[TcpLink, TcpLink, socket.socket]:
    here, there = socket.socketpair()
    return TcpLink(here), TcpLink(there), here


@contextmanager
def _server(
    name: str = "patience", limits: Limits | None = None, idle: float = 20.0
) -> Iterator[tuple[Link, socket.socket, list[Any]]]:
    """A greeted server in a thread; the list gets what `serve` returned or raised."""
    link, other, raw = _pair()
    ended: list[Any] = []
    made = encoder(name)

    def work() -> None:
        try:
            ended.append(SplitServer(made, BOUNDARY, other, timeout=2.0, idle=idle).serve())
        except SplitError as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        SplitEncoder(made, BOUNDARY, link, timeout=10.0)
        yield link, raw, ended
    finally:
        raw.close()
        thread.join(20)
        assert not thread.is_alive(), "the server hangs"


def _sent(name: str = "patience") -> dict[str, Tensor]:
    """What a batch looks like on the wire."""
    from safetensors.torch import load

    from dyndepth.split import payload

    whole = encoder(name)
    samples, _ = whole.advance(whole.begin(**inputs(LENGTHS)), BOUNDARY)
    return load(payload.encode(samples, "fp32"))


def _ask(link: Link, tensors: dict[str, Tensor] | bytes, number: int = 1) -> Frame:
    from safetensors.torch import save

    made = tensors if isinstance(tensors, bytes) else save(tensors)
    framing.send(link, Frame(Kind.SAMPLES, number, made), 5.0)
    return framing.receive(link, Limits(), 10.0)


def _header(magic: bytes = b"dynsplit", version: int = 1, kind: int = 2, length: int = 0, payload: bytes = b"") -> bytes:
    fields = struct.pack("<8sHHIQI", magic, version, kind, 1, length, zlib.crc32(payload))
    return fields + struct.pack("<I", zlib.crc32(fields))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n", "does not speak this protocol"),
        (_header(version=2), "version must be 1, got 2"),
        (_header(kind=9), "kind must be one of 1, 2, 3, 4, 5, got 9"),
        (_header(kind=1), "wanted samples, got HELLO"),
        (_header(length=2**62), f"the payload may have {2**28} bytes, the header announces {2**62}"),
        (_header()[:-1] + b"\xff", r"header is damaged \(checksum\)"),
        (_header(length=4, payload=b"abcd") + b"abce", r"payload of 4 bytes is damaged or was cut short \(checksum\)"),
        (_header(length=400) + b"short", r"got 5 of 400 bytes within 2 s"),
    ],
)
def test_a_frame_that_cannot_be_read_ends_the_link_with_its_reason(data: bytes, message: str) -> None:
    with _server() as (link, raw, ended):
        raw.sendall(data)
        assert framing.receive(link, Limits(), 10.0).kind == Kind.ERROR
    assert len(ended) == 1
    with pytest.raises(SplitError, match=message):
        raise ended[0]


def test_a_peer_that_goes_or_falls_silent() -> None:
    with _server() as (_, raw, ended):
        raw.sendall(_header(length=400) + b"short")
        raw.shutdown(socket.SHUT_WR)
    assert "the other side closed after 5 of 400 bytes" in str(ended[0])
    with _server(idle=0.2) as (_, _, ended):
        time.sleep(0.4)
    assert "got 0 of 32 bytes within 0.2 s" in str(ended[0])
    link, _, raw = _pair()
    with pytest.raises(SplitError, match=r"got 0 of 32 bytes within 0\.2 s"):
        SplitEncoder(encoder("patience"), BOUNDARY, link, timeout=0.2)
    raw.close()


def test_a_drip_of_bytes_is_not_waited_for() -> None:
    """The deadline is for the whole message: one byte now and then does not move it."""
    link, other, _ = _pair()
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.05):
            try:
                other.write(b"x", 1.0)
            except SplitError:
                return

    thread = threading.Thread(target=drip)
    thread.start()
    began = time.monotonic()
    with pytest.raises(SplitError, match=r"of 1000 bytes within 0\.5 s"):
        link.read(1000, 0.5)
    assert time.monotonic() - began < 3
    stop.set()
    thread.join(5)


Change = Callable[[dict[str, Tensor]], Any]


def _with(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    def changed(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name].clone())

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("ids"), r"ids must be int64 \[1\.\.65536\], got float32 \[0\]"),
        (_with("ids", lambda v: v.int()), r"ids must be int64 .* got int32"),
        (_with("ids", lambda v: v[:0]), r"got int64 \[0\]"),
        (_with("ids", lambda v: v * 0), "ids must be different numbers"),
        (_with("ids", lambda v: v + 2**40), r"ids must be different numbers in \[0, 65536\)"),
        (_with("ids", lambda v: v - 100), "ids must be different numbers"),
        (_with("lengths", lambda v: v * 0), "lengths must be at least 1"),
        (_with("lengths", lambda v: v + 1), r"hidden must be float32 \[\d+, 24\], got float32"),
        (_with("lengths", lambda v: v * 2**58), "lengths must be at least 1 and below the limit"),
        (_with("lengths", lambda v: v[1:]), "lengths must be int64"),
        (_with("boundary", lambda v: v + 1), "samples must be at boundary 3, got 4"),
        (_with("hidden", lambda v: v[:, 1:]), "hidden must be float32"),
        (_with("hidden", lambda v: v.double()), "hidden must be one of fp32, bf16, fp16, int8, got torch.float64"),
        (_with("hidden", lambda v: v.to(torch.int8)), "scale is missing"),
        (_with("hidden", lambda v: v.fill_(float("nan"))), "hidden holds NaN or infinity"),
        (lambda t: t.pop("carried.patience_count"), "carried.patience_count is missing"),
        (_with("carried.patience_count", lambda v: v.float()), "carried.patience_count must be int64"),
        (_with("carried.patience_argmax", lambda v: v[1:]), "carried.patience_argmax must be int64"),
        (lambda t: t.update({"carried.more": t["ids"]}), "nobody asked for carried.more"),
        (lambda t: t.update({"__reduce__": t["ids"]}), "nobody asked for __reduce__"),
        (lambda t: t.update({"depth": t["ids"][:1]}), "depth must be int64"),
        (lambda t: t.update({"inputs.x": t["ids"]}), "nobody asked for inputs.x"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_and_the_link_goes_on(change: Change, message: str) -> None:
    tensors = _sent()
    wrong = {**tensors}
    change(wrong)
    server = _Served.get()
    reply = server.answer(Frame(Kind.SAMPLES, 7, _saved(wrong)))
    assert (reply.kind, reply.number) == (Kind.ERROR, 7)
    assert re.search(message, reply.payload.decode()), reply.payload
    assert server.answer(Frame(Kind.SAMPLES, 8, _saved(tensors))).kind == Kind.ANSWERS


class _Served:
    """One server whose `answer` is called directly."""

    server: SplitServer | None = None

    @classmethod
    def get(cls) -> SplitServer:
        if cls.server is None:
            link, other, _ = _pair()
            framing.send(link, Frame(Kind.HELLO, 0, _identity()), 1.0)
            cls.server = SplitServer(encoder("patience"), BOUNDARY, other)
        return cls.server


def _identity() -> bytes:
    return identity(encoder("patience"), BOUNDARY)


def _saved(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: value.clone().contiguous() for name, value in tensors.items()})


def test_errors_travel_back_and_the_next_batch_is_answered() -> None:
    with _server() as (link, _, ended):
        for junk in (b"", b"\x80\x04\x95 a pickle?", b"\xff" * 40, _saved(_sent())[:-1], _saved(_sent()) + b"\0"):
            reply = _ask(link, junk, 5)
            assert (reply.kind, reply.number) == (Kind.ERROR, 5)
            assert b"payload: not a safetensors file" in reply.payload
        assert _ask(link, _sent(), 6).kind == Kind.ANSWERS
        framing.send(link, Frame(Kind.BYE, 0), 1.0)
    assert ended == [1]


def test_one_long_sample_among_many_short_ones_is_not_padded_out_of_memory() -> None:
    tensors = _sent("entropy")
    n = 400
    tensors["ids"], tensors["lengths"] = torch.arange(n), torch.tensor([500] + [1] * (n - 1))
    tensors["hidden"] = torch.zeros(500 + n - 1, WIDTH)
    link, other, _ = _pair()
    framing.send(link, Frame(Kind.HELLO, 0, identity(encoder("entropy"), BOUNDARY)), 1.0)
    small = Limits(payload_bytes=200_000)
    server = SplitServer(encoder("entropy", layout="padded"), BOUNDARY, other, limits=small)
    reply = server.answer(Frame(Kind.SAMPLES, 1, _saved(tensors)))
    assert b"would take 19200000 bytes padded, the limit is 1600000" in reply.payload


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Frame(Kind.ERROR, 1, b"no \x1b[31mroom"), r"the other side says: no \?\[31mroom"),
        (Frame(Kind.ANSWERS, 2), "wanted the answer to request 1, got ANSWERS 2"),
        (Frame(Kind.SAMPLES, 1), "wanted the answer to request 1, got SAMPLES 1"),
        (Frame(Kind.ANSWERS, 1, b"junk"), "not a safetensors file"),
        (_with("ids", lambda v: v + 1), "answers must be of the .* samples that were sent"),
        (_with("ids", lambda v: v[:1]), "answers must be of the .* samples that were sent"),
        (_with("exit_layers", lambda v: v - 3), "exit_layers must be above 3 and at most 5"),
        (_with("exit_layers", lambda v: v + 3), "exit_layers must be above 3 and at most 5"),
        (_with("lengths", lambda v: v.flip(0) + 1), "lengths of the samples that were sent"),
        (_with("logits", lambda v: v * float("nan")), "logits must be floating point without NaN"),
        (_with("logits", lambda v: v[:, :2]), r"logits must be float32 \[\d+, 3\]"),
        (_with("work", lambda v: v[:2]), r"work must be int64 \[5\]"),
    ],
)
def test_a_server_cannot_put_words_into_other_samples_mouths(reply: Any, message: str) -> None:
    from safetensors.torch import load

    link, other, raw = _pair()
    whole, batch = encoder("patience"), inputs(LENGTHS)
    framing.send(other, Frame(Kind.HELLO, 0, _identity()), 1.0)
    split = SplitEncoder(whole, BOUNDARY, link, wire="fp32", timeout=5.0)
    if not isinstance(reply, Frame):
        answers = load(_Served.get().answer(Frame(Kind.SAMPLES, 1, _saved(_sent()))).payload)
        reply(answers)
        reply = Frame(Kind.ANSWERS, 1, _saved(answers))
    framing.send(other, reply, 1.0)
    with pytest.raises(SplitError, match=message):
        split(**batch)
    assert (raw.fileno() == -1) == (reply.kind != Kind.ERROR), "only an error that it reports lets a server go on"


def test_sides_that_differ_and_bad_arguments() -> None:
    link, other, _ = _pair()
    encoder("other")  # made here: the seed is the process's
    thread = threading.Thread(target=lambda: _refused(other))
    thread.start()
    with pytest.raises(SplitError, match="both sides must have the same model, dtype, exits and boundary"):
        SplitEncoder(encoder("patience"), BOUNDARY, link, timeout=5.0)
    thread.join(10)
    link, _, _ = _pair()
    with pytest.raises(ArgumentError, match="boundary must be 1 to 4, got 5"):
        SplitEncoder(encoder("patience"), 5, link)
    with pytest.raises(ArgumentError, match="wire must be one of fp32, bf16, fp16, int8, got 'fp8'"):
        SplitEncoder(encoder("patience"), 3, link, wire="fp8")


def _refused(link: TcpLink) -> None:
    with pytest.raises(SplitError, match="the other differs"):
        SplitServer(encoder("other"), BOUNDARY, link, timeout=5.0)


def test_what_came_lies_as_tensors_of_torch_do() -> None:
    """A product's bits can depend on where its operand begins; in a payload tensors begin at any multiple of 8."""
    from safetensors.torch import load

    from dyndepth.split import payload

    came = [payload.saved({"first": torch.zeros(count, dtype=torch.int64), "x": torch.ones(3)}) for count in range(1, 9)]
    assert any(load(one)["x"].data_ptr() % 64 for one in came)
    assert all(payload.loaded(one)["x"].data_ptr() % 64 == 0 for one in came)


def test_what_criteria_carry_is_known_beforehand() -> None:
    """`carried_at` asks the criteria with zeros; passes leave just that with samples."""
    for name in NAMES:
        whole = encoder(name)
        samples, _ = whole.advance(whole.begin(**inputs(LENGTHS)), BOUNDARY)
        found = {key: (value.dtype, tuple(value.shape[1:])) for key, value in samples.carried.items()}
        assert whole.carried_at(BOUNDARY) == found, name
