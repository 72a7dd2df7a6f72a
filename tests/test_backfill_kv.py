"""backfill_kv: K,V of all skipped layers from one residual."""

from __future__ import annotations

import op_harness
import pytest
import torch

from dyndepth.errors import ArgumentError
from dyndepth.op import backend
from dyndepth.ops import backfill_kv
from dyndepth.testing import CASES, Case, assert_same

OP = "backfill_kv"
PROVIDERS = op_harness.providers(OP)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("case", "dtype"), op_harness.cases_in_dtypes(OP))
def test_as_exact_as_pytorch(case: Case, dtype: torch.dtype, provider: str) -> None:
    op_harness.check_against_oracle(OP, case, dtype, provider)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_by_hand(provider: str) -> None:
    """x = (3, 4) / sqrt(12.5), two layers; layer 1 uses the table that turns by a quarter."""
    residual = torch.tensor([[3.0, 4.0]])
    weight = torch.stack([torch.stack([torch.eye(2), 2 * torch.eye(2)]), torch.stack([3 * torch.eye(2), 4 * torch.eye(2)])])
    cos, sin = torch.tensor([[[1.0]], [[0.0]]]), torch.tensor([[[0.0]], [[1.0]]])
    pages = torch.zeros(4, 2, 1, 1, 1, 2)
    zero = torch.zeros(1, dtype=torch.int32)
    with backend(provider):
        backfill_kv(
            residual, weight, zero, zero, pages, 1, eps=0.0, cos=cos, sin=sin, variant=torch.tensor([0, 1], dtype=torch.int32)
        )
    unit = torch.tensor([3.0, 4.0]) / 12.5**0.5
    found = pages[:, :, 0, 0, 0]
    expected = torch.zeros(4, 2, 2)
    expected[1, 0], expected[1, 1] = unit, 2 * unit
    expected[2, 0], expected[2, 1] = torch.stack([-3 * unit[1], 3 * unit[0]]), 4 * unit
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_only_the_section_is_written(provider: str) -> None:
    arguments = next(case for case in CASES[OP] if case.name == "section").build()
    begin, count = arguments["section"].tolist()
    before = arguments["pages"].clone()
    after = op_harness.outcome(OP, arguments, provider)["pages"].flatten(2, 3)
    touched = torch.zeros(after.shape[2], dtype=torch.bool)
    touched[arguments["slots"][begin : begin + count].long()] = True
    assert_same(after[:, :, ~touched], before.flatten(2, 3)[:, :, ~touched], "outside the section")
    assert bool((after[1:-1, :, touched] != before.flatten(2, 3)[1:-1, :, touched]).all())


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("section", [(0, 0), (11, 5), (9, 100), (-3, 2), (-3, 5), (4, -1), (20, 3), (2**31 - 1, 2**31 - 1)])
def test_sections_are_cut_off(provider: str, section: tuple[int, int]) -> None:
    """Counters come from the device unread: rows [begin, begin + count) as far as they exist, by Python's own range."""
    arguments = next(case for case in CASES[OP] if case.name == "section").build()
    arguments["section"] = torch.tensor(section, dtype=torch.int32)
    before = arguments["pages"].clone()
    after = op_harness.outcome(OP, arguments, provider)["pages"]
    rows = [row for row in range(11) if row in range(section[0], section[0] + section[1])]
    arguments["slots"] = torch.tensor(
        [slot if row in rows else -1 for row, slot in enumerate(arguments["slots"].tolist())]
    ).int()
    expected = op_harness.outcome(OP, {**arguments, "section": None}, provider)["pages"]
    assert torch.equal(expected, before) == (not rows)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)  # fewer rows: another blocking of the product


