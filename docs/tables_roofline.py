"""Renderers of the tables of docs/roofline.md, part of tables.py. Nothing is read from docs/results: the planner computes."""

from __future__ import annotations

import functools
from pathlib import Path

from table_parts import header

from dyndepth.plan import Leaving, Sizes, calls, graph_calls, peak, roofline
from dyndepth.plan.passes import total

MODELS = {"roofline_smollm2": "SmolLM2-135M", "roofline_llama3": "Llama-3-8B", "roofline_qwen3": "Qwen3-8B"}
MACHINES = ("h100-sxm", "h200", "b200", "mi300x")
ROWS = (1, 8, 32, 128, 256)
#: Tokens whose K,V every row reads.
CONTEXT = 2048


def machines(_results: Path) -> str:
    """The four data sheets."""
    lines = header("GPU", "dense BF16, TFLOP/s", "memory, TB/s", "FLOPs per byte at the corner", "source")
    for machine in map(peak, MACHINES):
        lines.append(
            f"| {machine.name} | {machine.flops / 1e12:g} | {machine.bandwidth / 1e12:g} "
            f"| {machine.flops / machine.bandwidth:.0f} | {machine.source} |"
        )
    return "\n".join([*lines, "", ""])


def ops(name: str, _results: Path) -> str:
    """Every op of one model, by rows."""
    sizes = Sizes.known(name)
    lines = header("op", "rows", "MB", "GFLOP", *(f"{machine}, µs" for machine in MACHINES))
    by_rows = [roofline.ops(sizes, rows, CONTEXT) for rows in ROWS]
    for column in zip(*by_rows, strict=True):
        for line in column:
            cells = [_microseconds(*roofline.bound(peak(machine), line.traffic)) for machine in MACHINES]
            named = f"`{line.op}`, {line.what}" if line is column[0] else ""
            lines.append(
                f"| {named} | {line.rows} | {line.traffic.bytes / 1e6:.3g} | {line.traffic.flops / 1e9:.3g} "
                f"| {' | '.join(cells)} |"
            )
    return "\n".join([*lines, "", f"Arithmetic, not measured. {CONTEXT} tokens of context; c: compute decides.", ""])


def passes(_results: Path) -> str:
    """One pass without exits and with, by model and rows."""
    lines = header("model", "rows", "pass", "launches", "GB", "of no exit", *(f"{machine}, ms" for machine in MACHINES))
    for name in MODELS.values():
        for rows in ROWS:
            found = roofline.passes(Sizes.known(name), rows, CONTEXT)
            for line in found:
                first, moved = line is found[0], line.traffic.bytes
                cells = [f"{line.seconds(peak(machine)) * 1e3:.3g}" for machine in MACHINES]
                lines.append(
                    f"| {name if first else ''} | {rows if first else ''} | {line.name} | {line.launches} | {moved / 1e9:.3g} "
                    f"| {moved / found[0].traffic.bytes:.1%} | {' | '.join(cells)} |"
                )
    return "\n".join([*lines, "", f"Arithmetic, not measured. {CONTEXT} tokens of context.", ""])


def graph(_results: Path) -> str:
    """The same pass of predict in slices and in graph style."""
    lines = header("model", "rows", "in slices, GB", "graph style, GB", "of slices", "nobody leaves, graph style, GB")
    for name in MODELS.values():
        sizes = Sizes.known(name)
        for rows in ROWS:
            half = [Leaving(sizes.layers // 2, -(-rows // 2))]
            nobody = [Leaving(sizes.layers // 2, 0)]
            slices = total(calls(sizes, rows, CONTEXT, half))[1].bytes
            fixed, full = (total(graph_calls(sizes, rows, CONTEXT, exits))[1].bytes for exits in (half, nobody))
            first = name if rows == ROWS[0] else ""
            lines.append(
                f"| {first} | {rows} | {slices / 1e9:.3g} | {fixed / 1e9:.3g} | {fixed / slices:.1%} | {full / 1e9:.3g} |"
            )
    return "\n".join([*lines, "", f"Arithmetic, not measured. {CONTEXT} tokens of context.", ""])


TABLES = {
    "roofline_graph": graph,
    "roofline_machines": machines,
    "roofline_passes": passes,
    **{table: functools.partial(ops, name) for table, name in MODELS.items()},
}


def _microseconds(seconds: float, by: str) -> str:
    return f"{seconds * 1e6:.3g}" + (" c" if by == roofline.COMPUTE else "")
