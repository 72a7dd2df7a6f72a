"""The comparison's systems and prompts, on tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
from compare import shortlist, texts
from compare.generated import Generated, SelfSpeculation, full_depth, scheduled
from compare.measure import reference_of
from compare.naive import Naive
from compare.system import Cell, System
from tiny_compare import NEW, named, ours, shared, single

import dyndepth
from dyndepth.exits import TopProbability

# -- systems ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ours(), ids=lambda system: system.name)
def test_every_system_gives_the_tokens_that_were_asked_for(system: System) -> None:
    cell = single() if isinstance(system, SelfSpeculation) else shared()
    assert system.missing() is None
    assert system.refuses(cell) is None
    for wanted in (1, NEW):
        out = system.generate(cell, wanted)
        assert out.tokens.shape == (cell.batch, wanted)
        assert not bool((out.tokens == cell.model.generation_config.eos_token_id).any()), "the end of sequence is suppressed"
    text = full_depth().generate(cell, NEW).tokens
    said = system.generate(cell, NEW, text)
    assert said.tokens.shape == (cell.batch, NEW)
    assert said.share is not None


@pytest.mark.parametrize("mode", ["dynamic cache", "static cache", "full depth", "self-speculation", "lossless"])
def test_full_depth_agrees_in_fp32(mode: str) -> None:
    cell = single() if mode == "self-speculation" else shared()
    reference = reference_of(full_depth(), cell)
    system = named(mode)
    assert reference.free(system.generate(cell, NEW).tokens) == 1.0
    said = system.generate(cell, NEW, reference.text)
    assert reference.teacher(said.tokens) == 1.0
    assert said.share > 1.0 if mode in ("self-speculation", "lossless") else said.share == 1.0


def test_forced_tokens_are_answered_as_scoring_answers() -> None:
    """Teacher-forced agreement is that of dyndepth's scoring passes, for full depth and for exits."""
    cell = shared()
    reference = reference_of(full_depth(), cell)
    dynamic = named("dynamic").generate(cell, NEW, reference.text)
    for exits, found in ((None, reference.said), (cell.exits, dynamic.tokens)):
        for row, prompt in enumerate(cell.prompts):
            whole = torch.cat([prompt, reference.text[row]])
            scored = dyndepth.runtime.score.score(cell.model, [whole], exits, start=[len(prompt) - 1])
            assert torch.equal(scored.argmax()[len(prompt) - 1 : -1], found[row])
    assert reference.teacher(dynamic.tokens) < 1.0, "else this shows nothing"


def one_exit(cell: Cell, threshold: float = 0.5, leave: int = 3) -> Cell:
    exits = tiny_exits.exits_of(cell.model, tiny_exits.band(cell.model, leave, 6, threshold=threshold))
    return Cell(cell.model, cell.inputs, NEW, cell.context, exits, exits)


def test_mask_only_decides_as_dyndepth_does() -> None:
    """With one exit a decision reads layers below it only, which K,V of layers above do not reach."""
    cell = one_exit(shared())
    forced = reference_of(full_depth(), cell).text
    dynamic, mask = named("dynamic").generate(cell, NEW, forced), Naive(together=False).generate(cell, NEW, forced)
    assert torch.equal(dynamic.exit_layers.long(), mask.exit_layers.long())
    left = mask.exit_layers == 3
    assert left.any()
    assert not left.all()
    assert torch.equal(dynamic.tokens[left], mask.tokens[left])
    assert mask.share == 1.0
    assert dynamic.share == pytest.approx(float(mask.exit_layers.float().mean()) / 6)
    # What stays reads exact K,V: full depth's answer.
    assert torch.equal(mask.tokens[~left], full_depth().generate(cell, NEW, forced).tokens[~left])


@pytest.mark.parametrize("threshold", [0.5, -1.0])
def test_mask_only_picks_the_first_exit_of_two(threshold: float) -> None:
    """Up to the first new token all K,V are exact, so everything is dyndepth's."""
    cell = shared()
    exits = cell.exits.with_thresholds(threshold)
    cell = Cell(cell.model, cell.inputs, NEW, cell.context, exits, exits)
    dynamic, mask = named("dynamic").generate(cell, 1), Naive(together=False).generate(cell, 1)
    assert torch.equal(dynamic.exit_layers.long(), mask.exit_layers.long())
    assert torch.equal(dynamic.tokens, mask.tokens)


