"""Renderers of the tables of docs/speed.md, part of tables.py: depth efficiency, kernels, policies, soak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from table_parts import drafts, header, load, machine, percent


def depth_efficiency(results: Path) -> str:
    """What `make depth-efficiency` found: per batch size and forced rate, time saved against a perfect machine's saving."""
    return _depth_efficiency(load(results / "depth_efficiency.json"))


def depth_efficiency_float32(results: Path) -> str:
    """The same in float32."""
    return _depth_efficiency(load(results / "depth_efficiency_float32.json"))


def depth_efficiency_context1024(results: Path) -> str:
    """The same in bfloat16 with a longer context."""
    return _depth_efficiency(load(results / "depth_efficiency_context1024.json"))


def depth_efficiency_rank256(results: Path) -> str:
    """With whole K,V maps and with maps of rank 256, in the same rounds."""
    return _depth_efficiency(load(results / "depth_efficiency_rank256.json"))


def _depth_efficiency(found: dict[str, Any]) -> str:
    lines = header("batch", "rows leave at", "of live rows", "rows × layers", "full step, ms", "saved, ms", "perfect, ms",
                    "weights of boundaries, ms", "depth efficiency (p10–p90)")  # fmt: skip
    for batch in found["batches"]:
        for cell in batch["cells"]:
            lines.append(
                f"| {cell['batch']} | {_scenario(cell)} | {cell['rate']:.0%} | {cell['rows_x_layers']:.1%} "
                f"| {cell['full_s'] * 1e3:.2f} | {cell['saved_s'] * 1e3:.2f} | {cell['perfect_s'] * 1e3:.2f} "
                f"| {cell['boundary_weights_s'] * 1e3:.2f} | {_efficiency(cell)} |"
            )
    lines += ["", *header("batch", "full step, ms", "exits configured, none taken, ms", "cost (p10–p90)")]
    for batch in found["batches"]:
        cost = batch["machinery"]
        lines.append(
            f"| {batch['batch']} | {cost['full_s'] * 1e3:.2f} | {cost['configured_s'] * 1e3:.2f} "
            f"| {cost['cost']:.1%}{_spread(cost['cost_p10'], cost['cost_p90'], 1)} |"
        )
    settings, preempted = found["settings"], sum(batch["preempted"] for batch in found["batches"])
    blocks = sum(batch["blocks"] for batch in found["batches"])
    text = (
        f"{settings['model']}, {settings['dtype']}, context {settings['context']}, {settings['threads']} threads, "
        f"{settings['rounds']} rounds of {_steps(settings['steps'])} steps; {preempted} of {blocks} blocks preempted and left "
        f"out. p10–p90: {_resampled(settings)}. "
        f"– : a perfect machine would save less than {settings['resolved_from']:.0%} of a step. {machine(found)}"
    )
    return "\n".join([*lines, "", text, ""])


def _scenario(cell: dict[str, Any]) -> str:
    rank = cell.get("kv_rank")  # older files have none
    return str(cell["scenario"]) + ("" if rank is None else f", maps of rank {rank}")


def _steps(steps: int | list[int]) -> str:
    counts = [steps] if isinstance(steps, int) else list(dict.fromkeys(steps))
    return " or ".join(map(str, counts))


def _resampled(settings: dict[str, Any]) -> str:
    times = settings.get("resampled")
    return "of rounds" if times is None else f"of the median, by drawing the blocks again {times} times"


def soak(results: Path) -> str:
    """What `make soak` found, in one row."""
    found = load(results / "soak.json")
    verdict, rounds, settings = found["verdict"], found["rounds"], found["settings"]
    memory = verdict["memory"]
    lines = header("minutes", "rounds", "tokens", "resident: first third", "last third", "growth", "pages leaked",
                    "rounds unlike the first", "exception")  # fmt: skip
    shown = ["too short to judge"] * 3
    if memory["leak"] is not None:
        shown = [f"{memory[key] / 2**20:.1f} MiB" for key in ("first_bytes", "last_bytes", "growth_bytes")]
    cells = [
        f"{sum(one['seconds'] for one in rounds) / 60:.1f}", len(rounds), sum(one["tokens"] for one in rounds), *shown,
        verdict["pages_leaked"], len(verdict["different_rounds"]), verdict["error"] or "none",
    ]  # fmt: skip
    lines.append("| " + " | ".join(map(str, cells)) + " |")
    text = (
        f"{settings['model']}, {settings['dtype']}, up to {settings['batch']} requests at once, "
        f"{settings['requests']} a round, {settings['threads']} threads. {machine(found)}"
    )
    return "\n".join([*lines, "", text, ""])


def kernel_ratios(results: Path) -> str:
    """What `make kernel-ratios` found."""
    found = load(results / "kernel_ratios.json")
    lines = header("kernel", "ours, ms", "theirs, ms", "times as fast", f"1 → {found['threads']} threads")
    for row in found["rows"]:
        ours, theirs, alone = row["ours_s"], row["theirs_s"], row["one_thread_s"]
        lines.append(f"| {row['case']} | {ours * 1e3:.2f} | {theirs * 1e3:.2f} | {theirs / ours:.1f} | {alone / ours:.2f} |")
    text = f"`make kernel-ratios`: bfloat16, medians, in turn; attention is ten layers. {machine(found)}"
    return "\n".join([*lines, "", text, ""])


