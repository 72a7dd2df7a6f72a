"""ragged_attention's promise: a row's bits depend on neither its neighbours nor the threads; and what edges may not hide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import op_harness
import pytest
import torch
from torch import Tensor

from dyndepth.op import backend
from dyndepth.ops import ragged_attention
from dyndepth.testing import assert_as_exact_as, assert_same
from dyndepth.testing.cases import Arguments, widened

OP = "ragged_attention"
PROVIDERS = op_harness.providers(OP)
#: Around the strips of 64 and segments of 256 keys that the cpp kernel works in, and its vectors of 16.
CONTEXTS = [1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def problem(
    contexts: list[int],
    *,
    page_size: int = 16,
    rows_each: int = 1,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 20,
    window: int = 0,
    softcap: float = 0.0,
    heads: tuple[int, int] = (6, 2),
) -> Arguments:
    """Sequence i has `contexts[i]` keys in pages of its own; its last `rows_each` positions (at most) are rows."""
    generator = torch.Generator().manual_seed(20)
    per_sequence = -(-max(contexts) // page_size)
    pages = len(contexts) * per_sequence + 1
    table = torch.randperm(pages, generator=generator)[: len(contexts) * per_sequence].view(len(contexts), -1).int()
    pos = [p for context in contexts for p in range(max(0, context - rows_each), context)]
    seq = [at for at, context in enumerate(contexts) for _ in range(min(rows_each, context))]
    return {
        "q": (2 * torch.randn(len(pos), heads[0], head_dim, generator=generator)).to(dtype),
        "pages": torch.randn(2, pages, page_size, heads[1], head_dim, generator=generator).to(dtype),
        "block_table": table.contiguous(),
        "seq": torch.tensor(seq, dtype=torch.int32),
        "pos": torch.tensor(pos, dtype=torch.int32),
        "live": None,
        "scale": head_dim**-0.5,
        "softcap": softcap,
        "window": window,
    }


def attended(arguments: Arguments, provider: str, rows: Tensor | None = None) -> Tensor:
    """Of all rows or of some, in their order."""
    if rows is not None:
        arguments = {**arguments, **{name: arguments[name][rows] for name in ("q", "seq", "pos")}}
    with backend(provider):
        return ragged_attention(**arguments)


def place(arguments: Arguments, seq: int, pos: int) -> tuple[int, int]:
    """Page and slot in the page."""
    size = arguments["pages"].shape[2]
    return int(arguments["block_table"][seq, pos // size]), pos % size


def assert_independent(arguments: Arguments, provider: str, threads: Callable[[int], None]) -> None:
    """Alone, in pairs, in the tiles of its sequence cut anywhere, shuffled, in the whole batch; 1 thread and 2."""
    rows = len(arguments["q"])
    threads(1)
    together = attended(arguments, provider)
    assert bool(torch.isfinite(together).all())
    ways = [torch.arange(rows), torch.randperm(rows), torch.arange(rows).flip(0), torch.arange(0, rows, 3)]
    ways += [torch.arange(begin, rows) for begin in range(1, min(rows, 10))]
    ways += [torch.tensor([row, (row * 7 + 3) % rows]) for row in range(0, rows, 4)]
    ways += [torch.tensor([row]) for row in range(rows)]
    for count in (1, 2):
        threads(count)
        for number, way in enumerate(ways if count == 1 else ways[::4]):
            assert_same(attended(arguments, provider, way), together[way], f"way {number}, {count} threads")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 5, 16, 24])
def test_decode_rows_of_many_contexts(page_size: int, dtype: torch.dtype, provider: str, threads: Callable) -> None:
    assert_independent(problem(CONTEXTS, page_size=page_size, dtype=dtype), provider, threads)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("head_dim", [20, 64, 128])
@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
def test_rows_that_share_tiles(dtype: torch.dtype, head_dim: int, provider: str, threads: Callable) -> None:
    """Tiles of 8 rows of a sequence, some of them beginning in other segments than others."""
    arguments = problem([11, 70, 261, 515], rows_each=11, page_size=5, dtype=dtype, head_dim=head_dim)
    assert_independent(arguments, provider, threads)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "window", "softcap"),
    [
        ((3, 1), 64, 16, 0, 0.0),
        ((6, 2), 32, 32, 100, 0.0),
        ((8, 8), 64, 16, 0, 5.0),
        ((20, 1), 96, 24, 40, 5.0),
        ((2, 1), 288, 16, 0, 0.0),
    ],
    ids=["gqa", "window", "softcap", "more heads than a tile", "wide head"],
)
def test_prompts_alone_and_in_pieces(
    heads: tuple[int, int], head_dim: int, page_size: int, window: int, softcap: float, provider: str, threads: Callable
) -> None:
    """Tiles of many rows of a prompt, and of the one row that is left of it when it decodes."""
    arguments = problem(
        [70, 300],
        rows_each=45,
        page_size=page_size,
        dtype=torch.bfloat16,
        heads=heads,
        head_dim=head_dim,
        window=window,
        softcap=softcap,
    )
    assert_independent(arguments, provider, threads)
    reference, truth = op_harness.outcome(OP, arguments)["out"], op_harness.outcome(OP, widened(arguments))["out"]
    assert_as_exact_as(attended(arguments, provider), reference, truth)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_long_prompt_equals_its_rows_alone(seed: int, provider: str) -> None:
    """Half a million results: sums that differ in their last bit of fp32 only show in a few of them, rounded to bf16."""
    arguments = problem([1024], rows_each=1024, dtype=torch.bfloat16, heads=(9, 3), head_dim=64)
    arguments["q"] = torch.randn(arguments["q"].shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    alone = torch.cat([attended(arguments, provider, torch.tensor([row])) for row in range(1024)])
    assert_same(attended(arguments, provider), alone)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("keys", "scale", "softcap"), [(1e10, 0.125, 0.0), (1e25, 0.125, 0.0), (1.0, 1e10, 0.0), (1.0, 0.125, 1e6)]
)
def test_scores_and_caps_of_any_size(keys: float, scale: float, softcap: float, dtype: torch.dtype, provider: str) -> None:
    """The largest weight is 1 whatever its score is, in one segment and in two."""
    arguments = problem([100, 300], rows_each=20, dtype=dtype, head_dim=64) | {"scale": scale, "softcap": softcap}
    arguments["pages"][0] *= keys
    reference, truth = op_harness.outcome(OP, arguments)["out"], op_harness.outcome(OP, widened(arguments))["out"]
    found = attended(arguments, provider)
    assert bool(torch.isfinite(found).all())
    if max(keys, scale) == 1.0:  # beyond, one key weighs everything, and which one is a matter of rounding where two are level
        assert_as_exact_as(found, reference, truth)
    else:
        same = (found.double() - truth).abs().amax((1, 2)) <= 0.01
        assert int(same.sum()) >= 0.95 * len(same)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize(("heads", "head_dim"), [((6, 2), 20), ((6, 2), 64), ((20, 1), 64)])
def test_a_later_row_of_the_prompt_has_no_effect(
    heads: tuple[int, int], head_dim: int, part: int, wrong: float, provider: str
) -> None:
    """Not even where rows share a tile, in which a key that only some of them see weighs 0 for the others: 0 x inf."""
    arguments = problem([290], rows_each=40, dtype=torch.bfloat16, heads=heads, head_dim=head_dim)
    clean = attended(arguments, provider)
    for position in (255, 256, 270, 289):
        spoiled = {**arguments, "pages": arguments["pages"].clone()}
        spoiled["pages"][part, *place(arguments, 0, position)] = wrong
        before = position - 250
        found = attended(spoiled, provider)
        assert_same(found[:before], clean[:before], f"position {position}")
        assert not bool(torch.isfinite(found[before:]).all()), f"position {position}"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 17, 64, 100, 255, 256, 257, 400])
def test_windows_begin_anywhere(window: int, dtype: torch.dtype, provider: str, threads: Callable) -> None:
    """Within a strip or a segment, at its first key and at its last."""
    arguments = problem([window + 255, window + 256, window + 63, 600], rows_each=5, window=window, dtype=dtype, softcap=4.0)
    assert_independent(arguments, provider, threads)
    narrow = {**arguments, "pages": arguments["pages"].clone()}
    size = arguments["pages"].shape[2]
    for seq, table in enumerate(arguments["block_table"].tolist()):
        oldest = int(arguments["pos"][arguments["seq"] == seq].min()) - window + 1
        for pos in range(max(0, oldest)):  # before every window of the sequence
            narrow["pages"][:, table[pos // size], pos % size] = torch.nan
    assert_same(attended(narrow, provider), attended(arguments, provider))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [20, 64, 128])
@pytest.mark.parametrize("window", [0, 100])
def test_as_exact_as_pytorch(window: int, head_dim: int, dtype: torch.dtype, provider: str, threads: Callable) -> None:
    """Also where segments are merged that two threads computed."""
    arguments = problem(CONTEXTS, rows_each=3, page_size=24, dtype=dtype, head_dim=head_dim, window=window)
    threads(2)
    reference, truth = op_harness.outcome(OP, arguments)["out"], op_harness.outcome(OP, widened(arguments))["out"]
    assert_as_exact_as(attended(arguments, provider), reference, truth)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("page_size", [5, 16])
def test_keys_out_of_reach_have_no_effect(page_size: int, wrong: float, provider: str) -> None:
    """Of the future, of other sequences, of slots in the row's own last page."""
    arguments = problem(CONTEXTS, page_size=page_size, rows_each=1)
    clean = attended(arguments, provider)
    size = arguments["pages"].shape[2]
    seen = torch.zeros(arguments["pages"].shape[1:3], dtype=torch.bool)
    for seq, context in enumerate(CONTEXTS):
        for pos in range(context):
            seen[place(arguments, seq, pos)] = True
    arguments["pages"][:, ~seen] = wrong
    assert int((~seen).sum()) > size
    assert_same(attended(arguments, provider), clean)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("dtype", op_harness.DTYPES, ids=str)
