"""Judging in one call of C++ says what the band's own modules say, op by op."""

from __future__ import annotations

import math

import pytest
import tiny_exits
import tiny_models
import torch

from dyndepth.exits import Band, Exits, MlpHead, NormHead, TranslatorHead
from dyndepth.exits.criteria import Criterion, Decay, Entropy, Margin, RouterScore, Saturation, TopProbability, View
from dyndepth.exits.router import Router
from dyndepth.op import backend
from dyndepth.runtime.bind import bind
from dyndepth.runtime.judge import Judge, judge_of
from dyndepth.runtime.pass_plan import Plan
from dyndepth.runtime.propagate import Propagation
from dyndepth.runtime.score import score

GENERATOR = torch.Generator().manual_seed(4)
WIDTH = 48


def translator(rank: int | None) -> TranslatorHead:
    head = TranslatorHead(WIDTH, WIDTH, rank)
    for value in head.parameters():
        value.copy_(torch.randn(value.shape, generator=GENERATOR) * 0.2)
    return head


def router(neurons: int, *, silu: bool = False, cosine: bool = False, stats: bool = True) -> Router:
    made = Router(WIDTH, neurons, silu=silu, cosine=cosine, stats=stats)
    for value in made.parameters():
        value.copy_(torch.randn(value.shape, generator=GENERATOR) * 0.3)
    return made


def plan_of(name: str, band: Band, dtype: torch.dtype = torch.float32) -> Plan:
    model = bind(tiny_models.shared(name) if dtype == torch.float32 else tiny_models.tiny(name, dtype))
    exits = tiny_exits.exits_of(model.causal_lm, band).prepared(model.device, model.dtype)
    return Plan(model, exits, "propagate", {}, Propagation(model))


