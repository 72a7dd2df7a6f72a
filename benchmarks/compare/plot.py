"""compare.png: per dtype and context, tokens per second by batch size, and beside it agreement with full depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dyndepth.files import replacing


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """`rows` as in compare.json; nothing is drawn where there is none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    cells = sorted({(row["dtype"], row["context"]) for row in rows})
    if not cells:
        return
    names = list(dict.fromkeys((row["system"], row["mode"]) for row in rows))
    batches = sorted({row["batch"] for row in rows})
    colours = plt.get_cmap("tab20")
    figure, axes = plt.subplots(len(cells), 2, figsize=(15, 1 + 4.6 * len(cells)), squeeze=False, constrained_layout=True)
    for (speed, agreement), (dtype, context) in zip(axes, cells, strict=True):
        for number, name in enumerate(names):
            own = [r for r in rows if (r["system"], r["mode"], r["dtype"], r["context"]) == (*name, dtype, context)]
            own.sort(key=lambda row: row["batch"])
            # A little apart, so that bars and points of one batch size do not cover each other.
            places = [batches.index(row["batch"]) + 0.5 * (number / max(len(names) - 1, 1) - 0.5) for row in own]
            middle = [row["tokens_per_s_median"] for row in own]
            bars = [
                [row["tokens_per_s_median"] - row["tokens_per_s_p10"] for row in own],
                [row["tokens_per_s_p90"] - row["tokens_per_s_median"] for row in own],
            ]
            ours = name[0] == "dyndepth"
            style: dict[str, Any] = {
                "color": colours(number % 20), "marker": "o" if ours else "s", "linewidth": 2 if ours else 1, "markersize": 4,
                "linestyle": "-" if ours else "--", "label": ", ".join(name),
            }  # fmt: skip
            speed.errorbar(places, middle, yerr=bars, capsize=2, **style)
            agreement.plot(places, [row["agreement_teacher_forced"] for row in own], **(style | {"linestyle": ":"}))
        speed.set_yscale("log")
        speed.yaxis.set_major_formatter(ScalarFormatter())
        speed.yaxis.set_minor_formatter(ScalarFormatter())
        speed.set_ylabel("new tokens per second, prompt included")
        speed.set_title(f"{dtype}, context {context}: tokens per second, median and p10–p90", loc="left")
        agreement.set_title("teacher-forced agreement with dyndepth at full depth", loc="left")
        for axis in (speed, agreement):
            axis.set_xticks(range(len(batches)), [str(batch) for batch in batches])
            axis.set_xlabel("batch")
            axis.spines[["top", "right"]].set_visible(False)
        agreement.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)
