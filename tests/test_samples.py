"""Samples move bit for bit, in either layout, with everything that belongs to them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndepth.encoders import Embedded, Samples
from dyndepth.encoders.family import pack
from dyndepth.errors import ArgumentError

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=9)


def _made(lengths: list[int], layout: str) -> Samples:
    """Every value says whose it is: sample * 100 + token."""
    n, longest = len(lengths), max(lengths)
    hidden = (torch.arange(n)[:, None] * 100 + torch.arange(longest)).float()[..., None].repeat(1, 1, 3)
    keep = torch.arange(longest) < torch.tensor(lengths)[:, None]
    hidden[~keep] = -7.0
    samples = pack(Embedded(hidden, keep), packed_layout=layout == "packed")
    samples.carried["count"] = samples.ids * 10
    samples.inputs["bias"] = samples.ids[:, None].float() + torch.zeros(1, 2)
    return samples


def _check(samples: Samples, lengths: list[int], ids: list[int]) -> None:
    """The samples are exactly `ids`, in this order, with their own tokens and company."""
    assert samples.ids.tolist() == ids
    assert samples.lengths.tolist() == [lengths[i] for i in ids]
    assert samples.carried["count"].tolist() == [i * 10 for i in ids]
    assert samples.inputs["bias"][:, 0].tolist() == ids
    want = [i * 100 + t for i in ids for t in range(lengths[i])]
    assert samples.tokens()[:, 0].tolist() == want
    assert samples.tokens()[:, 2].tolist() == want
    assert samples.owners().tolist() == [at for at, i in enumerate(ids) for _ in range(lengths[i])]
    assert samples.first()[:, 0, 0].tolist() == [i * 100 for i in ids]
    assert samples.total == len(want)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@settings(deadline=None)
@given(lengths=LENGTHS, data=st.data())
def test_split_take_and_join(layout: str, lengths: list[int], data: st.DataObject) -> None:
    samples = _made(lengths, layout)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    _check(samples, lengths, order)
    leaves = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    kept = samples.split(leaves)
    _check(samples, lengths, order)  # what was split is untouched
    left = samples.split(~leaves)
    _check(kept, lengths, [i for i, gone in zip(order, leaves.tolist(), strict=True) if not gone])
    _check(left, lengths, [i for i, gone in zip(order, leaves.tolist(), strict=True) if gone])
    if not samples.packed and kept.count:
        assert kept.hidden.shape[1] == max(kept.lengths.tolist())
    if kept.count and left.count:
        _check(Samples.concatenate([left, kept]), lengths, left.ids.tolist() + kept.ids.tolist())
    at = torch.tensor(data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=5)), dtype=torch.int64)
    _check(samples.taken(at), lengths, [order[i] for i in at.tolist()])


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_pooling(layout: str) -> None:
    samples = _made([3, 1, 2], layout)  # in order: 1, 2, 0
    assert samples.pooled("first")[:, 0].tolist() == [100, 200, 0]
    assert samples.pooled("mean")[:, 0].tolist() == [100, 200.5, 1]
    assert samples.pooled("max")[:, 0].tolist() == [100, 201, 2]
    assert samples.padded().shape == (3, 3, 3)
    with pytest.raises(ArgumentError, match="pooling must be"):
        samples.pooled("sum")
    with pytest.raises(ArgumentError, match="at least 2 tokens"):
        samples.first(2)


def test_padding_may_stand_anywhere() -> None:
    hidden = torch.arange(12.0).view(2, 6, 1)
    keep = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0]]).bool()
    for layout in (True, False):
        samples = pack(Embedded(hidden, keep), packed_layout=layout)
        assert samples.tokens()[:, 0].tolist() == [1, 3, 4, 6, 7, 8, 9, 10]
    with pytest.raises(ArgumentError, match="sample 1 has none"):
        pack(Embedded(hidden, keep & torch.tensor([[True], [False]])), packed_layout=True)


def test_only_like_meets_like() -> None:
    one, other = _made([2, 1], "packed"), _made([2, 1], "packed")
    other.boundary = 2
    with pytest.raises(ArgumentError, match="boundaries 0 and 2"):
        Samples.concatenate([one, other])
    with pytest.raises(ArgumentError, match="one layout"):
        Samples.concatenate([one, _made([2, 1], "padded")])


def test_gradients_flow_through_packing() -> None:
    with torch.enable_grad():
        hidden = torch.randn(2, 3, 4, requires_grad=True)
        keep = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
        for layout in (True, False):
            samples = pack(Embedded(hidden, keep), packed_layout=layout)
            (samples.padded().sum() + samples.pooled("mean").sum() + samples.first().sum()).backward()
            assert hidden.grad is not None
            assert bool((hidden.grad[0, 2] == 0).all())
            assert bool((hidden.grad[keep] != 0).all())
            hidden.grad = None