def everyone(judge: Judge, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and head-ready rows with a threshold that every row reaches."""
    scores, state, ready = judge(hidden, -math.inf, torch.ones(len(hidden), dtype=torch.bool), len(hidden))
    number = ~scores.isnan()
    assert torch.equal(state.bool(), number)
    filled = torch.full((len(hidden), ready.shape[1]), torch.nan, dtype=ready.dtype)
    filled[number] = ready
    return scores, filled


COMMON = {
    "router": (NormHead(), RouterScore(router(1))),
    "silu router": (NormHead(), RouterScore(router(5, silu=True))),
    "full translator": (translator(None), RouterScore(router(3))),
    "low rank": (translator(7), TopProbability()),
    "margin": (translator(16), Margin()),
    "entropy": (NormHead(), Entropy()),
    "no head": (None, TopProbability()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shortlist", [False, True])
@pytest.mark.parametrize("kind", COMMON)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_is_the_modules_answer(name: str, kind: str, shortlist: bool, dtype: torch.dtype) -> None:
    head, criterion = COMMON[kind]
    ids = torch.tensor([3, 9, 1, 40, 41, 17, 88]) if shortlist else None
    plan = plan_of(name, Band(2, 6, criterion, threshold=0.5, head=head, shortlist=ids), dtype)
    band = plan.bands[2]
    judge = plan.judge(band)
    assert judge is not None
    hidden = (3 * torch.randn(19, WIDTH, generator=GENERATOR)).to(dtype)
    with torch.no_grad():
        scores, ready = everyone(judge, hidden)
        assert band.criterion.kind == criterion.kind
        by_hand = band.head_or_norm()(hidden, plan.model.finish)
        view = View(
            hidden=hidden, seq=torch.zeros(19), step=torch.zeros(19), previous=None, stats=lambda: plan.stats(band, by_hand),
            depth=None, leave=2, layers=6,
        )  # fmt: skip
        wanted = band.criterion.score(view)
    few = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    torch.testing.assert_close(ready.float(), by_hand.float(), rtol=few, atol=few)
    torch.testing.assert_close(scores, wanted, rtol=few, atol=few)


def test_a_row_is_judged_alike_in_any_company() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        plan = plan_of("llama", Band(2, 6, RouterScore(router(4)), threshold=0.5, head=translator(None)), dtype)
        judge = plan.judge(plan.bands[2])
        assert judge is not None
        hidden = torch.randn(40, WIDTH, generator=GENERATOR).to(dtype)
        scores, ready = everyone(judge, hidden)
        for count in (1, 3, 16, 17):
            some_scores, some_ready = everyone(judge, hidden[7 : 7 + count].contiguous())
            assert torch.equal(some_scores, scores[7 : 7 + count])
            assert torch.equal(some_ready, ready[7 : 7 + count])
        hidden[3] = torch.nan
        again, _ = everyone(judge, hidden)
        assert bool(again[3].isnan())
        assert torch.equal(again[torch.arange(40) != 3], scores[torch.arange(40) != 3])


def test_who_leaves() -> None:
    """At the threshold, one for all or one per row; not those that may not; rows past the judged ones are away."""
    plan = plan_of("llama", Band(2, 6, TopProbability(), threshold=0.5, head=translator(None)))
    judge = plan.judge(plan.bands[2])
    assert judge is not None
    hidden = torch.randn(6, WIDTH, generator=GENERATOR)
    may = torch.tensor([True, True, False, True, True, True])
    scores, ready = everyone(judge, hidden)
    middle = float(scores.sort().values[3])
    _, state, left = judge(hidden, middle, may, 8)
    wanted = (scores >= middle) & may
    assert state.tolist() == [*wanted.long().tolist(), 2, 2]
    assert torch.equal(left, ready[wanted])
    thresholds = torch.where(torch.arange(6) % 2 == 0, scores, torch.inf)
    _, state, left = judge(hidden, thresholds, may, 6)
    assert state.tolist() == [1, 0, 0, 0, 1, 0]
    assert torch.equal(left, ready[[0, 4]])


def test_a_request_that_names_its_depth_changes_nothing_for_the_others() -> None:
    """One call judges them all: the same exits, the same bits, whoever else asked for what."""
    model = tiny_models.shared("llama")
    bands = [Band(leave, 6, RouterScore(router(2)), threshold=0.55, head=translator(None)) for leave in (2, 4)]
    exits = Exits(bands, tiny_exits.exits_of(model, bands[0]).model)
    tokens = [torch.randint(3, 90, (7,), generator=GENERATOR) for _ in range(4)]
    free = score(model, tokens, exits, kv="propagate")
    asked = score(model, tokens, exits, kv="propagate", depth=[None, 2, None, 6])
    own = [slice(7 * at, 7 * at + 7) for at in range(4)]
    for at in (0, 2):
        assert torch.equal(asked.exit_layer[own[at]], free.exit_layer[own[at]])
        assert torch.equal(asked.ready[own[at]], free.ready[own[at]])
    assert asked.exit_layer[own[1]].tolist() == [2] * 7
    assert asked.exit_layer[own[3]].tolist() == [6] * 7


def test_no_rows() -> None:
    plan = plan_of("llama", Band(2, 6, TopProbability(), threshold=0.5))
    judge = plan.judge(plan.bands[2])
    assert judge is not None
    scores, ready = everyone(judge, torch.empty(0, WIDTH))
    assert (list(scores.shape), list(ready.shape)) == ([0], [0, WIDTH])


class Own(TopProbability):
    """A subclass may score as it likes."""


@pytest.mark.parametrize(
    ("head", "criterion"),
    [
        (NormHead(), Own()),
        (NormHead(), Saturation()),
        (NormHead(), RouterScore(router(1, stats=False))),
        (NormHead(), RouterScore(router(1, cosine=True))),
        (MlpHead(WIDTH, 8), TopProbability()),
    ],
)
def test_what_is_out_of_the_common_goes_op_by_op(head: NormHead, criterion: Criterion) -> None:
    plan = plan_of("llama", Band(2, 6, criterion, threshold=0.5, head=head))
    assert plan.judge(plan.bands[2]) is None


def test_hooks_layer_norms_and_forced_providers_go_op_by_op() -> None:
    plan = plan_of("llama", Band(2, 6, TopProbability(), threshold=0.5, head=translator(None)))
    assert isinstance(plan.judge(plan.bands[2]), Judge)
    for forced in ("torch", "exit_stats=torch", "ragged_linear=torch"):
        with backend(forced):
            assert plan.judge(plan.bands[2]) is None
    with backend("cpp"):
        assert isinstance(plan.judge(plan.bands[2]), Judge)
    head = plan.bands[2].head
    assert head is not None
    handle = head.register_forward_hook(lambda *_: None)
    assert judge_of(plan.model, plan.bands[2], plan.head(plan.bands[2])) is None
    handle.remove()
    assert judge_of(plan.model, plan.bands[2], None) is None
    other = plan_of("gpt2", Band(2, 6, TopProbability(), threshold=0.5))
    assert other.judge(other.bands[2]) is None


@pytest.mark.parametrize("decay", [None, Decay(4.0, 8)])
def test_passes_take_the_same_exits(decay: Decay | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole passes, with and without the one call: same exits, same answers, fp32."""
    model = tiny_models.shared("llama")
    bands = [Band(leave, 6, RouterScore(router(2)), threshold=0.55, head=translator(None), decay=decay) for leave in (2, 4)]
    exits = Exits(bands, tiny_exits.exits_of(model, bands[0]).model)
    tokens = [torch.randint(3, 90, (length,), generator=GENERATOR) for length in (9, 5, 14)]
    fused = score(model, tokens, exits, kv="propagate")
    assert 0 < int((fused.exit_layer < 6).sum()) < fused.exit_layer.numel(), "some rows must leave, and some stay"
    monkeypatch.setattr(Plan, "judge", lambda self, band: None)
    plain = score(model, tokens, exits, kv="propagate")
    assert torch.equal(fused.exit_layer, plain.exit_layer)
    assert torch.equal(fused.layers_run, plain.layers_run)
    assert torch.equal(fused.bands_taken, plain.bands_taken)
    torch.testing.assert_close(fused.ready, plain.ready, rtol=1e-4, atol=1e-4)
