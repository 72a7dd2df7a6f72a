"""The image demo: scikit-learn's digits, a small ViT trained here, exits with a certificate, five ways to run them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dyndepth.calibration import calibrate_samples
from dyndepth.demo.tasks import digits
from dyndepth.demo.tasks.measure import Problem, accuracy, run_and_write
from dyndepth.encoders import DynamicEncoder

RISK, CONFIDENCE = 0.02, 0.95


def run(
    folder: Path, *, batches: Sequence[int] = (1, 8, 32, 128), repetitions: int = 5, epochs: int = digits.EPOCHS
) -> dict[str, Any]:
    """Train once, set thresholds on calibration images, measure on test images; writes image.json and image.png."""
    console = Console()
    with Progress(
        TextColumn("training a ViT on digits (once)"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, disable=digits.cached(epochs).exists(),
    ) as progress:  # fmt: skip
        bar = progress.add_task("train", total=epochs)
        model, exits = digits.load(epochs, advance=lambda: progress.advance(bar))
    data = digits.digits()
    calibration, test = data["calibration"], data["test"]
    exits = calibrate_samples(model, exits, [{"pixel_values": calibration.pixels}], risk=RISK, confidence=CONFIDENCE)
    certificate = exits.record["certificate"]
    console.print(
        f"thresholds from {len(calibration)} calibration images: "
        + (
            f"another answer than at full depth on at most {RISK:.0%} of images, with {CONFIDENCE:.0%} confidence "
            f"(measured {certificate['measured_risk']:.1%})"
            if certificate["certified"]
            else "nothing could be certified, so the exits are closed"
        ),
        highlight=False,
    )
    problem = Problem(
        "image",
        DynamicEncoder(model, exits),
        lambda numbers: {"pixel_values": test.pixels[list(numbers)]},
        len(test),
        accuracy(test.labels),
    )
    facts = {
        "model": f"ViT, {model.config.num_hidden_layers} layers of {model.config.hidden_size}",
        "data": "scikit-learn digits",
        "images": {name: len(part) for name, part in data.items()},
        "exits": [point.leave for point in exits],
        "record": exits.record,
    }
    title = f"{len(test)} digits, {facts['model']}, exits after {', '.join(str(point.leave) for point in exits)}"
    return run_and_write(problem, folder, batches, repetitions, facts, title)
