"""Predicted steps: against numbers worked out by hand, against simulation, against each other."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndepth.errors import ArgumentError
from dyndepth.plan import (
    HEADS,
    POLICIES,
    Exit,
    Machine,
    Shape,
    Step,
    advise,
    art,
    best_flush,
    curve,
    flushed,
    full_depth,
    predict,
    rebatch,
)
from dyndepth.plan.rates import occupancy
from dyndepth.plan.times import Times

#: A weight takes 1 us to read and 0.25 us a row to compute, so four rows are free; a number of K or V takes 1 us; a copy 2 us.
TOY = Machine("toy", "bfloat16", bandwidth=2e6, flops=8e6)
#: A layer takes 1 ms, the head 2 ms, K,V of a token and layer 10 us.
SMALL = Shape("small", layers=4, width=100, layer=1000, products=1, kv=10, head=2000, ready=100, vocab=20)
#: Llama-3-8B on an H100 as its reports measure one: 3.0 TB/s, 0.8 PFLOP/s, 20 us for every boundary.
H100 = Machine("h100", "bfloat16", bandwidth=3.0e12, flops=0.8e15, sync_s=20e-6)
LLAMA = Shape("8b", 32, 4096, 218_100_000, 7, 2048, 128256 * 4096, 4096, 128256)


def exits_strategy(layers: int = 6) -> st.SearchStrategy[list[Exit]]:
    """Early exits and bands that resume, at most one per boundary."""

    def build(parts: list[tuple[int, int, float]]) -> list[Exit]:
        return [Exit(leave, min(layers, leave + more), rate) for leave, more, rate in parts]

    one = st.tuples(st.integers(1, layers - 1), st.integers(1, layers), st.floats(0, 1))
    return st.lists(one, max_size=4, unique_by=lambda part: part[0]).map(build)


SIX = dataclasses.replace(SMALL, layers=6)


def work_of(step: Step) -> float:
    return step.layers + step.reads + step.head


def test_no_exit_by_hand() -> None:
    """4 rows wait for weights: 4 layers of 1 ms, 4 rows x 4 layers x 5 tokens of 10 us, head 2 ms. 8 rows for compute."""
    assert full_depth(TOY, SMALL, 4, 5) == Step(pytest.approx(4e-3), pytest.approx(0.8e-3), pytest.approx(2e-3))
    assert full_depth(TOY, SMALL, 8, 0).seconds == pytest.approx((4 * 2 + 4) * 1e-3)


@pytest.mark.parametrize(
    ("policy", "heads", "wanted"),
    [
        # Two rows, exit at 2, each leaves with 1/2. Somebody is left in 3/4 of the steps: layers 2 + 2 * 3/4 = 3.5.
        # Reads: 2 layers x 2 rows, and 2 x 1 above, of 50 us each. Judging is a head. In half of the steps one leaves and
        # one stays: 400 numbers move. A row left in 3/4 of the steps, and then 2000 weights of back-fill are read.
        ("compaction", "A", (3.5, 0.3, 1.5, 2.0, 0.4, 1.5)),
        ("compaction", "B", (3.5, 0.3, 2.0, 0.0, 0.4, 1.5)),
        ("compaction", "C", (3.5, 0.3, 1.5, 2.0, 0.4, 1.5)),  # its shortlist is the whole vocabulary of 20 words
        # The batch goes on with both rows in 3/4 of the steps; back-fill only when both are out.
        ("all-out", "A", (3.5, 0.35, 1.5, 2.0, 0.0, 0.5)),
        ("all-out", "B", (3.5, 0.35, 2.0, 0.0, 0.0, 0.5)),
    ],
)
def test_one_exit_by_hand(policy: str, heads: str, wanted: tuple[float, ...]) -> None:
    step = predict(TOY, SMALL, [Exit(2, 4, 0.5)], 2, 5, policy, heads)
    assert [value * 1e3 for value in dataclasses.astuple(step)] == pytest.approx(wanted)
    assert step.seconds == pytest.approx(sum(wanted) / 1e3)


def test_what_judging_reads() -> None:
    """B reads the exit's head and its words, or neither; A the head and all words; C the shortlist, one of its own if none."""
    plain, short = Exit(2, 4, 0.5, head=300), Exit(2, 4, 0.5, head=300, words=7)
    times = Times(TOY, SMALL)
    assert times.judge(plain, "B", 1) == 0
    assert times.judge(short, "B", 1) == times.judge(short, "C", 1) == pytest.approx((300 + 700) * 1e-6)
    assert times.judge(short, "A", 1) == pytest.approx((300 + 2000) * 1e-6)
    assert times.judge(Exit(2, 3, 0.5, words=7), "A", 1) == 0  # below the top there is no head to read
    # A head that judging did not run is run for rows that leave.
    assert times.leave(plain, "B", 1) - times.leave(short, "B", 1) == pytest.approx(300e-6)
    jump, identity = Exit(2, 3, 0.5, head=300), Exit(2, 3, 0.5)
    assert times.leave(jump, "A", 1) - times.leave(identity, "A", 1) == pytest.approx(300e-6)
    waits = Times(dataclasses.replace(TOY, sync_s=1.0, op_s=0.01), SMALL)
    assert waits.judge(plain, "B", 1) == pytest.approx(1.05)