def policies_speed(results: Path) -> str:
    """What `make policies` found about speed."""
    found = load(results / "policies.json")
    lines = header("batch", "", "tokens/s (p10–p90)", "times full depth", "rows × layers", "drafts accepted")
    for row in found["speed"]:
        lines.append(
            f"| {row['batch']} | {row['system']} | {row['tokens_per_s']:.1f} ({row['p10']:.1f}–{row['p90']:.1f}) "
            f"| {row['times_full']:.2f} | {percent(row['rows_x_layers'])} | {drafts(row)} |"
        )
    return "\n".join([*lines, "", _policies(found), ""])


def policies_lossless(results: Path) -> str:
    """What `make policies` found about losslessness."""
    found = load(results / "policies.json")
    lines = header("dtype", "against", "batch", "sequences × tokens", "sequences that differ", "drafts accepted")
    for row in found["lossless"]:
        lines.append(
            f"| {row['dtype']} | {row['against']} | {row['batch']} | {row['sequences']} × {row['tokens']} "
            f"| {row['different']} | {row['accepted']} of {row['drafted']} |"
        )
    return "\n".join([*lines, ""])


def policies_quality(results: Path) -> str:
    """What `make policies` found about the tokens that stay."""
    found = load(results / "policies.json")
    names = list(dict.fromkeys(row["policy"] for row in found["quality"]))
    lines = header("tokens that left", "tokens judged", *(f"{name}: agreement, KL" for name in names))
    for share in dict.fromkeys(row["share"] for row in found["quality"]):
        rows = {row["policy"]: row for row in found["quality"] if row["share"] == share}
        cells = [f"{rows[name]['agreement']:.1%}, {rows[name]['kl']:.4f}" for name in names]
        lines.append(f"| {share:.0%} | {rows[names[0]]['tokens']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def policies_engine(results: Path) -> str:
    """What `make policies` found about re-batching."""
    found = load(results / "policies.json")
    lines = header("rule", "tokens/s", "completion p50, s", "p99, s", "rows × layers", "rows that left", "passes",
                    "rows that waited", "longest wait, passes")  # fmt: skip
    for row in found["engine"]:
        lines.append(
            f"| {row['system']} | {row['tokens_per_s']:.0f} | {row['p50_s']:.2f} | {row['p99_s']:.2f} "
            f"| {row['rows_x_layers']:.1%} | {row['left']:.1%} | {row['passes']} | {row['flushed']} | {row['longest_wait']} |"
        )
    first = found["engine"][0]
    text = f"{first['requests']} requests arrive at once, {first['slots']} slots. {_policies(found)}"
    return "\n".join([*lines, "", text, ""])


def policies_skips(results: Path) -> str:
    """What `make policies` found about drafts that leave out layers."""
    found = load(results / "policies.json")["skips"]
    lines = header("layers that drafts leave out", "drafts accepted", "tokens per weight read, of full depth's")
    for trial in found["search"]["sizes"]:
        layers = ", ".join(map(str, trial["layers"]))
        lines.append(f"| {layers} | {trial['accepted']} of {trial['drafted']} | {trial['gain']:.2f} |")
    lines += ["", *header("batch", "drafts", "tokens/s", "times full depth", "rows × layers", "drafts accepted")]
    for row in found["timed"]:
        lines.append(
            f"| {row['batch']} | {row['system']} | {row['tokens_per_s']:.1f} | {row['times_full']:.2f} "
            f"| {percent(row['rows_x_layers'])} | {drafts(row)} |"
        )
    asked = found["search"]
    text = (
        f"Best set of every size among {asked['trials']}, {asked['prompts']} prompts of {asked['tokens']} new tokens, "
        f"{asked['drafts']} drafts. {_policies(load(results / 'policies.json'))}"
    )
    return "\n".join([*lines, "", text, ""])


def _policies(found: dict[str, Any]) -> str:
    asked = found["settings"]
    return f"`make policies`: {asked['model']}, bfloat16, {asked['threads']} threads, in turn, medians. {machine(found)}"


TABLES = {
    "kernel_ratios": kernel_ratios, "depth_efficiency": depth_efficiency,
    "depth_efficiency_float32": depth_efficiency_float32, "depth_efficiency_context1024": depth_efficiency_context1024,
    "soak": soak,
    "policies_speed": policies_speed, "policies_lossless": policies_lossless, "policies_quality": policies_quality,
    "policies_engine": policies_engine, "policies_skips": policies_skips,
}  # fmt: skip


def _efficiency(cell: dict[str, Any]) -> str:
    if not cell["resolved"]:
        return "–"
    return f"{cell['efficiency']:.0%}{_spread(cell['efficiency_p10'], cell['efficiency_p90'], 0)}"


def _spread(low: float | None, high: float | None, digits: int) -> str:
    return "" if low is None or high is None else f" ({low:.{digits}%}–{high:.{digits}%})"