@pytest.mark.parametrize("provider", PROVIDERS)
def test_other_layers_are_untouched(provider: str) -> None:
    arguments = next(case for case in CASES[OP] if case.name == "variants").build()
    before = arguments["pages"].clone()
    after = op_harness.outcome(OP, arguments, provider)["pages"]
    assert_same(after[0], before[0])
    assert_same(after[-1], before[-1])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_row_does_not_depend_on_its_neighbours(provider: str) -> None:
    arguments = next(case for case in CASES[OP] if case.name == "variants").build()
    together = op_harness.outcome(OP, arguments, provider)["pages"]
    one_by_one = arguments["pages"].clone()
    with backend(provider):
        for row in range(len(arguments["pos"])):
            part = {name: arguments[name][row : row + 1] for name in ("residual", "pos", "slots")}
            op_harness.REGISTRY[OP](**{**arguments, **part, "pages": one_by_one})
    torch.testing.assert_close(one_by_one, together, rtol=1e-5, atol=1e-5)


def test_variant_may_be_a_buffer_or_parameter() -> None:
    """A module may hold it as a Parameter, a subclass of Tensor."""
    arguments = next(case for case in CASES[OP] if case.name == "variants").build()
    expected = op_harness.outcome(OP, arguments, "cpp")["pages"]
    held = {**arguments, "variant": torch.nn.Parameter(arguments["variant"], requires_grad=False)}
    assert_same(op_harness.outcome(OP, held, "cpp")["pages"], expected)
    held["variant"] = torch.nn.Parameter(arguments["variant"] + 2, requires_grad=False)
    for provider in op_harness.HOST_CHECKED:
        with pytest.raises(ArgumentError, match=r"backfill_kv: variant must be in \[0, 2\)"):
            op_harness.outcome(OP, held, provider)


@pytest.mark.parametrize("name", ["one", "layer_norm", "variants", "section", "empty"])
def test_contract(name: str) -> None:
    case = next(case for case in CASES[OP] if case.name == name)
    op_harness.check_contract(OP, case.build())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, "backfill_kv: norm must be one of none, rms, layer, got 'batch'"),
        ({"residual": torch.zeros(3, 6)}, r"backfill_kv: weight must be float32 \[any, 2, 8, 6\]"),
        ({"weight": torch.zeros(2, 2, 8, 10)[..., ::2]}, "backfill_kv: weight must be contiguous"),
        ({"bias": torch.zeros(2, 8)}, r"backfill_kv: bias must be float32 \[2, 2, 8\]"),
        ({"first_layer": 2}, r"backfill_kv: first_layer must be in \[0, 1\]"),
        ({"first_layer": -1}, r"backfill_kv: first_layer must be in \[0, 1\]"),
        ({"variant": torch.tensor([0, 1], dtype=torch.int32)}, r"backfill_kv: variant must be in \[0, 1\)"),
        ({"variant": torch.tensor([-1, 0], dtype=torch.int32)}, r"backfill_kv: variant must be in \[0, 1\), got -1 at 0"),
        ({"section": torch.zeros(1, dtype=torch.int32)}, "backfill_kv: section must be int32 with 2 elements"),
        ({"pages": torch.zeros(2, 3, 2, 2, 4)}, "backfill_kv: pages must be float32"),
        ({"slots": torch.full((3,), 6, dtype=torch.int32)}, r"backfill_kv: slots must be in \[-1, 6\)"),
        ({"pos": torch.full((3,), 7, dtype=torch.int32)}, r"backfill_kv: pos must be in \[0, 7\)"),
    ],
)
@pytest.mark.parametrize("provider", op_harness.HOST_CHECKED)
def test_wrong_arguments(change: dict, message: str, provider: str) -> None:
    arguments = {
        "residual": torch.zeros(3, 5), "weight": torch.zeros(2, 2, 8, 5), "pos": torch.zeros(3, dtype=torch.int32),
        "slots": torch.arange(3, dtype=torch.int32), "pages": torch.zeros(3, 2, 3, 2, 2, 4), "first_layer": 0,
        "cos": torch.zeros(1, 7, 2), "sin": torch.zeros(1, 7, 2), **change,
    }  # fmt: skip
    with backend(provider), pytest.raises(ArgumentError, match=message):
        backfill_kv(**arguments)
