"""Samples move bit for bit, in either layout, with everything that belongs to them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from dyndepth.encoders import Embedded, Samples
from dyndepth.encoders.family import pack
from dyndepth.errors import ArgumentError
from dyndepth.op import backend
from dyndepth.ops import _cpp
from dyndepth.testing import assert_same

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


@pytest.mark.parametrize(
    ("layout", "provider"), [(layout, provider) for layout in ("packed", "padded") for provider in ("cpp", "torch")]
)
@settings(deadline=None)
@given(lengths=LENGTHS, data=st.data())
def test_split_take_and_join(layout: str, provider: str, lengths: list[int], data: st.DataObject) -> None:
    with backend(provider):
        _split_take_and_join(_made(lengths, layout), lengths, data)


def _split_take_and_join(samples: Samples, lengths: list[int], data: st.DataObject) -> None:
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    _check(samples, lengths, order)
    leaves = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    kept, gone = samples.split(leaves)
    assert gone.at.tolist() == [i for i, leave in enumerate(leaves.tolist()) if leave]
    assert (gone.lengths.tolist(), gone.ids.tolist()) == (samples.lengths[gone.at].tolist(), samples.ids[gone.at].tolist())
    assert len(gone.at) or kept is samples
    assert kept is samples or (kept.carried is not samples.carried and kept.inputs is not samples.inputs)
    _check(samples, lengths, order)  # what was split is untouched
    left, _ = samples.split(~leaves)
    _check(kept, lengths, [i for i, gone in zip(order, leaves.tolist(), strict=True) if not gone])
    _check(left, lengths, [i for i, gone in zip(order, leaves.tolist(), strict=True) if gone])
    if not samples.packed and kept.count:
        assert kept.hidden.shape[1] == max(kept.lengths.tolist())
    if kept.count and left.count:
        _check(Samples.concatenate([left, kept]), lengths, left.ids.tolist() + kept.ids.tolist())
    at = torch.tensor(data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=5)), dtype=torch.int64)
    _check(samples.taken(at), lengths, [order[i] for i in at.tolist()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
@pytest.mark.parametrize(("count", "width"), [(1, (5,)), (7, ()), (40, (3, 2)), (300, (1024,)), (3, (0,))])
def test_split_in_one_call_moves_every_byte(dtype: torch.dtype, count: int, width: tuple[int, ...]) -> None:
    """Against indexing; 300 x 1024 is shared by threads, whose seams lie anywhere in runs of samples."""
    lengths = torch.randint(0, 9, (count,))
    hidden = torch.randint(-100, 100, (int(lengths.sum()), *width)).to(dtype)
    ids = torch.randperm(count) * 3
    split = _split()
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        leaves = torch.rand(count) < share
        moved, *rest = split(hidden, lengths, ids, leaves, True)
        kept = hidden[torch.repeat_interleave(~leaves, lengths)] if bool(leaves.any()) else hidden[:0]
        assert_same(moved, kept)
        wanted = (lengths[~leaves], ids[~leaves], leaves.nonzero()[:, 0], lengths[leaves], ids[leaves])
        for one, other in zip(rest, wanted, strict=True):
            assert_same(one, other)
        slabs = hidden.new_zeros(count, 4, *width).random_(-100, 100) if dtype != torch.bool else leaves[:, None].repeat(1, 2)
        moved, *rest = split(slabs, lengths, ids, leaves, False)
        assert_same(moved, slabs[~leaves] if bool(leaves.any()) else slabs[:0])
        for one, other in zip(rest, wanted, strict=True):
            assert_same(one, other)
    strided = [split(hidden, torch.stack([lengths] * 2, 1)[:, 0], torch.stack([ids] * 2, 1)[:, 1], leaves, True)]
    for one, other in zip(strided[0], split(hidden, lengths, ids, leaves, True), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([1, 2, 4])}, r"make up hidden's 6 rows, got more"),
        ({"lengths": torch.tensor([-1, 3, 4])}, r"not be negative, got -1 at 0"),
        ({"lengths": torch.tensor([1, 2, 3], dtype=torch.int32)}, r"lengths int64"),
        ({"ids": torch.tensor([1, 2])}, r"ids int64 \[n\]"),
        ({"leaves": torch.tensor([0, 1, 1])}, r"leaves bool"),
        ({"packed": False}, r"make up hidden's 6 rows, got 3"),
        ({"hidden": torch.zeros(2, 6).T}, r"contiguous hidden"),
    ],
)
def test_split_in_one_call_refuses(change: dict[str, torch.Tensor], message: str) -> None:
    given = {
        "hidden": torch.zeros(6, 2), "lengths": torch.tensor([1, 2, 3]), "ids": torch.tensor([4, 5, 6]),
        "leaves": torch.tensor([True, False, True]), "packed": True,
    }  # fmt: skip
    _split()(**given)
    with pytest.raises(RuntimeError, match=message):
        _split()(**{**given, **change})


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_split_is_one_call_where_it_may_be(layout: str) -> None:
    """On the CPU without gradients or tangents, unless another provider is forced or rows are not dense."""
    samples = _made([2, 3, 3], layout)
    assert samples._splits_in_one_call()
    with backend("torch"):
        assert not samples._splits_in_one_call()
    with torch.enable_grad():
        assert not samples._splits_in_one_call()
    wide = torch.stack([samples.hidden] * 2, -1)[..., 0]
    assert not dataclasses.replace(samples, hidden=wide)._splits_in_one_call()


def test_split_keeps_tangents() -> None:
    samples = _made([2, 3, 3], "packed")
    with forward_ad.dual_level():
        dual = dataclasses.replace(samples, hidden=forward_ad.make_dual(samples.hidden, 2 * samples.hidden))
        kept, _ = dual.split(torch.tensor([False, True, False]))
        value, tangent = forward_ad.unpack_dual(kept.hidden)
    assert_same(tangent, 2 * value)


def test_split_in_one_call_refuses_lengths_beyond_int64() -> None:
    most = 2**63 - 1
    with pytest.raises(RuntimeError, match="6 rows, got more"):
        _split()(torch.zeros(6, 2), torch.tensor([most, 4, most, 4]), torch.arange(4), torch.arange(4) % 2 == 0, True)


def _split() -> Any:
    assert _cpp.missing() is None
    return torch.ops.dyndepth_cpp.split_samples


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
