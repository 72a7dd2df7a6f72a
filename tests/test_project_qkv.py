"""project_qkv: queries of live rows, keys and values of all rows."""

from __future__ import annotations

import op_harness
import pytest
import torch

from dyndepth.errors import ArgumentError
from dyndepth.op import backend
from dyndepth.ops import project_qkv, ragged_linear, store_kv
from dyndepth.testing import CASES, Case, assert_same

OP = "project_qkv"
PROVIDERS = op_harness.providers(OP)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("case", "dtype"), op_harness.cases_in_dtypes(OP))
def test_as_exact_as_pytorch(case: Case, dtype: torch.dtype, provider: str) -> None:
    op_harness.check_against_oracle(OP, case, dtype, provider)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_by_hand(provider: str) -> None:
    """One head of two channels: q doubles, k swaps, v adds a bias; no rotation; row 1 is not live but has K,V."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    pages = torch.zeros(2, 1, 2, 1, 2)
    with backend(provider):
        q = project_qkv(
            x,
            2 * torch.eye(2),
            torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
            torch.eye(2),
            torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([1, 0], dtype=torch.int32),
            pages,
            v_bias=torch.tensor([0.5, -0.5]),
            live=torch.tensor([1], dtype=torch.int32),
        )
    assert q[0, 0].tolist() == [2.0, 4.0]
    assert pages[0, 0, :, 0].tolist() == [[4.0, 3.0], [2.0, 1.0]]
    assert pages[1, 0, :, 0].tolist() == [[3.5, 3.5], [1.5, 1.5]]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_is_store_kv_after_three_linears(provider: str) -> None:
    """Bit for bit, with the linears of the same provider where it has its own."""
    arguments = next(case for case in CASES[OP] if case.name == "odd").build()
    head_dim = arguments["pages"].shape[4]

    def heads(name: str) -> torch.Tensor:
        x, weight, bias = arguments["x"], arguments[f"{name}_weight"], arguments[f"{name}_bias"]
        with backend("cpp" if provider == "cpp" else "torch"):
            y = ragged_linear(x, weight, bias=bias)
        return y.unflatten(1, (-1, head_dim))

    by_hand = arguments["pages"].clone()
    rotary = {name: arguments[name] for name in ("cos", "sin", "pos", "slots")}
    with backend(provider):
        q = store_kv(heads("q"), heads("k"), heads("v"), pages=by_hand, **rotary)
    found = op_harness.outcome(OP, arguments, provider)
    assert_same(found["q"], q, "queries")
    assert_same(found["pages"], by_hand, "pages")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_queries_of_dead_rows_cost_nothing(provider: str) -> None:
    """With NaN in the dead rows' part of x, live queries stay clean; with live 0 no query product runs at all."""
    arguments = next(case for case in CASES[OP] if case.name == "live").build()
    live = int(arguments["live"])
    clean = op_harness.outcome(OP, arguments, provider)["q"]
    arguments["x"][live:] = torch.nan
    assert_same(op_harness.outcome(OP, arguments, provider)["q"], clean)
    arguments["live"] = torch.tensor([0], dtype=torch.int32)
    arguments["q_weight"] = arguments["q_weight"] * torch.nan
    assert bool(op_harness.outcome(OP, arguments, provider)["q"].numel() == 0)


def test_views_into_a_fused_projection() -> None:
    """Phi-3 keeps q, k, v in one weight: row slices of it are as good as separate weights."""
    arguments = next(case for case in CASES[OP] if case.name == "one").build()
    names = ("q_weight", "k_weight", "v_weight")
    fused = torch.cat([arguments[name] for name in names])
    parts = fused.split([arguments[name].shape[0] for name in names])
    expected = op_harness.outcome(OP, arguments, "cpp")
    found = op_harness.outcome(OP, {**arguments, **dict(zip(names, parts, strict=True))}, "cpp")
    assert_same(found["q"], expected["q"])
    assert_same(found["pages"], expected["pages"])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_promised_element_is_written(provider: str) -> None:
    arguments = next(case for case in CASES[OP] if case.name == "norm").build()
    with backend(provider):
        assert bool(torch.isfinite(op_harness.REGISTRY[OP](**arguments)).all())
    assert bool(torch.isfinite(arguments["pages"]).all())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", ["live", "none_live"])
def test_queries_past_live_are_not_computed(name: str, provider: str) -> None:
    case = next(case for case in CASES[OP] if case.name == name)
    op_harness.assert_only_live_rows_are_written(OP, case, provider)


@pytest.mark.parametrize("name", ["odd", "norm", "no_rotary", "empty"])
def test_contract(name: str) -> None:
    case = next(case for case in CASES[OP] if case.name == name)
    op_harness.check_contract(OP, case.build())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 3).T}, "project_qkv: x must be contiguous"),
        ({"q_weight": torch.zeros(10, 5)}, "project_qkv: q_weight must be a multiple of 2 kv_heads x 4 head_dim"),
        ({"q_weight": torch.zeros(12, 5)}, "project_qkv: q_weight must be a multiple of 2 kv_heads x 4 head_dim"),
        ({"k_weight": torch.zeros(8, 6)}, r"project_qkv: k_weight must be float32 \[8, 5\]"),
        ({"v_weight": torch.zeros(4, 5)}, r"project_qkv: v_weight must be float32 \[8, 5\]"),
        ({"q_bias": torch.zeros(8)}, r"project_qkv: q_bias must be float32 \[16\]"),
        ({"q_bias": torch.zeros(32)[::2]}, "project_qkv: q_bias must be contiguous"),
        ({"k_gain": torch.zeros(5)}, r"project_qkv: k_gain must be float32 \[4\]"),
        ({"pages": torch.zeros(2, 3, 2, 2, 4, dtype=torch.float16)}, "project_qkv: pages must be float32"),
        ({"live": torch.zeros(1, dtype=torch.int64)}, "project_qkv: live must be int32 with 1 element"),
    ],
)
def test_wrong_arguments(change: dict, message: str) -> None:
    arguments = {
        "x": torch.zeros(3, 5),
        "q_weight": torch.zeros(16, 5),
        "k_weight": torch.zeros(8, 5),
        "v_weight": torch.zeros(8, 5),
        "pos": torch.zeros(3, dtype=torch.int32),
        "slots": torch.arange(3, dtype=torch.int32),
        "pages": torch.zeros(2, 3, 2, 2, 4),
        **change,
    }
    with pytest.raises(ArgumentError, match=message):
        project_qkv(**arguments)
