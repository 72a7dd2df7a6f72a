"""Splitformer on the speech demo's Conformer: errors of every exit, with half-rate layers and without, after equal training.

    PYTHONPATH=benchmarks python benchmarks/splitformer.py BUILD_FOLDER [--steps 200] [--results docs/results/splitformer.json]

Both start from the demo's weights (`splitformer.of`, which adds nothing until it learns) and see the same batches in the same
order: espeak-ng's voices with white noise, as in train_speech_demo.py. Trained as early-exit ASR is. Nothing is chosen: the
figures are those of the last step, on phrases by voices that training never heard. Needs espeak-ng; resumes per model.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_speech_demo import judged, sounds

from dyndepth import info
from dyndepth.demo.tasks import espeak, speech_model
from dyndepth.encoders import DynamicEncoder, SampleExits, facts_of
from dyndepth.files import replacing
from dyndepth.recipes import asr, splitformer

PEAK, WARMUP, BATCH, UTTERANCES, TEST = 1e-3, 0.1, 24, 800, 256
#: Of the phrases: training of the demo saw seeds 0 and 1.
SEED, TEST_SEED = 4, 3


def started(name: str) -> tuple[Any, SampleExits]:
    """The demo's Conformer and its exits, or that model with half-rate layers under the same exits."""
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


def trained(name: str, steps: int, folder: Path) -> tuple[Any, SampleExits]:
    model, exits = started(name)
    path = folder / f"{name}-{steps}.pt"
    if path.exists():
        weights = torch.load(path, weights_only=True)
        model.load_state_dict(weights["model"])
        exits.load_state_dict(weights["exits"])
        return model.eval(), exits.eval()
    chosen, said = sounds(UTTERANCES, SEED, False, folder)
    order = sorted(range(len(said)), key=lambda row: len(said[row]))
    groups = [order[at : at + BATCH] for at in range(0, len(order) - BATCH + 1, BATCH)]
    encoder = DynamicEncoder(model, exits)
    parameters = [*model.parameters(), *exits.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK, total_steps=steps, pct_start=WARMUP)
    model.train()
    for step in range(steps):
        rows = groups[int(np.random.default_rng([12, step]).integers(len(groups)))]
        found = encoder.everywhere(**speech_model.batch(heard(said, rows, step)))
        loss = asr.loss(found, [speech_model.encoded(chosen[row].text) for row in rows])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        rate.step()
        if step % 20 == 0:
            print(f"{name}, step {step}: {loss.item():.3f}", flush=True)
    torch.save({"model": model.state_dict(), "exits": exits.state_dict()}, path)
    return model.eval(), exits.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    espeak.require()
    given.build.mkdir(parents=True, exist_ok=True)
    chosen, said = sounds(TEST, TEST_SEED, True, given.build)
    rows: list[dict[str, Any]] = []
    for name, steps in (("conformer", 0), ("conformer", given.steps), ("splitformer", given.steps)):
        model, exits = trained(name, steps, given.build) if steps else started(name)
        encoder = DynamicEncoder(model, exits)
        rates = judged(encoder, chosen, said)
        places = [*encoder.boundaries, encoder.depth]
        rows.append(
            {
                "model": name, "steps": steps, "parameters": sum(p.numel() for p in model.parameters()),
                "exits": [{"leave": at, **found} for at, found in zip(places, rates, strict=True)],
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    result = {
        "phrases": TEST, "layers": speech_model.LAYERS, "steps": given.steps, "batch": BATCH, "peak_rate": PEAK,
        "chosen": "nothing: the weights of the last step; settings were fixed before a test phrase was heard",
        "machine": info.collect(), "rows": rows,
    }  # fmt: skip
    with replacing(given.results or given.build / "splitformer.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
