"""store_kv: rotary embedding, then K and V of every row to its slot."""

from __future__ import annotations

import math

import op_harness
import pytest
import torch

from dyndepth.errors import ArgumentError
from dyndepth.op import backend
from dyndepth.ops import store_kv
from dyndepth.testing import CASES, Case, assert_same

OP = "store_kv"
PROVIDERS = op_harness.providers(OP)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("case", "dtype"), op_harness.cases_in_dtypes(OP))
def test_as_exact_as_pytorch(case: Case, dtype: torch.dtype, provider: str) -> None:
    op_harness.check_against_oracle(OP, case, dtype, provider)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("name", ["no_rotary", "padding", "fused"])
def test_values_move_bit_for_bit(name: str, dtype: torch.dtype, provider: str) -> None:
    """V is never computed with; without rotation neither is K. Slots nobody owns keep their bits."""
    arguments = next(case for case in CASES[OP] if case.name == name).build(dtype)
    before = arguments["pages"].clone()
    pages = op_harness.outcome(OP, arguments, provider)["pages"].flatten(1, 2)
    owned = arguments["slots"] >= 0
    slots = arguments["slots"][owned].long()
    assert_same(pages[1, slots], arguments["v"][owned].contiguous(), "values")
    if arguments["cos"] is None:
        assert_same(pages[0, slots], arguments["k"][owned].contiguous(), "keys")
    others = torch.ones(pages.shape[1], dtype=torch.bool)
    others[slots] = False
    assert_same(pages[:, others], before.flatten(1, 2)[:, others], "other slots")


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_by_hand(provider: str) -> None:
    """A quarter turn at position 1: (a, b) -> (-b, a); the third channel passes through; page 1, offset 0 is slot 2."""
    cos, sin = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    q = torch.tensor([[[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]]])
    pages = torch.zeros(2, 2, 2, 1, 3)
    with backend(provider):
        turned = store_kv(
            q,
            q * 10,
            q * 100,
            torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([2, 1], dtype=torch.int32),
            pages,
            cos=cos,
            sin=sin,
        )
    assert turned[:, 0].tolist() == [[1.0, 2.0, 3.0], [-2.0, 1.0, 3.0]]
    assert pages[0, 1, 0, 0].tolist() == [10.0, 20.0, 30.0]
    assert pages[0, 0, 1, 0].tolist() == [-20.0, 10.0, 30.0]
    assert pages[1, 1, 0, 0].tolist() == [100.0, 200.0, 300.0]
    assert pages[1, 0, 1, 0].tolist() == [100.0, 200.0, 300.0]
    assert float(pages.abs().sum()) == 60 + 60 + 600 + 600


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_padding_next_to_slot_zero(provider: str) -> None:
    """Rows with slot -1 must not disturb slot 0, written in the same call or not."""
    k = torch.arange(1.0, 4.0).view(3, 1, 1)
    pos = torch.zeros(3, dtype=torch.int32)
    for slots, expected in (
        ([-1, 0, -1], [2.0, 9.0]),
        ([-1, 1, -1], [9.0, 2.0]),
        ([-1, -1, -1], [9.0, 9.0]),
        ([0, 1, -1], [1.0, 2.0]),
    ):
        pages = torch.full((2, 1, 2, 1, 1), 9.0)
        with backend(provider):
            store_kv(k, k, k, pos, torch.tensor(slots, dtype=torch.int32), pages)
        assert pages[0].flatten().tolist() == expected, slots
        assert pages[1].flatten().tolist() == expected, slots


