"""The engine: a request's tokens are those it would get alone, whatever waits, joins, is cancelled or runs out of pages."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import dyndepth
from dyndepth.engine import Engine, Filled, Immediate, Moment, Request, Waiting
from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits, Patience, Saturation

KV = ["predict", "propagate", "copy", "recompute", "release"]
RULES = {"immediate": Immediate(), "pairs": Filled(2, passes=5), "late": Filled(99, passes=3), "never": Filled(99, passes=99)}
ENDS = (2, 30, 149)


@functools.cache
def _exits(kind: str = "router") -> Exits:
    model = tiny_models.shared("llama")
    options: dict[str, Any] = {}
    if kind == "patience":
        options = {"criterion": Patience(), "threshold": 1.0}
    elif kind == "saturation":
        options = {"criterion": Saturation(), "threshold": 0.8}
    points = (2, 4, 5) if kind != "router" else (2, 4)
    return tiny_exits.exits_of(model, *(tiny_exits.band(model, point, 6, **options) for point in points))


@functools.cache
def _alone(prompt: tuple[int, ...], new: int, kv: str, kind: str = "router", pending: int = 3) -> tuple[list[int], list[int]]:
    """Tokens and exit layers of dyndepth.generate for one request by itself."""
    out = tiny_models.shared("llama").generate(
        torch.tensor([prompt]), custom_generate=dyndepth.generate, exits=_exits(kind), kv=kv, pending=pending,
        max_new_tokens=new, do_sample=False, eos_token_id=list(ENDS), return_dict_in_generate=True,
    )  # fmt: skip
    count = int((out.exit_layers[0] >= 0).sum())
    return out.sequences[0, len(prompt) :][:count].tolist(), out.exit_layers[0, :count].tolist()


def _prompt(seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, 20, (1,), generator=generator))
    return tuple(torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator).tolist())


def _request(seed: int, new: int) -> Request:
    return Request(torch.tensor(_prompt(seed)), max_new_tokens=new, ends=ENDS)


def _engine(**options: Any) -> Engine:
    settings_ = {"slots": 4, "longest": 64, "page_size": 4, "pending": 3} | options
    return Engine(tiny_models.shared("llama"), settings_.pop("exits", _exits()), **settings_)


def _check(request: Request, seed: int, new: int, kv: str, kind: str = "router") -> None:
    tokens, exits = _alone(_prompt(seed), new, kv, kind)
    assert request.state == "finished"
    assert request.tokens == tokens
    assert request.exit_layers == exits


# -- tokens ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kv", "name"), [(kv, name) for kv in KV for name in RULES if kv != "release" or name == "immediate"])
def test_tokens_are_those_of_generate(kv: str, name: str) -> None:
    engine = _engine(kv=kv, rule=RULES[name])
    asked = [(seed, 5 + seed % 9) for seed in range(11)]
    requests = [engine.add_request(_request(*each)) for each in asked]
    seen: dict[int, list[int]] = {request.number: [] for request in requests}
    for event in engine.stream():
        seen[event.request.number].append(event.token)
        assert event.last == event.request.done
    for request, (seed, new) in zip(requests, asked, strict=True):
        _check(request, seed, new, kv)
        assert seen[request.number] == request.tokens
    assert {2, 4, 6} <= {depth for request in requests for depth in request.exit_layers}
    assert engine.session.pages.available == engine.session.pages.limit
    assert not len(engine._parked)
    if name == "immediate":
        assert not engine.counts.flushed
    else:
        assert sum(engine.counts.flushed.values()) > 5
        assert engine.counts.longest_wait <= 32


@pytest.mark.parametrize("kind", ["patience", "saturation"])
@pytest.mark.parametrize("name", RULES)
def test_what_criteria_carry_waits_with_the_row(kind: str, name: str) -> None:
    engine = _engine(exits=_exits(kind), kv="predict", rule=RULES[name])
    requests = [engine.add_request(_request(seed, 9)) for seed in range(6)]
    list(engine.stream())
    for seed, request in enumerate(requests):
        _check(request, seed, 9, "predict", kind)
    assert len({depth for request in requests for depth in request.exit_layers}) > 1


@pytest.mark.parametrize("name", ["immediate", "pairs"])
@pytest.mark.parametrize("kv", KV)
def test_preemption_changes_no_token(kv: str, name: str) -> None:
    """Pages for about two requests: others are put back, run again, and go on where they were."""
    if kv == "release":
        name = "immediate"
    engine = _engine(kv=kv, rule=RULES[name], pages=14, longest=40)
    asked = [(seed, 20) for seed in range(5)]
    requests = [engine.add_request(_request(*each)) for each in asked]
    list(engine.stream())
    for request, (seed, new) in zip(requests, asked, strict=True):
        _check(request, seed, new, kv)
    assert engine.counts.preempted > 0
    assert engine.repeated.rows > 0
    assert engine.session.pages.free == engine.session.pages.total


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_one_at_a_time_and_pages_of_any_size(page_size: int) -> None:
    engine = _engine(kv="recompute", rule=Filled(3), slots=1, page_size=page_size, chunk=2)
    requests = [engine.add_request(_request(seed, 8)) for seed in range(4)]
    list(engine.stream())
    for seed, request in enumerate(requests):
        _check(request, seed, 8, "recompute")


def test_full_depth_is_transformers() -> None:
    engine = Engine(tiny_models.shared("llama"), slots=3, longest=64)
    requests = [engine.add_request(_request(seed, 7)) for seed in range(5)]
    list(engine.stream())
    for seed, request in enumerate(requests):
        prompt = torch.tensor([_prompt(seed)])
        wanted = tiny_models.shared("llama").generate(prompt, max_new_tokens=7, do_sample=False, eos_token_id=list(ENDS))
        assert request.tokens == wanted[0, prompt.shape[1] :].tolist()
    assert engine.work.run == engine.work.possible


# -- sampling and processors ------------------------------------------------------------------------------------------------


def test_draws_do_not_depend_on_neighbours() -> None:
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

    def made(others: int, rule_: Any) -> list[int]:
        engine = _engine(rule=rule_)
        for seed in range(others):
            engine.add_request(_request(seed, 9))
        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.4), TemperatureLogitsWarper(0.8)])
        request = engine.add_request(
            Request(torch.tensor(_prompt(9)), max_new_tokens=12, processors=processors, sample=True, seed=4)
        )
        list(engine.stream())
        return request.tokens

    assert made(0, None) == made(3, None) == made(5, Filled(3))


# -- arrivals and cancellation ------------------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Arrivals, cancellations, ends, flush timings, page exhaustion, in any order."""

    @initialize(
        kv=st.sampled_from(KV),
        name=st.sampled_from(sorted(RULES)),
        slots=st.integers(1, 5),
        pages=st.sampled_from([12, 20, 60]),
        wait=st.integers(1, 9),
    )
    def begin(self, kv: str, name: str, slots: int, pages: int, wait: int) -> None:
        self.kv, self.wait = kv, wait
        name = "immediate" if kv == "release" else name
        self.engine = _engine(kv=kv, rule=RULES[name], slots=slots, pages=pages, longest=40, longest_wait=wait)
        self.asked: list[tuple[Request, int, int]] = []
        self.seen: dict[int, list[int]] = {}

    @rule(seed=st.integers(0, 12), new=st.integers(1, 15))
    def arrive(self, seed: int, new: int) -> None:
        request = self.engine.add_request(_request(seed, new))
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
        pages, running = self.engine.session.pages, set(self.engine._running)
        assert pages.free + sum(len(owned) for owned in pages._owned) == pages.total
        assert all(not owned for slot, owned in enumerate(pages._owned) if slot not in running)
        assert set(self.engine._parked.seq.tolist()) <= running
        waits = [each for each in self.engine._running.values() if each.waits_at]
        assert int(self.engine._parked.wants.sum()) == len(waits)
        for each in waits:
            assert self.engine.counts.passes - each.since[0] <= self.wait + 1

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for event in self.engine.stream():
            self.seen[event.request.number].append(event.token)
        for request, seed, new in self.asked:
            tokens, exits = _alone(_prompt(seed), new, self.kv)
            assert request.done
            assert request.tokens == self.seen[request.number]
            assert tokens[: len(request.tokens)] == request.tokens
            assert exits[: len(request.tokens)] == request.exit_layers
            if request.state == "finished":
                assert len(request.tokens) == len(tokens)
        assert self.engine.session.pages.free == self.engine.session.pages.total
        assert self.engine.counts.longest_wait <= self.wait + 1


