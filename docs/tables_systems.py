"""Renderers of the tables of docs/split.md and docs/utilities.md, part of tables.py."""

from __future__ import annotations

from pathlib import Path

from table_parts import header, load


def split(results: Path) -> str:
    """What docs/examples/split.py found: what travels in each precision, and what it does to the answers."""
    found = load(results / "split.json")
    lines = header("wire", "sent", "of all samples in fp32", "answers received", "accuracy", "answer of one process")
    for row in found["wires"]:
        lines.append(
            f"| {row['wire']} | {row['sent_bytes'] / 1024:.1f} KiB | {row['sent_bytes'] / found['all_fp32_bytes']:.1%} "
            f"| {row['received_bytes'] / 1024:.1f} KiB | {row['accuracy']:.1%} | {row['same_answer']:.1%} |"
        )
    some = found["wires"][0]
    text = (
        f"{found['model']}, {found['samples']} held-out digits in batches of {found['batch']}, cut after layer "
        f"{found['boundary']}, exits at probability {found['threshold']:g}: {some['samples']} samples travel. One process: "
        f"accuracy {found['accuracy_one_process']:.1%}."
    )
    return "\n".join([*lines, "", text, ""])


def taocache(results: Path) -> str:
    """What benchmarks/taocache.py found: model calls against the distance from the pictures of all steps."""
    found = load(results / "taocache.json")
    lines = header("threshold", "start", "most", "model calls per prompt", "fewest–most", "PSNR", "PSNR, as many plain steps")
    for row in found["rows"]:
        all_steps = round(row["model_calls"]) == found["steps"]
        plain = "all steps" if all_steps else f"{row['psnr_fewer_steps']:.1f} dB"
        lines.append(
            f"| {row['threshold']:g} | {row['start']:g} | {row['most']} | {row['model_calls']:.1f} of {found['steps']} "
            f"| {row['fewest']}–{row['most_calls']} | {row['psnr']:.1f} dB | {plain} |"
        )
    text = (
        f"`benchmarks/taocache.py`: a DiT of four layers on 8 × 8 digits, DDIM, {found['prompts']} prompts; PSNR against the "
        "pictures of all steps from the same noise."
    )
    return "\n".join([*lines, "", text, ""])


TABLES = {"split": split, "taocache": taocache}
