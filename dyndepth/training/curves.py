"""The picture of a run: loss, validation KL and agreement over the rows shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dyndepth.errors import ArgumentError
from dyndepth.files import replacing, require
from dyndepth.training.trainer import metrics


def draw(run: Path, path: Path) -> None:
    """Write a PNG from a run's metrics."""
    require("matplotlib", "curves need matplotlib: pip install 'dyndepth[train]'")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = list(metrics(run))
    steps = [entry for entry in entries if "loss" in entry]
    looks = [entry for entry in entries if "validation" in entry]
    if not looks:
        raise ArgumentError(f"curves: {run} holds no run that was looked at")
    shown, total = {0: 0}, 0
    for entry in steps:
        total += entry["rows"]
        shown[entry["update"]] = total
    exits = list(looks[0]["validation"])
    figure, panes = plt.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    for colour, leave in zip(plt.get_cmap("viridis")([i / max(1, len(exits)) for i in range(len(exits))]), exits, strict=True):
        label = f"exit {leave}"
        panes[0].plot(
            [shown[e["update"]] for e in steps], _smooth([e["loss"][leave] for e in steps]), color=colour, label=label
        )
        for pane, name in ((panes[1], "kl"), (panes[2], "agreement")):
            values = [look["validation"][leave][name] for look in looks]
            pane.plot([shown[look["update"]] for look in looks], values, ".-", color=colour, label=label)
    for pane, title, unit in (
        (panes[0], "training loss", "nats (moving average)"),
        (panes[1], "KL(full || exit), validation", "nats per token"),
        (panes[2], "agreement with full depth, validation", "share of tokens"),
    ):
        pane.set_title(title, loc="left")
        pane.set_xlabel("rows shown")
        pane.set_ylabel(unit)
        pane.grid(alpha=0.3)
    panes[1].legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def _smooth(values: list[Any], share: float = 0.1) -> list[float]:
    """Exponential moving average, started at the first value."""
    out, mean = [], values[0] if values else 0.0
    for value in values:
        mean += share * (value - mean)
        out.append(float(mean))
    return out
