"""exit_stats: confidence statistics in one pass over the vocabulary."""

from __future__ import annotations

import math

import op_harness
import pytest
import torch

from dyndepth.errors import ArgumentError
from dyndepth.op import backend
from dyndepth.ops import ExitStats, exit_stats
from dyndepth.testing import CASES, Case, assert_as_exact_as, assert_same
from dyndepth.testing.cases import widened

OP = "exit_stats"
PROVIDERS = op_harness.providers(OP)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("case", "dtype"), op_harness.cases_in_dtypes(OP))
def test_as_exact_as_pytorch(case: Case, dtype: torch.dtype, provider: str) -> None:
    arguments = case.build(dtype)
    truth = op_harness.outcome(OP, widened(arguments))
    reference = op_harness.outcome(OP, arguments)
    actual = op_harness.outcome(OP, arguments, provider)
    for name in op_harness.OUTPUTS[OP][1:]:
        assert_as_exact_as(actual[name], reference[name].float(), truth[name], what=f"{case.name}: {name}", working=dtype)
    if dtype == torch.float32:
        assert_same(actual["argmax"], reference["argmax"], "argmax")
        return
    # In half precision the two largest logits may round to the same number: the choice must be as good as the best.
    best, chosen = truth["top1"], _logit_of(arguments, actual["argmax"])
    slack = (
        2 * (reference["top1"].double() - truth["top1"]).abs().max() + torch.finfo(dtype).eps * best.abs().max()
        if len(best)
        else 0
    )
    assert bool((chosen >= best - slack).all())


