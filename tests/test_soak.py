"""The soak: it passes where nothing is wrong, and finds leaks, changes and exceptions that are put in."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import soak
import tables_speed
import tiny_exits
import tiny_models
import torch
from soak_pool import Answer, Pool, Request, schedule

import dyndepth
from dyndepth.exits.criteria import Schedule
from dyndepth.runtime.pages import Pages

MIB = 2**20
LENGTHS = (3, 9, 17, 5, 12, 30, 2, 8, 21, 4)


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def subject(**changes: Any) -> soak.Subject:
    model = changes.pop("model", tiny_models.shared("llama"))
    given = prompts()
    settings: dict[str, Any] = {
        "requests": schedule(given, 4, 3, 8), "calls": [(given[:1], 3), (given[2:6], 4)], "ends": [2], "slots": 4,
        "capacity": 40, "pages": 5,
    }  # fmt: skip
    return soak.Subject(model, **({"exits": tiny_exits.mixed(model)} | settings | changes))


def steady() -> int:
    return 500 * MIB


def test_a_quiet_soak_passes() -> None:
    found = soak.soak(subject(), 0, least_rounds=4, rss=steady)
    verdict = found.verdict()
    assert verdict["passed"], verdict
    assert verdict["memory"]["leak"] is False
    assert (verdict["rounds"], verdict["pages_leaked"], verdict["different_rounds"]) == (4, 0, [])
    assert len({one.digest for one in found.rounds}) == 1
    assert found.rounds[0].tokens > len(LENGTHS)
    assert 0 < found.rounds[0].rows_x_layers < 1
    assert [sample.seconds for sample in found.samples] == sorted(sample.seconds for sample in found.samples)


def test_answers_are_those_of_generate() -> None:
    """Whatever slot and company a request had: tokens and depths of a call of its own, at most as many as it wanted."""
    model = tiny_models.shared("llama")
    one = subject()
    pool = Pool(model, one.exits, [2], one.slots, one.capacity, one.pages)
    for _ in range(2):
        for request, answer in zip(one.requests, pool.run(one.requests), strict=True):
            out = model.generate(
                input_ids=request.prompt[None], custom_generate=dyndepth.generate, exits=one.exits, do_sample=False,
                max_new_tokens=request.new_tokens, eos_token_id=[2], pad_token_id=0, return_dict_in_generate=True,
            )  # fmt: skip
            assert answer.tokens == out.sequences[0, len(request.prompt) :].tolist()
            assert answer.layers == out.layers_run[0].tolist()
        assert pool.session.pages.free == pool.session.pages.total


def test_depth_by_position() -> None:
    """A request's own steps count, not the pool's: from its third token on it leaves after three layers."""
    model = tiny_models.shared("llama")
    by_step = Schedule(first=tiny_models.LAYERS, last=3, length=2)
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 3, tiny_models.LAYERS, by_step))
    one = subject(exits=exits, ends=[])
    answers = Pool(model, exits, [], one.slots, one.capacity, one.pages).run(one.requests)
    assert [answer.layers for answer in answers] == [([6, 6] + [3] * 6)[: request.new_tokens] for request in one.requests]


def test_requests_join_leave_and_wait() -> None:
    """Slots and pages are both too few at times, and both are taken again."""
    one = subject(requests=[Request(prompt, 8, 0) for prompt in prompts()])
    pool = Pool(one.model, one.exits, one.ends, one.slots, one.capacity, one.pages)
    seen: list[tuple[int, int]] = []
    waited: list[int] = []

    def tick() -> None:
        seen.append((len(pool._running), pool.session.pages.free))

    joined = Pool._join

    def join(self: Pool, request: Request, answer: Answer) -> bool:
        done = joined(self, request, answer)
        if not done and len(self._running) < self.slots:
            waited.append(request.positions)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "_join", join)
        pool.run(one.requests, tick)
    counts = [count for count, _ in seen]
    assert max(counts) > 2
    assert any(later > earlier for earlier, later in itertools.pairwise(counts))
    assert any(later < earlier for earlier, later in itertools.pairwise(counts))
    assert waited, "no request ever waited for pages"
    assert seen[-1] == (0, 5)


def test_a_request_that_can_never_be_served() -> None:
    found = soak.soak(subject(requests=[Request(prompts()[5], 90, 0)], capacity=119, pages=3), 0, rss=steady)
    assert found.error is not None
    assert "a request of 119 positions can never be served: 3 of 3 pages are free" in found.error
    assert not found.verdict()["passed"]


def test_pages_that_are_not_given_back_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    release, calls = Pages.release, []

    def forgetful(self: Pages, sequence: int) -> None:
        """One page is lost in the first round."""
        calls.append(sequence)
        if len(calls) == 5:
            self._owned[sequence].pop()
        release(self, sequence)

    monkeypatch.setattr(Pages, "release", forgetful)
    verdict = soak.soak(subject(), 0, least_rounds=2, rss=steady).verdict()
    assert verdict["pages_leaked"] == 1
    assert not verdict["passed"]


def test_a_changed_answer_is_found() -> None:
    """Weights that change after the first round, as a stray write would change them (exits would notice it themselves)."""
    model = tiny_models.tiny("llama")

    def change(number: int, found: soak.Soak) -> None:
        if number == 0:
            model.model.layers[0].mlp.down_proj.weight.data.mul_(3)

    verdict = soak.soak(subject(model=model, exits=None), 0, least_rounds=3, rss=steady, after=change).verdict()
    assert verdict["different_rounds"] == [1, 2]
    assert not verdict["passed"]


def test_memory_that_grows_is_found() -> None:
    held = [500 * MIB]

    def grow(number: int, found: soak.Soak) -> None:
        held[0] += 9 * MIB

    verdict = soak.soak(subject(), 0, least_rounds=4, rss=lambda: held[0], after=grow).verdict()
    assert verdict["memory"]["leak"] is True
    assert verdict["memory"]["growth_bytes"] == 18 * MIB
    assert not verdict["passed"]


@pytest.mark.parametrize(
    ("rounds", "leak"),
    [
        ([900, 500, 500, 500], False),  # the first round warms up
        ([100, 500, 500, 510, 510], False),  # 2 % and no more
        ([500, 500, 500, 511], True),  # 2.2 %, 11 MiB
        ([4000, 4000, 4000, 4017], True),  # 0.4 %, 17 MiB
        ([4000, 4000, 4000, 4016], False),
        ([500, 500, 700, 500, 500, 700, 500], False),  # medians of thirds
        ([500, 600, 400], None),  # too short
        ([], None),
    ],
)
def test_judging_memory_by_hand(rounds: list[int], leak: bool | None) -> None:
    assert soak.judge_memory([value * MIB for value in rounds])["leak"] is leak


def test_exceptions_are_part_of_what_was_found() -> None:
    def fail(number: int, found: soak.Soak) -> None:
        raise ValueError("on\npurpose")

    found = soak.soak(subject(), 0, least_rounds=3, rss=steady, after=fail)
    assert found.error == "ValueError: on purpose"
    assert len(found.rounds) == 1
    assert not found.verdict()["passed"]
    assert not soak.Soak().verdict()["passed"]  # nothing was run


def test_the_digest_sees_every_token_and_depth() -> None:
    base = [Answer([1, 2], [3, 4]), Answer([5], [6])]
    others = [
        [Answer([1, 3], [3, 4]), Answer([5], [6])], [Answer([1, 2], [3, 5]), Answer([5], [6])],
        [Answer([1, 2, 5], [3, 4, 6]), Answer()], [Answer([5], [6]), Answer([1, 2], [3, 4])],
    ]  # fmt: skip
    assert soak.digest(base) == soak.digest([Answer([1, 2], [3, 4]), Answer([5], [6])])
    assert len({soak.digest(base), *map(soak.digest, others)}) == 5


def test_the_schedule_is_seeded_and_in_bursts() -> None:
    first, again, other = (schedule(prompts() * 4, 8, seed, 16) for seed in (1, 1, 2))
    facts = [[(request.arrives, request.new_tokens) for request in one] for one in (first, again, other)]
    assert facts[0] == facts[1] != facts[2]
    arrivals = [request.arrives for request in first]
    assert arrivals == sorted(arrivals)
    assert 1 < len(set(arrivals)) < len(arrivals)
    assert {request.new_tokens for request in first} <= set(range(1, 17))
    assert first[0].positions == len(first[0].prompt) + first[0].new_tokens - 1


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status and files; the files are there after every round, and say it when it went wrong."""
    monkeypatch.setattr(soak, "demo_subject", lambda slots, requests: subject())
    monkeypatch.setattr(sys, "argv", ["soak.py", str(tmp_path), "--minutes", "0"])
    written = []
    inner = soak.write
    monkeypatch.setattr(soak, "write", lambda *given: (written.append(len(given[1].rounds)), inner(*given)))
    monkeypatch.setattr(soak, "GROWTH_BYTES", 1 << 40)  # this process holds all the other tests
    monkeypatch.setattr(soak, "GROWTH_SHARE", 10.0)
    with pytest.raises(SystemExit) as done:
        soak.main()
    assert done.value.code == 0
    assert written == [1, 2, 3, 4, 4]
    found = json.loads((tmp_path / "soak.json").read_text())
    assert set(found) == {"settings", "machine", "verdict", "rounds", "samples"}
    assert set(found["samples"][0]) == {"seconds", "rss_bytes", "pages_free", "pages_total"}
    assert found["samples"][0]["rss_bytes"] > MIB
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
    assert "round 3: " in capsys.readouterr().out
    assert "| 4 |" in tables_speed.soak(tmp_path)
    monkeypatch.setattr(soak, "GROWTH_SHARE", -1.0)
    with pytest.raises(SystemExit) as done:
        soak.main()
    assert done.value.code == 1
    assert json.loads((tmp_path / "soak.json").read_text())["verdict"]["memory"]["leak"] is True


@pytest.mark.parametrize("arguments", [("--batch", "0"), ("--requests", "0"), ("--minutes", "nan")])
def test_arguments(arguments: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["soak.py", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as done:
        soak.main()
    assert done.value.code == 2
