"""Single layers and single ops, timed apart from decoding on the same rows, pages and weights.

These are separate measurements: their sum is not the time of a step, in which C++ runs many of them in one call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dyndepth.exits import Band, Exits
from dyndepth.exits.criteria import RouterScore
from dyndepth.ops import backfill_kv, compact_rows, exit_stats, ragged_attention, ragged_linear
from dyndepth.runtime.bind import Model
from dyndepth.runtime.layer import Context, Layer
from dyndepth.runtime.norms import is_plain_linear
from dyndepth.runtime.rows import Rows
from dyndepth.runtime.session import Session

#: Bytes of the buffer that the read roof reads: more than caches hold.
ROOF_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Op:
    """One op as a layer, a boundary or the LM head calls it."""

    name: str
    where: str
    calls: int
    rows: int
    #: Median of all calls together.
    seconds: float


@dataclass(frozen=True)
class Alone:
    """Medians, seconds, with all rows live."""

    #: All layers in one span, and every layer in a span of its own, in the same rounds.
    span_s: float
    layers_s: list[float]
    ops: list[Op]
    read_roof_bytes_per_s: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "layer_by_layer_s": sum(self.layers_s)}


def run_layers(model: Model, begin: int, end: int, hidden: Tensor, live: int, rows: Rows, context: Context) -> None:
    """Layers [begin, end) in place for rows `[0, live)`, as a pass runs them."""
    if not isinstance(model.stack, str) and model.stack.usable():
        model.stack.run(begin, end, hidden[:live], live, rows.seq, rows.pos, rows.slots, context)
        return
    for layer in model.layers[begin:end]:
        layer.run(hidden, live, live, rows.seq, rows.pos, rows.slots, context)


def decode_rows(session: Session, prompts: Sequence[Tensor]) -> tuple[Rows, Context]:
    """Prompts (ids [t]) in the pages at full depth, and the rows of their last tokens, which a first step would run."""
    session.prefill([prompt[:-1] for prompt in prompts], session.work())
    positions = [len(prompt) - 1 for prompt in prompts]
    return session.rows(range(len(prompts)), positions, tokens=torch.stack([prompt[-1] for prompt in prompts]))


@torch.no_grad()
def measure(model: Model, prompts: Sequence[Tensor], exits: Exits | None, rounds: int, roof_bytes: int = ROOF_BYTES) -> Alone:
    """Everything in turn, `rounds` times after one round that does not count."""
    session = Session(model, [len(prompt) for prompt in prompts], exits)
    rows, context = decode_rows(session, prompts)
    count, depth = len(rows), model.depth
    ops = _ops(session, rows, context)
    buffer = torch.ones(roof_bytes // 8, dtype=torch.int64, device=model.device)
    spans: list[float] = []
    layers: list[list[float]] = [[] for _ in range(depth)]
    taken: list[list[float]] = [[] for _ in ops]
    reads: list[float] = []
    for _ in range(rounds + 1):
        hidden = rows.hidden.clone()
        spans.append(_timed(lambda h=hidden: run_layers(model, 0, depth, h, count, rows, context)))  # type: ignore[misc]
        hidden = rows.hidden.clone()
        for at in range(depth):
            layers[at].append(_timed(lambda i=at, h=hidden: run_layers(model, i, i + 1, h, count, rows, context)))  # type: ignore[misc]
        for (_, _, calls), times in zip(ops, taken, strict=True):
            times.append(_timed(lambda todo=calls: [call() for call in todo]))  # type: ignore[misc]
        reads.append(_timed(buffer.max))
    found = [Op(name, where, len(calls), count, _median(times)) for (name, where, calls), times in zip(ops, taken, strict=True)]
    return Alone(_median(spans), [_median(times) for times in layers], found, roof_bytes / _median(reads))


_Calls = tuple[str, str, list[Callable[[], Any]]]


def _ops(session: Session, rows: Rows, context: Context) -> list[_Calls]:
    """(op, where, calls of one step) at the shapes of these rows."""
    model, hidden = session.model, rows.hidden
    found: list[_Calls] = [
        ("ragged_attention", "layers", [_attention(layer, rows, context) for layer in model.layers]),
        ("ragged_linear", "layers", [call for layer in model.layers for call in _products(layer, hidden)]),
        ("norm modules", "layers", [_on(norm, hidden) for layer in model.layers for norm in _norms(layer)]),
        ("LM head", "top", [lambda: model.logits(model.finish(hidden))]),
    ]
    for band in session.plan.exits or ():
        found += _boundary(session, band, rows, context)
    return [(name, where, calls) for name, where, calls in found if calls]


def _attention(layer: Layer, rows: Rows, context: Context) -> Callable[[], Any]:
    q = torch.ones(len(rows), layer.heads, layer.head_dim, dtype=rows.hidden.dtype, device=rows.hidden.device)
    return lambda: ragged_attention(
        q, context.pages[layer.index], context.block_table, rows.seq, rows.pos,
        scale=layer.scale, softcap=layer.softcap, window=layer.window,
    )  # fmt: skip


def _products(layer: Layer, hidden: Tensor) -> list[Callable[[], Any]]:
    """Every plain linear of the layer, as products of their own; gates and residuals left out."""
    calls: list[Callable[[], Any]] = []
    for module in layer.module.modules():
        linear: Any = module
        if not is_plain_linear(module) or not linear.weight.is_contiguous() or linear.weight.dtype != hidden.dtype:
            continue
        x = hidden.new_ones(hidden.shape[0], linear.weight.shape[1])
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        calls.append(lambda x=x, weight=weight, bias=bias: ragged_linear(x, weight, bias=bias))  # type: ignore[misc]
    return calls


def _norms(layer: Layer) -> list[Callable[[Tensor], Tensor]]:
    norms = (layer.before_attention, layer.after_attention, layer.before_mlp, layer.after_mlp)
    return [norm for norm in norms if norm is not None]


def _on(function: Callable[[Tensor], Tensor], hidden: Tensor) -> Callable[[], Any]:
    return lambda: function(hidden)


def _boundary(session: Session, band: Band, rows: Rows, context: Context) -> list[_Calls]:
    """Judging, moving and back-filling all rows at a band's boundary."""
    model, plan, hidden, where = session.model, session.plan, rows.hidden, f"boundary {band.leave}"
    state = torch.arange(len(rows), device=hidden.device).remainder(2).to(torch.int8)  # every other row leaves
    payloads = [hidden, rows.seq, rows.pos, rows.slots, rows.step, rows.may_leave, rows.index]
    found: list[_Calls] = [("compact_rows", where, [lambda: compact_rows(state, payloads)])]
    head = model.plain_head()
    stats = None
    if band.criterion.needs_logits and head is not None:
        ready = band.head_or_norm()(hidden, model.finish).contiguous() if not band.has_block else model.finish(hidden)
        weight = head[0] if band.shortlist is None else head[0][band.shortlist]
        bias = head[1] if band.shortlist is None or head[1] is None else head[1][band.shortlist]
        stats = exit_stats(ready, weight, head_bias=bias, softcap=model.logit_softcap)
        found.append(("exit_stats", where, [lambda: exit_stats(ready, weight, head_bias=bias, softcap=model.logit_softcap)]))
    judge = plan.judge(band) if not band.has_block else None
    if judge is not None:  # what a pass really calls, in place of the two
        found.append(("judge_rows", where, [lambda: judge(hidden, band.threshold, rows.may_leave, len(rows))]))
    router = band.criterion.router if isinstance(band.criterion, RouterScore) else None
    if router is not None:
        found.append(("router_score", where, [lambda: router(hidden, hidden, stats)]))
    kv = band.kv
    if kv is not None:
        found.append(
            (
                "backfill_kv",
                where,
                [
                    lambda: backfill_kv(
                        hidden, kv.weight, rows.pos, rows.slots, context.pages, band.leave, bias=kv.bias, cos=context.cos,
                        sin=context.sin, variant=plan.propagation.variants(band.leave, band.resume), down=kv.down,
                    )
                ],
            )
        )  # fmt: skip
    return found


def _timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - begin) / 1e9


def _median(times: list[float]) -> float:
    """Of all but the first, which does not count; of that one alone if there are no others."""
    return statistics.median(times[1:] or times)