TestSchedules = Machine.TestCase
TestSchedules.settings = settings(
    max_examples=60, stateful_step_count=18, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


# -- rules --------------------------------------------------------------------------------------------------------------------


def test_filled_by_hand() -> None:
    moment = Moment(fresh=3, running=8, context=50)
    rule_ = Filled(4, passes=6, seconds=0.5)
    waiting = [
        Waiting(2, 4, 1, 0.0),
        Waiting(3, 3, 6, 0.0),
        Waiting(4, 3, 5, 0.4),
        Waiting(5, 1, 1, 0.6),
        Waiting(6, 0, 0, 0.0),
    ]
    assert rule_(waiting, moment) == {2, 3, 5}
    assert Immediate()([*waiting, Waiting(6, 0, 0, 0.0)], moment) == {2, 3, 4, 5, 6}


# -- refusals -----------------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    engine = _engine(pages=5)
    with pytest.raises(ArgumentError, match="can take 29 positions, there is room for 20"):
        engine.add_request(Request(torch.arange(3, 23), max_new_tokens=10))
    with pytest.raises(ArgumentError, match=r"prompt ids must be in \[0, 203\), got 3 to 203"):
        engine.add_request(Request(torch.tensor([3, 203]), max_new_tokens=2))
    request = engine.add_request(_request(1, 3))
    with pytest.raises(ArgumentError, match="was added before"):
        engine.add_request(request)
    with pytest.raises(ArgumentError, match="not this engine's"):
        engine.cancel(_request(1, 3))
    with pytest.raises(ArgumentError, match=r"prompt must be int64 \[t\] with t >= 1"):
        Request(torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="max_new_tokens must be at least 1, got 0"):
        Request(torch.tensor([5]), max_new_tokens=0)
    with pytest.raises(ArgumentError, match="slots must be at least 1, got 0"):
        _engine(slots=0)
    with pytest.raises(ArgumentError, match=r"rule must be Immediate\(\), got Filled"):
        _engine(kv="release", rule=Filled(2))
    with pytest.raises(ArgumentError, match="Filled: wanted rows"):
        Filled(0)
    list(engine.stream())
    assert request.state == "finished"
    engine.cancel(request)
    assert request.state == "finished"


# -- what goes wrong ------------------------------------------------------------------------------------------------------


def test_a_processor_that_raises_fails_its_own_request() -> None:
    def broken(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > len(_prompt(1)) + 2:
            raise ZeroDivisionError("mine")
        return scores

    engine = _engine(kv="recompute", rule=Filled(2))
    others = [engine.add_request(_request(seed, 9)) for seed in (2, 3)]
    request = engine.add_request(Request(torch.tensor(_prompt(1)), max_new_tokens=9, processors=broken))
    after = engine.add_request(_request(4, 9))
    events = list(engine.stream())
    assert request.state == "failed"
    assert isinstance(request.error, ZeroDivisionError)
    assert [event.token for event in events if event.request is request] == [*request.tokens, None]
    for each, seed in zip([*others, after], (2, 3, 4), strict=True):
        _check(each, seed, 9, "recompute")
        assert [event.token for event in events if event.request is each] == each.tokens
    assert engine.session.pages.free == engine.session.pages.total


@pytest.mark.parametrize("kv", ["predict", "recompute"])
def test_an_interrupted_step_loses_nothing(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out in a prompt, in a pass, behind one: the next step goes on, and the tokens are the same."""
    engine = _engine(kv=kv, rule=Filled(2), chunk=3)
    requests = [engine.add_request(_request(seed, 12)) for seed in range(5)]
    calls, run, logits = [0], engine.session.run, type(engine.model).logits

    def failing(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] % 7 == 2:
                raise MemoryError
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(engine.session, "run", failing(run))
    monkeypatch.setattr(type(engine.model), "logits", failing(logits))
    interrupted = 0
    while engine.busy and interrupted < 60:
        try:
            engine.step()
        except MemoryError:
            interrupted += 1
            if interrupted > 8:
                monkeypatch.undo()
    assert interrupted > 5
    for seed, request in enumerate(requests):
        _check(request, seed, 12, kv)
    assert engine.session.pages.free == engine.session.pages.total


def test_cancelled_from_a_processor_and_between_events() -> None:
    engine = _engine()
    victim = engine.add_request(_request(2, 30))

    def cancels(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == len(_prompt(1)) + 2:
            engine.cancel(victim)
            engine.cancel(request)
        return scores

    request = engine.add_request(Request(torch.tensor(_prompt(1)), max_new_tokens=9, processors=cancels))
    last = engine.add_request(_request(3, 9))
    seen = []
    for event in engine.stream():
        seen.append(event.request)
        if event.request is last and len(last.tokens) == 3:
            engine.cancel(last)
    assert [each.state for each in (victim, request, last)] == ["cancelled"] * 3
    assert len(request.tokens) == 2
    assert seen.count(last) == 3


def test_requests_take_what_callers_have() -> None:
    buffer = torch.tensor(_prompt(5))
    engine = _engine()
    request = engine.add_request(Request(buffer, max_new_tokens=8, ends=torch.tensor(ENDS)))
    buffer.fill_(7)
    list(engine.stream())
    _check(request, 5, 8, "predict")
    assert Request(torch.tensor([5]), ends=2).end_ids == {2}
    with pytest.raises(ArgumentError, match="ends must be an id or several, got 'x'"):
        Request(torch.tensor([5]), ends="x")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"wanted a dyndepth\.Request, got Tensor"):
        engine.add_request(torch.tensor([5]))  # type: ignore[arg-type]


def test_learned_positions_bound_a_request() -> None:
    engine = Engine(tiny_models.shared("gpt2"), longest=256, slots=2)
    with pytest.raises(ArgumentError, match="can take 149 positions, there is room for 128"):
        engine.add_request(Request(torch.arange(3, 123), max_new_tokens=30))
    request = engine.add_request(Request(torch.arange(3, 123), max_new_tokens=9))
    list(engine.stream())
    assert request.state == "finished"
