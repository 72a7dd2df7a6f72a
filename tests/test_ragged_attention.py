"""ragged_attention: single rows over paged K,V."""

from __future__ import annotations

import math

import op_harness
import pytest
import torch

from dyndepth.errors import ArgumentError
from dyndepth.op import backend
from dyndepth.ops import ragged_attention
from dyndepth.testing import CASES, Case, assert_same

OP = "ragged_attention"
PROVIDERS = op_harness.providers(OP)


def _case(name: str) -> Case:
    return next(case for case in CASES[OP] if case.name == name)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("case", "dtype"), op_harness.cases_in_dtypes(OP))
def test_as_exact_as_pytorch(case: Case, dtype: torch.dtype, provider: str) -> None:
    op_harness.check_against_oracle(OP, case, dtype, provider)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_by_hand(provider: str) -> None:
    """Two keys with scores 0 and ln 3: weights 1/4 and 3/4. Position 0 sees itself only."""
    pages = torch.zeros(2, 3, 1, 1, 2)
    pages[0, 2, 0, 0], pages[0, 1, 0, 0] = torch.tensor([0.0, 0.0]), torch.tensor([math.log(3.0), 0.0])
    pages[1, 2, 0, 0], pages[1, 1, 0, 0] = torch.tensor([4.0, 8.0]), torch.tensor([0.0, 4.0])
    table = torch.tensor([[2, 1]], dtype=torch.int32)
    q = torch.tensor([[[1.0, 5.0]], [[1.0, 5.0]]])
    seq, pos = torch.zeros(2, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    with backend(provider):
        out = ragged_attention(q, pages, table, seq, pos, scale=1.0)
        windowed = ragged_attention(q, pages, table, seq, pos, scale=1.0, window=1)
    assert out[0, 0].tolist() == pytest.approx([4.0, 8.0])
    assert out[1, 0].tolist() == pytest.approx([1.0, 5.0])
    assert windowed[1, 0].tolist() == pytest.approx([0.0, 4.0])


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_equals_causal_sdpa_on_a_whole_sequence(provider: str) -> None:
    """A prefill of one sequence is ordinary causal attention."""
    rows, heads, kv_heads, dim, page = 37, 6, 2, 16, 8
    q, k, v = torch.randn(rows, heads, dim), torch.randn(rows, kv_heads, dim), torch.randn(rows, kv_heads, dim)
    table = torch.tensor([[4, 0, 3, 1, 2, -1]], dtype=torch.int32)
    pages = torch.full((2, 5, page, kv_heads, dim), torch.nan)
    for position in range(rows):
        pages[0, table[0, position // page], position % page] = k[position]
        pages[1, table[0, position // page], position % page] = v[position]
    with backend(provider):
        out = ragged_attention(
            q, pages, table, torch.zeros(rows, dtype=torch.int32), torch.arange(rows, dtype=torch.int32), scale=dim**-0.5
        )
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.movedim(1, 0)[None], k.movedim(1, 0)[None], v.movedim(1, 0)[None], is_causal=True, enable_gqa=True
    )[0].movedim(0, 1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
@pytest.mark.parametrize("name", ["gqa3", "window", "prefill", "odd_pages"])
def test_invisible_slots_are_never_used(name: str, provider: str) -> None:
    """Slots past a row's position, before its window, in other pages: NaN there changes nothing."""
    arguments = _case(name).build()
    clean = op_harness.outcome(OP, arguments, provider)["out"]
    size, table = arguments["pages"].shape[2], arguments["block_table"]
    visible = torch.zeros(arguments["pages"].shape[1:3], dtype=torch.bool)
    for seq, pos in zip(arguments["seq"].tolist(), arguments["pos"].tolist(), strict=True):
        first = max(0, pos - arguments["window"] + 1) if arguments["window"] else 0
        for position in range(first, pos + 1):
            visible[table[seq, position // size], position % size] = True
    arguments["pages"][:, ~visible] = torch.nan
    assert_same(op_harness.outcome(OP, arguments, provider)["out"], clean)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", ["gqa3", "prefill", "window_softcap"])
def test_a_row_does_not_depend_on_its_neighbours(name: str, provider: str) -> None:
    """Alone or in a tile with others of its sequence, in any order: the same bits."""
    arguments = _case(name).build()
    together = op_harness.outcome(OP, arguments, provider)["out"]
    for row in range(0, len(together), 5):
        alone = {key: arguments[key][row : row + 1] for key in ("q", "seq", "pos")}
        assert_same(op_harness.outcome(OP, {**arguments, **alone}, provider)["out"][0], together[row], f"row {row}")
    order = torch.randperm(len(together))
    shuffled = {key: arguments[key][order] for key in ("q", "seq", "pos")}
    assert_same(op_harness.outcome(OP, {**arguments, **shuffled}, provider)["out"], together[order])


@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_a_visible_nan_or_infinity_is_not_hidden(provider: str, dtype: torch.dtype) -> None:
    """What a model computed wrong must show, in the rows that see it and only there."""
    arguments = _case("gqa3").build(dtype)
    seq, pos = int(arguments["seq"][-1]), int(arguments["pos"][-1])
    size = arguments["pages"].shape[2]
    arguments["pages"][1, arguments["block_table"][seq, pos // size], pos % size, 0, :2] = torch.tensor([torch.nan, torch.inf])
    out = op_harness.outcome(OP, arguments, provider)["out"]
    assert bool(out[-1, 0, 0].isnan())
    assert bool(out[-1, 0, 1].isinf())
    assert bool(torch.isfinite(out[:-1]).all())


@pytest.mark.parametrize("provider", PROVIDERS)
def test_rows_past_live_are_not_looked_at(provider: str) -> None:
    """Their sequence and position may be anything."""
    arguments = _case("live").build()
    live = int(arguments["live"])
    clean = op_harness.outcome(OP, arguments, provider)["out"]
    arguments["q"][live:] = torch.nan
    arguments["seq"][live:], arguments["pos"][live:] = 2**31 - 1, -(2**31)
    assert_same(op_harness.outcome(OP, arguments, provider)["out"], clean)
    arguments["live"] += 100
    arguments["q"], arguments["seq"], arguments["pos"] = (arguments[name][:live] for name in ("q", "seq", "pos"))
    assert_same(op_harness.outcome(OP, arguments, provider)["out"], clean)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", ["live", "none_live", "split31_live30", "split32_live0"])
def test_rows_past_live_are_not_computed(name: str, provider: str) -> None:
    op_harness.assert_only_live_rows_are_written(OP, _case(name), provider)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_pages_between_windows_are_not_looked_at(provider: str) -> None:
    """Rows of one sequence, far apart, share a tile; table entries that neither sees may be anything."""
    q, pages = torch.randn(2, 2, 8), torch.randn(2, 3, 4, 1, 8)
    arguments = {"q": q, "pages": pages, "seq": torch.zeros(2, dtype=torch.int32), "scale": 0.3, "window": 3}
    pos = torch.tensor([2, 26], dtype=torch.int32)
    hostile = torch.tensor([[1, 99, -7, 2**31 - 1, -1, 3, 2, -5]], dtype=torch.int32)
    tame = torch.tensor([[1, 0, 0, 0, 0, 0, 2, 0]], dtype=torch.int32)
    with backend(provider):
        found = ragged_attention(block_table=hostile, pos=pos, **arguments)
        assert_same(found, ragged_attention(block_table=tame, pos=pos, **arguments))
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_keys_that_score_minus_infinity_weigh_nothing(provider: str) -> None:
    """Also where they come first, and fill a page."""
    pages = torch.randn(2, 40, 4, 1, 2)
    pages[0, :39, :, 0, 0] = -torch.inf
    q = torch.tensor([[[1.0, 1.0]]])
    at = {"seq": torch.zeros(1, dtype=torch.int32), "scale": 1.0, "block_table": torch.arange(40, dtype=torch.int32)[None]}
    with backend(provider):
        found = ragged_attention(q, pages, pos=torch.tensor([159], dtype=torch.int32), **at)
        alone = ragged_attention(q, pages, pos=torch.tensor([159], dtype=torch.int32), window=4, **at)
    torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_large_scores_do_not_overflow(provider: str) -> None:
    arguments = _case("gqa3").build()
    arguments["q"] *= 1e4
    assert bool(torch.isfinite(op_harness.outcome(OP, arguments, provider)["out"]).all())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_promised_element_is_written(provider: str) -> None:
    assert bool(torch.isfinite(op_harness.outcome(OP, _case("odd_pages").build(), provider)["out"]).all())


@pytest.mark.parametrize("name", ["gqa3", "window_softcap", "odd_pages", "empty"])
def test_contract(name: str) -> None:
    op_harness.check_contract(OP, _case(name).build())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, "ragged_attention: q must be a multiple of 2 kv_heads"),
        ({"q": torch.zeros(4, 2, 4).movedim(0, 1)}, "ragged_attention: q must be contiguous"),
        ({"q": torch.zeros(2, 4, 4, dtype=torch.float16)}, "ragged_attention: pages must be float16"),
        ({"pages": torch.zeros(2, 3, 2, 2, 6)}, r"ragged_attention: pages must be float32 \[2, any, any, any, 4\]"),
        ({"block_table": torch.zeros(1, 2, dtype=torch.int64)}, "ragged_attention: block_table must be int32"),
        ({"seq": torch.zeros(3, dtype=torch.int32)}, r"ragged_attention: seq must be int32 \[2\]"),
        ({"softcap": -1.0}, "ragged_attention: softcap must be at least 0"),
        ({"window": -1}, "ragged_attention: window must be at least 0"),
        ({"seq": torch.ones(2, dtype=torch.int32)}, r"ragged_attention: seq must be in \[0, 1\)"),
        ({"pos": torch.full((2,), 4, dtype=torch.int32)}, r"ragged_attention: pos must be in \[0, 4\)"),
        ({"pos": torch.full((2,), -1, dtype=torch.int32)}, r"ragged_attention: pos must be in \[0, 4\)"),
        ({"pos": torch.full((2,), 3, dtype=torch.int32)}, r"ragged_attention: block_table must be in \[0, 3\) for visible"),
        ({"block_table": torch.tensor([[3, 0]], dtype=torch.int32)}, r"block_table must be in \[0, 3\) for visible.*got 3"),
        ({"softcap": math.nan}, "ragged_attention: softcap must be at least 0"),
    ],
)
@pytest.mark.parametrize("provider", op_harness.HOST_CHECKED)
def test_wrong_arguments(change: dict, message: str, provider: str) -> None:
    arguments = {
        "q": torch.zeros(2, 4, 4),
        "pages": torch.zeros(2, 3, 2, 2, 4),
        "block_table": torch.tensor([[0, -1]], dtype=torch.int32),
        "seq": torch.zeros(2, dtype=torch.int32),
        "pos": torch.ones(2, dtype=torch.int32),
        "scale": 1.0,
        **change,
    }
    with backend(provider), pytest.raises(ArgumentError, match=message):
        ragged_attention(**arguments)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("provider", op_harness.HOST_CHECKED)
def test_a_wrong_page_is_found_whichever_row_sees_it(provider: str, window: int) -> None:
    """Whatever rows come before it, in any order: an entry that a row sees raises, one that none sees does not."""
    generator = torch.Generator().manual_seed(window)
    for rows in (1, 2, 3, 5):
        for _ in range(8):
            seq = torch.randint(0, 2, (rows,), generator=generator, dtype=torch.int32)
            pos = torch.randint(0, 10, (rows,), generator=generator, dtype=torch.int32)
            for sequence, page in ((s, p) for s in range(2) for p in range(5)):
                table = torch.arange(10, dtype=torch.int32).view(2, 5)
                table[sequence, page] = -1
                visible = any(
                    int(s) == sequence and (max(0, int(p) - window + 1) if window else 0) // 2 <= page <= int(p) // 2
                    for s, p in zip(seq, pos, strict=True)
                )
                given = (torch.zeros(rows, 2, 4), torch.zeros(2, 10, 2, 2, 4), table, seq, pos)
                with backend(provider):
                    if not visible:
                        ragged_attention(*given, scale=1.0, window=window)
                        continue
                    with pytest.raises(ArgumentError, match="block_table must be"):
                        ragged_attention(*given, scale=1.0, window=window)