def test_all_rows_agree_is_dyndepth_where_there_is_one_row() -> None:
    cell = single()
    options = {"custom_generate": dyndepth.generate, "exits": cell.exits, "kv": "propagate"}
    one = Generated("dyndepth", "propagate", lambda cell: options).generate(cell, 60)
    naive = Naive(together=True).generate(cell, 60)
    assert torch.equal(one.tokens, naive.tokens)
    assert torch.equal(one.exit_layers.long(), naive.exit_layers.long())
    assert one.share == pytest.approx(naive.share)
    assert naive.share < 1.0


def test_all_rows_agree_stays_while_one_row_does_not_want_to_leave() -> None:
    cell = one_exit(shared())
    forced = reference_of(full_depth(), cell).text
    together, mask = Naive(together=True).generate(cell, NEW, forced), Naive(together=False).generate(cell, NEW, forced)
    everybody = (mask.exit_layers == 3).all(0)
    assert torch.equal(together.exit_layers[0] == 3, everybody)
    closed, open_ = one_exit(shared(), threshold=2.0), one_exit(shared(), threshold=-1.0)
    assert Naive(together=True).generate(closed, NEW).share == 1.0
    assert Naive(together=True).generate(open_, NEW).share == 0.5


def test_naive_says_what_it_cannot_run() -> None:
    model = tiny_models.shared("llama")
    mixed = tiny_exits.mixed(model)
    cell = Cell(model, tiny_models.prompts(2), NEW, 18, mixed, mixed)
    assert "band [1, 3)" in str(Naive(together=True).refuses(cell))
    other = tiny_models.shared("qwen2")
    assert "got qwen2" in str(Naive(together=True).refuses(Cell(other, cell.inputs, NEW, 18, mixed, mixed)))


def test_schedule_does_the_work_it_was_given() -> None:
    cell = shared()
    for share in (0.6, 0.8, 0.95):
        rule = scheduled(cell.exits, share, 24)
        assert all(band.criterion.kind == "schedule" for band in rule)
        options = {"custom_generate": dyndepth.generate, "exits": rule, "kv": "none"}
        out = Generated("dyndepth", "schedule", lambda cell, options=options: options).generate(cell, 24)
        assert out.share == pytest.approx(share, abs=0.03)
        assert (out.exit_layers == out.exit_layers[:1]).all(), "the same for every row"


def test_a_static_cache_is_no_longer_than_its_call() -> None:
    cell, static = shared(), named("static cache")
    cell.model.generate(**cell.inputs, max_new_tokens=40, cache_implementation="static", eos_token_id=None)
    static.generate(cell, NEW)
    assert cell.model._previous_max_cache_length < cell.width + NEW + 1


def test_work_of_fixed_depths() -> None:
    assert named("fixed depth 3").generate(shared(), NEW).share == 0.5
    assert named("fixed depth 5").generate(shared(), NEW).share == pytest.approx(5 / 6)


def test_shortlist_threshold_is_the_lowest_that_agrees_enough() -> None:
    score = torch.tensor([0.9, 0.8, 0.7, 0.7, 0.1])
    agrees = torch.tensor([True, True, True, False, False])
    assert shortlist.lowest_threshold(score, agrees, 0.75) == pytest.approx(0.7)
    assert shortlist.lowest_threshold(score, agrees, 0.9) == pytest.approx(0.8), "rows of one score leave together"
    assert shortlist.lowest_threshold(score, ~agrees, 0.9) == float("inf")
    bands = list(shared().shortlisted)
    assert all(isinstance(band.criterion, TopProbability) and len(band.shortlist) == 50 for band in bands)


# -- prompts ------------------------------------------------------------------------------------------------------------


class Words:
    """One token per word."""

    pad_token_id = 0

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [self.known.setdefault(word, len(self.known) + 1) for word in text.split()]}

    def apply_chat_template(self, turns: list[dict[str, str]], **options: Any) -> str:
        return f"<user> {turns[0]['content']} <assistant>"


@pytest.mark.parametrize("width", [8, 64, 960])
def test_prompts_have_their_length_and_differ(width: int) -> None:
    words = Words()
    inputs = texts.prompts(words, 64, width)
    assert inputs["input_ids"].shape == (64, width)
    lengths = inputs["attention_mask"].sum(1)
    assert lengths[0] == width
    assert set(lengths.tolist()) == {width, width - width // 8, width - width // 4}
    assert bool(inputs["attention_mask"][:, -1].all()), "padded on the left"
    if width > 8:
        assert len({tuple(row.tolist()) for row in inputs["input_ids"]}) == 64
    rows = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    if width == 960:
        assert len({tuple(row[1:9].tolist()) for row in rows}) > 32, "other filling too"
    assert all(row[0] == words.known["<user>"] and row[-1] == words.known["<assistant>"] for row in rows)
    assert not set(texts.TUNING) & set(texts.ROWS)
