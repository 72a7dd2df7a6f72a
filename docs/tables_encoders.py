"""Renderers of the tables of docs/encoders.md, part of tables.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from table_parts import demo_rows, header, load, machine


def encoder_layouts(results: Path) -> str:
    """What benchmarks/encoder_layouts.py found: a pass packed, padded and by transformers."""
    found = load(results / "encoder_layouts.json")
    names = ("dtype", "lengths", "batch", "padding", "packed, ms", "padded, ms", "transformers, ms")
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    for row in found["rows"]:
        times = [f"{row[f'{name}_s'] * 1e3:.1f}" for name in ("packed", "padded", "transformers")]
        lines.append(f"| {row['dtype']} | {row['lengths']} | {row['batch']} | {row['padding']:.0%} | {' | '.join(times)} |")
    cpu = found["machine"]["cpu"]
    text = (
        f"Medians of {found['rounds']} rounds taken in turn, {found['threads']} threads, {cpu['name']} ({cpu['capability']})."
    )
    return "\n".join([*lines, "", text, ""])


def encoder_speech(results: Path) -> str:
    """What benchmarks/encoder_speech.py found: exits by themselves, both criteria by threshold, speed by batch size."""
    found = load(results / "encoder_speech.json")
    lines = header("everybody leaves after", "WER", "CER")
    for row in found["exits"]:
        lines.append(f"| layer {row['leave']} of {found['layers']} | {row['wer']:.1%} | {row['cer']:.1%} |")
    lines += ["", *header("criterion", "threshold", "samples × layers", "WER", "CER", "same text as full depth")]
    for row in found["sweep"]:
        lines.append(
            f"| {row['criterion']} | {row['threshold']:g} | {row['samples_x_layers']:.1%} | {row['wer']:.1%} "
            f"| {row['cer']:.1%} | {row['same_text']:.1%} |"
        )
    lines += ["", *header("block", "batch", "way", "phrases/s (p10–p90)", "samples × layers", "WER")]
    for row in found["rows"]:
        lines.append(
            f"| {row['criterion']} {row['threshold']:g} | {row['batch']} | {row['system']}, {row['mode']} "
            f"| {row['samples_per_s_median']:.1f} ({row['samples_per_s_p10']:.1f}–{row['samples_per_s_p90']:.1f}) "
            f"| {row['samples_x_layers']:.1%} | {row['quality']:.1%} |"
        )
    chosen = ", ".join(f"{row['criterion']} {row['threshold']:g}" for row in chosen_on_calibration(found).values())
    machines: dict[str, list[str]] = {}
    for criterion, sizes in found["speed"].items():
        for run in sizes.values():
            of = f"{run['threads']} threads, {run['repetitions']} repetitions in turn, {machine(run)[:-1]}"
            machines.setdefault(of, [])
            machines[of] += [criterion] * (criterion not in machines[of])
    runs = "; ".join(f"{' and '.join(criteria)} on {of}" for of, criteria in machines.items())
    text = (
        f"{found['phrases']} phrases, {found['seconds_of_speech']:.0f} s of speech, {found['parameters'] / 1e6:.2f} M "
        f"parameters, trained for {found['training']['steps']} steps of {found['training']['batch']} phrases. Speed is at the "
        f"threshold chosen on other phrases of these voices, the least work with a WER at most {found['spare_wer'] * 100:.0f} "
        f"points above full depth's there: {chosen}. Compare speeds only within a block and batch size: each was measured in a "
        f"run of its own ({runs}). transformers' batch reads padding, hence its WER."
    )
    return "\n".join([*lines, "", text, ""])


def demo_speech(results: Path) -> str:
    """What `dyndepth demo --task speech` printed."""
    found = load(results / "speech.json")
    facts = found["facts"]
    certificate = facts["record"]["certificate"]
    said = (
        f"another text than at full depth for at most {certificate['risk']:.0%} of phrases with "
        f"{certificate['confidence']:.0%} confidence, certified on {facts['phrases']['calibration']} other phrases"
        if certificate["certified"]
        else "nothing could be certified: exits are closed"
    )
    text = (
        f"{facts['model']}, exits after {', '.join(map(str, facts['exits']))}; {facts['phrases']['test']} phrases; {said}. "
        f"Agreement: the arg max of every frame is that of transformers' first batch size. {facts['threads']} threads, "
        f"{facts['repetitions']} repetitions. {machine(found)}"
    )
    return "\n".join([*demo_rows(found, "phrases", "WER"), "", text, ""])


def chosen_on_calibration(found: dict[str, Any]) -> dict[str, Any]:
    """Criterion -> the row of its sweep that runs the least on the calibration phrases at a word error rate that may be."""
    most = found["full"]["calibration"]["wer"] + found["spare_wer"]
    near = [row for row in found["sweep"] if row["calibration"]["wer"] <= most]
    return {
        criterion: min(
            (row for row in near if row["criterion"] == criterion), key=lambda row: row["calibration"]["samples_x_layers"]
        )
        for criterion in dict.fromkeys(row["criterion"] for row in near)
    }


TABLES = {"demo_speech": demo_speech, "encoder_layouts": encoder_layouts, "encoder_speech": encoder_speech}
