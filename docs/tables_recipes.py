"""Tables of recipe pages, part of tables.py: MuE, DYNAMAX, regression under PABEE, Splitformer on this project's data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from table_parts import header, load


def mue(results: Path) -> str:
    """What `benchmarks/mue.py` found: thresholds per stream and in the decoder, accuracy and work."""
    found = load(results / "mue.json")
    lines = header(
        "asked for", "thresholds: image, text, decoder", "exact answers", "image layers", "text layers", "decoder layers"
    )
    for row in found["rows"]:
        limits = [row["thresholds"][part] for part in ("image", "text", "decoder")]
        shown = ", ".join("–" if limit is None else f"{limit:g}" for limit in limits)
        work = " | ".join(f"{row['work'][part]:.1%}" for part in ("image", "text", "decoder"))
        lines.append(f"| {row['system']} | {shown} | {row['accuracy']:.1%} | {work} |")
    pictures = found["pictures"]
    text = (
        f"{found['model']}, trained for {found['steps']} steps of {found['batch']}; {found['data']}; {found['questions']} "
        f"questions on {pictures['test']} test pictures. Thresholds are chosen on {pictures['choose']} others: image, then "
        f"text, then decoder, each loosened from {max(found['levels']):g} to {min(found['levels']):g} at the most as long as "
        "it keeps the share of full depth's accuracy there. Layers: share of samples × layers, in the decoder of tokens × "
        "layers."
    )
    return "\n".join([*lines, "", text, ""])


def dynamax(results: Path) -> str:
    """What `benchmarks/dynamax.py` found: classifiers by themselves, then thresholds under both state policies."""
    found = load(results / "dynamax.json")
    lines = header("classifier", "boundary", "safe to leave", "log-loss, nats", "of the constant guess")
    for kind, places in found["classifiers"].items():
        for leave, one in places.items():
            lines.append(
                f"| {kind} | {leave} of {found['layers']} | {one['safe']:.1%} | {one['log_loss']:.3f} "
                f"| {one['log_loss_of_constant']:.3f} |"
            )
    lines += ["", *header("agreement asked for", "classifier", "skipped states", "threshold", "agreement reached",
                           "rows × layers", "states updated", "the text's own token", "loss, nats")]  # fmt: skip
    for row in sorted(found["rows"], key=lambda row: -row["wanted"]):
        limit = "none found" if row["threshold"] is None else f"{row['threshold']:.3f}"
        lines.append(
            f"| {row['wanted']:.0%} | {row['kind']} | {row['policy']} | {limit} | {row['agreement']:.1%} "
            f"| {row['rows_x_layers']:.1%} | {row['states_updated']:.1%} | {row['accuracy']:.1%} | {row['loss']:.3f} |"
        )
    full, sizes = found["full_depth"], found["documents"]
    text = (
        f"{found['model']}, {found['parameters'] / 1e6:.2f} M parameters, trained for {found['steps']} steps of "
        f"{found['batch']} on {sizes['train']} documents of {found['data']}; at full depth {full['accuracy']:.1%} of the "
        f"text's tokens, loss {full['loss']:.3f}. Classifiers learn from {sizes['learn']} other documents, thresholds from "
        f"{sizes['choose']}: the lowest of those tried that keeps the agreement asked for there (none found: none did, "
        f"and nobody leaves). Figures: {sizes['test']} test documents, {found['tokens'] - found['prompt']} tokens each, "
        "teacher-forced. States updated: the share of rows × layers that did not run but moved its states on, which is "
        "part of a layer's work."
    )
    return "\n".join([*lines, "", text, ""])


def encoder_regression(results: Path) -> str:
    """What `benchmarks/encoder_regression.py` found: PABEE's patience with a tolerance, for numbers."""
    found = load(results / "encoder_regression.json")
    lines = header("patience", "tolerance", "squared error", "variance explained", "samples × layers")
    for row in found["rows"]:
        own = all(row[name] == found["best"][name] for name in ("patience", "tolerance"))
        tolerance = "–" if row["tolerance"] is None else f"{row['tolerance']:g}"
        lines.append(
            f"| {row['patience'] or 'full depth'}{' (chosen)' if own else ''} | {tolerance} | {row['mse']:.3f} "
            f"| {row['explained']:.1%} | {row['samples_x_layers']:.1%} |"
        )
    sizes = found["tweets"]
    text = (
        f"{found['model']}; {found['answer']} of {found['data']}, in standard deviations; {sizes['train']} train, "
        f"{sizes['held_out']} choose: the least samples × layers with a squared error at most {found['spare']:.0%} above full "
        f"depth's. Figures: {sizes['test']} others."
    )
    return "\n".join([*lines, "", text, ""])


def splitformer(results: Path) -> str:
    """What `benchmarks/splitformer.py` found: every exit with half-rate layers and without, after the same training."""
    found = load(results / "splitformer.json")
    lines = header("model", "parameters", "more steps", "exit after layer", "WER", "CER", "operations a second of speech")
    for row in found["rows"]:
        for point in row["exits"]:
            rate = point["operations"] / found["seconds_of_speech"] / 1e6
            lines.append(
                f"| {row['model']} | {row['parameters'] / 1e6:.2f} M | {row['steps']} | {point['leave']} of {found['layers']} "
                f"| {point['wer']:.1%} | {point['cer']:.1%} | {rate:.1f} M |"
            )
    rates = ", ".join(f"{part} {rate:g}" for part, rate in found["peak_rates"].items())
    text = (
        f"{found['phrases']} test phrases. Steps of {found['batch']} of {found['utterances']} phrases; highest rates: {rates}. "
        f"Chosen: {found['chosen']}. Operations: floating-point ones of layers, front end and heads left out."
    )
    return "\n".join([*lines, "", text, ""])


TABLES: dict[str, Callable[[Path], str]] = {
    "mue": mue,
    "dynamax": dynamax,
    "encoder_regression": encoder_regression,
    "splitformer": splitformer,
}
