"""router_score: norm, small MLP, sigmoid."""

from __future__ import annotations

import math

import op_harness
import pytest
import torch

from dyndepth.errors import ArgumentError
from dyndepth.op import backend
from dyndepth.ops import router_score
from dyndepth.testing import CASES, Case

OP = "router_score"
PROVIDERS = op_harness.providers(OP)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("case", "dtype"), op_harness.cases_in_dtypes(OP))
def test_as_exact_as_pytorch(case: Case, dtype: torch.dtype, provider: str) -> None:
    op_harness.check_against_oracle(OP, case, dtype, provider)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_by_hand(provider: str) -> None:
    """x = (3, 4) / sqrt(12.5); one linear neuron, then one SiLU neuron with every feature."""
    hidden = torch.tensor([[3.0, 4.0]])
    weight1, bias1, weight2, bias2 = torch.tensor([[1.0, -1.0]]), torch.tensor([0.5]), torch.tensor([2.0]), torch.tensor([0.25])
    z = -1 / math.sqrt(12.5) + 0.5
    with backend(provider):
        linear = router_score(hidden, weight1, bias1, weight2, bias2, silu=False, eps=0.0)
        rich = router_score(
            hidden,
            weight1,
            bias1,
            weight2,
            bias2,
            eps=0.0,
            previous=torch.tensor([[4.0, 3.0]]),
            cosine_weight=torch.tensor([2.0]),
            extra=torch.tensor([[1.0, 10.0]]),
            extra_weight=torch.tensor([[0.1, -0.01]]),
        )
    assert linear.item() == pytest.approx(1 / (1 + math.exp(-(2 * z + 0.25))), rel=1e-6)
    z += 2.0 * 24 / 25 + 0.1 - 0.1
    assert rich.item() == pytest.approx(1 / (1 + math.exp(-(2 * z / (1 + math.exp(-z)) + 0.25))), rel=1e-6)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_zero_residual_is_harmless(provider: str) -> None:
    zeros = torch.zeros(2, 4)
    with backend(provider):
        scores = router_score(
            zeros, torch.ones(1, 4), torch.zeros(1), torch.ones(1), torch.zeros(1), previous=zeros, cosine_weight=torch.ones(1)
        )
    assert scores.tolist() == [0.5, 0.5]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_promised_element_is_written(provider: str) -> None:
    arguments = next(case for case in CASES[OP] if case.name == "everything").build()
    with backend(provider):
        scores = router_score(**arguments)
    assert bool(((scores >= 0) & (scores <= 1)).all())


@pytest.mark.parametrize("provider", PROVIDERS)
def test_only_live_rows_are_read(provider: str) -> None:
    arguments = next(case for case in CASES[OP] if case.name == "odd").build()
    whole = op_harness.outcome(OP, arguments, provider)["score"]
    arguments["hidden"][4:] = torch.nan
    arguments["live"] = torch.tensor([4], dtype=torch.int32)
    assert op_harness.outcome(OP, arguments, provider)["score"].tolist() == whole[:4].tolist()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_rows_past_live_are_not_computed(provider: str) -> None:
    case = next(case for case in CASES[OP] if case.name == "live")
    op_harness.assert_only_live_rows_are_written(OP, case, provider)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_cosine_of_tiny_residuals(provider: str) -> None:
    """The guard against 0 / 0 applies to each length, not to their product: 1e-12 long rows have an angle."""
    hidden = torch.tensor([[3e-12, 4e-12]])
    with backend(provider):
        score = router_score(
            hidden, torch.zeros(1, 2), torch.zeros(1), torch.ones(1), torch.zeros(1),
            previous=hidden, cosine_weight=torch.ones(1), silu=False,
        )  # fmt: skip
    assert score.item() == pytest.approx(1 / (1 + math.exp(-1.0)), rel=1e-5)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_row_does_not_depend_on_its_neighbours(provider: str) -> None:
    arguments = next(case for case in CASES[OP] if case.name == "everything").build()
    together = op_harness.outcome(OP, arguments, provider)["score"]
    for row in range(len(together)):
        alone = {
            name: value[row : row + 1] if name in ("hidden", "previous", "extra") else value
            for name, value in arguments.items()
        }
        assert op_harness.outcome(OP, alone, provider)["score"].item() == together[row].item()


@pytest.mark.parametrize("name", ["odd", "everything", "empty"])
def test_contract(name: str) -> None:
    case = next(case for case in CASES[OP] if case.name == name)
    op_harness.check_contract(OP, case.build())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, dtype=torch.int32)}, "router_score: hidden must be float32"),
        ({"hidden": torch.zeros(2, 0), "weight1": torch.zeros(2, 0)}, "router_score: hidden must be at least one channel"),
        ({"weight1": torch.zeros(2, 3, dtype=torch.bfloat16)}, r"router_score: weight1 must be float32 \[any, 3\]"),
        ({"bias1": torch.zeros(3)}, r"router_score: bias1 must be float32 \[2\]"),
        ({"bias2": torch.zeros(2)}, r"router_score: bias2 must be float32 \[1\]"),
        ({"cosine_weight": torch.zeros(2)}, "router_score: previous must be given with cosine_weight, got None"),
        ({"previous": torch.zeros(2, 4)}, r"router_score: previous must be float32 \[2, 3\]"),
        ({"extra": torch.zeros(2, 1)}, "router_score: extra and extra_weight must be given together"),
        ({"extra": torch.zeros(2, 1), "extra_weight": torch.zeros(2, 2)}, r"extra_weight must be float32 \[2, 1\]"),
    ],
)
def test_wrong_arguments(change: dict, message: str) -> None:
    arguments = {
        "hidden": torch.zeros(2, 3),
        "weight1": torch.zeros(2, 3),
        "bias1": torch.zeros(2),
        "weight2": torch.zeros(2),
        "bias2": torch.zeros(1),
        **change,
    }
    with pytest.raises(ArgumentError, match=message):
        router_score(**arguments)
