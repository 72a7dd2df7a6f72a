"""Split computing: which two sides take each other for the same encoder, and which do not."""

from __future__ import annotations

import copy
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from split_worker import BOUNDARY, CLASSES, WIDTH, encoder

from dyndepth.encoders import DynamicEncoder, LinearHead, SampleExit, SampleExits
from dyndepth.errors import SplitError
from dyndepth.exits import Entropy
from dyndepth.split import SplitEncoder, SplitServer, TcpLink
from dyndepth.split.here import identity


def _changed(name: str, change: Callable[[Any], Any]) -> tuple[DynamicEncoder, DynamicEncoder]:
    """An encoder, and another one whose model and exits are copies that `change` made different."""
    whole = encoder(name)
    other = copy.deepcopy(torch.nn.ModuleDict({"model": whole.model, "exits": whole.exits}))
    made = change(other)
    exits = made if isinstance(made, SampleExits) else other["exits"]
    return whole, DynamicEncoder(other["model"], exits)


def _set(get: Callable[[Any], Any], value: float) -> Callable[[Any], None]:
    def change(parts: Any) -> None:
        get(parts).data.view(-1)[0] = value

    return change


def _criterion(parts: Any) -> SampleExits:
    points = [
        SampleExit(point.leave, point.head, type(point.criterion)(module=point.judge, seed=5), point.threshold)
        for point in parts["exits"]
    ]
    return SampleExits(points, parts["exits"].model)


def _final(parts: Any) -> SampleExits:
    exits = parts["exits"]
    return SampleExits(list(exits), exits.model, final=LinearHead(WIDTH, CLASSES))


def _threshold(parts: Any) -> Any:
    return parts["exits"].with_thresholds([-0.3, -0.3, -0.3, -0.30000001])


def _top(parts: Any) -> Any:
    return parts["model"].classifier.weight


DIFFERENT: list[tuple[str, Callable[[Any], Any]]] = [
    ("entropy", _threshold),
    ("entropy", _set(lambda parts: parts["exits"].exits[3].head.out.weight, 9.0)),
    ("entropy", _set(lambda parts: parts["exits"].exits[0].head.out.bias, 9.0)),
    ("entropy", _set(_top, 9.0)),
    ("entropy", _final),
    ("ponder", _criterion),
    ("ponder", _set(lambda parts: next(parts["exits"].exits[0].judge.parameters()), 9.0)),
    ("ponder", lambda parts: parts["exits"].with_criterion(Entropy(), -0.3)),
]


@pytest.mark.parametrize(("name", "change"), DIFFERENT)
def test_sides_that_would_answer_differently_refuse_each_other(name: str, change: Callable[[Any], Any]) -> None:
    whole, other = _changed(name, change)
    here, there = socket.socketpair()
    said: list[str] = []

    def serve() -> None:
        try:
            SplitServer(other, BOUNDARY, TcpLink(there), timeout=10.0)
        except SplitError as error:
            said.append(str(error))

    server = threading.Thread(target=serve)
    server.start()
    try:
        with pytest.raises(SplitError, match="the other differs"):
            SplitEncoder(whole, BOUNDARY, TcpLink(here), timeout=10.0)
    finally:
        here.close()
        server.join(20)
    assert len(said) == 1, "the server must refuse as well"
    assert "the other differs" in said[0]


@pytest.mark.parametrize("name", ["entropy", "ponder", "q_exit", "patience"])
def test_sides_that_answer_alike_are_the_same(name: str, tmp_path: Path) -> None:
    """A copy, what came back from files, other notes and another layout; but not another cut."""
    whole = encoder(name)
    own = identity(whole, BOUNDARY)
    assert identity(_changed(name, lambda _: None)[1], BOUNDARY) == own
    whole.exits.save_pretrained(tmp_path)
    read = SampleExits.from_pretrained(tmp_path)
    read.record = {"made": "elsewhere"}
    assert identity(DynamicEncoder(whole.model, read, layout="padded"), BOUNDARY) == own
    assert identity(DynamicEncoder(whole.model, copy.deepcopy(read).double()), BOUNDARY) == own, (
        "exits run in the model's dtype"
    )
    assert identity(whole, BOUNDARY - 1) != own
