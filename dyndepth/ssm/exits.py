"""SsmExits: where tokens may leave a Mamba model, and the classifiers that let them; kept in safetensors + JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dyndepth.errors import ExitsError, UnsupportedModelError
from dyndepth.exits import store
from dyndepth.exits.codec import number_to_json
from dyndepth.exits.store import ModelFacts
from dyndepth.runtime.fingerprint import differs, samples_of
from dyndepth.ssm.classifiers import CLASSIFIERS, Classifier

FORMAT, VERSION = "dyndepth-ssm-exits", 1
#: transformers' model types that decode here.
MODEL_TYPES = ("mamba",)


class SsmExit(nn.Module):
    """One place where tokens may leave: `leave` layers below it; a token leaves when sigmoid(classifier) >= threshold."""

    def __init__(self, leave: int, classifier: Classifier, threshold: float = math.inf) -> None:
        super().__init__()
        if leave < 1:
            raise ExitsError(f"ssm exit: leave must be at least 1, got {leave}")
        if math.isnan(threshold):
            raise ExitsError(f"ssm exit at {leave}: threshold must be a number, got NaN")
        self.leave, self.classifier, self.threshold = leave, classifier, float(threshold)


class SsmExits(nn.Module):
    """Exits in ascending order of `leave`, the facts of the model they were made for, and what their maker remembers."""

    def __init__(self, exits: Iterable[SsmExit], model: ModelFacts, record: dict[str, Any] | None = None) -> None:
        super().__init__()
        ordered: list[SsmExit] = sorted(exits, key=lambda point: point.leave)
        self.exits = nn.ModuleList(ordered)
        self.model = model
        self.record = record or {}
        leaves = [point.leave for point in self]
        if len(set(leaves)) != len(leaves) or (leaves and leaves[-1] >= model.layers):
            raise ExitsError(f"ssm exits: wanted at most one exit per boundary below {model.layers}, got {leaves}")
        for point in self:
            if point.classifier.settings["width"] != model.width:
                raise ExitsError(
                    f"ssm exits: the classifier at {point.leave} must read {model.width}, reads "
                    f"{point.classifier.settings['width']}"
                )

    def __iter__(self) -> Iterator[SsmExit]:
        return iter(self.exits)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.exits)

    def with_thresholds(self, thresholds: float | Sequence[float]) -> SsmExits:
        """The same classifiers with other thresholds, one for all or one each."""
        values = [thresholds] * len(self) if isinstance(thresholds, int | float) else list(thresholds)
        if len(values) != len(self):
            raise ExitsError(f"with_thresholds: wanted {len(self)} numbers, got {values}")
        made = [SsmExit(point.leave, point.classifier, float(value)) for point, value in zip(self, values, strict=True)]
        return SsmExits(made, self.model, self.record)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `exits.json` and one safetensors file; an existing set is replaced in one step, or not at all."""
        tensors = {
            f"{at}.{name}": value for at, point in enumerate(self) for name, value in point.classifier.state_dict().items()
        }
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "model": dataclasses.asdict(self.model),
            "exits": [
                {
                    "leave": point.leave,
                    "threshold": number_to_json(point.threshold),
                    "kind": point.classifier.kind,
                    "settings": point.classifier.settings,
                }
                for point in self
            ],
            "record": self.record,
        }
        store.write(Path(folder), manifest, tensors)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SsmExits:
        """Read what `save_pretrained` wrote; ExitsError says what is wrong with it."""
        manifest, tensors = store.read(Path(folder), FORMAT, VERSION)
        try:
            exits = []
            for at, entry in enumerate(manifest["exits"]):
                if entry["kind"] not in CLASSIFIERS:
                    raise ExitsError(f"ssm exits: classifier must be one of {', '.join(CLASSIFIERS)}, got {entry['kind']!r}")
                classifier = CLASSIFIERS[entry["kind"]](**entry["settings"])
                classifier.load_state_dict({name: value.clone() for name, value in store.part(tensors, f"{at}.").items()})
                exits.append(SsmExit(int(entry["leave"]), classifier, float(entry["threshold"])))
            return cls(exits, ModelFacts.from_json(manifest["model"]), dict(manifest["record"] or {})).eval()
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            if isinstance(error, ExitsError):
                raise
            raise ExitsError(f"ssm exits: {folder} is damaged: {type(error).__name__}: {error}") from error


def facts_of(model: Any) -> ModelFacts:
    """Sizes of a Mamba model, and a few weights of every layer's projections (one that was wrapped since is not compared)."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in MODEL_TYPES or not hasattr(model, "lm_head"):
        raise UnsupportedModelError(f"ssm: wanted a causal LM of type {', '.join(MODEL_TYPES)}, got {type(model).__name__}")
    layers = list(model.backbone.layers)
    names = ("in_proj", "x_proj", "dt_proj", "out_proj")
    sampled = [samples_of(getattr(layer.mixer, name)) for layer in layers for name in names]
    prints = tuple(() if part is None else tuple(float(f"{value:.6g}") for value in part.tolist()) for part in sampled)
    return ModelFacts(config.model_type, len(layers), int(config.hidden_size), int(config.vocab_size), prints)


def check_facts(exits: SsmExits, model: Any) -> None:
    """Raise ExitsError unless the exits were made for this model."""
    made, here = exits.model, facts_of(model)
    for name in ("model_type", "layers", "width", "vocab_size"):
        if getattr(made, name) != getattr(here, name):
            wanted, came = getattr(made, name), getattr(here, name)
            raise ExitsError(f"exits were made for another model: {name} must be {wanted!r}, got {came!r}")
    if differs(made.fingerprint, here.fingerprint):
        raise ExitsError(f"exits were made for another {made.model_type} of the same size (fingerprint mismatch)")
