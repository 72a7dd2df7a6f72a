"""The demo's picture: which layers every token of one continuation ran, and tokens per second side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dyndepth.demo.measure import Row
from dyndepth.exits import Exits
from dyndepth.files import replacing

_COLOURS = {"static cache": "#9a9a9a", "full depth": "#4c78a8", "dynamic": "#2ca25f"}


def draw(path: Path, rows: list[Row], exits: Exits, tokenizer: Any, output: Any, width: int, depth: int, shown: int) -> None:
    """Write a PNG: a token x depth heat map of continuation `shown`, and bars of tokens per second with p10-p90."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    ran = np.ones((depth, 0))
    labels = []
    for token, bits, layers in zip(
        output.sequences[shown, width:].tolist(),
        output.bands_taken[shown].tolist(),
        output.layers_run[shown].tolist(),
        strict=True,
    ):
        if layers < 0:
            break
        column = np.ones((depth, 1))
        for number, band in enumerate(exits):
            if bits >> number & 1:
                column[band.leave : band.resume] = 0
        ran = np.hstack([ran, column])
        labels.append(_printable(tokenizer.decode([token])))

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(14, 9), height_ratios=[3, 2], constrained_layout=True)
    top.imshow(ran, aspect="auto", origin="lower", cmap=_map(), vmin=0, vmax=1, interpolation="nearest")
    top.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    top.set_yticks([0, depth // 2, depth - 1], ["1", str(depth // 2 + 1), str(depth)])
    top.set_ylabel("decoder layer")
    top.set_title(f"layers that ran for each token ({ran.mean():.1%} of this continuation's token x layer cells)", loc="left")

    batches = sorted({row.batch for row in rows})
    for place, batch in enumerate(batches):
        group = [row for row in rows if row.batch == batch]
        for offset, row in enumerate(group):
            x = place + (offset - (len(group) - 1) / 2) * 0.25
            median = row.tokens_per_s_median
            bars = [[median - row.tokens_per_s_p10], [row.tokens_per_s_p90 - median]]
            label = f"{row.system}, {row.mode}" if place == 0 else None
            bottom.bar(x, median, 0.22, yerr=bars, color=_COLOURS[row.mode], label=label, capsize=3)
            note = f"{median:.0f}\n{row.rows_x_layers:.0%} work\n{row.agreement_teacher_forced:.1%} agree"
            bottom.annotate(
                note,
                (x, row.tokens_per_s_p90),
                ha="center",
                va="bottom",
                fontsize=8,
                xytext=(0, 3),
                textcoords="offset points",
            )
    bottom.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    bottom.set_ylabel("new tokens per second")
    bottom.set_ylim(0, 1.3 * max(row.tokens_per_s_p90 for row in rows))
    bottom.legend(loc="upper left", fontsize=8)
    bottom.set_title(
        "tokens per second, median and p10-p90; work = rows x layers run; agree = teacher-forced, with full depth",
        loc="left",
    )
    for axis in (bottom,):
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def _printable(text: str) -> str:
    """What the picture's font has: line ends spelt out, other scripts and symbols as a box."""
    text = text.replace("\n", "\\n").replace("\t", "\\t").replace("$", "\\$")
    return "".join(letter if letter.isprintable() and ord(letter) < 0x250 else "\u25a1" for letter in text)


def _map() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap(["#f2f2f2", "#2b6ca3"])