def test_a_nan_within_reach_shows(dtype: torch.dtype, part: int, provider: str) -> None:
    """In the key or value of any one position: first and last of a vector, a strip, a segment, and the row's own."""
    for context in (1, 17, 64, 65, 256, 257, 320, 513):
        places = {0, 15, 16, 63, 64, 127, 255, 256, 257, 319, 511, 512, context - 2, context - 1}
        for wrong in sorted(p for p in places if 0 <= p < context):
            arguments = problem([context, context], dtype=dtype)
            arguments["pages"][part, *place(arguments, 1, wrong), 0] = torch.nan
            found = attended(arguments, provider)
            what = f"position {wrong} of {context}"
            assert bool(found[1, :3].isnan().all()), what
            assert bool(torch.isfinite(found[1, 3:]).all()), f"{what}: another head"
            assert bool(torch.isfinite(found[0]).all()), f"{what}: another sequence"


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
@pytest.mark.parametrize("window", [1, 2, 8, 38, 100, 257])
def test_a_nan_at_the_edge_of_a_window_shows(window: int, provider: str) -> None:
    """In its oldest key, wherever that lies in a strip; one position earlier it is nobody's business."""
    for context in (window + 48, window + 62, window + 63, window + 64, window + 255, window + 256):
        for shift in (0, -1):
            arguments = problem([context], window=window)
            arguments["pages"][0, *place(arguments, 0, context - window + shift)] = torch.nan
            found = attended(arguments, provider)
            assert bool((found.isnan() if shift == 0 else torch.isfinite(found)).all()), f"context {context}, shift {shift}"


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
def test_a_nan_among_keys_that_weigh_nothing_shows(provider: str) -> None:
    """Every other key of its strip, or of its segment, scores -inf."""
    for first, last in ((0, 64), (64, 128), (0, 256), (256, 300)):
        for wrong in range(first, last, 13):
            arguments = problem([300], heads=(1, 1))
            arguments["q"][:] = 1.0
            for pos in range(first, last):
                arguments["pages"][0, *place(arguments, 0, pos)] = torch.nan if pos == wrong else -torch.inf
            assert bool(attended(arguments, provider).isnan().all()), f"position {wrong} of [{first}, {last})"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_sum_of_nothing_but_subnormals_has_one_sign(provider: str) -> None:
    """Processors that multiply bf16 flush such a sum to -0; what a row does not see may not turn that into 0."""
    pages = torch.zeros(2, 4, 16, 1, 32, dtype=torch.bfloat16)
    pages[0, 0, 0, 0, 0] = 1.0
    values = pages[1].view(64, 32)
    values[1:32], values[32:] = -1.2e-38, 3e-38
    q = torch.zeros(40, 1, 32, dtype=torch.bfloat16)
    q[:, :, 0] = 4.0
    table, pos, seq = torch.arange(4, dtype=torch.int32)[None], torch.arange(1, 41, dtype=torch.int32), torch.zeros(40).int()
    with backend(provider):
        together = ragged_attention(q, pages, table, seq, pos, scale=1.0)
        alone = [ragged_attention(q[i : i + 1], pages, table, seq[i : i + 1], pos[i : i + 1], scale=1.0) for i in range(40)]
    assert_same(torch.cat(alone), together)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
