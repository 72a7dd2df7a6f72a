"""Tables of encoders: what recipes reach on real text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from table_parts import demo_rows, header, load


def encoder_text(results: Path) -> str:
    """What `make encoder-text` found: every setting of every system."""
    found = load(results / "encoder_text.json")
    lines = header("system", "trained", "setting", "accuracy", "samples × layers", "mean layers")
    for row in found["rows"]:
        trained = f"with the model, {_updates(row)} updates from {row['started']}" if row["with_model"] else "exits alone"
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
    found = load(results / "encoder_text.json")
    lines = header("system", "what the paper adds", "what runs here", "what differs", "reached here")
    for system, (adds, _, differs) in found["about"].items():
        lines.append(f"| {system} | {adds} | {runs_here(found, system)} | {differs} | {figures(found, system)} |")
    return "\n".join([*lines, "", f"Test accuracy at the share of samples × layers, {SETTINGS}", ""])


#: How the one setting of a system is picked, as `figures` picks it.
SETTINGS = (
    "of the setting that loses at most a point on the held-out documents for the least work there; where none does, of the "
    "most accurate one there, and it says so. EERO and JEI-DNN are held against DeeBERT's full depth. A model that was trained "
    "with its exits was trained for as many updates as stand beside it, which is short; a frozen model is the one published."
)
#: Whose full depth a system without a row of its own is held against: EERO and JEI-DNN share a model with DeeBERT.
_REFERENCE = {"EERO": "DeeBERT", "JEI-DNN": "DeeBERT"}


def runs_here(found: dict[str, Any], system: str) -> str:
    """What runs here; where only a system's assistant has figures, that, and apart from it what has none."""
    told: str = found["about"][system][1]
    return f"an assistant of full width with exits; without a figure: {told}" if _only_assistant(found, system) else told


def figures(found: dict[str, Any], system: str) -> str:
    """What a system reached with the model frozen and with the model trained, of what was measured."""
    if _only_assistant(found, system):
        return f"its assistant only: {_reached(found, f'{system}, assistant', True)}; narrowing not measured"
    reached = [_reached(found, system, with_model) for with_model in (False, True) if _rows(found, system, with_model)]
    return "; ".join(reached) or "not measured"


def _updates(row: dict[str, Any]) -> str:
    """How many trained the model; a model that was made narrower in steps had as many after each."""
    return f"{row['steps']} times {row['updates']}" if "steps" in row else str(row["updates"])


def _rows(found: dict[str, Any], system: str, with_model: bool) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if row["system"] == system and row["with_model"] == with_model]


def _only_assistant(found: dict[str, Any], system: str) -> bool:
    systems = {row["system"] for row in found["rows"]}
    return system not in systems and f"{system}, assistant" in systems


def _reached(found: dict[str, Any], system: str, with_model: bool) -> str:
    own = _rows(found, system, with_model)
    reference = _rows(found, _REFERENCE.get(system, system), with_model)
    whole = next(row for row in reference if row["setting"] == "full depth")
    early = [row for row in own if row["setting"] != "full depth"]
    near = [row for row in early if row["held_out"]["accuracy"] >= whole["held_out"]["accuracy"] - 0.01]
    best = (
        min(near, key=lambda row: row["held_out"]["samples_x_layers"])
        if near
        else max(early, key=lambda row: row["held_out"]["accuracy"])
    )
    setting = best["setting"] if near else f"{best['setting']}, the most accurate: none is within a point"
    if "products" in best:
        setting += f"; {best['products']:.0%} of the wide layers' products"
    how = "model frozen"
    if with_model:
        how = f"model trained, {_updates(best)} updates of {found['batch']} from {best['started']}"
    return f"{best['accuracy']:.1%} at {best['samples_x_layers']:.0%} ({setting}; full depth {whole['accuracy']:.1%}; {how})"


def demo_text(results: Path) -> str:
    """What `dyndepth demo --task text` printed."""
    found = load(results / "text.json")
    lines = demo_rows(found, "documents", "accuracy")
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