def test_rotation_matches_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(5, 4, 16), torch.randn(5, 2, 16)
    angles = torch.arange(9.0)[:, None] / 10000 ** (torch.arange(8) / 8)
    pos = torch.tensor([3, 0, 8, 1, 5], dtype=torch.int32)
    pages = torch.zeros(2, 5, 1, 2, 16)
    turned = store_kv(q, k, k, pos, torch.arange(5, dtype=torch.int32), pages, cos=angles.cos(), sin=angles.sin())
    full = torch.cat([angles, angles], dim=1)[pos.long()]
    expected_q, expected_k = apply_rotary_pos_emb(q, k, full.cos(), full.sin())
    torch.testing.assert_close(turned, expected_q, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pages[0, :, 0], expected_k, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_promised_element_is_written(provider: str) -> None:
    arguments = next(case for case in CASES[OP] if case.name == "partial_rotary").build()
    with backend(provider):
        assert bool(torch.isfinite(op_harness.REGISTRY[OP](**arguments)).all())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_queries_past_live_are_not_rotated(provider: str) -> None:
    case = next(case for case in CASES[OP] if case.name == "live")
    op_harness.assert_only_live_rows_are_written(OP, case, provider)


def test_angles_of_the_last_position() -> None:
    """The last row of the table is reachable, the one behind it is not."""
    cos, sin = torch.ones(3, 1), torch.zeros(3, 1)
    arguments = {
        "q": torch.ones(1, 1, 2),
        "k": torch.ones(1, 1, 2),
        "v": torch.ones(1, 1, 2),
        "cos": cos,
        "sin": sin,
        "slots": torch.zeros(1, dtype=torch.int32),
        "pages": torch.zeros(2, 1, 1, 1, 2),
    }
    for provider in op_harness.HOST_CHECKED:
        with backend(provider):
            assert math.isfinite(float(store_kv(pos=torch.tensor([2], dtype=torch.int32), **arguments).sum()))
            with pytest.raises(ArgumentError, match=r"store_kv: pos must be in \[0, 3\)"):
                store_kv(pos=torch.tensor([3], dtype=torch.int32), **arguments)


@pytest.mark.parametrize("name", ["partial_rotary", "fused", "padding", "fewer_queries", "no_rotary"])
def test_contract(name: str) -> None:
    case = next(case for case in CASES[OP] if case.name == name)
    op_harness.check_contract(OP, case.build())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 2)}, "store_kv: q must be float32"),
        ({"q": torch.zeros(9, 4, 6)}, "store_kv: q must be at most 3 rows"),
        ({"k": torch.zeros(3, 2, 6, dtype=torch.bfloat16)}, r"store_kv: k must be float32 \[3, 2, 6\].*got bfloat16"),
        ({"v": torch.zeros(3, 1, 6)}, r"store_kv: v must be float32 \[3, 2, 6\]"),
        ({"k": torch.zeros(3, 6, 2).mT}, "store_kv: k must be dense in its last axis"),
        ({"cos": torch.zeros(0, 3), "sin": torch.zeros(0, 3)}, "store_kv: cos must be at least one position long"),
        ({"pages": torch.zeros(2, 2, 0, 2, 6)}, "store_kv: pages must be of at least one slot, head and channel"),
        ({"cos": None}, "store_kv: cos and sin must be given together"),
        ({"cos": torch.zeros(5, 4), "sin": torch.zeros(5, 4)}, "store_kv: cos must be at most 3 channels wide"),
        ({"cos": torch.zeros(5, 3).double()}, r"store_kv: cos must be float32 \[any, any\]"),
        ({"pos": torch.zeros(3, dtype=torch.int64)}, r"store_kv: pos must be int32 \[3\]"),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, r"store_kv: slots must be int32 \[3\]"),
        ({"pages": torch.zeros(2, 2, 2, 2, 5)}, r"store_kv: pages must be float32 \[2, any, any, any, 6\]"),
        ({"pages": torch.zeros(2, 2, 2, 2, 12)[..., ::2]}, "store_kv: pages must be contiguous"),
        ({"slots": torch.full((3,), 4, dtype=torch.int32)}, r"store_kv: slots must be in \[-1, 4\)"),
        ({"slots": torch.full((3,), -2, dtype=torch.int32)}, r"store_kv: slots must be in \[-1, 4\)"),
        ({"pos": torch.full((3,), -1, dtype=torch.int32)}, r"store_kv: pos must be in \[0, 5\)"),
    ],
)
@pytest.mark.parametrize("provider", op_harness.HOST_CHECKED)
def test_wrong_arguments(change: dict, message: str, provider: str) -> None:
    arguments = {
        "q": torch.zeros(3, 4, 6),
        "k": torch.zeros(3, 2, 6),
        "v": torch.zeros(3, 2, 6),
        "cos": torch.zeros(5, 3),
        "sin": torch.zeros(5, 3),
        "pos": torch.zeros(3, dtype=torch.int32),
        "slots": torch.arange(3, dtype=torch.int32),
        "pages": torch.zeros(2, 2, 2, 2, 6),
        **change,
    }
    with backend(provider), pytest.raises(ArgumentError, match=message):
        store_kv(**arguments)