@pytest.mark.parametrize("empty", [(0, 256), (256, 512), (512, 600), (64, 128), (0, 599)])
def test_segments_that_weigh_nothing(empty: tuple[int, int], provider: str) -> None:
    """All of their keys score -inf: the answer is that of the others, wherever they lie."""
    arguments = problem([600], heads=(2, 1))
    arguments["q"] = arguments["q"].abs() + 0.1
    kept = [pos for pos in range(600) if not empty[0] <= pos < empty[1]]
    for pos in range(*empty):
        arguments["pages"][0, *place(arguments, 0, pos)] = -torch.inf
    keys, values = (
        torch.stack([arguments["pages"][part, *place(arguments, 0, pos), 0] for pos in kept]).double() for part in (0, 1)
    )
    weights = (arguments["q"][0].double() @ keys.T * arguments["scale"]).softmax(-1)
    torch.testing.assert_close(attended(arguments, provider)[0], (weights @ values).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("provider", ["torch", *PROVIDERS])
@pytest.mark.parametrize("at", [3, 300, 599])
def test_a_key_that_takes_all_the_weight(at: int, provider: str) -> None:
    """Scores hundreds apart in different segments: the others shrink to nothing, without overflow."""
    arguments = problem([600], heads=(1, 1))
    arguments["pages"][0, *place(arguments, 0, at), 0] = 500 * arguments["q"][0, 0]
    found = attended(arguments, provider)
    torch.testing.assert_close(found[0, 0], arguments["pages"][1, *place(arguments, 0, at), 0], rtol=1e-6, atol=1e-6)
