"""DREX: rows wait until a deep pass is worth it; nobody is forced out or in; tokens are those of no waiting at all."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch

from dyndepth.engine import Engine, Filled, Moment, Planned, Request, Waiting
from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits, Margin
from dyndepth.plan import Exit
from dyndepth.plan.machine import Machine
from dyndepth.plan.rebatch import art, rebatch
from dyndepth.plan.shape import Shape
from dyndepth.recipes import drex
from dyndepth.runtime.score import score


def _prompts(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, tiny_models.VOCABULARY, (3 + 2 * n,), generator=generator) for n in range(count)]


def _run(engine: Engine, count: int = 7, new: int = 12) -> list[Request]:
    requests = [engine.add_request(Request(prompt, max_new_tokens=new)) for prompt in _prompts(count)]
    list(engine.stream())
    return requests


def _half(model: Any) -> Exits:
    """Exits whose margin about half of the tokens reach."""
    return drex.exits(model, 3, threshold=0.35)


@pytest.mark.parametrize("kv", ["copy", "predict", "recompute"])
@pytest.mark.parametrize("rows", [1, 3, 99])
def test_a_row_leaves_where_its_margin_says_so_and_nowhere_else(rows: int, kv: str) -> None:
    """Judged again, token by token: whoever left had the margin and whoever stayed had not, whatever waited."""
    model = tiny_models.shared("llama")
    exits = _half(model)
    if kv == "predict":
        exits.bands[0].kv = tiny_exits.band(model, 3, 6).kv
    engine = drex.engine(model, exits, rows=rows, kv=kv, slots=5, longest=64)
    requests = _run(engine)
    left, stayed = 0, 0
    for request in requests:
        start = [len(request.prompt) - 1]
        scored = score(model, [request.ids[:-1]], exits, start=start, kv=kv)
        assert scored.exit_layer[start[0] :].tolist() == request.exit_layers
        left += sum(depth == 3 for depth in request.exit_layers)
        stayed += sum(depth == 6 for depth in request.exit_layers)
    assert min(left, stayed) > 10
    assert engine.counts.kept == 0
    if rows == 3:
        assert 10 < sum(engine.counts.flushed.values()) <= stayed  # who comes to a deep pass in time need not wait
        assert sum(engine.counts.flushes.values()) < stayed / 1.5, "deep passes are shared"


def test_the_papers_rule_for_splitting() -> None:
    """t_f = 10, t_s = 6, t_d = 6: a split costs 2, a third of a deep pass; more than a third must leave."""
    assert [drex.worth_splitting(leaving, 12, 10.0, 6.0, 6.0) for leaving in (0, 3, 4, 5, 12)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert art(10.0, 6.0, 6.0) == pytest.approx(1 / 3)


#: Small layers on a large machine: a pass costs its launches and nothing by the row.
_BY_PASS = Machine.named("h100-sxm", "bfloat16")


def test_the_planner_decides_how_long_rows_wait() -> None:
    model = tiny_models.shared("llama")
    exits = _half(model)
    rule = drex.engine(model, exits, machine=_BY_PASS).rule
    assert isinstance(rule, Planned)
    shape = Shape.of(model)
    seen = set()
    for rate in (0.0, 0.5, 0.95, 1.0):
        one = Exit(3, 6, rate, head=rule._exits[3].head, words=rule._exits[3].words)
        best = rebatch(_BY_PASS, shape, one, 8, 64, "B").passes
        moment = Moment(fresh=4, running=8, context=60, rates={3: rate})
        assert rule.passes(3, rate, moment) == best
        for waited in range(best + 2):
            goes = rule([Waiting(3, 4, waited, 0.0)], moment) == {3}
            assert goes == (waited + 1 >= best)
        seen.add(best)
    assert rule([Waiting(3, 0, 0, 0.0)], Moment(4, 8, 60, {3: 0.0})) == {3}, "where nobody leaves, nobody waits"
    assert len(seen) > 1


def test_exits_and_refusals() -> None:
    model = tiny_models.shared("llama")
    exits = drex.exits(model)
    assert [(band.leave, band.resume, band.threshold) for band in exits] == [(3, 6, 0.9)]
    assert isinstance(exits.bands[0].criterion, Margin)
    heads = tiny_exits.exits_of(model, tiny_exits.band(model, 2, 6), tiny_exits.band(model, 4, 6, head="mlp"))
    assert drex.exits(model, 4, heads=heads).bands[0].head_or_norm().kind == "mlp"
    with pytest.raises(ArgumentError, match="heads must have one exit or leave must name one, got 2"):
        drex.exits(model, heads=heads)
    with pytest.raises(ArgumentError, match="rule and rows exclude each other"):
        drex.engine(model, exits, rule=Filled(2), rows=2)
    with pytest.raises(ArgumentError, match="wanted 0 <= leaving <= rows"):
        drex.worth_splitting(3, 2, 1.0, 1.0, 1.0)