def _logit_of(arguments: dict, ids: torch.Tensor) -> torch.Tensor:
    """float64 logit of one id per row."""
    wide = widened(arguments)
    only = [
        op_harness.REGISTRY[OP].reference(
            **{**wide, "hidden": wide["hidden"][row : row + 1], "vocab_ids": ids[row : row + 1], "live": None}
        )[1]
        for row in range(len(ids))
    ]
    return torch.cat(only) if only else torch.empty(0, dtype=torch.float64)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_by_hand(provider: str) -> None:
    """Two rows over three words; every number worked out on paper."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    head = torch.tensor([[0.0, 0.0], [math.log(2.0), 0.0], [0.0, 0.0]])
    with backend(provider):
        stats = exit_stats(hidden, head)
    # Row 0: logits 0, ln 2, 0 -> probabilities 1/4, 1/2, 1/4. Row 1: all zero -> uniform over three, first wins.
    assert stats.argmax.tolist() == [1, 0]
    assert stats.top1.tolist() == pytest.approx([math.log(2), 0.0], abs=1e-6)
    assert stats.top2.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert stats.logsumexp.tolist() == pytest.approx([math.log(4), math.log(3)], abs=1e-6)
    assert stats.entropy.tolist() == pytest.approx([1.5 * math.log(2), math.log(3)], abs=1e-6)
    # Temperature one half squares the odds: 1/6, 4/6, 1/6.
    half = -(2 / 6 * math.log(1 / 6) + 4 / 6 * math.log(4 / 6))
    assert stats.entropy_half.tolist() == pytest.approx([half, math.log(3)], abs=1e-6)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_norm_by_hand(provider: str) -> None:
    """RMS of (3, 4) is sqrt(12.5); the gain follows the norm."""
    hidden, gain = torch.tensor([[3.0, 4.0]]), torch.tensor([2.0, 0.5])
    with backend(provider):
        stats = exit_stats(hidden, torch.eye(2), norm_gain=gain, eps=0.0)
    assert stats.top1.item() == pytest.approx(6 / math.sqrt(12.5), rel=1e-6)
    assert stats.top2.item() == pytest.approx(2 / math.sqrt(12.5), rel=1e-6)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_shortlist_speaks_in_vocabulary_ids(provider: str) -> None:
    head = torch.tensor([[5.0], [1.0], [2.0], [3.0]])
    with backend(provider):
        stats = exit_stats(torch.tensor([[1.0], [-1.0]]), head, vocab_ids=torch.tensor([3, 1]))
    assert stats.argmax.tolist() == [3, 1]
    assert stats.top1.tolist() == [3.0, -1.0]
    assert stats.top2.tolist() == [1.0, -3.0]


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_ties_go_to_the_lowest_position_across_blocks(provider: str) -> None:
    head = torch.zeros(20000, 1)
    head[[700, 9000, 19999]] = 1.0
    with backend(provider):
        stats = exit_stats(torch.ones(2, 1), head)
    assert stats.argmax.tolist() == [700, 700]
    assert stats.top2.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_ties_go_to_the_lowest_position_across_products(provider: str) -> None:
    """So many rows that a library multiplies: the words lie in its second product, in two blocks of that."""
    head = torch.zeros(18500, 1)
    head[[17000, 18436]] = 1.0
    with backend(provider):
        stats = exit_stats(torch.ones(129, 1), head, live=torch.tensor([2], dtype=torch.int32))
    assert stats.argmax[:2].tolist() == [17000, 17000]
    assert stats.top2[:2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_extreme_logits(provider: str) -> None:
    """A sure thing, huge spreads, minus infinity: no NaN, entropy zero where certain."""
    head = torch.tensor([[300.0], [0.0], [-300.0]])
    with backend(provider):
        sure = exit_stats(torch.ones(1, 1), head)
        masked = exit_stats(torch.ones(1, 1), head, head_bias=torch.tensor([0.0, -torch.inf, -torch.inf]))
    for stats in (sure, masked):
        assert stats.logsumexp.item() == pytest.approx(300.0)
        assert stats.entropy.item() == pytest.approx(0.0, abs=1e-6)
        assert stats.entropy_half.item() == pytest.approx(0.0, abs=1e-6)
    assert masked.top2.item() == -math.inf


@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_nan_spoils_its_row_only(provider: str, dtype: torch.dtype) -> None:
    hidden = torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [2.0, 0.0]], dtype=dtype)
    with backend(provider):
        stats = exit_stats(hidden, torch.randn(40, 2).to(dtype))
    for name, values in zip(ExitStats._fields[1:], stats[1:], strict=True):
        assert values.isnan().tolist() == [False, True, False], name


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
@pytest.mark.parametrize("infinite", [1, 3])
def test_an_infinite_logit_spoils_its_row_only(provider: str, infinite: int) -> None:
    head, bias = torch.randn(9000, 2), torch.zeros(9000)
    bias[infinite] = torch.inf
    with backend(provider):
        clean = exit_stats(torch.randn(2, 2), head)
        stats = exit_stats(torch.randn(2, 2), head, head_bias=bias)
    for name, good, spoilt in zip(ExitStats._fields[1:], clean[1:], stats[1:], strict=True):
        assert bool(torch.isfinite(good).all()), name
        assert bool(spoilt.isnan().all()), name


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_words_that_cannot_be_cost_nothing(provider: str) -> None:
    """Whole blocks of -inf before the first possible word, as grammars mask a vocabulary."""
    head, bias = torch.randn(20000, 4), torch.zeros(20000)
    bias[:9000] = -torch.inf
    hidden = torch.randn(3, 4)
    with backend(provider):
        masked = exit_stats(hidden, head, head_bias=bias)
        short = exit_stats(hidden, head, vocab_ids=torch.arange(9000, 20000))
    assert_same(masked.argmax, short.argmax)
    for name, one, other in zip(ExitStats._fields[1:], masked[1:], short[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", ["live", "none_live", "rows129_live128"])
def test_rows_past_live_are_not_computed(name: str, provider: str) -> None:
    case = next(case for case in CASES[OP] if case.name == name)
    op_harness.assert_only_live_rows_are_written(OP, case, provider)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_promised_element_is_written(provider: str) -> None:
    with backend(provider):
        stats = exit_stats(torch.randn(5, 8), torch.randn(100, 8), norm_gain=torch.ones(8))
    assert all(bool(torch.isfinite(values).all()) for values in stats[1:])
    assert bool(((stats.argmax >= 0) & (stats.argmax < 100)).all())


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_row_does_not_depend_on_its_neighbours(provider: str) -> None:
    hidden, head = torch.randn(9, 16), torch.randn(3000, 16)
    with backend(provider):
        together = exit_stats(hidden, head)
        alone = [exit_stats(hidden[row : row + 1], head) for row in range(9)]
    assert together.argmax.tolist() == [stats.argmax.item() for stats in alone]
    torch.testing.assert_close(together.entropy, torch.cat([stats.entropy for stats in alone]), rtol=1e-5, atol=1e-5)


def test_logits_are_never_whole() -> None:
    """Peak memory of the cpp provider stays far below [n, V]: the largest allocation is one block."""
    hidden, head = torch.randn(64, 16), torch.randn(200_000, 16)
    with (
        backend("cpp"),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        exit_stats(hidden, head)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 64 * 8192 * 4


@pytest.mark.parametrize("name", ["odd", "shortlist", "bias_softcap", "empty"])
def test_contract(name: str) -> None:
    case = next(case for case in CASES[OP] if case.name == name)
    op_harness.check_contract(OP, case.build())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, dtype=torch.float64)}, r"exit_stats: hidden must be float32 or bfloat16 or float16"),
        ({"hidden": torch.zeros(3, 2).T}, r"exit_stats: hidden must be contiguous, got strides"),
        ({"head_weight": torch.zeros(5, 4)}, r"exit_stats: head_weight must be float32 \[any, 3\].*got float32 \[5, 4\]"),
        ({"head_weight": torch.zeros(0, 3)}, r"exit_stats: head_weight must be at least one row"),
        ({"head_weight": torch.zeros(5, 3, dtype=torch.bfloat16)}, r"head_weight must be float32.*got bfloat16"),
        ({"head_bias": torch.zeros(4)}, r"exit_stats: head_bias must be float32 \[5\]"),
        ({"head_bias": torch.zeros(10)[::2]}, "exit_stats: head_bias must be contiguous"),
        ({"norm_gain": torch.zeros(3, dtype=torch.bfloat16)}, r"exit_stats: norm_gain must be float32 \[3\]"),
        ({"norm_gain": torch.zeros(6)[::2]}, "exit_stats: norm_gain must be contiguous"),
        ({"softcap": math.nan}, "exit_stats: softcap must be at least 0"),
        ({"live": torch.zeros(1, dtype=torch.int64)}, "exit_stats: live must be int32"),
        ({"vocab_ids": torch.zeros(2, dtype=torch.int32)}, r"exit_stats: vocab_ids must be int64"),
        ({"vocab_ids": torch.zeros(0, dtype=torch.int64)}, r"exit_stats: vocab_ids must be at least one id"),
        ({"softcap": -1.0}, r"exit_stats: softcap must be at least 0"),
        ({"live": torch.zeros(2, dtype=torch.int32)}, r"exit_stats: live must be int32 with 1 element"),
    ],
)
def test_wrong_arguments(change: dict, message: str) -> None:
    arguments = {"hidden": torch.zeros(2, 3), "head_weight": torch.zeros(5, 3), **change}
    with pytest.raises(ArgumentError, match=message):
        exit_stats(**arguments)


@pytest.mark.parametrize("provider", op_harness.HOST_CHECKED)
@pytest.mark.parametrize("wrong", [-1, 5])
def test_ids_out_of_range(provider: str, wrong: int) -> None:
    with backend(provider), pytest.raises(ArgumentError, match=r"exit_stats: vocab_ids must be in \[0, 5\)"):
        exit_stats(torch.zeros(1, 3), torch.zeros(5, 3), vocab_ids=torch.tensor([0, wrong]))
