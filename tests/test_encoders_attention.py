"""Attention of packed samples: csrc/cpu/packed_attention.cpp and who calls it."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import tiny_encoders
import torch
from encoder_witness import middle, told
from torch import Tensor
from torch.autograd import forward_ad
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification

from dyndepth.encoders import DynamicEncoder, RegressionPatience, SampleExit, SampleExits, Samples, attention, facts_of
from dyndepth.encoders.attention import Packing, packed_attention
from dyndepth.encoders.family import bind, pack
from dyndepth.errors import ArgumentError
from dyndepth.op import backend
from dyndepth.ops import _cpp, ragged_attention

#: Around tiles of 16, chunks of 32, 96 queries and segments of 256 keys.
LENGTHS = [1, 2, 16, 31, 32, 33, 96, 97, 255, 256, 257, 300]
SHAPES = [(3, 3, 32), (4, 2, 64), (6, 1, 96), (2, 2, 24)]  # heads, kv_heads, head_dim
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

assert _cpp.missing() is None, _cpp.missing()  # loads it, too: a build that failed must not hide here


def _made(lengths: list[int], shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(len(lengths) + dim)
    tokens = sum(lengths)
    q, k, v = (torch.randn(tokens, count, dim, generator=generator).to(dtype) for count in (heads, kv_heads, kv_heads))
    return q, k, v, torch.tensor(lengths)


def _kernel(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    found: Tensor = torch.ops.dyndepth_cpp.packed_attention(q, k, v, lengths, scale)
    return found


def _sample_by_sample(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Softmax written out, one sample and head at a time."""
    group, found = q.shape[1] // k.shape[1], torch.empty_like(q)
    start = 0
    for length in lengths.tolist():
        here = slice(start, start + length)
        for head in range(q.shape[1]):
            scores = q[here, head] @ k[here, head // group].T * scale
            found[here, head] = scores.softmax(-1) @ v[here, head // group]
        start += length
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_pytorch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    q, k, v, lengths = _made(LENGTHS, shape, dtype)
    scale = shape[2] ** -0.5
    truth = _sample_by_sample(q.double(), k.double(), v.double(), lengths, scale)
    query, key, value = (t.transpose(0, 1)[None] for t in (q, k, v))
    with mock.patch.object(attention, "in_one_call", return_value=False):
        theirs = packed_attention(None, query, key, value, None, scaling=scale, packing=Packing(lengths))[0][0]
    error, allowed = ((found.double() - truth).abs().max() for found in (_kernel(q, k, v, lengths, scale), theirs))
    assert float(error) <= 1.5 * float(allowed) + 1e-7
    assert float(allowed) < 0.05  # theirs are an oracle


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sample_does_not_depend_on_its_neighbours(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Alone, or among any others, NaN and infinity included: the same bits; and those of ragged_attention."""
    q, k, v, lengths = _made(LENGTHS, shape, dtype)
    together = _kernel(q, k, v, lengths, 0.3)
    parts = [torch.split(t, LENGTHS) for t in (q, k, v, together)]
    for at, length in enumerate(LENGTHS):
        alone = _kernel(*(part[at].contiguous() for part in parts[:3]), torch.tensor([length]), 0.3)
        assert torch.equal(alone, parts[3][at]), length
        table = torch.arange(length, dtype=torch.int32)[None]
        seq, pos = torch.zeros(length, dtype=torch.int32), torch.full((length,), length - 1, dtype=torch.int32)
        pages = torch.stack([parts[1][at], parts[2][at]])[:, :, None].contiguous()
        with backend("cpp"):
            assert torch.equal(ragged_attention(parts[0][at].contiguous(), pages, table, seq, pos, scale=0.3), alone), length
    start = sum(LENGTHS[:5])
    spoilt = slice(start, start + LENGTHS[5])
    k[spoilt], v[spoilt] = torch.nan, torch.inf
    others = torch.ones(len(q), dtype=torch.bool)
    others[spoilt] = False
    again = _kernel(q, k, v, lengths, 0.3)
    assert torch.equal(again[others], together[others])
    assert not bool(again[spoilt].isfinite().any())


def test_by_hand() -> None:
    """Scores 0 and ln 3: weights 1/4 and 3/4; a sample of one token sees nothing else."""
    k = torch.tensor([[[0.0]], [[math.log(3.0)]], [[7.0]]])
    v = torch.tensor([[[4.0]], [[8.0]], [[5.0]]])
    q = torch.ones(3, 1, 1)
    assert _kernel(q, k, v, torch.tensor([2, 1]), 1.0).flatten().tolist() == pytest.approx([7.0, 7.0, 5.0])


@pytest.mark.parametrize("lengths", [[3, 3], [8], [7, 0], [8, -1], []], ids=str)
def test_lengths_that_do_not_cover_the_tokens(lengths: list[int]) -> None:
    q, k, v, _ = _made([7], SHAPES[0], torch.bfloat16)
    with pytest.raises(RuntimeError, match="lengths of at least 1 whose sum is 7"):
        _kernel(q, k, v, torch.tensor(lengths, dtype=torch.int64), 1.0)


def test_no_tokens() -> None:
    q, k, v, lengths = _made([], SHAPES[0], torch.bfloat16)
    assert _kernel(q, k, v, lengths.long(), 1.0).shape == (0, 3, 32)


def _watched() -> Any:
    """Counts the calls of the kernel, and lets them through."""
    return mock.patch.object(torch.ops.dyndepth_cpp, "packed_attention", wraps=torch.ops.dyndepth_cpp.packed_attention)


def _bert(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config: Any = BertConfig
    return BertModel(
        config(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=50),
        add_pooling_layer=False,
    ).eval().to(dtype)  # fmt: skip


def _calls(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, int]:
    """Residuals after both layers, packed, and how many of them went through the kernel."""
    family = bind(model)
    samples = pack(family.embed(input_ids=ids, attention_mask=mask), packed_layout=True)
    with _watched() as seen:
        for layer in range(2):
            samples = family.step(layer, samples)
    return samples.hidden, seen.call_count


def test_layers_take_it_where_it_is_faster() -> None:
    """bfloat16 on a machine that multiplies it, without gradients; everything else is PyTorch's."""
    ids = torch.randint(0, 50, (5, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([9, 4, 1, 4, 7])[:, None]).long()
    expected = 2 if _cpp.multiplies_bfloat16() else 0
    model = _bert(torch.bfloat16)
    ours, calls = _calls(model, ids, mask)
    assert calls == expected
    with backend("torch"):
        theirs, calls = _calls(model, ids, mask)
    assert calls == 0
    assert _calls(_bert(torch.float32), ids, mask)[1] == 0
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("trained", ["query", "key", "value"])
def test_gradients_go_through_pytorchs(trained: str) -> None:
    """Also where nothing but one projection of the first layer is trained."""
    model = _bert(torch.bfloat16).requires_grad_(False)
    weight = getattr(model.encoder.layer[0].attention.self, trained).weight.requires_grad_(True)
    with torch.enable_grad():
        hidden, calls = _calls(model, torch.randint(0, 50, (2, 6)), torch.ones(2, 6, dtype=torch.long))
        hidden.float().square().sum().backward()
    assert calls == 0
    assert bool(weight.grad.any())


def test_tangents_go_through_pytorchs() -> None:
    """Forward mode is the derivative that PyTorch has in fp32; its kernels without one raise, they are not silent."""
    query, key, value, along = (torch.randn(1, 2, 7, 32, generator=torch.Generator().manual_seed(n)) for n in range(4))
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        with forward_ad.dual_level(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            dual = forward_ad.make_dual(query.to(dtype), along.to(dtype))
            out, _ = packed_attention(None, dual, key.to(dtype), value.to(dtype), None, packing=Packing(torch.tensor([3, 4])))
            found.append(forward_ad.unpack_dual(out).tangent)
    assert found[0] is not None
    torch.testing.assert_close(found[0].float(), found[1], rtol=0.05, atol=0.05)


def test_images_may_be_packed() -> None:
    """And answer alike in both layouts; by default nothing changes for their layers."""
    torch.manual_seed(0)
    config: Any = ViTConfig
    model = ViTForImageClassification(
        config(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=32, num_labels=5)
    ).eval().bfloat16()  # fmt: skip
    exits = SampleExits([], facts_of(model))
    found = {layout: DynamicEncoder(model, exits, layout=layout) for layout in ("auto", "packed", "padded")}
    assert not found["auto"].packed
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    packed, padded = (found[layout](pixel_values=pixels).logits for layout in ("packed", "padded"))
    torch.testing.assert_close(packed, padded, rtol=0.05, atol=0.05)


def _function(query: Tensor, **how: Any) -> tuple[Tensor, bool]:
    """packed_attention of two samples of 3 and 4 tokens, and whether it took the kernel."""
    generator = torch.Generator().manual_seed(3)
    key, value = (torch.randn(query.shape, generator=generator).to(query.dtype) for _ in range(2))
    with _watched() as seen:
        out = packed_attention(None, query, key, value, None, packing=Packing(torch.tensor([3, 4])), **how)[0]
    return out, seen.called


@pytest.mark.parametrize("scaling", [None, 0.9])
def test_the_scale_is_the_layers(scaling: float | None) -> None:
    query = torch.randn(1, 2, 7, 32, generator=torch.Generator().manual_seed(4)).bfloat16()
    with mock.patch.object(attention, "in_one_call", return_value=True):  # the kernel runs anywhere
        ours, called = _function(query, scaling=scaling)
    with backend("torch"):
        theirs, not_called = _function(query, scaling=scaling)
    assert called
    assert not not_called
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_what_the_kernel_is_not_for() -> None:
    assert not _function(torch.randn(1, 2, 7, 32).bfloat16(), dropout=0.5)[1]
    assert not _function(torch.randn(1, 2, 7, 48).bfloat16())[1]
    assert not _function(torch.randn(1, 2, 7, 32))[1]
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        assert not _function(torch.randn(1, 2, 7, 32).bfloat16())[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointed_layers_are_refused(dtype: torch.dtype) -> None:
    """Run again in backward, they would attend across samples."""
    model = _bert(dtype).train()
    model.gradient_checkpointing_enable()
    with torch.enable_grad(), pytest.raises(ArgumentError, match='layout must be "padded" with gradient checkpointing'):
        _calls(model, torch.randint(0, 50, (2, 6)), torch.ones(2, 6, dtype=torch.long))


def test_slabs_of_equal_samples_are_views() -> None:
    samples = Samples(torch.arange(12.0).view(6, 2), torch.tensor([3, 3]), torch.arange(2))
    assert samples.padded().data_ptr() == samples.hidden.data_ptr()
    assert samples.padded().tolist() == samples.hidden.view(2, 3, 2).tolist()


@pytest.mark.parametrize("kind", [kind for kind, chosen in tiny_encoders.criteria().items() if chosen[0].scored])
def test_every_criterion_decides_as_alone_in_fp32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 model over the kernel, in several batches: the exits of its weights in fp32, one sample at a time.

    Thresholds on scores stand in gaps of .02 of what the formulas say. Counts and draws (patience, ponder_draw) have no such
    gap to choose: there the inputs are such that rounding decided nothing where this was written.
    """
    calls = []
    asked = attention.in_one_call
    monkeypatch.setattr(attention, "in_one_call", lambda *call: calls.append(asked(*call)) or calls[-1])
    half = tiny_encoders.model("bert_wide", torch.bfloat16)
    exact = type(half)(half.config).eval()
    exact.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    found = tiny_encoders.exits("bert_wide", kind)
    for parameter in (parameter for point in found for parameter in point.head.parameters()):
        parameter.copy_(parameter.bfloat16().float())
    batch = tiny_encoders.inputs("bert_wide")
    if kind == "regression_patience":  # answers of this model move by 1.2 to 6.1, none by 2.0 to 2.3
        chosen = [SampleExit(point.leave, point.head, RegressionPatience(tolerance=2.16)) for point in found]
        found = SampleExits(chosen, facts_of(half))
    threshold = 0.0 if kind == "ponder_draw" else middle(exact, found, kind, batch, 0.02)
    want, where = told(exact, found, kind, batch, threshold)
    assert len(set(where)) > 1, "the threshold separates nobody"
    encoder = DynamicEncoder(half, SampleExits(found.with_thresholds(threshold), facts_of(half)))
    for rows in (range(8), range(7, -1, -1), [3, 1, 6], [4], [7]):
        at = torch.tensor(list(rows))
        out = encoder(**{name: value[at] for name, value in batch.items()}, numbers=at)
        assert out.exit_layers.tolist() == [where[row] for row in rows]
        torch.testing.assert_close(out.logits.float(), want[at], rtol=0.1, atol=0.2)
    assert set(calls) == {_cpp.multiplies_bfloat16()}
