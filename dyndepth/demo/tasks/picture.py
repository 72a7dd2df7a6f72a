"""The picture of a task demo: samples per second by batch size, and quality against the work that was run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dyndepth.demo.tasks.measure import DYNAMIC, FULL, LOOP, STREAM, WAITING, Row
from dyndepth.files import replacing

_COLOURS = {FULL: "#4c78a8", LOOP: "#9a9a9a", WAITING: "#e0a030", DYNAMIC: "#8fce9f", STREAM: "#2ca25f"}


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Write a PNG: bars with p10-p90 per batch size, and per way its quality over its share of samples x layers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), width_ratios=[2, 1], constrained_layout=True)
    batches = sorted({row.batch for row in rows})
    named: set[str] = set()
    for place, batch in enumerate(batches):
        group = [row for row in rows if row.batch == batch]
        for offset, row in enumerate(group):
            x = place + (offset - (len(group) - 1) / 2) * 0.22
            median = row.samples_per_s_median
            spread = [[median - row.samples_per_s_p10], [row.samples_per_s_p90 - median]]
            label = None if row.mode in named else row.mode
            named.add(row.mode)
            left.bar(x, median, 0.2, yerr=spread, color=_COLOURS[row.mode], label=label, capsize=3)
            note = f"{median:.0f}\n{row.samples_x_layers:.0%}"
            left.annotate(
                note, (x, row.samples_per_s_p90), ha="center", va="bottom", fontsize=7, xytext=(0, 3),
                textcoords="offset points",
            )  # fmt: skip
    left.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    left.set_ylabel("samples/s, median, p10-p90; % of work run")
    left.set_ylim(0, 1.25 * max(row.samples_per_s_p90 for row in rows))
    left.legend(loc="upper left", fontsize=8)
    left.set_title(title, loc="left", fontsize=9)
    for mode in dict.fromkeys(row.mode for row in rows):
        own = [row for row in rows if row.mode == mode]
        right.scatter([row.samples_x_layers for row in own], [row.quality for row in own], color=_COLOURS[mode], label=mode)
    right.set_xlabel("share of samples x layers run")
    right.set_ylabel(rows[0].metric)
    right.set_xlim(0, 1.05)
    right.set_ylim(min(row.quality for row in rows) - 0.02, max(row.quality for row in rows) + 0.02)
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
