"""Renderers of tables from docs/results/zen5, part of tables.py: those of docs/speed.md, and some measured there alone."""

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


def kv_ranks_zen5(results: Path) -> str:
    """What K,V maps cut to a rank cost the rows that stay, and what back-filling with them takes."""
    found = load(results / "zen5" / "kv_ranks.json")
    counts = [str(count) for count in found["leaving"]]
    lines = header("exit", "rank", "maps, M numbers", "KL", "agreement", *(f"{count} rows, µs (p10–p90)" for count in counts))
    for row in found["rows"]:
        times = [[1e6 * each for each in row["seconds"][count]] for count in counts]
        lines.append(
            f"| {row['exit']} | {row['rank'] or 'whole'} | {row['numbers'] / 1e6:.2f} | {row['kl']:.4f} "
            f"| {row['agreement']:.1%} | " + " | ".join(f"{m:.0f} ({low:.0f}–{high:.0f})" for m, low, high in times) + " |"
        )
    text = (
        f"{found['model']}, {found['dtype']}; {found['share']:.0%} of the rows leave by lot; KL(full ‖ dynamic) in nats and "
        f"agreement with full depth of the {found['rows'][0]['rows']} judged rows that stay; ridge on "
        f"{found['fitted_on_tokens']} tokens. "
        f"Seconds of one `backfill_kv` of 20 and 10 layers, caches evicted, median of {found['rounds']} rounds in turn. "
    )
    return "\n".join([*lines, "", text + machine(found), ""])


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
} | {"prompt_parts_zen5": prompt_parts_zen5, "kv_ranks_zen5": kv_ranks_zen5}
