"""Three ways to leave a vision model early, on scikit-learn's digits: a ViT with linear exits, LGViT, Dyn-Perceiver.

All are trained on the same images, and every figure is of the same test images. A row is one operating point: a threshold (ViT,
LGViT) or an exit distribution made of calibration images (Dyn-Perceiver), its accuracy, the share of the work that is run, and
samples per second in whole batches, in turn with full depth. What the point reaches on the calibration images stands beside it:
a table that shows one point of a system chooses by those.

    PYTHONPATH=benchmarks python benchmarks/encoder_image.py build [--repetitions 5] [--only train]

`--only train` stops after training, which is kept in the folder: a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyndepth import info
from dyndepth.demo.measure import Rates, interleaved
from dyndepth.demo.tasks import digits
from dyndepth.encoders import DynamicEncoder, SampleExits
from dyndepth.files import replacing, require
from dyndepth.recipes import dyn_perceiver, lgvit

#: Thresholds on the largest probability along which ViT and LGViT are measured; inf is full depth.
THRESHOLDS = (float("inf"), 0.999, 0.99, 0.95, 0.865, 0.7, 0.5)
#: Powers of the exit fractions of Dyn-Perceiver; None is everything through all of it.
POWERS = (None, 3.0, 1.5, 1.0, 0.6, 0.3, 0.1)
SYSTEMS = ("ViT, largest probability", "LGViT", "Dyn-Perceiver")
#: How a table that shows one point of a system picks it.
CHOSEN = "on the calibration images: the least work among the points within one point of full depth's accuracy there"


def epochs(number: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Noisy training images in batches of 32, another order every epoch."""
    data = digits.digits()["train"]
    generator = torch.Generator().manual_seed(1000 + number)
    for part in torch.randperm(len(data), generator=generator).split(32):
        yield {"pixel_values": digits.noisy(data.pixels[part], generator)}, data.labels[part]


def lgvit_model(folder: Path, first: int, second: int) -> tuple[Any, SampleExits]:
    """A ViT of the demo's sizes with LGViT's heads after layers 3 to 7 of 8, trained in both stages once."""
    from transformers import ViTForImageClassification

    done = folder / "lgvit" / "exits" / "exits.json"
    if not done.exists():
        model = digits.vit(seed=1)
        torch.manual_seed(1)
        exits = lgvit.train(
            model,
            lgvit.exits(model),
            epochs,
            first=first,
            second=second,
            rate=1e-3,
            advance=lambda: print(".", end="", flush=True),
        )
        model.save_pretrained(folder / "lgvit" / "model")
        exits.save_pretrained(folder / "lgvit" / "exits")
        print()
    loaded: Any = ViTForImageClassification.from_pretrained(folder / "lgvit" / "model").eval()
    return loaded, SampleExits.from_pretrained(folder / "lgvit" / "exits")


def perceiver_model(folder: Path, count: int) -> dyn_perceiver.DynPerceiver:
    """Both branches at the digits' size, trained once."""
    if not (folder / "perceiver" / "exits.json").exists():
        torch.manual_seed(2)
        config = dyn_perceiver.PerceiverConfig(
            classes=digits.CLASSES, images=1, channels=(16, 24, 32, 64, 96), latents=16, stem=1, strides=(1, 2, 1, 1),
            blocks=(1, 1, 2, 3), depths=(1, 1, 1, 2), heads=(1, 2, 4, 4), grid=4,
        )  # fmt: skip
        model = dyn_perceiver.DynPerceiver(config)
        dyn_perceiver.train(model, epochs, count=count, rate=2e-3, ema=0.99, advance=lambda: print(".", end="", flush=True))
        model.save_pretrained(folder / "perceiver")
        print()
    return dyn_perceiver.DynPerceiver.from_pretrained(folder / "perceiver")


Run = Callable[[], tuple[Tensor, float]]


def encoder_run(model: Any, exits: SampleExits, batches: list[Tensor]) -> Run:
    encoder = DynamicEncoder(model, exits)

    def run() -> tuple[Tensor, float]:
        found = [encoder(pixel_values=pixels) for pixels in batches]
        possible = sum(out.work.possible for out in found)
        return torch.cat([out.logits for out in found]), sum(out.work.run for out in found) / possible

    return run


