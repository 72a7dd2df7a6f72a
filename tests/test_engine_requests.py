"""Requests of an engine that ask for more: lossless generation, a depth of their own, prompts that join over many steps."""

from __future__ import annotations

import functools
from typing import Any

import joint
import pytest
import tiny_exits
import tiny_models
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import dyndepth
from dyndepth.engine import Engine, Filled, Immediate, Request
from dyndepth.errors import ArgumentError
from dyndepth.exits import Always, Exits, FixedDepth

RULES = {"immediate": Immediate(), "pairs": Filled(2, passes=5), "never": Filled(99, passes=99)}
ENDS = (2, 30, 149)


@functools.cache
def _exits(way: str = "two") -> Exits:
    model = tiny_models.shared("llama")
    if way == "always":
        return tiny_exits.exits_of(model, tiny_exits.band(model, 5, 6, Always(), head="norm"))
    return tiny_exits.exits_of(model, tiny_exits.band(model, 2, 6), tiny_exits.band(model, 4, 6, head="norm"))


def _prompt(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, 20, (1,), generator=generator))
    return torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator)


@functools.cache
def _full(seed: int, new: int, **options: Any) -> list[int]:
    """transformers' own tokens for one request."""
    prompt = _prompt(seed)[None]
    settings_ = {"do_sample": False, "eos_token_id": list(ENDS), "max_new_tokens": new}
    return tiny_models.shared("llama").generate(prompt, **settings_)[0, prompt.shape[1] :].tolist()


@functools.cache
def _dynamic(seed: int, new: int, way: str = "two", depth: int | None = None) -> list[int]:
    prompt = _prompt(seed)[None]
    out = tiny_models.shared("llama").generate(
        prompt, custom_generate=dyndepth.generate, exits=_exits(way), kv="recompute", pending=3, max_new_tokens=new,
        depth=depth, do_sample=False, eos_token_id=list(ENDS),
    )  # fmt: skip
    return out[0, prompt.shape[1] :].tolist()


def _request(seed: int, new: int, mode: str = "lossless", **options: Any) -> Request:
    return Request(_prompt(seed), max_new_tokens=new, ends=ENDS, mode=mode, **options)


def _engine(way: str = "two", **options: Any) -> Engine:
    settings_ = {"slots": 4, "longest": 64, "page_size": 4, "pending": 3, "kv": "recompute"} | options
    return Engine(tiny_models.shared("llama"), settings_.pop("exits", _exits(way)), **settings_)


# -- lossless ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [1, 4, 30])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("way", ["two", "always"])
def test_greedy_requests_get_the_full_models_tokens(way: str, name: str, drafts: int) -> None:
    """Beside requests whose early tokens are final, in one engine."""
    engine = _engine(way, rule=RULES[name])
    asked = [(seed, 5 + seed % 9) for seed in range(12)]
    requests = [engine.add_request(_request(*each, "lossless" if each[0] % 3 else "dynamic", drafts=drafts)) for each in asked]
    seen: dict[int, list[int]] = {request.number: [] for request in requests}
    for event in engine.stream():
        seen[event.request.number].append(event.token)
        assert event.last == event.request.done or event.request.state == "finished"
    for request, (seed, new) in zip(requests, asked, strict=True):
        assert request.tokens == (_full(seed, new) if request.lossless else _dynamic(seed, new, way))
        assert seen[request.number] == request.tokens
        drafted = [depth for depth in request.exit_layers if depth < 6]
        assert request.accepted == (len(drafted) if request.lossless else 0)
    lossless = [request for request in requests if request.lossless]
    assert sum(request.drafted for request in lossless) > sum(request.accepted for request in lossless) > 0
    assert engine.session.pages.free == engine.session.pages.total
    assert not len(engine._parked)


def test_rows_of_different_sequences_draft_and_verify_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine("always")
    seen: list[set[bool]] = []
    made = engine._made

    def noting(request: Request, depth: int, *args: Any) -> Any:
        seen[-1].add(depth < 6)
        return made(request, depth, *args)

    monkeypatch.setattr(engine, "_made", noting)
    for seed, drafts in ((1, 1), (2, 3), (3, 4)):
        engine.add_request(_request(seed, 20, drafts=drafts))
    while engine.busy:
        seen.append(set())
        engine.step()
    assert sum(each == {True, False} for each in seen) > 5