@pytest.mark.parametrize(
    ("rows", "context", "p", "all_out", "compaction"),
    [
        (1, 512, 0.5, 1.23, 1.23),
        (1, 512, 0.8, 1.52, 1.52),
        (8, 512, 0.5, 0.94, 0.94),
        (8, 512, 0.8, 1.02, 1.03),
        (32, 2048, 0.5, 0.96, 1.05),
        (32, 2048, 0.8, 0.96, 1.11),
        (64, 2048, 0.8, 0.97, 1.22),
        (32, 8192, 0.8, 0.98, 1.34),
        (256, 512, 0.8, 0.97, 1.21),
    ],
)
def test_speed_ups_of_an_8b_model(rows: int, context: int, p: float, all_out: float, compaction: float) -> None:
    """Another program's figures for an exit at 16 of 32 and a full head; it leaves back-fill and moves out."""
    full = full_depth(H100, LLAMA, rows, context).seconds
    found = [full / predict(H100, LLAMA, [Exit(16, 32, p)], rows, context, policy, "A").seconds for policy in POLICIES]
    assert found == pytest.approx([all_out, compaction], abs=0.021)


@pytest.mark.parametrize(
    ("leave", "p", "speed_ups"),
    [
        (8, 0.5, (1.04, 1.10, 1.15)),
        (8, 0.9, (1.69, 1.73, 1.98)),
        (16, 0.7, (1.03, 1.07, 1.12)),
        (16, 0.8, (1.10, 1.14, 1.22)),
        (20, 0.9, (1.12, 1.15, 1.22)),
    ],
)
def test_rebatching_an_8b_model(leave: int, p: float, speed_ups: tuple[float, ...]) -> None:
    """The same program's best k, heads A, B and C (4096 words)."""
    full = full_depth(H100, LLAMA, 16, 0).seconds
    for heads, wanted in zip(HEADS, speed_ups, strict=True):
        one = Exit(leave, 32, p, words=4096 if heads == "C" else 0)
        assert full / rebatch(H100, LLAMA, one, 16, 0, heads).seconds == pytest.approx(wanted, abs=0.021)


@pytest.mark.parametrize(("p", "k", "wanted"), [(0.5, 1, 10 / 12), (0.5, 2, 15 / 18), (1.0, 3, 30 / 24), (0.0, 5, 10 / 36)])
def test_flushed_by_hand(p: float, k: int, wanted: float) -> None:
    """Full depth 10, shallow 6, deep 6: a cycle gives 1 + p + ... tokens a row for 6 k + 6."""
    assert flushed(p, k, 10, 6, 6) == pytest.approx(wanted)


