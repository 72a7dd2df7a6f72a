"""The text demo's frontier: documents per second against accuracy over thresholds, in batches of 32, with a picture.

    PYTHONPATH=benchmarks python benchmarks/encoder_text_speed.py build [--documents 256] [--judged 1024] [--repetitions 3]

The model as published and the exits that come with the package (`dyndepth demo --task text`). A threshold on the largest
probability is one point of the frontier; which one to take is not chosen here, but the demo's own, certified on documents that
are not measured, is among them. Accuracy and work are of `--judged` test documents, answered once; the first `--documents` of
them are timed, all points in turn. Writes encoder_text_speed.json and .png into the folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndepth import info
from dyndepth.demo.measure import Rates, interleaved
from dyndepth.demo.tasks import reuters, text
from dyndepth.demo.tasks.measure import DYNAMIC, FULL, STREAM
from dyndepth.encoders import DynamicEncoder
from dyndepth.files import replacing, require

BATCH = 32
#: Thresholds on the largest probability, the same for every exit, strictest first.
THRESHOLDS = (0.999, 0.99, 0.97, 0.9, 0.8, 0.65, 0.5)

Run = Callable[[], tuple[list[Tensor], float]]


def points(documents: int) -> tuple[dict[tuple[str, float | None], Run], Callable[[list[Tensor]], float], float]:
    """((way, threshold) -> a run over the first test documents, accuracy of their logits, the demo's threshold)."""
    model, tokenizer = reuters.minilm()
    exits = reuters.load_exits()
    found = reuters.documents().test
    split = reuters.Split(found.texts[:documents], found.labels[:documents])
    certified = {point.threshold for point in exits}
    assert len(certified) == 1, certified
    own = certified.pop()
    runs: dict[tuple[str, float | None], Run] = {}
    for threshold in sorted({*THRESHOLDS, own}, reverse=True):
        problem = text.problem_of(DynamicEncoder(model, exits.with_thresholds(threshold)), tokenizer, split)
        ways = problem.ways(BATCH)
        runs.setdefault((FULL, None), ways[FULL])
        runs |= {(way, threshold): ways[way] for way in (DYNAMIC, STREAM)}
    return runs, problem.quality, own


def plot(path: Path, rows: list[dict[str, Any]], certified: float) -> None:
    """Accuracy over documents per second, and over the share of samples x layers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True, sharey=True)
    for axis, key in zip(axes, ("samples_per_s_median", "samples_x_layers"), strict=True):
        for number, way in enumerate((DYNAMIC, STREAM)):
            own = [row for row in rows if row["mode"] == way]
            axis.plot([row[key] for row in own], [100 * row["accuracy"] for row in own], "o-", color=f"C{number}", label=way)
            star = next(row for row in own if row["threshold"] == certified)
            axis.plot(star[key], 100 * star["accuracy"], "*", color=f"C{number}", markersize=15)
        full = next(row for row in rows if row["mode"] == FULL)
        axis.plot(full[key], 100 * full["accuracy"], "ks", markersize=9, label="transformers, full depth")
    axes[0].set(xlabel="test documents per second, batches of 32", ylabel="accuracy, %", title="stars: the certified threshold")
    axes[1].set(xlabel="share of samples x layers run")
    axes[0].legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=256)
    parser.add_argument("--judged", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=3)
    wish = parser.parse_args()
    require("matplotlib", "the picture needs matplotlib: pip install 'dyndepth[demo]'")
    runs, quality, certified = points(wish.judged)
    # A stream gives the answers that batches give (tests/test_sample_stream.py), so it is not asked again.
    judged = {(way, threshold): run() for (way, threshold), run in runs.items() if way != STREAM}
    runs, _, _ = points(wish.documents)
    _, seconds = interleaved(runs, wish.repetitions, lambda: None)
    reference = [logits.argmax(-1) for logits in judged[FULL, None][0]]
    rows: list[dict[str, Any]] = []
    for way, threshold in runs:
        logits, work = judged[DYNAMIC if way == STREAM else way, threshold]
        rates = Rates.of(wish.documents, seconds[way, threshold])
        same = [bool(mine.argmax(-1) == theirs) for mine, theirs in zip(logits, reference, strict=True)]
        rows.append(
            {
                "mode": way, "threshold": threshold, "samples_x_layers": work, "accuracy": quality(logits),
                "agreement": sum(same) / len(same), "samples_per_s_median": rates.median,
                "samples_per_s_p10": rates.p10, "samples_per_s_p90": rates.p90,
            }
        )  # fmt: skip
        print(f"{way}, {threshold}: {rows[-1]['accuracy']:.1%}, work {work:.1%}, {rates.median:.0f} documents/s")
    result = {
        "model": "all-MiniLM-L6-v2", "data": "Reuters R52", "documents": wish.documents, "judged": wish.judged, "batch": BATCH,
        "certified_threshold": certified, "threads": torch.get_num_threads(), "repetitions": wish.repetitions,
        "chosen": "nothing here: every point is shown; the certified threshold comes with the exits, from held-out documents",
        "machine": info.collect(), "rows": rows,
    }  # fmt: skip
    wish.folder.mkdir(parents=True, exist_ok=True)
    with replacing(wish.folder / "encoder_text_speed.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    plot(wish.folder / "encoder_text_speed.png", rows, certified)
    print(f"wrote encoder_text_speed.json and .png into {wish.folder}")


if __name__ == "__main__":
    main()