def test_no_row_runs_a_layer_twice() -> None:
    """By hooks: every token's row runs every layer once; beyond that only rows of rejected drafts do, once each."""
    model = tiny_models.tiny("llama")
    ran = [0] * 6
    for number, layer in enumerate(model.model.layers):

        def count(module: Any, args: Any, output: Any, number: int = number) -> None:
            ran[number] += output.shape[0]

        layer.mlp.down_proj.register_forward_hook(count)
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 2, 6), tiny_exits.band(model, 4, 6, head="norm"))
    engine = Engine(model, exits, kv="recompute", slots=3, longest=64)
    requests = [engine.add_request(Request(_prompt(seed), max_new_tokens=12, mode="lossless")) for seed in range(5)]
    list(engine.stream())
    prompts = sum(len(request.prompt) - 1 for request in requests)
    assert [layers - prompts for layers in ran] == engine.work.layers
    rejected = sum(request.drafted - request.accepted for request in requests)
    assert engine.work.rows == 5 * 12
    assert all(engine.work.rows <= layers <= engine.work.rows + rejected for layers in engine.work.layers)


@pytest.mark.parametrize("name", ["immediate", "pairs"])
def test_preemption_forgets_drafts_and_changes_no_token(name: str) -> None:
    """Pages for about two requests: others are put back with drafts under way."""
    engine = _engine("always", rule=RULES[name], pages=40, longest=40, page_size=1)
    drop, lost = engine._drop, []
    engine._drop = lambda request: lost.append(len(request.unverified)) or drop(request)  # type: ignore[method-assign,func-returns-value]
    requests = [engine.add_request(_request(seed, 20, drafts=6)) for seed in range(5)]
    list(engine.stream())
    assert [request.tokens for request in requests] == [_full(seed, 20) for seed in range(5)]
    assert engine.counts.preempted > 0
    assert max(lost) > 1, "drafts must be under way for this to test anything"
    assert engine.session.pages.free == engine.session.pages.total


@pytest.mark.parametrize("new", [1, 2, 4])
def test_nothing_is_drafted_past_the_end(new: int) -> None:
    """The last token is the full model's to say."""
    engine = _engine("always", longest=20 + new)
    request = engine.add_request(Request(torch.arange(3, 23), max_new_tokens=new, mode="lossless", drafts=30))
    list(engine.stream())
    assert len(request.tokens) == new
    assert engine.work.layers[0] <= sum(range(1, new + 1))
    assert request.drafted <= sum(range(new))
    assert (request.drafted == 0) == (new == 1)


def test_processors_see_the_prefix_of_each_draft() -> None:
    from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    prompt = _prompt(4)
    wanted = tiny_models.shared("llama").generate(
        prompt[None], max_new_tokens=16, do_sample=False, repetition_penalty=1.6, no_repeat_ngram_size=2
    )
    plugs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.6), NoRepeatNGramLogitsProcessor(2)])
    engine = _engine("always")
    request = engine.add_request(Request(prompt, max_new_tokens=16, ends=2, processors=plugs, mode="lossless"))
    engine.add_request(_request(5, 9))
    list(engine.stream())
    assert request.tokens == wanted[0, len(prompt) :].tolist()
    assert request.drafted > 5


def test_sampled_requests_have_the_full_models_distribution() -> None:
    from transformers import TemperatureLogitsWarper

    model = tiny_models.tiny("llama", vocab_size=joint.SMALL)
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 4, 6, Always(), head="norm"))
    prompt, warp = torch.tensor([3, 5, 4]), {"temperature": 1.2}
    engine = Engine(model, exits, kv="recompute", slots=128, longest=8)
    requests = [
        engine.add_request(
            Request(
                prompt, max_new_tokens=2, processors=TemperatureLogitsWarper(1.2), sample=True, seed=seed, mode="lossless",
                drafts=2,
            )
        )
        for seed in range(3000)
    ]  # fmt: skip
    list(engine.stream())
    assert sum(request.drafted for request in requests) == 3000
    joint.check(
        joint.counted(torch.tensor([request.tokens for request in requests])), joint.joint(model, prompt[None], warp, 2)
    )


# -- a depth of its own, and long prompts -------------------------------------------------------------------------------------


def test_requests_may_name_their_depth() -> None:
    model = tiny_models.shared("llama")
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 2, 6, FixedDepth()), tiny_exits.band(model, 4, 6, head="norm"))
    engine = _engine(exits=exits, kv="propagate", slots=2)
    asked = [2, None, 4, 6, None, 2]
    requests = [engine.add_request(_request(seed, 9, "dynamic", depth=depth)) for seed, depth in enumerate(asked)]
    list(engine.stream())
    for seed, (request, depth) in enumerate(zip(requests, asked, strict=True)):
        wanted = model.generate(
            _prompt(seed)[None], custom_generate=dyndepth.generate, exits=exits, kv="propagate", depth=depth, max_new_tokens=9,
            do_sample=False, eos_token_id=list(ENDS),
        )  # fmt: skip
        assert request.tokens == wanted[0, len(_prompt(seed)) :].tolist()
        if depth is not None:
            assert set(request.exit_layers) == {depth}
    assert {4, 6} <= {layer for request in requests if request.depth is None for layer in request.exit_layers}