def test_best_flush_and_art() -> None:
    k, best = best_flush(0.8, 10, 6, 6)
    assert best == max(flushed(0.8, n, 10, 6, 6) for n in range(1, 65)) == flushed(0.8, k, 10, 6, 6)
    assert art(10, 6, 6) == pytest.approx(1 / 3)
    # With deep batches always full a row costs t_shallow + (1 - p) t_deep: even with full depth exactly at ART's share.
    assert 6 + (1 - art(10, 6, 6)) * 6 == pytest.approx(10)


@pytest.mark.parametrize("p", [0.3, 0.8])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_flushed_is_what_a_pool_does(p: float, k: int) -> None:
    """A pool of rows that flip a coin at the exit in every shallow pass; times do not depend on the rows."""
    rng, rows, tokens, cycles = np.random.default_rng(5), 40, 0, 400
    for _ in range(cycles):
        started = rows
        for _ in range(k):
            left = rng.binomial(started, p)
            tokens, started = tokens + left, left
        tokens += rows - started  # those that waited run the deep pass
    speed = tokens / rows / (cycles * (k * 6 + 6)) * 10
    assert flushed(p, k, 10, 6, 6) == pytest.approx(speed, rel=0.02)


@pytest.mark.parametrize("heads", HEADS)
def test_rebatching_is_what_a_pool_does(heads: str) -> None:
    """The same with times by row count, few rows, and everything that costs."""
    machine = dataclasses.replace(TOY, op_s=2e-5, sync_s=1e-4)
    one, rows, k, context = Exit(1, 4, 0.6, head=200, words=3), 6, 3, 5
    times, rng = Times(machine, SMALL), np.random.default_rng(2)
    tokens, seconds, cycles = 0, 0.0, 1500
    for _ in range(cycles):
        started = rows
        for number in range(1, k + 1):
            left = int(rng.binomial(started, one.rate))
            seconds += times.layer(started) + times.reads(started * 5) + times.judge(one, heads, started)
            seconds += times.leave(one, heads, left) + (times.partition(rows) if 0 < left < started else 0.0)
            if heads == "B" and number < k:
                seconds += times.head(left)
            tokens, started = tokens + left, left
        deep = rows - started
        seconds += 3 * times.layer(deep) + times.reads(3 * deep * 5)
        seconds += times.head(deep + started) if heads == "B" else times.head(deep)
        tokens += deep
    found = rebatch(machine, SMALL, one, rows, context, heads, passes=k)
    assert found.passes == k
    assert found.seconds == pytest.approx(seconds / tokens * rows, rel=0.015)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_is_what_rows_do(policy: str, heads: str) -> None:
    """Rows that flip coins at two early exits and a band that resumes, counted one by one."""
    machine = dataclasses.replace(TOY, op_s=2e-5, sync_s=1e-4)
    exits, rows, rng = [Exit(1, 3, 0.4), Exit(2, 6, 0.3, words=5), Exit(4, 6, 0.6, head=200)], 5, np.random.default_rng(9)
    draws = 1500
    seconds = np.mean([_sampled(Times(machine, SIX), exits, rows, 7, policy, heads, rng) for _ in range(draws)])
    assert predict(machine, SIX, exits, rows, 7, policy, heads).seconds == pytest.approx(seconds, rel=0.012)


def _sampled(
    times: Times, exits: Sequence[Exit], rows: int, context: int, policy: str, heads: str, rng: np.random.Generator
) -> float:
    resume, seconds = np.zeros(rows, dtype=int), 0.0
    for layer in range(SIX.layers):
        for one in (one for one in exits if one.leave == layer):
            live = resume <= layer
            goes = live & (rng.random(rows) < one.rate)
            resume[goes] = one.resume
            count, left = int(live.sum()), int(goes.sum())
            if policy == "compaction":
                seconds += times.judge(one, heads, count) + times.leave(one, heads, left)
                seconds += times.partition(rows) if 0 < left < count else 0.0
            elif count:
                seconds += times.judge(one, heads, rows) + (times.leave(one, heads, rows) if left == count else 0.0)
        here = int((resume <= layer).sum())
        here = rows if policy == "all-out" and here else here
        seconds += times.layer(here) + times.reads(here * context)
    deep = int((resume < SIX.layers).sum())
    return seconds + times.head(rows if heads == "B" or (policy == "all-out" and deep) else deep)


