"""accept_drafts: the prefix that the target model agrees with, and what it says next, distributed as if it had spoken alone."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import op_harness
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.op import REGISTRY, backend
from dyndepth.ops import accept_drafts
from dyndepth.testing import CASES, Case, assert_same

OP = "accept_drafts"
PROVIDERS = op_harness.providers(OP)
EVERY = ["torch", *PROVIDERS]
EXAMPLES = ["greedy_long", "greedy_no_drafts", "odd", "certain", "no_drafts", "nearly_equal", "words1025"]
#: The largest float32 below 1.
ALMOST_ONE = 1 - 2.0**-24


def arguments_of(name: str) -> dict[str, Any]:
    return next(case for case in CASES[OP] if case.name == name).build()


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def one(provider: str, drafts: list[int], p: list[list[float]], q: list[list[float]] | None, u: list[float]) -> tuple[int, int]:
    """A single row of which every draft counts."""
    width = len(p[0])
    with backend(provider):
        accepted, token = accept_drafts(
            torch.tensor([drafts], dtype=torch.int64),
            int32(len(drafts)),
            torch.tensor([p]),
            draft_probs=None if q is None else torch.tensor([q]).view(1, len(drafts), width),
            uniforms=torch.tensor([u]),
        )
    return int(accepted), int(token)


def test_providers() -> None:
    assert "cpp" in PROVIDERS, REGISTRY[OP].providers["cpp"].missing()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", op_harness.cases(OP))
def test_equals_reference(case: Case, provider: str) -> None:
    """Every bit: mass is counted in whole units, so no order of adding is better than another."""
    arguments = case.build()
    expected = op_harness.outcome(OP, arguments)
    for name, value in op_harness.outcome(OP, arguments, provider).items():
        assert_same(value, expected[name], f"{case.name} {provider}: {name}")


@pytest.mark.parametrize("provider", EVERY)
def test_greedy_by_hand(provider: str) -> None:
    drafts = torch.tensor([[5, 8, 2], [5, 8, 7], [5, 8, 7], [6, 8, 7], [5, 8, 7]])
    target = torch.tensor([[5, 8, 7, 1]]).expand(5, 4)
    with backend(provider):
        accepted, token = accept_drafts(drafts, int32(3, 3, 2, 3, 0), target)
    assert accepted.tolist() == [2, 3, 2, 0, 0]
    assert token.tolist() == [7, 1, 7, 5, 5]
    assert (accepted.dtype, token.dtype) == (torch.int32, torch.int64)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), most=st.integers(0, 5), rows=st.integers(0, 6))
@pytest.mark.parametrize("provider", EVERY)
def test_greedy_against_plain_python(provider: str, data: st.DataObject, most: int, rows: int) -> None:
    words = st.integers(-1, 2)
    drafts = [[data.draw(words) for _ in range(most)] for _ in range(rows)]
    target = [[data.draw(words) for _ in range(most + 1)] for _ in range(rows)]
    lengths = [data.draw(st.integers(0, most)) for _ in range(rows)]
    with backend(provider):
        accepted, token = accept_drafts(
            torch.tensor(drafts, dtype=torch.int64).view(rows, most),
            int32(*lengths),
            torch.tensor(target, dtype=torch.int64).view(rows, most + 1),
        )
    for row in range(rows):
        kept = 0
        while kept < lengths[row] and drafts[row][kept] == target[row][kept]:
            kept += 1
        assert (int(accepted[row]), int(token[row])) == (kept, target[row][kept])


P, Q = [0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.5, 0.0]


@pytest.mark.parametrize("provider", EVERY)
@pytest.mark.parametrize(
    ("draft", "u", "last", "expected"),
    [
        (0, 0.99, 0.0, (1, 0)),  # p > q: kept for certain; then the bonus from p
        (1, 0.99, 0.5, (1, 1)),  # p = q: kept; 0.5 is not exceeded by token 0's 0.5
        (2, 0.2, 0.75, (1, 2)),  # 0.2 * 0.5 < 0.125
        (2, 0.25, 0.6, (0, 0)),  # 0.25 * 0.5 is not below 0.125; residual (1/4, 0, 0, 1/8): token 0 up to 2/3
        (2, 0.3, 0.7, (0, 3)),
        (2, 0.3, 0.0, (0, 0)),
        (2, 0.3, ALMOST_ONE, (0, 3)),
    ],
)
def test_sampling_by_hand(provider: str, draft: int, u: float, last: float, expected: tuple[int, int]) -> None:
    assert one(provider, [draft], [P, P], [Q], [u, last]) == expected


@pytest.mark.parametrize("provider", EVERY)
def test_a_draft_is_judged_without_rounding(provider: str) -> None:
    """0.75 q is a quarter of a last place below p: in float32 they would be equal, and an equal one is refused."""
    q, p = 12582913 * 2.0**-24, 9437185 * 2.0**-24
    assert torch.tensor(0.75) * torch.tensor(q) == torch.tensor(p)
    assert one(provider, [0], [[p, 1 - p]] * 2, [[q, 1 - q]], [0.75, 0.0]) == (1, 0)
    assert one(provider, [0], [[p - 2.0**-24, 1 - p]] * 2, [[q, 1 - q]], [0.75, 0.0]) == (0, 1)


@pytest.mark.parametrize("provider", EVERY)
@pytest.mark.parametrize(
    ("u", "last", "expected"),
    [
        (0.49, 0.9, (1, 3)),  # kept with probability p(0) = 0.5; the bonus is from p
        (0.5, 0.0, (0, 1)),  # else p without token 0: (0, 1/4, 1/8, 1/8)
        (0.9, 0.49, (0, 1)),
        (0.9, 0.5, (0, 2)),
        (0.9, 0.75, (0, 3)),
    ],
)
def test_certain_drafts_by_hand(provider: str, u: float, last: float, expected: tuple[int, int]) -> None:
    assert one(provider, [0], [P, P], None, [u, last]) == expected


@st.composite
def dyadic(draw: st.DrawFn, size: int) -> list[Fraction]:
    """A distribution in 64ths: sums and products of these are exact in every arithmetic."""
    cuts = sorted(draw(st.lists(st.integers(0, 64), min_size=size - 1, max_size=size - 1)))
    return [Fraction(b - a, 64) for a, b in zip([0, *cuts], [*cuts, 64], strict=True)]


def by_fractions(
    drafts: list[int], p: list[list[Fraction]], q: list[list[Fraction]] | None, u: list[Fraction]
) -> tuple[int, int]:
    """Leviathan et al. 2023, algorithm 1, in exact arithmetic."""
    at, mass = 0, p[len(drafts)]
    for at, draft in enumerate([*drafts, None]):
        if draft is None:
            break
        certain = [Fraction(word == draft) for word in range(len(p[0]))] if q is None else q[at]
        if not u[at] * certain[draft] < p[at][draft]:
            residual = [max(a - b, Fraction(0)) for a, b in zip(p[at], certain, strict=True)]
            mass = residual if sum(residual) else p[at]
            break
    running = Fraction(0)
    for word, weight in enumerate(mass):
        running += weight
        if running > u[-1] * sum(mass):
            return at, word
    raise AssertionError("a uniform below 1 always ends inside")


@settings(max_examples=120, deadline=None)
@given(data=st.data(), most=st.integers(0, 3), size=st.integers(1, 6), certain=st.booleans())
@pytest.mark.parametrize("provider", EVERY)
def test_sampling_against_exact_arithmetic(provider: str, data: st.DataObject, most: int, size: int, certain: bool) -> None:
    p = [data.draw(dyadic(size)) for _ in range(most + 1)]
    q = None if certain else [data.draw(dyadic(size)) for _ in range(most)]
    drafts = [data.draw(st.integers(0, size - 1)) for _ in range(most)]
    u = [Fraction(data.draw(st.integers(0, 127)), 128) for _ in range(most + 1)]

    def floats(rows: list[list[Fraction]]) -> list[list[float]]:
        return [[float(value) for value in row] for row in rows]

    found = one(provider, drafts, floats(p), None if q is None else floats(q), [float(value) for value in u])
    assert found == by_fractions(drafts, p, q, u)


@pytest.mark.parametrize("provider", EVERY)
@pytest.mark.parametrize("name", ["greedy_long", "odd", "certain"])
def test_what_does_not_count_is_not_looked_at(provider: str, name: str) -> None:
    arguments = arguments_of(name)
    expected = op_harness.outcome(OP, arguments, provider)
    other = op_harness.copied(arguments)
    beyond = torch.arange(other["drafts"].shape[1]) >= other["lengths"][:, None]
    behind = torch.arange(other["target"].shape[1]) > other["lengths"][:, None]
    assert bool(beyond.any())
    if other["uniforms"] is None:
        # A draft that does not count, and what the target would say there.
        other["drafts"] = torch.where(beyond, other["target"][:, :-1], other["drafts"])
        other["target"] = torch.where(behind, 77, other["target"])
    else:
        other["drafts"][beyond] = 2**62
        other["target"][behind] = torch.nan
        if other["draft_probs"] is not None:
            other["draft_probs"][beyond] = torch.nan
    for key, value in op_harness.outcome(OP, other, provider).items():
        assert_same(value, expected[key], key)


@pytest.mark.parametrize("provider", EVERY)
@pytest.mark.parametrize("name", ["greedy_long", "odd", "certain", "words4096"])
def test_rows_do_not_depend_on_each_other(provider: str, name: str) -> None:
    arguments = arguments_of(name)
    whole = op_harness.outcome(OP, arguments, provider)
    for row in range(0, len(arguments["drafts"]), 5):
        alone = {key: None if value is None else value[row : row + 1] for key, value in arguments.items()}
        for key, value in op_harness.outcome(OP, alone, provider).items():
            assert_same(value, whole[key][row : row + 1], f"row {row}: {key}")


@pytest.mark.parametrize("provider", EVERY)
@pytest.mark.parametrize("name", ["greedy_long", "odd", "certain"])
def test_any_strides(provider: str, name: str) -> None:
    """Rows and positions may lie anywhere; so may single drafts and uniforms."""

    def spread(value: Tensor) -> Tensor:
        if value.dim() == 2:
            return value.new_zeros(2 * value.shape[1], 3 * value.shape[0]).T[::3, ::2].copy_(value)
        rows, places, words = value.shape
        return value.new_zeros(2 * places, 3 * rows, words + 3)[::2, ::3, 2:-1].transpose(0, 1).copy_(value)

    arguments = arguments_of(name)
    expected = op_harness.outcome(OP, arguments, provider)
    strided = {
        key: value if value is None else spread(value) if value.dim() > 1 else value.repeat_interleave(2)[::2]
        for key, value in arguments.items()
    }
    assert not strided["target"].is_contiguous()
    with backend(provider):
        found = REGISTRY[OP](**strided)
    for value, key in zip(found, ("accepted", "token"), strict=True):
        assert_same(value, expected[key], key)


@pytest.mark.parametrize("provider", EVERY)
def test_no_word_without_mass(provider: str) -> None:
    """The smallest and the largest uniform, zeros at both ends; a row's whole mass in any one place."""
    for width in (3, 70, 2500):
        for place in {1, width // 2, width - 2}:
            p = torch.zeros(1, 1, width)
            p[0, 0, place] = 1e-3
            for u in (0.0, 0.5, ALMOST_ONE):
                with backend(provider):
                    _, token = accept_drafts(torch.zeros(1, 0, dtype=torch.int64), int32(0), p, uniforms=torch.tensor([[u]]))
                assert int(token) == place


@pytest.mark.parametrize("provider", EVERY)
@pytest.mark.parametrize("width", [40, 1100, 2500])
def test_a_refused_certain_draft_wherever_it_lies(provider: str, width: int) -> None:
    """Kernels divide the vocabulary; its word is taken out of one part, once."""
    places = [place for edge in range(0, width, 32) for place in (edge - 1, edge, edge + 1) if 0 <= place < width]
    shares = [0.0, 0.31, 0.62, ALMOST_ONE]
    drafts = torch.tensor(places).repeat_interleave(len(shares))[:, None]
    last = torch.tensor(shares).repeat(len(places))
    p = torch.full((width,), 2.0**-12)
    with backend(provider):
        accepted, token = accept_drafts(
            drafts,
            torch.ones(len(drafts), dtype=torch.int32),
            p.expand(len(drafts), 2, width),
            uniforms=torch.stack([torch.full_like(last, 0.5), last], 1),
        )
    assert not accepted.any()
    rank = (last.double() * (width - 1)).long()  # among the other words, all of one mass
    assert token.tolist() == (rank + (rank >= drafts[:, 0])).tolist()


@pytest.mark.parametrize("provider", EVERY)
def test_a_residual_that_rounding_left_empty(provider: str) -> None:
    """p and q agree but for one word, where p is the smaller by a rounding: the difference has no mass, so p is drawn from."""
    q = [0.25, 0.5, 0.25]
    p = [0.25, 0.5 - 2.0**-25, 0.25]
    assert one(provider, [1], [p, p], [q], [ALMOST_ONE, 0.0]) == (0, 0)
    assert one(provider, [1], [p, p], [q], [ALMOST_ONE, 0.9]) == (0, 2)
    # A certain draft of (nearly) certain p: refused by the last uniform there is, and still the only word there is.
    assert one(provider, [1], [[0.0, ALMOST_ONE, 0.0]] * 2, None, [ALMOST_ONE, 0.3]) == (0, 1)
    # Less than a unit is nothing.
    assert one(provider, [], [[2.0**-61, 0.5, 2.0**-61]], None, [0.0]) == (0, 1)
    assert one(provider, [], [[2.0**-60, 0.5, 0.0]], None, [0.0]) == (0, 0)


@pytest.mark.parametrize("provider", EVERY)
def test_what_is_no_distribution(provider: str) -> None:
    nan, inf = torch.nan, torch.inf
    none = [nan, nan, nan]
    assert one(provider, [], [none], None, [0.5]) == (0, -1)
    assert one(provider, [], [[0.0, 0.0, -1.0]], None, [0.5]) == (0, -1)
    # A comparison with NaN keeps nothing.
    assert one(provider, [1], [none, none], [[0.5, 0.5, 0.0]], [0.0, 0.5]) == (0, -1)
    assert one(provider, [1], [[0.5, 0.5, 0.0]] * 2, [none], [0.0, 0.9]) == (0, 1)
    assert one(provider, [1], [none, none], None, [0.0, 0.5]) == (0, -1)
    # Single entries: NaN counts 0, more than 1 counts 1.
    assert one(provider, [], [[nan, 0.5, 0.5]], None, [0.0]) == (0, 1)
    assert one(provider, [], [[inf, 0.5, 0.5]], None, [0.49]) == (0, 0)
    assert one(provider, [], [[inf, 0.5, 0.5]], None, [0.5]) == (0, 1)
    assert one(provider, [], [[3.0, 1.0, 0.0]], None, [0.5]) == (0, 1)
    # So it does where kernels take many words at once, and words of 2^-40 each are no less certain than others.
    long = [0.0] * 80
    long[3], long[70] = inf, 1.0
    assert one(provider, [], [long], None, [0.49]) == (0, 3)
    assert one(provider, [], [long], None, [0.5]) == (0, 70)
    assert one(provider, [], [[2.0**-40] * 80], None, [0.5]) == (0, 40)
    assert one(provider, [], [[1.5 * 2.0**-31] * 60 + [0.0] * 20], None, [ALMOST_ONE]) == (0, 59)
    # Whatever comes in, what comes out can be used as an index (or is -1).
    with backend(provider):
        _, token = accept_drafts(
            torch.zeros(1, 0, dtype=torch.int64), int32(0), torch.full((1, 1, 50), inf), uniforms=torch.tensor([[0.9]])
        )
    assert -1 <= int(token) < 50


@pytest.mark.parametrize("provider", EVERY)
def test_equal_distributions_keep_every_draft(provider: str) -> None:
    arguments = arguments_of("odd")
    arguments["target"] = torch.cat([arguments["draft_probs"], arguments["target"][:, -1:]], 1)
    arguments["uniforms"][:] = ALMOST_ONE
    assert_same(op_harness.outcome(OP, arguments, provider)["accepted"], arguments["lengths"])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", ["greedy_long", "odd"])
def test_every_promised_element_is_written(provider: str, name: str) -> None:
    arguments = arguments_of(name)
    found = op_harness.outcome(OP, arguments, provider)
    assert bool((found["accepted"] <= arguments["lengths"]).all())
    assert bool((found["token"] < 200).all())


@pytest.mark.parametrize("provider", EVERY)
def test_inputs_are_untouched(provider: str) -> None:
    arguments = arguments_of("odd")
    before = op_harness.copied(arguments)
    with backend(provider):
        REGISTRY[OP](**arguments)
    for key, value in arguments.items():
        assert_same(value, before[key], key)


@pytest.mark.parametrize("name", EXAMPLES)
def test_contract(name: str) -> None:
    op_harness.check_contract(OP, arguments_of(name))


SAMPLED = {
    "drafts": torch.zeros(2, 3, dtype=torch.int64),
    "lengths": torch.full((2,), 3, dtype=torch.int32),
    "target": torch.full((2, 4, 5), 0.2),
    "draft_probs": torch.full((2, 3, 5), 0.2),
    "uniforms": torch.full((2, 4), 0.5),
}
GREEDY = {**SAMPLED, "target": torch.zeros(2, 4, dtype=torch.int64), "draft_probs": None, "uniforms": None}


def _with(base: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    changed = base.clone()
    changed[at] = value
    return changed


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (GREEDY, {"drafts": torch.zeros(2, 3)}, r"drafts must be int64 \[any, any\] \(b, k\).*got float32 \[2, 3\]"),
        (GREEDY, {"lengths": torch.zeros(2, dtype=torch.int64)}, r"lengths must be int32 \[2\] \(b\).*got int64"),
        (GREEDY, {"lengths": int32(1)}, r"lengths must be int32 \[2\].*got int32 \[1\]"),
        (GREEDY, {"target": torch.zeros(2, 3, dtype=torch.int64)}, r"target must be int64 \[2, 4\] \(b, k \+ 1\)"),
        (GREEDY, {"target": torch.zeros(2, 4, dtype=torch.int32)}, r"target must be int64 \[2, 4\].*or float32.*got int32"),
        (GREEDY, {"uniforms": torch.zeros(2, 4)}, "uniforms must be None where target is int64"),
        (GREEDY, {"draft_probs": torch.zeros(2, 3, 5)}, "draft_probs must be None where target is int64"),
        (SAMPLED, {"target": torch.zeros(2, 4, 5).half()}, r"target must be int64 .* or float32 \[2, 4, any\].*got float16"),
        (SAMPLED, {"target": torch.zeros(2, 3, 5)}, r"target must be float32 \[2, 4, any\] \(b, k \+ 1, V\)"),
        (SAMPLED, {"target": torch.zeros(2, 4, 0)}, "target must be over at least one token"),
        (SAMPLED, {"target": torch.zeros(2, 4, 10)[..., ::2]}, "target must be dense in its last axis"),
        (SAMPLED, {"draft_probs": torch.zeros(2, 3, 4)}, r"draft_probs must be float32 \[2, 3, 5\] \(b, k, V\)"),
        (SAMPLED, {"draft_probs": torch.zeros(2, 3, 10)[..., ::2]}, "draft_probs must be dense in its last axis"),
        (SAMPLED, {"uniforms": None}, r"uniforms must be float32 \[2, 4\] where target is float32 \(sampling\), got None"),
        (SAMPLED, {"uniforms": torch.zeros(2, 3)}, r"uniforms must be float32 \[2, 4\]"),
        (SAMPLED, {"uniforms": torch.zeros(2, 4).double()}, r"uniforms must be float32 \[2, 4\].*got float64"),
        (SAMPLED, {"lengths": int32(1, 4)}, r"lengths must be in \[0, 4\), got 4 at 1"),
        (GREEDY, {"lengths": int32(-1, 3)}, r"lengths must be in \[0, 4\), got -1 at 0"),
        (SAMPLED, {"drafts": _with(SAMPLED["drafts"], (1, 2), 5)}, r"drafts must be in \[0, 5\) below lengths, got 5 at 5"),
        (SAMPLED, {"drafts": _with(SAMPLED["drafts"], (1, 0), -1)}, r"drafts must be in \[0, 5\) below lengths, got -1 at 3"),
        (SAMPLED, {"uniforms": _with(SAMPLED["uniforms"], (1, 1), 1)}, r"uniforms must be in \[0, 1\), got 1 at 5"),
        (SAMPLED, {"uniforms": _with(SAMPLED["uniforms"], (0, 3), -0.5)}, r"uniforms must be in \[0, 1\), got -0.5 at 3"),
        (SAMPLED, {"uniforms": _with(SAMPLED["uniforms"], (0, 3), torch.nan)}, r"uniforms must be in \[0, 1\), got nan at 3"),
    ],
)
@pytest.mark.parametrize("provider", op_harness.HOST_CHECKED)
def test_wrong_arguments(base: dict[str, Any], change: dict[str, Any], message: str, provider: str) -> None:
    arguments = base | change
    options = {key: arguments.pop(key) for key in ("draft_probs", "uniforms")}
    with backend(provider), pytest.raises(ArgumentError, match=f"accept_drafts: {message}"):
        accept_drafts(**arguments, **options)


@pytest.mark.parametrize("provider", op_harness.HOST_CHECKED)
def test_the_right_arguments_of_those(provider: str) -> None:
    for base in (GREEDY, SAMPLED):
        with backend(provider):
            accept_drafts(**base)
