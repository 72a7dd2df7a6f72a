"""Tables of encoders: what recipes reach on real text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from table_parts import header


def encoder_text(results: Path) -> str:
    """What `make encoder-text` found: every setting of every system."""
    found = _load(results)
    lines = header("system", "trained", "setting", "accuracy", "samples × layers", "mean layers")
    for row in found["rows"]:
        trained = f"with the model, {row['updates']} updates from {row['started']}" if row["with_model"] else "exits alone"
        setting = row["setting"]
        if "bound" in row:
            setting += f" (bound {row['bound']:.2f})"
        if "products" in row:
            setting += f", {row['products']:.0%} of the products"
        lines.append(
            f"| {row['system']} | {trained} | {setting} | {row['accuracy']:.1%} | {row['samples_x_layers']:.1%} "
            f"| {row['mean_layers']:.2f} |"
        )
    sizes = found["documents"]
    text = (
        f"{found['model']}, {found['layers']} layers; {found['data']}, {found['topics']} topics, the first {found['tokens']} "
        f"tokens of a document; {sizes['train']} documents train, {sizes['held_out']} set thresholds and stop training, "
        f"{sizes['test']} of the published test set are answered, in batches of {found['batch']}."
    )
    return "\n".join([*lines, "", text, ""])


def encoder_text_systems(results: Path) -> str:
    """System, what runs here, what differs, and the figure reached: at most a point is lost, for the least work."""
    found = _load(results)
    lines = header("system", "what the paper adds", "what runs here", "what differs", "reached here")
    for system, (adds, runs, differs) in found["about"].items():
        lines.append(f"| {system} | {adds} | {runs} | {differs} | {figures(found, system)} |")
    text = (
        "Test accuracy at the share of samples × layers, of the setting that loses at most a point on the held-out documents "
        "for the least work there; where none does, of the most accurate one there. EERO and JEI-DNN are held against "
        "DeeBERT's full depth."
    )
    return "\n".join([*lines, "", text, ""])


#: Whose full depth a system without a row of its own is held against: EERO and JEI-DNN share a model with DeeBERT.
_REFERENCE = {"EERO": "DeeBERT", "JEI-DNN": "DeeBERT"}


def figures(found: dict[str, Any], system: str) -> str:
    """What a system reached with the model frozen and with the model trained, of what was measured."""
    reached = [
        _reached(found["rows"], system, with_model)
        for with_model in (False, True)
        if any(row["system"] == system and row["with_model"] == with_model for row in found["rows"])
    ]
    if not reached and any(row["system"] == f"{system}, assistant" for row in found["rows"]):
        return (
            f"its assistant of full width only: {_reached(found['rows'], f'{system}, assistant', True)}; narrowing not measured"
        )
    return "; ".join(reached) or "not measured"


def _reached(rows: list[dict[str, Any]], system: str, with_model: bool) -> str:
    own = [row for row in rows if row["with_model"] == with_model and row["system"] == system]
    reference = _REFERENCE.get(system, system)
    whole = next(
        row for row in rows if row["with_model"] == with_model and row["system"] == reference and row["setting"] == "full depth"
    )
    early = [row for row in own if row["setting"] != "full depth"]
    near = [row for row in early if row["held_out"]["accuracy"] >= whole["held_out"]["accuracy"] - 0.01]
    best = (
        min(near, key=lambda row: row["held_out"]["samples_x_layers"])
        if near
        else max(early, key=lambda row: row["held_out"]["accuracy"])
    )
    how = "model trained" if with_model else "model frozen"
    setting = f"{best['setting']}; full depth {whole['accuracy']:.1%}; {how}"
    return f"{best['accuracy']:.1%} at {best['samples_x_layers']:.0%} ({setting})"


def _load(results: Path) -> Any:
    return json.loads((results / "encoder_text.json").read_text(encoding="utf-8"))


def demo_text(results: Path) -> str:
    """What `dyndepth demo --task text` printed."""
    found = json.loads((results / "text.json").read_text(encoding="utf-8"))
    lines = header("batch", "system", "documents/s (p10–p90)", "samples × layers", "accuracy", "agreement")
    for row in found["rows"]:
        lines.append(
            f"| {row['batch']} | {row['system']}, {row['mode']} | {row['samples_per_s_median']:.0f} "
            f"({row['samples_per_s_p10']:.0f}–{row['samples_per_s_p90']:.0f}) | {row['samples_x_layers']:.1%} "
            f"| {row['quality']:.1%} | {row['agreement']:.1%} |"
        )
    facts, cpu = found["facts"], found["machine"]["cpu"]
    certificate = facts["record"]["certificate"]
    text = (
        f"`dyndepth demo --task text`: {facts['model']}; {facts['documents']['test']} test documents of {facts['data']}; "
        f"disagreement with full depth at most {certificate['risk']:.0%} with {certificate['confidence']:.0%} confidence, "
        f"certified on {certificate['n']} other documents. {facts['threads']} threads, {cpu['name']} ({cpu['capability']})."
    )
    return "\n".join([*lines, "", text, ""])


TABLES: dict[str, Callable[[Path], str]] = {
    "demo_text": demo_text,
    "encoder_text": encoder_text,
    "encoder_text_systems": encoder_text_systems,
}