@settings(max_examples=60, deadline=None)
@given(exits_strategy(), st.integers(1, 12), st.integers(0, 50), st.sampled_from(HEADS), st.integers(1, 5), st.floats(0, 1))
def test_more_exits_never_slower(exits: list[Exit], rows: int, context: int, heads: str, leave: int, rate: float) -> None:
    """Under compaction, where judging and moving are free: an exit more, or a higher rate, leaves no more to do."""
    before = predict(TOY, SIX, exits, rows, context, "compaction", heads)
    for one in exits:
        if one.resume == 6:  # a band that resumes hands rows to exits above it, which may be fewer for it
            freer = [other if other is not one else dataclasses.replace(one, rate=max(one.rate, rate)) for other in exits]
            assert work_of(predict(TOY, SIX, freer, rows, context, "compaction", heads)) <= work_of(before) * (1 + 1e-9)
    early = [one for one in exits if one.resume == 6]
    if all(one.leave != leave for one in early):
        more = work_of(predict(TOY, SIX, [*early, Exit(leave, 6, rate)], rows, context, "compaction", heads))
        assert more <= work_of(predict(TOY, SIX, early, rows, context, "compaction", heads)) * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(exits_strategy(), st.integers(1, 12), st.integers(0, 50), st.sampled_from(HEADS))
def test_policies_agree_where_they_must(exits: list[Exit], rows: int, context: int, heads: str) -> None:
    """One row: all-out is compaction. Any: compaction runs no layer on more rows. Re-batching with k = 1 is compaction."""
    machine = dataclasses.replace(TOY, op_s=1e-5, sync_s=1e-4)
    alone = [predict(machine, SIX, exits, 1, context, policy, heads).seconds for policy in POLICIES]
    assert alone[0] == pytest.approx(alone[1])
    all_out, compaction = (predict(machine, SIX, exits, rows, context, policy, heads) for policy in POLICIES)
    assert compaction.layers <= all_out.layers * (1 + 1e-9)
    assert compaction.reads <= all_out.reads * (1 + 1e-9)
    for one in (one for one in exits if one.resume == 6):
        single = predict(machine, SIX, [one], rows, context, "compaction", heads).seconds
        assert rebatch(machine, SIX, one, rows, context, heads, passes=1).seconds == pytest.approx(single)
        assert rebatch(machine, SIX, one, rows, context, heads).seconds <= single * (1 + 1e-9)


def test_nothing_takes_no_time() -> None:
    times = Times(dataclasses.replace(TOY, op_s=1.0, sync_s=1.0), SMALL)
    one = Exit(2, 4, 0.5, head=10, words=3)
    assert times.layer(0) == times.head(0) == times.reads(0) == times.partition(0) == 0
    assert all(times.judge(one, heads, 0) == times.leave(one, heads, 0) == 0 for heads in HEADS)
    gone = predict(TOY, SMALL, [Exit(1, 4, 1.0)], 8, 100)
    assert gone.layers == pytest.approx(TOY.product(1000, 8))
    assert full_depth(TOY, SMALL, 4, 0).reads == 0


def test_occupancy_by_hand() -> None:
    """At 1 half of the rows skip [1, 3); at 2 half of the others leave for good; at 3 three quarters are back or there."""
    present, live = occupancy([Exit(1, 3, 0.5), Exit(2, 4, 0.5)], 4)
    assert present == pytest.approx([1, 0.5, 0.25, 0.75])
    assert live == pytest.approx([1, 0.5])


