"""DREX (arXiv 2512.15705): dynamic re-batching at early exits, with copied K,V and without involuntary exits or stays.

A row leaves where its own confidence says so; a row that must go deeper waits at the exit until the deep layers are worth
running, while the others go on. K,V of skipped layers are the last computed layer's. The engine is dyndepth.Engine.
"""

from __future__ import annotations

from typing import Any

from dyndepth.engine import Engine, Filled, Planned, Rule
from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits, Margin
from dyndepth.plan import exits_of
from dyndepth.plan.machine import Machine
from dyndepth.plan.shape import Shape
from dyndepth.recipes import ee_tuning


def exits(model: Any, leave: int | None = None, *, heads: Exits | None = None, threshold: float = 0.9) -> Exits:
    """One ramp under the margin of the two largest probabilities, the paper's confidence.

    Args:
        model: a supported transformers causal LM.
        leave: its boundary; by default that of the heads (which must have one), else half of the depth.
        heads: a trained head (Balcony's, as in the paper: `dyndepth.recipes.balcony`); without it the final norm reads.
        threshold: smallest margin that leaves.
    """
    if leave is None:
        if heads is not None and len(heads.bands) != 1:
            raise ArgumentError(f"drex.exits: heads must have one exit or leave must name one, got {len(heads.bands)}")
        leave = max(1, model.config.num_hidden_layers // 2) if heads is None else heads.bands[0].leave
    found = ee_tuning.exits(model, (leave,), heads=heads, threshold=threshold)
    for band in found:
        band.criterion = Margin()
    return Exits(found.bands, found.model, {**found.record, "recipe": "DREX (arXiv 2512.15705)"})


def worth_splitting(leaving: int, rows: int, t_full: float, t_shallow: float, t_deep: float) -> bool:
    """The paper's ART rule: a batch of `rows` is split when more than (t_s + t_d - t_f) / t_d of it leaves.

    Seconds of a full pass, of the layers below the exit and of those above it. A split costs c = t_s + t_d - t_f more and saves
    the deep pass of those that leave, in the long run `leaving / rows` of one. Equality does not split.
    """
    if rows < 1 or not 0 <= leaving <= rows or t_deep <= 0:
        raise ArgumentError(f"worth_splitting: wanted 0 <= leaving <= rows and t_deep > 0, got {leaving}, {rows}, {t_deep}")
    return leaving * t_deep > rows * (t_shallow + t_deep - t_full)


def engine(
    model: Any,
    exits: Exits,
    *,
    kv: str = "copy",
    rule: Rule | None = None,
    rows: int | None = None,
    machine: Machine | None = None,
    **options: Any,
) -> Engine:
    """An engine that re-batches.

    Args:
        exits: of `exits`, or any that leave for good.
        kv: `copy` as in the paper, or any other K,V policy: `predict` hurts the other tokens least of those that approximate
            (docs/exact.md), `recompute` not at all.
        rule: when rows that wait go on. By default `Filled(rows)` where `rows` is given, else `Planned`: as many shallow passes
            per deep one as the planner finds best for this machine, model and the rate seen so far, one where waiting does
            not pay.
        machine: figures for `Planned`; measured here once by default.
        options: of dyndepth.Engine.
    """
    if rule is not None and rows is not None:
        raise ArgumentError("drex.engine: rule and rows exclude each other")
    if rule is None:
        rule = Filled(rows) if rows is not None else _planned(model, exits, machine)
    return Engine(model, exits, kv=kv, rule=rule, **options)


def _planned(model: Any, exits: Exits, machine: Machine | None) -> Planned:
    shape = Shape.of(model)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    sized = exits_of(exits, {band.leave: 0.0 for band in exits})  # what judging reads; rates are those seen
    return Planned(Machine.measure(dtype) if machine is None else machine, shape, sized)
