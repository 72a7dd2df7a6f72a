"""A stream's answers are a batch's, in order, and its layers run with full batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoder_witness import middle
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_encoders import EXITS, LAYERS, exits, inputs, model

import dyndepth
from dyndepth.encoders import CtcHead, FrameEntropy, SampleExit, SampleExits, facts_of
from dyndepth.errors import ArgumentError

COUNT = 23
BOUND = {"rtol": 2e-5, "atol": 2e-5}


def _lengths() -> list[int]:
    return [(7 * i) % 9 + 1 for i in range(COUNT)]


def _encoder(kind: str, layout: str = "auto") -> dyndepth.DynamicEncoder:
    found = exits("bert", kind)
    threshold = middle(model("bert"), found, kind, inputs("bert", _lengths()))
    return dyndepth.DynamicEncoder(model("bert"), found.with_thresholds(threshold), layout=layout)


def _parts(sizes: list[int]) -> list[dict[str, torch.Tensor]]:
    batch, parts, at = inputs("bert", _lengths()), [], 0
    for size in sizes:
        parts.append({name: value[at : at + size] for name, value in batch.items()})
        at += size
    return [part for part in parts if len(part["input_ids"])]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("kind", ["patience", "q_exit", "margin", "saturation"])
def test_a_stream_answers_as_a_batch(kind: str, layout: str) -> None:
    encoder = _encoder(kind, layout)
    whole = encoder(**inputs("bert", _lengths()))

    @settings(max_examples=12, deadline=None)
    @given(batch=st.integers(1, 9), sizes=st.lists(st.integers(1, 7), min_size=COUNT, max_size=COUNT), ordered=st.booleans())
    def check(batch: int, sizes: list[int], ordered: bool) -> None:
        stream = dyndepth.SampleStream(encoder, batch, ordered=ordered)
        answers = list(stream(_parts(sizes)))
        numbers = [answer.number for answer in answers]
        assert (numbers if ordered else sorted(numbers)) == list(range(COUNT))
        for answer in answers:
            assert answer.exit_layer == whole.exit_layers[answer.number]
            torch.testing.assert_close(answer.logits, whole.logits[answer.number], **BOUND)
        assert stream.work.layers == whole.work.layers
        assert stream.work.rows == COUNT
        _full_batches(stream, batch)

    check()


def _full_batches(stream: Any, batch: int) -> None:
    """At most one run of each stretch is not full."""
    for boundary in (0, *EXITS):
        sizes = {size: count for (at, size), count in stream.batches.items() if at == boundary}
        assert sum(count for size, count in sizes.items() if size != batch) <= 1
        assert all(0 < size <= batch for size in sizes)


def test_answers_come_as_soon_as_they_may() -> None:
    """Samples are admitted only when no batch waits: the source is never read far ahead."""
    encoder = _encoder("margin")
    read = []

    def source() -> Any:
        for part in _parts([1] * COUNT):
            read.append(len(read))
            yield part

    stream = dyndepth.SampleStream(encoder, 4, ordered=False)
    seen = 0
    for _ in stream(source()):
        seen += 1
        # Waiting at most: batch - 1 at each of five boundaries, and the batch that runs.
        assert len(read) - seen <= 3 * (len(EXITS) + 1) + 4
    assert seen == COUNT


def test_per_token_answers() -> None:
    torch.manual_seed(0)
    base = model("bert").bert
    heads = [CtcHead(24, 6) for _ in range(3)]
    for head in heads:
        head.out.weight.data *= 4
    facts = facts_of(base, heads[2])
    found = SampleExits([SampleExit(at, heads[at - 1], FrameEntropy(), -0.2) for at in (1, 2)], facts, final=heads[2])
    encoder = dyndepth.DynamicEncoder(base, found)
    whole = encoder(**inputs("bert", _lengths()))
    assert 0 < len(set(whole.exit_layers.tolist())) <= 3
    assert whole.frames.tolist() == _lengths()
    for answer in dyndepth.SampleStream(encoder, 5)(_parts([6, 6, 6, 6])):
        length = _lengths()[answer.number]
        assert answer.logits.shape == (length, 6)
        torch.testing.assert_close(answer.logits, whole.logits[answer.number, :length], **BOUND)
        assert bool((whole.logits[answer.number, length:] == 0).all())


def test_nothing_and_little() -> None:
    encoder = _encoder("margin")
    assert list(dyndepth.SampleStream(encoder)([])) == []
    assert len(list(dyndepth.SampleStream(encoder, 100)(_parts([COUNT])))) == COUNT
    with pytest.raises(ArgumentError, match="batch must be"):
        dyndepth.SampleStream(encoder, 0)
    assert encoder.depth == LAYERS


def test_a_rare_deep_sample_answers() -> None:
    """One sample needs every layer, the others leave at once: it does not wait for the end of the stream."""
    encoder = _encoder("margin")
    depths = encoder(**inputs("bert", _lengths())).exit_layers.tolist()
    deep = depths.index(max(depths))
    shallow = depths.index(min(depths))
    batch, read = inputs("bert", _lengths()), []

    def source() -> Any:
        for number in range(400):
            read.append(number)
            at = deep if number == 0 else shallow
            yield {name: value[at : at + 1] for name, value in batch.items()}

    stream = dyndepth.SampleStream(encoder, 4, longest_wait=5)
    first = next(stream(source()))
    assert first.number == 0
    assert first.exit_layer == max(depths)
    # At each of its stretches it waits for five others at most, each of four samples.
    assert len(read) <= 4 * 6 * (len(EXITS) + 1)
    with pytest.raises(ArgumentError, match="longest_wait"):
        dyndepth.SampleStream(encoder, 4, longest_wait=0)


def test_draws_of_a_stream_are_those_of_one_call() -> None:
    encoder = dyndepth.DynamicEncoder(model("bert"), exits("bert", "ponder_draw", 0.0))
    whole = encoder(**inputs("bert", _lengths()))
    assert len(set(whole.exit_layers.tolist())) > 1
    for answer in dyndepth.SampleStream(encoder, 5)(_parts([4] * 6)):
        assert answer.exit_layer == whole.exit_layers[answer.number]


@pytest.mark.parametrize("kind", ["never", "always"])
def test_a_stream_has_no_answers_that_are_nan(kind: str) -> None:
    """Neither at an exit nor at the top, as in whole batches."""
    broken = inputs("vit")
    broken["pixel_values"][3] = torch.nan
    encoder = dyndepth.DynamicEncoder(model("vit"), exits("vit", kind))
    with pytest.raises(ArgumentError, match="NaN"):
        list(dyndepth.SampleStream(encoder, 3)([broken]))