@pytest.mark.parametrize("chunk", [1, 5])
def test_a_long_prompt_does_not_stall_the_others(chunk: int) -> None:
    """At most `chunk` prompt rows run per step, and requests that are there get a token in every step meanwhile."""
    engine = _engine(kv="predict", chunk=chunk, longest=100)
    early = engine.add_request(Request(_prompt(3), max_new_tokens=60))
    while not early.tokens:
        engine.step()
    prompt = torch.randint(3, tiny_models.VOCABULARY, (40,), generator=torch.Generator().manual_seed(1))
    late = engine.add_request(Request(prompt, max_new_tokens=4))
    steps, rows = 0, engine.prompt_work.rows
    while not late.tokens:
        before = len(early.tokens)
        engine.step()
        assert engine.prompt_work.rows - rows <= chunk
        assert len(early.tokens) == before + 1
        rows, steps = engine.prompt_work.rows, steps + 1
    assert steps == -(-39 // chunk)
    list(engine.stream())
    alone = _engine(kv="predict", longest=100)
    same = alone.add_request(Request(prompt, max_new_tokens=4))
    list(alone.stream())
    assert late.tokens == same.tokens


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="mode='lossless' works with kv='recompute' only, got kv='predict'"):
        _engine(kv="predict").add_request(_request(1, 4))
    with pytest.raises(ArgumentError, match="mode must be one of dynamic, lossless, got 'exact'"):
        _request(1, 4, "exact")
    with pytest.raises(ArgumentError, match="drafts must be at least 1, got 0"):
        _request(1, 4, drafts=0)
    with pytest.raises(ArgumentError, match=r"depth must name an exit point or the top, one of \[2, 4, 6\], got 3"):
        _engine().add_request(_request(1, 4, depth=3))


# -- schedules ----------------------------------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Lossless and other requests arrive and are cancelled, under any rule, with few pages and prompts in pieces."""

    @initialize(
        way=st.sampled_from(["two", "always"]),
        name=st.sampled_from(sorted(RULES)),
        slots=st.integers(1, 5),
        pages=st.sampled_from([12, 20, 60]),
        wait=st.integers(1, 9),
        chunk=st.sampled_from([1, 6, 512]),
    )
    def begin(self, way: str, name: str, slots: int, pages: int, wait: int, chunk: int) -> None:
        self.way = way
        self.engine = _engine(way, rule=RULES[name], slots=slots, pages=pages, longest=40, longest_wait=wait, chunk=chunk)
        self.asked: list[tuple[Request, int, int]] = []
        self.seen: dict[int, list[int]] = {}

    @rule(seed=st.integers(0, 9), new=st.integers(1, 15), drafts=st.integers(0, 5))
    def arrive(self, seed: int, new: int, drafts: int) -> None:
        request = self.engine.add_request(_request(seed, new, "lossless" if drafts else "dynamic", drafts=max(drafts, 1)))
        self.asked.append((request, seed, new))
        self.seen[request.number] = []

    @rule(which=st.integers(0, 30))
    def cancel(self, which: int) -> None:
        if self.asked:
            self.engine.cancel(self.asked[which % len(self.asked)][0])

    @rule(times=st.integers(1, 8))
    def step(self, times: int) -> None:
        for _ in range(times):
            for event in self.engine.step():
                self.seen[event.request.number].append(event.token)

    @invariant()
    def nothing_leaks(self) -> None:
        if not hasattr(self, "engine"):
            return
        pages, running = self.engine.session.pages, self.engine._running
        assert pages.free + sum(len(owned) for owned in pages._owned) == pages.total
        assert all(not owned for slot, owned in enumerate(pages._owned) if slot not in running)
        assert set(self.engine._parked.seq.tolist()) <= set(running)
        for request in running.values():
            if request.lossless:  # what waits are its drafts' rows, and its newest row where that is held
                mine = int((self.engine._parked.seq == request.slot).sum())
                assert mine == len(request.unverified) + bool(request.waits_at)
                assert len(request.unverified) <= request.drafts
                assert pages.length(request.slot) <= request.position + 1, "pages of rejected drafts go back"

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for event in self.engine.stream():
            self.seen[event.request.number].append(event.token)
        for request, seed, new in self.asked:
            tokens = _full(seed, new) if request.lossless else _dynamic(seed, new, self.way)
            assert request.done
            assert request.tokens == self.seen[request.number]
            assert tokens[: len(request.tokens)] == request.tokens
            if request.state == "finished":
                assert len(request.tokens) == len(tokens)
        assert self.engine.session.pages.free == self.engine.session.pages.total


TestSchedules = Machine.TestCase
TestSchedules.settings = settings(
    max_examples=40, stateful_step_count=18, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
