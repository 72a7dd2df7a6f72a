"""compact_rows moves rows bit for bit, in a stable three-way partition."""

from __future__ import annotations

import op_harness
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndepth.errors import ArgumentError
from dyndepth.op import REGISTRY, backend
from dyndepth.ops import compact_rows
from dyndepth.testing import Case, assert_same

OP = "compact_rows"
PROVIDERS = op_harness.providers(OP)


def test_extension_is_built() -> None:
    assert "cpp" in PROVIDERS, REGISTRY[OP].providers["cpp"].missing()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("case", "dtype"), op_harness.cases_in_dtypes(OP))
def test_equals_reference(case: Case, dtype: torch.dtype, provider: str) -> None:
    arguments = case.build(dtype)
    moved, order, counts = REGISTRY[OP].reference(**arguments)
    with backend(provider):
        actual, actual_order, actual_counts = compact_rows(**arguments)
    assert_same(actual_order, order, "order")
    assert_same(actual_counts, counts, "counts")
    for number, (one, other) in enumerate(zip(actual, moved, strict=True)):
        assert_same(one, other.contiguous(), f"payload {number}")


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_worked_example(provider: str) -> None:
    """The example of the docstring, by hand."""
    state = torch.tensor([0, 2, 1, 0, 1], dtype=torch.int8)
    letters = torch.tensor([[10, 11], [20, 21], [30, 31], [40, 41], [50, 51]])
    with backend(provider):
        (moved,), order, counts = compact_rows(state, [letters])
    assert moved.tolist() == [[10, 11], [40, 41], [30, 31], [50, 51], [20, 21]]
    assert order.tolist() == [0, 3, 2, 4, 1]
    assert order.dtype == torch.int32
    assert counts.tolist() == [2, 2]


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
@settings(max_examples=60, deadline=None)
@given(states=st.lists(st.sampled_from([0, 1, 2]), max_size=80), width=st.integers(0, 5))
def test_partition_properties(provider: str, states: list[int], width: int) -> None:
    """Against plain Python: a stable sort by state."""
    rows = len(states)
    payload = torch.arange(rows * width, dtype=torch.int16).view(rows, width)
    with backend(provider):
        (moved,), order, counts = compact_rows(torch.tensor(states, dtype=torch.int8), [payload])
    expected = sorted(range(rows), key=lambda row: states[row])
    assert order.tolist() == expected
    assert counts.tolist() == [states.count(0), states.count(1)]
    assert moved.tolist() == [payload.tolist()[row] for row in expected]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_more_rows_than_sixteen_bits_count(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """70 000. The interpreter partitions all of them and moves those around edges: every row is a program of its own."""
    rows = 70_000
    state = torch.randint(0, 3, (rows,)).to(torch.int8)
    payload = torch.arange(3 * rows, dtype=torch.int32).view(rows, 3)
    shown = list(range(rows))
    if provider == "triton" and op_harness.INTERPRETED:
        from triton.runtime import interpreter

        shown = [row for edge in (0, 1024, 32768, 65536, rows) for row in range(edge - 9, edge + 9) if 0 <= row < rows]
        grid = lambda *given: shown if given == (rows,) else range(*given)  # noqa: E731
        monkeypatch.setattr(interpreter, "range", grid, raising=False)
    with backend(provider):
        (moved,), order, counts = compact_rows(state, [payload])
    (wanted,), wanted_order, wanted_counts = REGISTRY[OP].reference(state, [payload])
    assert_same(order, wanted_order)
    assert_same(counts, wanted_counts)
    assert_same(moved[shown], wanted[shown])
    assert len(shown) == rows or int((moved == torch.iinfo(torch.int32).max).all(1).sum()) == rows - len(shown)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_nan_and_negative_zero_keep_their_bits(provider: str) -> None:
    payload = torch.tensor([[-0.0], [torch.nan], [torch.inf]])
    payload.view(torch.int32)[1] = 0x7FC00123  # a NaN with a payload
    with backend(provider):
        (moved,), _, _ = compact_rows(torch.tensor([1, 2, 0], dtype=torch.int8), [payload])
    assert_same(moved, payload[[2, 0, 1]])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_promised_element_is_written(provider: str) -> None:
    payload = torch.ones(7, 3)
    with backend(provider):
        (moved,), order, counts = compact_rows(torch.tensor([0, 1, 2, 0, 1, 2, 0], dtype=torch.int8), [payload])
    assert bool((moved == 1).all())
    assert sorted(order.tolist()) == list(range(7))
    assert counts.tolist() == [3, 2]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_inputs_are_untouched_and_outputs_are_new(provider: str) -> None:
    state, payload = torch.tensor([1, 0], dtype=torch.int8), torch.arange(6.0).view(2, 3)
    before = payload.clone()
    with backend(provider):
        (moved,), _, _ = compact_rows(state, [payload])
    moved.fill_(-1)
    assert_same(payload, before)
    assert state.tolist() == [1, 0]


@pytest.mark.parametrize("name", ["odd", "empty", "decode16"])
def test_contract(name: str) -> None:
    case = next(case for case in op_harness.CASES[OP] if case.name == name)
    op_harness.check_contract(OP, case.build())


@pytest.mark.parametrize(
    ("state", "payloads", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), [], r"compact_rows: state must be int8 \[3\].*got int64 \[3\]"),
        (torch.zeros(3, 1, dtype=torch.int8), [], r"compact_rows: state must be int8 \[n\], got int8 \[3, 1\]"),
        (torch.zeros(3, dtype=torch.int8), [torch.zeros(2, 4)], r"compact_rows: payloads\[0\] must be \[3, \.\.\.\]"),
        (torch.zeros(0, dtype=torch.int8), [torch.tensor(1.0)], r"compact_rows: payloads\[0\] must be \[0, \.\.\.\]"),
    ],
)
def test_wrong_arguments(state: torch.Tensor, payloads: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        compact_rows(state, payloads)


@pytest.mark.parametrize("provider", op_harness.HOST_CHECKED)
@pytest.mark.parametrize("wrong", [-1, 3, 127])
def test_unknown_state(provider: str, wrong: int) -> None:
    with backend(provider), pytest.raises(ArgumentError, match=rf"compact_rows: state must be in \[0, 3\), got {wrong} at 1"):
        compact_rows(torch.tensor([0, wrong], dtype=torch.int8), [])