def perceiver_run(model: Any, thresholds: Any, batches: list[Tensor], cost: dict[str, Any]) -> Run:
    dynamic = dyn_perceiver.DynamicPerceiver(model, thresholds)

    def run() -> tuple[Tensor, float]:
        found = [dynamic(pixels) for pixels in batches]
        work = sum(dyn_perceiver.work_of(out, cost) * len(out.exits) for out in found)
        return torch.cat([out.logits for out in found]), work / sum(len(out.exits) for out in found)

    return run


def points(folder: Path, split: str, wish: argparse.Namespace) -> dict[tuple[str, str], Run]:
    """(system, operating point) -> a run over the images of a split."""
    data = digits.digits()
    batches = list(data[split].pixels.split(wish.batch))
    vit, linear = digits.load()
    deep, heads = lgvit_model(folder, wish.first, wish.second)
    perceiver = perceiver_model(folder, wish.epochs)
    found: dict[tuple[str, str], Run] = {}
    for name, model, exits in ((SYSTEMS[0], vit, linear), (SYSTEMS[1], deep, heads)):
        for value in THRESHOLDS:
            found[name, "full depth" if value == float("inf") else f"{value:g}"] = encoder_run(
                model, exits.with_thresholds(value), batches
            )
    scores, _ = dyn_perceiver.scores_of(perceiver, [data["calibration"].pixels])
    cost = dyn_perceiver.costs(perceiver, data["test"].pixels[:1])
    for power in POWERS:
        thresholds = [np.inf] * 4 if power is None else dyn_perceiver.geometric_thresholds(scores, power)
        found[SYSTEMS[2], "full depth" if power is None else f"p = {power:g}"] = perceiver_run(
            perceiver, thresholds, batches, cost
        )
    return found


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Accuracy over samples per second, and over the share of the work."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True, sharey=True)
    for number, system in enumerate(SYSTEMS):
        own = [row for row in rows if row["system"] == system]
        for axis, key in zip(axes, ("samples_per_s_median", "work"), strict=True):
            axis.plot([row[key] for row in own], [100 * row["accuracy"] for row in own], "o-", color=f"C{number}", label=system)
            axis.plot(own[0][key], 100 * own[0]["accuracy"], "s", color=f"C{number}", markersize=9)
    axes[0].set(xlabel="test images per second", ylabel="accuracy, %", title="squares: full depth")
    axes[1].set(xlabel="share of samples x layers (Dyn-Perceiver: of operations) run")
    axes[0].legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--first", type=int, default=30, help="epochs of LGViT's stage 1")
    parser.add_argument("--second", type=int, default=10, help="and of its stage 2")
    parser.add_argument("--epochs", type=int, default=25, help="of Dyn-Perceiver")
    parser.add_argument("--only", choices=("train",))
    wish = parser.parse_args()
    require("matplotlib", "the picture needs matplotlib: pip install 'dyndepth[demo]'")
    runs, others = (points(wish.folder, split, wish) for split in ("test", "calibration"))
    if wish.only == "train":
        return
    data = digits.digits()
    labels = data["test"].labels
    first, seconds = interleaved(runs, wish.repetitions, lambda: None)
    rows: list[dict[str, Any]] = []
    for (system, point), (logits, work) in first.items():
        rates = Rates.of(len(labels), seconds[system, point])
        reference = first[system, "full depth"][0].argmax(-1)
        chooses, chooses_work = others[system, point]()
        rows.append(
            {
                "system": system, "point": point, "batch": wish.batch, "samples": len(labels), "work": work,
                "accuracy": float((logits.argmax(-1) == labels).float().mean()),
                "agreement": float((logits.argmax(-1) == reference).float().mean()),
                "samples_per_s_median": rates.median, "samples_per_s_p10": rates.p10, "samples_per_s_p90": rates.p90,
                "calibration": {
                    "accuracy": float((chooses.argmax(-1) == data["calibration"].labels).float().mean()), "work": chooses_work,
                },
            }
        )  # fmt: skip
        print(f"{system}, {point}: {rows[-1]['accuracy']:.1%}, work {work:.1%}, {rates.median:.0f} images/s")
    settings = {key: value for key, value in vars(wish).items() if key not in ("folder", "only")}
    settings["threads"] = torch.get_num_threads()
    found = {"machine": info.collect(), "settings": settings, "chosen": CHOSEN, "rows": rows}
    with replacing(wish.folder / "encoder_image.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    plot(wish.folder / "encoder_image.png", rows)
    print(f"wrote encoder_image.json and encoder_image.png into {wish.folder}")


if __name__ == "__main__":
    main()