@pytest.mark.parametrize("rows", [4, 16, 64])
def test_dont_on_middle_batches(rows: int) -> None:
    """Weights are read as long as one row is left; the honest baseline wins, and the reason says by how much."""
    found = advise(H100, LLAMA, curve(32), rows, 256)
    assert found.choice is None
    assert re.search(r"\d\d% of a step goes to reading weights.* some row is left in (99|100)% of the steps", found.reason)
    fastest = min((o for o in found.options if o.policy in POLICIES and o.heads in "AB"), key=lambda option: option.seconds)
    assert found.gain(fastest) < 0.02
    change = fastest.seconds / found.full.seconds - 1
    assert (f"takes {change:.1%} longer" if change > 0 else f"saves {-change:.1%}, less than the margin of 2%") in found.reason


def test_advice_where_it_pays() -> None:
    """Alone, with long contexts, or bound by compute; the exit points found are the best of all sets."""
    exits = [Exit(12, 32, 0.5), Exit(20, 32, 0.6)]
    for rows, context in ((1, 256), (64, 16384), (1024, 0)):
        found = advise(H100, LLAMA, exits, rows, context)
        assert found.choice is not None, (rows, context)
        assert found.choice.policy == "compaction"
        assert found.reason == f"{found.choice.label} gains {found.gain(found.choice):.1%}"
        # By hand: 20 alone keeps what would have left at 12, 1 - 0.5 * 0.4.
        sets = [exits, exits[:1], [Exit(20, 32, 0.8)]]
        each = [predict(H100, LLAMA, some, rows, context, "compaction", heads).seconds for some in sets for heads in "AB"]
        assert found.choice.seconds == pytest.approx(min(each))
    assert {(option.policy, option.heads) for option in found.options} == {
        (policy, heads) for policy in (*POLICIES, "re-batching") for heads in HEADS
    }


def test_shortlist_tokens_are_a_choice() -> None:
    """C wins where it may."""
    exits = [Exit(16, 32, 0.5, words=64)]
    assert advise(H100, LLAMA, exits, 1, 256).choice.heads != "C"  # type: ignore[union-attr]
    found = advise(H100, LLAMA, exits, 1, 256, heads=("A", "B", "C"))
    assert found.choice == found.best("compaction") == found.best("compaction", "AC")
    assert found.choice is not None
    assert (found.choice.heads, found.best("compaction", "A").heads, found.best("re-batched")) == ("C", "A", None)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: full_depth(TOY, SMALL, 0, 5), "plan: wanted at least one row and a context of at least 0, got 0, 5"),
        (lambda: predict(TOY, SMALL, [], 1, -1), "plan: wanted at least one row and a context of at least 0, got 1, -1"),
        (lambda: predict(TOY, SMALL, [], 1, 1, "some"), "plan: policy must be one of all-out, compaction, got 'some'"),
        (lambda: predict(TOY, SMALL, [], 1, 1, "all-out", "D"), "plan: heads must be one of A, B, C, got 'D'"),
        (lambda: rebatch(TOY, SMALL, Exit(2, 4, 0.5), 1, 1, "D"), "plan: heads must be one of A, B, C, got 'D'"),
        (lambda: rebatch(TOY, SMALL, Exit(2, 3, 0.5), 1, 1), r"re-batching: wanted an early exit, got band \[2, 3\)"),
        (lambda: flushed(1.5, 1, 1, 1, 1), r"flushed: wanted a share in \[0, 1\] and k >= 1, got 1.5, 1"),
        (lambda: advise(TOY, SMALL, [], 1, 1), "plan: there are no exits to judge"),
        (lambda: advise(TOY, SMALL, [Exit(2, 4, 0.5)], 1, 1, heads="AD"), "plan: heads must be some of A, B, C, got A, D"),
        (lambda: advise(TOY, SMALL, [Exit(2, 4, 0.5)], 1, 1, heads=()), "plan: heads must be some of A, B, C, got none"),
        (lambda: advise(TOY, SMALL, [Exit(2, 4, 0.5)], 1, 1, margin=1), r"plan: margin must be in \[0, 1\), got 1"),
    ],
)
def test_errors(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError, match=message):
        call()
