"""What `dyndepth plan --roofline` says: lower bounds of ops and passes (docs/roofline.md)."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

from dyndepth.errors import ArgumentError

if TYPE_CHECKING:
    from dyndepth.plan import Exit, Leaving, Machine, Sizes


def say(machine: Machine, sizes: Sizes, exits: Sequence[Exit], source: str, batches: Sequence[int], context: int) -> None:
    """Tables on the terminal."""
    from dyndepth.plan import roofline

    console = Console(highlight=False)
    console.print(
        f"{sizes.name} on {machine.name}, {machine.dtype}: {machine.bandwidth / 1e12:.3g} TB/s, {machine.flops / 1e12:.4g} "
        f"TFLOP/s ({machine.source}); context {context}. Arithmetic, not measured.",
        soft_wrap=True,
    )
    table = Table(Column("op", no_wrap=True), "rows", "MB", "GFLOP", "at least, us", "waits for", title="ops")
    for column in zip(*(roofline.ops(sizes, rows, context, machine.item) for rows in batches), strict=True):
        for line in column:
            seconds, by = roofline.bound(machine, line.traffic)
            first, last = line is column[0], line is column[-1]
            moved, flops = f"{line.traffic.bytes / 1e6:.3g}", f"{line.traffic.flops / 1e9:.3g}"
            named = f"{line.op}: {line.what}" if first else ""
            table.add_row(named, str(line.rows), moved, flops, f"{seconds * 1e6:.3g}", by, end_section=last)
    console.print(table)
    table = Table("rows", "pass", "launches", "GB", "at least, ms", "of no exit", title="one pass")
    for rows in batches:
        found = roofline.passes(sizes, rows, context, leaving(exits, rows, sizes), machine.item)
        full = found[0].seconds(machine)
        for line in found:
            seconds, first, last = line.seconds(machine), line is found[0], line is found[-1]
            cells = [line.name, str(line.launches), f"{line.traffic.bytes / 1e9:.3g}", f"{seconds * 1e3:.3g}"]
            table.add_row(str(rows) if first else "", *cells, f"{seconds / full:.1%}", end_section=last)
    console.print(table)
    listed = ", ".join(f"{one.leave}: {one.rate:.1%}" for one in exits)
    console.print(f"rows that leave, of those live there, rounded: {listed} ({source})", soft_wrap=True)


def write_json(machine: Machine, sizes: Sizes, exits: Sequence[Exit], batches: Sequence[int], context: int) -> None:
    """The same, and every call of every pass, as JSON."""
    from dyndepth.plan import roofline

    ops: list[dict[str, Any]] = []
    passes: list[dict[str, Any]] = []
    for rows in batches:
        for line in roofline.ops(sizes, rows, context, machine.item):
            seconds, by = roofline.bound(machine, line.traffic)
            ops.append({**dataclasses.asdict(line), "bound_s": seconds, "bound_by": by})
        for one in roofline.passes(sizes, rows, context, leaving(exits, rows, sizes), machine.item):
            facts = {"launches": one.launches, "traffic": dataclasses.asdict(one.traffic), "bound_s": one.seconds(machine)}
            passes.append({**dataclasses.asdict(one), **facts})
    facts = {
        "about": "arithmetic, not measured", "machine": machine.to_json(), "model": dataclasses.asdict(sizes),
        "context": context, "ops": ops, "passes": passes,
    }  # fmt: skip
    sys.stdout.write(json.dumps(facts, indent=1) + "\n")


def leaving(exits: Sequence[Exit], rows: int, sizes: Sizes) -> list[Leaving]:
    """How many rows leave at each boundary: the rate of those that are live there, rounded."""
    from dyndepth.plan import Leaving

    found, live = [], rows
    for one in sorted(exits, key=lambda one: one.leave):
        if one.resume != sizes.layers:
            raise ArgumentError(f"--roofline: rows leave for good; band [{one.leave}, {one.resume}) resumes")
        gone = round(live * one.rate)
        found.append(Leaving(one.leave, gone, one.words))
        live -= gone
    return found
