"""Early-exit ASR on the demo's Conformer: error rates and work by threshold under both criteria, then speed by batch size.

    python benchmarks/encoder_speech.py FOLDER
    python benchmarks/encoder_speech.py FOLDER --speed frame_entropy
    python benchmarks/encoder_speech.py FOLDER --speed sentence_posterior [--batch 32]

The first writes FOLDER/encoder_speech.json; the others, on a quiet machine, add samples per second to it, of all batch sizes or
of one. Needs espeak-ng. Phrases are spoken by voices that training never heard. The threshold at which speed is measured is
chosen on the demo's calibration phrases; all other figures are of its test phrases. A second call of the first keeps the speeds
of thresholds that it chooses again. Every batch size under a criterion is a run of its own, whose machine stands beside it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_speech_demo import BATCH

from dyndepth import info
from dyndepth.demo.tasks import espeak, speech, speech_model
from dyndepth.demo.tasks.measure import measure
from dyndepth.encoders import DynamicEncoder, SampleExits
from dyndepth.files import replacing
from dyndepth.recipes import asr

REPETITIONS, TEST = 3, 256
#: The beam search of a few samples at a time would take minutes.
SIZES = {"frame_entropy": (1, 8, 32, 128), "sentence_posterior": (32,)}
LEVELS = {
    "frame_entropy": [-value for value in (0.0003, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012, 0.02)],
    "sentence_posterior": [0.999, 0.99, 0.97, 0.95, 0.9, 0.8, 0.7, 0.6, 0.4],
}
#: Largest word error rate above full depth's at which speed is measured.
SPARE = 0.02


def read(encoder: DynamicEncoder, batches: list[dict[str, Tensor]], texts: list[str]) -> dict[str, Any]:
    """Error rates, work and where samples left, by the model's own passes."""
    found: list[str] = []
    left: list[int] = []
    run = possible = 0
    for inputs in batches:
        out = encoder(**inputs)
        found += asr.decode(out, speech_model.VOCABULARY)
        left += out.exit_layers.tolist()
        run, possible = run + out.work.run, possible + out.work.possible
    places = [*encoder.boundaries, encoder.depth]
    return {
        **asr.error_rates(found, texts),
        "samples_x_layers": run / possible,
        "left": {str(at): left.count(at) for at in places},
        "texts": found,
    }


def per_exit(model: Any, exits: SampleExits, batches: list[dict[str, Tensor]], texts: list[str]) -> list[dict[str, Any]]:
    """Error rates if everybody left at one exit."""
    rows = []
    for at in [*(point.leave for point in exits), model.config.num_hidden_layers]:
        opened = exits.with_thresholds([-1e9 if point.leave == at else float("inf") for point in exits])
        told = read(DynamicEncoder(model, opened), batches, texts)
        rows.append({"leave": at, "wer": told["wer"], "cer": told["cer"]})
    return rows


def batched(sounds: list[Any]) -> list[dict[str, Tensor]]:
    return [speech_model.batch(sounds[at : at + 32]) for at in range(0, len(sounds), 32)]


def errors_and_work(model: Any, exits: SampleExits, texts: list[str], sounds: list[Any]) -> dict[str, Any]:
    """Test phrases; of the calibration phrases, what a threshold is chosen by."""
    batches = batched(sounds)
    other_texts, other_sounds = speech.spoken("calibration", TEST)
    others = batched(other_sounds)
    closed = DynamicEncoder(model, exits.closed())
    full = read(closed, batches, texts)
    sweep: list[dict[str, Any]] = []
    for criterion, levels in LEVELS.items():
        for level in levels:
            encoder = DynamicEncoder(model, asr.judged_by(exits, criterion, level))
            told = read(encoder, batches, texts)
            same = sum(a == b for a, b in zip(told.pop("texts"), full["texts"], strict=True)) / TEST
            chooses = read(encoder, others, other_texts)
            chooses = {name: chooses[name] for name in ("wer", "samples_x_layers")}
            sweep.append({"criterion": criterion, "threshold": level, **told, "same_text": same, "calibration": chooses})
            print(sweep[-1], flush=True)
    return {
        "phrases": TEST,
        "seconds_of_speech": sum(map(len, sounds)) / espeak.RATE,
        "layers": model.config.num_hidden_layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "spare_wer": SPARE,
        "full": {"wer": full["wer"], "cer": full["cer"], "calibration": {"wer": read(closed, others, other_texts)["wer"]}},
        "chosen": "what ran the least on the calibration phrases among the thresholds within spare_wer of full depth there",
        "machine": info.collect(),
        "exits": per_exit(model, exits, batches, texts),
        "sweep": sweep,
    }


def chosen(found: dict[str, Any], criterion: str) -> float:
    """The freest threshold of a criterion that costs at most spare_wer on the calibration phrases."""
    most = found["full"]["calibration"]["wer"] + found["spare_wer"]
    within = [row for row in found["sweep"] if row["criterion"] == criterion and row["calibration"]["wer"] <= most]
    return float(min(within, key=lambda row: row["calibration"]["samples_x_layers"])["threshold"])


def speed(
    found: dict[str, Any], criterion: str, size: int, model: Any, exits: SampleExits, texts: list[str], sounds: list[Any]
) -> None:
    """Every way at one batch size, at the threshold that was chosen: into `rows`, and what ran them into `speed`."""
    threshold = chosen(found, criterion)
    problem = speech.problem_of(DynamicEncoder(model, asr.judged_by(exits, criterion, threshold)), texts, sounds)
    timed = [{"criterion": criterion, "threshold": threshold, **asdict(row)} for row in measure(problem, (size,), REPETITIONS)]
    others = [row for row in found.get("rows", []) if (row["criterion"], row["batch"]) != (criterion, size)]
    order = list(LEVELS)
    found["rows"] = sorted(others + timed, key=lambda row: (order.index(row["criterion"]), row["batch"]))
    run = {"threads": torch.get_num_threads(), "repetitions": REPETITIONS, "machine": info.collect()}
    found.setdefault("speed", {}).setdefault(criterion, {})[str(size)] = run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--speed", choices=list(LEVELS))
    parser.add_argument("--batch", type=int, help="one batch size instead of all of the criterion's")
    given = parser.parse_args()
    path = given.folder / "encoder_speech.json"
    espeak.require()
    model, exits = speech_model.load()
    texts, sounds = speech.spoken("test", TEST)
    if given.speed:
        found = json.loads(path.read_text())
        for size in SIZES[given.speed] if given.batch is None else (given.batch,):
            speed(found, given.speed, size, model, exits, texts, sounds)
    else:
        before = json.loads(path.read_text()) if path.exists() else {}
        found = errors_and_work(model, exits, texts, sounds)
        found["rows"] = [row for row in before.get("rows", []) if row["threshold"] == chosen(found, row["criterion"])]
        kept = {row["criterion"] for row in found["rows"]}
        found["speed"] = {name: runs for name, runs in before.get("speed", {}).items() if name in kept}
    found["training"] = {"steps": exits.record["steps"], "batch": BATCH}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
