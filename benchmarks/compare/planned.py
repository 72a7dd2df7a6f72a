"""What `dyndepth plan` says, beside what was measured: decoding at full depth, with exits, at fixed depths.

The planner knows the machine's products (by ragged_linear where that is the faster), copies and reads, and the model's sizes;
for rows with exits it is also told the share of rows x layers that ran. Its error is of seconds per step: predicted /
measured - 1.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from dyndepth.exits import Exits
from dyndepth.plan import Machine, Shape, exits_of, full_depth, predict
from dyndepth.plan.rates import exits_at

KEY = "planned_decode_tokens_per_s"


@dataclass(frozen=True)
class Planner:
    """Predictions for one model in one dtype."""

    machine: Machine
    shape: Shape
    exits: Exits
    shortlisted: Exits

    def step(self, row: dict[str, Any]) -> float | None:
        """Seconds per decode step of a row of compare.json; None for ways that the planner has no formula for."""
        if row["system"] != "dyndepth" or row["decode_tokens_per_s_median"] is None:
            return None
        # Prompts are shorter than the cell is wide, and padding is never read; the text then grows by `new_tokens`.
        sizes = (row["batch"], round(row["prompt_tokens"] / row["batch"] + row["new_tokens"] / 2))
        mode = row["mode"]
        if mode == "full depth":
            return full_depth(self.machine, self.shape, *sizes).seconds
        if mode.startswith("fixed depth "):
            # Everybody leaves at the named boundary; nothing has to be judged, and the ones below are passed by.
            (there,) = exits_of(self.exits, {int(mode.removeprefix("fixed depth ")): 1.0})
            return predict(self.machine, self.shape, (replace(there, words=0),), *sizes).seconds
        exits = {"dynamic": self.exits, "shortlist": self.shortlisted}.get(mode)
        if exits is None or not 0 < (row["rows_x_layers"] or 0) <= 1:
            return None
        return predict(self.machine, self.shape, exits_at(exits, row["rows_x_layers"]), *sizes).seconds


def beside(rows: Iterable[dict[str, Any]], planner: Callable[[str], Planner] | None) -> list[dict[str, Any]]:
    """The rows, each with the tokens/s of decoding that its dtype's planner predicts (None: it has no formula)."""
    found = []
    for row in rows:
        step = None if planner is None else planner(row["dtype"]).step(row)
        found.append(row | {KEY: None if step is None else row["batch"] / step})
    return found


def error(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Mean and largest absolute error of the predicted seconds per step, and the mean with its sign; None without any."""
    errors = [row["decode_tokens_per_s_median"] / row[KEY] - 1 for row in rows if row.get(KEY)]
    if not errors:
        return None
    return {
        "rows": len(errors),
        "mean_absolute": statistics.fmean(map(abs, errors)),
        "largest": max(errors, key=abs),
        "mean": statistics.fmean(errors),
    }


def planners(subject: Callable[[str], Any]) -> Callable[[str], Planner]:
    """By dtype, when first asked for; this machine is measured then, because its speed changes from day to day."""

    @functools.cache
    def made(dtype: str) -> Planner:
        of = subject(dtype)
        return Planner(Machine.measure(dtype, again=True), Shape.of(of.model), of.exits, of.shortlisted)

    return made
