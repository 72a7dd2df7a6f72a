"""`make encoder-text`: every recipe for text encoders on the same real data: accuracy against the layers that samples run.

MiniLM (6 layers) on Reuters R52, both from packages of PyPI (dyndepth.demo.tasks.reuters). First with the model frozen as
published, where only heads and judges learn (minutes); then the recipes whose papers train the model too (`--with-model`, an
hour or two on two cores): DeeBERT with fresh exits, as its paper does; PABEE and PALBERT from the exits of the frozen model on,
so that they do not begin by undoing what the model knows; COST-EFF from DeeBERT's model. DynamicEncoder runs at several
settings over the held-out documents, where the table of systems chooses between them, and over the test set, which nothing is
tuned on.

The folder keeps models and checkpoints, so that a second call (or one after a kill) goes on; `encoder_text.json` there grows.
`--updates` and `--stage` change how long the model is trained; what is already in the folder stays, and every row says how long
its model was trained and from what.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndepth import info
from dyndepth.demo.tasks import reuters
from dyndepth.encoders import DynamicEncoder, SampleExits
from dyndepth.files import replacing
from dyndepth.recipes import costeff, deebert, eero, jei_dnn, pabee, palbert
from dyndepth.recipes.costeff_slender import multiplications
from dyndepth.training.encoder_states import Inputs, PooledStates
from dyndepth.training.encoder_trainer import EncoderConfig

BATCH = 32
#: Updates that train the model with its exits: few, for two cores. Fresh exits take more, to make up for what they do to it.
UPDATES = {"deebert": 200, "pabee": 80, "palbert": 80}
#: Updates of COST-EFF's assistant, and of its narrow model after each of the steps that make it narrower.
STAGES, STEPS = {"costeff-assistant": 40, "costeff": 120}, 2
#: Updates of exits on a model that stays.
ON_FROZEN = 1000
#: What a training of the model begins with.
STARTED = {
    "deebert": "fresh exits", "pabee": "the frozen model's exits", "palbert": "the frozen model's exits",
    "costeff-assistant": "a copy of DeeBERT's model", "costeff": "the assistant",
}  # fmt: skip
#: Rates of the model and of exits.
BASE_LR, LR = 1e-4, 1e-3
#: Documents of the published test set that are answered, its first ones.
TEST = 1024

#: PALBERT's prior: with 6 layers twice the paper's 0.1 on 12, so that its median lies as deep.
PRIOR = 0.2

Trained = tuple[Any, SampleExits]


@dataclass
class Data:
    """Tokenised splits: what trains, what sets thresholds and stops early, what is reported on."""

    train: dict[str, Tensor]
    train_labels: Tensor
    held: dict[str, Tensor]
    held_labels: Tensor
    test: dict[str, Tensor]
    test_labels: Tensor
    topics: int

    @property
    def validation(self) -> tuple[dict[str, Tensor], Tensor]:
        return self.held, self.held_labels


def settings(updates: int, **changes: Any) -> EncoderConfig:
    """Of training with the model; every hundred updates a checkpoint."""
    options: dict[str, Any] = {
        "updates": updates, "batch": BATCH, "lr": LR, "base_lr": BASE_LR, "precision": "bf16", "evaluate_every": 100,
        "checkpoint_every": 50,
    }  # fmt: skip
    return EncoderConfig(**(options | changes))


def frozen(**changes: Any) -> EncoderConfig:
    """Of training exits alone."""
    options: dict[str, Any] = {
        "updates": ON_FROZEN, "batch": 64, "lr": LR, "precision": "bf16", "evaluate_every": 100, "patience": 5,
    }  # fmt: skip
    return EncoderConfig(**(options | changes))


class Bench:
    """The systems, each trained once and kept in the folder."""

    def __init__(self, folder: Path, updates: int | None = None, stage: int | None = None) -> None:
        self.folder = folder
        self.updates = {name: own if updates is None else updates for name, own in UPDATES.items()}
        self.updates |= {name: own if stage is None else stage for name, own in STAGES.items()}
        found = reuters.documents()
        _, tokenizer = reuters.minilm()
        test = reuters.Split(found.test.texts[:TEST], found.test.labels[:TEST])
        parts = [reuters.encoded(tokenizer, split.texts) for split in (found.train, found.held_out, test)]
        labels = [split.labels for split in (found.train, found.held_out, test)]
        self._states: list[PooledStates] = []
        self.data = Data(parts[0], labels[0], parts[1], labels[1], parts[2], labels[2], len(found.topics))

    def splits(self, with_model: bool) -> tuple[Inputs, tuple[Inputs, Tensor]]:
        """Inputs to train on and the validation split; of the frozen model, its pooled vectors, computed once for all."""
        data = self.data
        if with_model:
            return data.train, data.validation
        if not self._states:
            model, _ = reuters.minilm()
            encoder = DynamicEncoder(model, deebert.exits(model, data.topics, pooling="mean"))
            with torch.autocast("cpu", torch.bfloat16):
                self._states = [PooledStates.collect(encoder, given) for given in (data.train, data.held)]
        return self._states[0], (self._states[1], data.held_labels)

    def kept(self, name: str, with_model: bool, make: Callable[[Path], Trained]) -> Trained:
        """Read from the folder, or made and written there."""
        place = self.folder / (f"{name}-model" if with_model else name)
        if not (place / "exits" / "exits.json").exists():
            print(f"training {place.name}", flush=True)
            torch.manual_seed(0)
            model, exits = make(place)
            place.mkdir(parents=True, exist_ok=True)
            if with_model:
                told = {"updates": self.updates[name], "started": STARTED[name]}
                (place / "training.json").write_text(json.dumps(told) + "\n")
            costeff.save(model, place / "model")
            exits.save_pretrained(place / "exits")
        return costeff.load(place / "model"), SampleExits.from_pretrained(place / "exits")

    def deebert(self, with_model: bool) -> Trained:
        def make(place: Path) -> Trained:
            model, _ = reuters.minilm()
            exits = deebert.exits(model, self.data.topics, pooling="mean")
            first = settings(self.updates["deebert"]) if with_model else frozen()
            inputs, validation = self.splits(with_model)
            return model, deebert.train(
                model, exits, inputs, self.data.train_labels, first=first, second=frozen(), validation=validation,
                folder=place / "run",
            )  # fmt: skip

        return self.kept("deebert", with_model, make)

    def joint(self, recipe: Any, with_model: bool) -> Trained:
        """PABEE or PALBERT."""
        name = recipe.__name__.rpartition(".")[2]

        def make(place: Path) -> Trained:
            model, _ = reuters.minilm()
            exits = recipe.exits(model, self.data.topics, pooling="mean")
            if with_model:
                exits.load_state_dict(self.joint(recipe, False)[1].state_dict())
            inputs, validation = self.splits(with_model)
            more = {"rate": PRIOR} if recipe is palbert else {}
            return model, recipe.train(
                model, exits, inputs, self.data.train_labels, config=settings(self.updates[name]) if with_model else frozen(),
                validation=validation, folder=place / "run", **more,
            )  # fmt: skip

        return self.kept(name, with_model, make)

    def jei_dnn(self, trade: float) -> Trained:
        """One training per price of cost; the model is frozen in the paper too."""

        def make(place: Path) -> Trained:
            model, _ = reuters.minilm()
            exits = jei_dnn.exits(model, self.data.topics, pooling="mean")
            inputs, validation = self.splits(False)
            return model, jei_dnn.train(
                model, exits, inputs, self.data.train_labels, trade=trade, validation=validation, warmup=600, warmup_lr=3e-3,
                config=frozen(updates=2000, lr=1e-2, weight_decay=5e-4, patience=0),
            )  # fmt: skip

        return self.kept(f"jei_dnn-{trade}", False, make)

    def costeff(self) -> tuple[Trained, Trained]:
        """(teacher assistant, the narrow model)."""
        data = self.data

        def assistant(place: Path) -> Trained:
            teacher, tops = self.deebert(True)
            model = copy.deepcopy(teacher)
            exits = costeff.exits(model, data.topics, pooling="mean")
            exits.load_state_dict(tops.state_dict())  # a copy of the teacher, its off-ramps included
            return model, costeff.assist(
                model, exits, teacher, tops, data.train, data.train_labels,
                config=settings(self.updates["costeff-assistant"]), validation=data.validation, folder=place / "run",
            )  # fmt: skip

        wide = self.kept("costeff-assistant", True, assistant)

        def slender(place: Path) -> Trained:
            made = costeff.slenderise(
                *wide, data.train, data.train_labels, heads=6, neurons=768, rank=192, steps=STEPS, validation=data.validation,
                config=settings(self.updates["costeff"]), folder=place / "run",
            )  # fmt: skip
            return made.model, made.exits

        return wide, self.kept("costeff", True, slender)

    def training_of(self, system: str) -> dict[str, Any]:
        """Updates that trained a system's model (COST-EFF's narrow one: in each step), and what they began with."""
        place = {"COST-EFF, assistant": "costeff-assistant", "EERO": "deebert"}.get(system, system.lower().replace("-", ""))
        return dict(json.loads((self.folder / f"{place}-model" / "training.json").read_text()))

    def reached(self, trained: Trained, exits: SampleExits | None = None) -> dict[str, Any]:
        """Figures of the test set, and under `held_out` those of the documents that a setting may be chosen by."""
        model, own = trained
        encoder = DynamicEncoder(model, exits or own)
        held = self._read(encoder, self.data.held, self.data.held_labels)
        return {**self._read(encoder, self.data.test, self.data.test_labels), "held_out": held}

    @torch.no_grad()
    def _read(self, encoder: DynamicEncoder, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
        """Accuracy and the share of samples x layers that was run, in batches as they come."""
        right = run = 0
        layers: list[Tensor] = []
        for rows in torch.arange(len(labels)).split(BATCH):
            out = encoder(**_some(inputs, rows))
            right += int((out.logits.argmax(-1) == labels[rows]).sum())
            run += out.work.run
            layers.append(out.exit_layers)
        count = len(labels)
        return {
            "accuracy": right / count, "samples_x_layers": run / (count * encoder.depth),
            "mean_layers": float(torch.cat(layers).double().mean()),
        }  # fmt: skip


def _some(inputs: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in inputs.items()}


#: How the table of systems picks one setting of each.
CHOSEN = (
    "of a system's settings, the one that ran the least samples x layers on the held-out documents among those within one "
    "point of full depth's accuracy there, else the most accurate one there"
)

#: Per system: what its paper trains and on what, what runs here, what differs.
ABOUT = {
    "DeeBERT": (
        "off-ramps left at low entropy",
        "heads with a pooler each, mean pooling",
        "MiniLM of 6 layers, not BERT of 12",
    ),
    "EERO": (
        "shares by exponential weights, thresholds by conditional quantiles",
        "DeeBERT's heads under the largest probability",
        "formulas as reconstructed in docs/recipes/eero.md; the budget comes with a bound",
    ),
    "PABEE": ("P answers in a row", "one pooler for all exits, mean pooling", "MiniLM of 6 layers, not ALBERT of 12"),
    "PALBERT": (
        "the posterior's quantile",
        "one classifier, one lambda head",
        "MiniLM; no layer embedding; prior of rate 0.2",
    ),
    "JEI-DNN": (
        "gates that learn with their exits",
        "frozen model, linear modules",
        "AdamW, not SGD; text, not images; one factor per batch in the modules' loss, not per sample; a warm-up run of its own",
    ),
    "COST-EFF": (
        "narrow layers and exits, distilled",
        "half of the heads and neurons, embedding of rank 192 (of 384), two steps",
        "MiniLM, half as wide as BERT already; short training",
    ),
}


class Results:
    """Rows as they come, written after each system."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        path = bench.folder / "encoder_text.json"
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []

    def has(self, system: str, with_model: bool, setting: str) -> bool:
        """An earlier run measured it."""
        return any((row["system"], row["with_model"], row["setting"]) == (system, with_model, setting) for row in self.rows)

    def add(
        self, system: str, with_model: bool, setting: str, trained: Trained, exits: SampleExits | None = None, **more: Any
    ) -> None:
        if self.has(system, with_model, setting):
            return
        found = self.bench.reached(trained, exits)
        if with_model:
            more |= self.bench.training_of(system)
        self.rows.append({"system": system, "with_model": with_model, "setting": setting, **found, **more})
        print(f"{system}{', model trained' if with_model else ''}, {setting}: {found}", flush=True)

    def sweep(self, system: str, with_model: bool, trained: Trained, points: Mapping[str, float], **more: Any) -> None:
        """Full depth, then one threshold for all exits after the other."""
        self.add(system, with_model, "full depth", trained, trained[1].closed(), **more)
        for name, threshold in points.items():
            self.add(system, with_model, name, trained, trained[1].with_thresholds(threshold), **more)
        self.write()

    def write(self) -> None:
        data = self.bench.data
        result = {
            "model": "all-MiniLM-L6-v2", "layers": 6, "data": "Reuters R52", "tokens": reuters.LENGTH, "batch": BATCH,
            "documents": {"train": len(data.train_labels), "held_out": len(data.held_labels), "test": len(data.test_labels)},
            "topics": data.topics, "updates_frozen": ON_FROZEN, "about": ABOUT,
            "chosen": CHOSEN, "machine": info.collect(), "rows": self.rows,
        }  # fmt: skip
        with replacing(self.bench.folder / "encoder_text.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


ENTROPIES = {f"S = {entropy}": -entropy for entropy in (0.05, 0.2, 0.5)}
PATIENCES = {f"P = {patience}": pabee.threshold(patience) for patience in (1, 2, 3)}
BUDGETS = (1.5, 2.0, 3.0)
TRADES = (0.01, 0.03, 0.1, 0.5, 2.0)
QUANTILES = {f"q = {q}": q for q in (0.25, 0.5, 0.75)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/encoder-text"))
    parser.add_argument("--with-model", action="store_true", help="the recipes that train the model, too")
    parser.add_argument("--updates", type=int, help=f"that train the model with its exits; {UPDATES} by default")
    parser.add_argument("--stage", type=int, help=f"updates of each of COST-EFF's stages; {STAGES} by default")
    given = parser.parse_args()
    folder, with_model = given.folder, given.with_model
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, given.updates, given.stage)
    results = Results(bench)
    for trained_too in (False, True) if with_model else (False,):
        found = bench.deebert(trained_too)
        results.sweep("DeeBERT", trained_too, found, ENTROPIES)
        for budget in BUDGETS:
            if results.has("EERO", trained_too, f"budget {budget} layers"):
                continue
            exits = eero.fit(*found, bench.data.held, bench.data.held_labels, budget)
            bound = exits.record["eero"]["layers_bound"]
            results.add("EERO", trained_too, f"budget {budget} layers", found, exits, budget=budget, bound=bound)
        results.sweep("PABEE", trained_too, bench.joint(pabee, trained_too), PATIENCES)
        found = bench.joint(palbert, trained_too)
        results.sweep("PALBERT", trained_too, found, QUANTILES)
        results.add("PALBERT", trained_too, "PonderNet's draws", found, palbert.ponder(found[1]))
        if not trained_too:
            for trade in TRADES:
                results.add("JEI-DNN", False, f"lambda = {trade}", bench.jei_dnn(trade))
        results.write()
    if with_model:
        wide, narrow = bench.costeff()
        results.sweep("COST-EFF, assistant", True, wide, ENTROPIES)
        share = multiplications(narrow[0]) / multiplications(wide[0])
        results.sweep("COST-EFF", True, narrow, ENTROPIES, products=share, steps=STEPS)
    print(f"wrote {folder / 'encoder_text.json'}")


if __name__ == "__main__":
    main()
