"""Renderers of docs/speed-zen5.md, part of tables.py: tables of docs/speed.md from docs/results/zen5."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from table_parts import header, load, machine
from tables_compare import compare, compare_full_depth
from tables_speed import depth_efficiency, depth_efficiency_context1024, depth_efficiency_rank256, kernel_ratios
from tables_vision import encoder_depth


def _there(table: Callable[[Path], str], results: Path) -> str:
    return table(results / "zen5")


def prompt_parts_zen5(results: Path) -> str:
    """What `make prompt-parts` found: a layer of a prompt, part by part."""
    found = load(results / "zen5" / "prompt_parts.json")
    lines: list[str] = []
    for shape in found["shapes"]:
        prompts, tokens = shape["prompts"], shape["tokens"]
        lines += [f"**{prompts} prompt{'s' if prompts > 1 else ''} of {tokens} tokens**, ms a layer (GFLOP/s)", ""]
        lines += header("part", "ours", "PyTorch", "oneDNN, packed weights")
        sums = dict.fromkeys(("ours", "library", "packed"), 0.0)
        for part in shape["parts"]:
            cells = []
            for who in sums:
                taken = part["seconds"].get(who)
                sums[who] += part["seconds"]["library" if taken is None else who]
                rate = "" if taken is None or not part["operations"] else f" ({part['operations'] / taken / 1e9:.0f})"
                cells.append("–" if taken is None else f"{1e3 * taken:.2f}{rate}")
            lines.append(f"| {part['part']} | {' | '.join(cells)} |")
        lines.append(f"| sum | {' | '.join(f'{1e3 * taken:.2f}' for taken in sums.values())} |")
        lines += [f"| a layer of the pass | {1e3 * shape['layer_s']:.2f} | – | – |", ""]
    text = (
        f"`make prompt-parts`: {found['dtype']}, {found['threads']} threads, medians, in turn. Ours add residuals and "
        "multiply gates in the same call; where nothing is packed the last column sums PyTorch's. "
    )
    return "\n".join([*lines, text + machine(found), ""])


TABLES: dict[str, Callable[[Path], str]] = {
    f"{table.__name__}_zen5": partial(_there, table)
    for table in (
        compare,
        compare_full_depth,
        depth_efficiency,
        depth_efficiency_context1024,
        depth_efficiency_rank256,
        kernel_ratios,
        encoder_depth,
    )
} | {"prompt_parts_zen5": prompt_parts_zen5}
