"""Makes the speech demo's weights: a small Conformer with CTC exits learns from espeak-ng's voices (hours on one core).

    python benchmarks/train_speech_demo.py --cache /tmp/speech --steps 6000

Goes on where it was stopped. Trained as early-exit ASR is: the plain sum of CTC losses of all exits, gradients cut to norm 1.
"""

from __future__ import annotations

import argparse
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dyndepth.demo.tasks import espeak, speech_model
from dyndepth.encoders import DynamicEncoder, SampleExits, facts_of
from dyndepth.encoders.ctc import greedy
from dyndepth.recipes import asr

PEAK, WARMUP, BATCH, DECAY = 3e-3, 300, 24, 0.01


def sounds(count: int, seed: int, held_out: bool, cache: Path) -> tuple[list[espeak.Utterance], list[Any]]:
    """Utterances and their clean sounds, spoken once."""
    path = cache / f"sounds-{count}-{seed}-{held_out}.npz"
    chosen = espeak.utterances(count, seed, held_out=held_out)
    if not path.exists():
        with ThreadPoolExecutor(2) as pool:
            said = list(pool.map(espeak.clean, chosen))
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(path, sound=np.concatenate(said).astype(np.float16), ends=np.cumsum([len(s) for s in said]))
    kept = np.load(path)
    return chosen, [part.astype(np.float32) for part in np.split(kept["sound"], kept["ends"][:-1])]


def judged(encoder: DynamicEncoder, chosen: list[espeak.Utterance], said: list[Any]) -> list[dict[str, float]]:
    """Error rates at every exit and the top."""
    found: list[list[str]] = []
    wanted: list[str] = []
    with torch.no_grad():
        for at in range(0, len(chosen), 64):
            part = chosen[at : at + 64]
            noisy = [espeak.noisy(s, u) for s, u in zip(said[at : at + 64], part, strict=True)]
            for number, (samples, logits) in enumerate(encoder.everywhere(**speech_model.batch(noisy))):
                texts = greedy(logits, samples.lengths)
                inverse = torch.argsort(samples.ids).tolist()
                if number == len(found):
                    found.append([])
                found[number] += ["".join(speech_model.VOCABULARY[c] for c in texts[i]) for i in inverse]
            wanted += [u.text for u in part]
    return [asr.error_rates(texts, wanted) for texts in found]


def rate(step: int, steps: int) -> float:
    return PEAK * min(step / WARMUP, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))) + 0.01)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--cache", type=Path, required=True)
    options.add_argument("--steps", type=int, default=6000)
    options.add_argument("--utterances", type=int, default=6000)
    options.add_argument("--folder", type=Path, default=speech_model.WEIGHTS)
    given = options.parse_args()
    torch.manual_seed(0)
    model = speech_model.build()
    for module in model.modules():  # noise is drawn anew for every utterance: that is enough
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    exits = asr.exits(model)
    encoder = DynamicEncoder(model, exits)
    chosen, said = sounds(given.utterances, 0, False, given.cache)
    held, held_said = sounds(256, 1, True, given.cache)
    parameters = [*model.parameters(), *exits.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK, betas=(0.9, 0.98), weight_decay=DECAY)
    checkpoint, step = given.cache / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        exits.load_state_dict(state["exits"])
        optimizer.load_state_dict(state["optimizer"])
        step = int(state["step"])
    order = sorted(range(len(said)), key=lambda i: len(said[i]))
    groups = [order[at : at + BATCH] for at in range(0, len(order) - BATCH + 1, BATCH)]
    began, losses = time.time(), []
    while step < given.steps:
        step += 1
        rng = np.random.default_rng([7, step])
        rows = groups[int(rng.integers(len(groups)))]
        heard = []
        for i in rows:
            loud = said[i] * np.float32(10 ** rng.uniform(-0.5, 0.3))
            ratio = float(rng.uniform(3, 35))
            power = float(np.mean(np.square(loud))) / 10 ** (ratio / 10)
            heard.append((loud + rng.standard_normal(len(loud)) * math.sqrt(power)).astype(np.float32))
        model.train()
        loss = asr.loss(encoder.everywhere(**speech_model.batch(heard)), [speech_model.encoded(chosen[i].text) for i in rows])
        optimizer.param_groups[0]["lr"] = rate(step, given.steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            print(step, f"{np.mean(losses[-50:]):.3f}", f"{(time.time() - began) / len(losses):.2f} s a step", flush=True)
        if step % 500 == 0 or step == given.steps:
            model.eval()
            print(step, [{k: round(v, 3) for k, v in r.items()} for r in judged(encoder, held, held_said)], flush=True)
            state = {
                "model": model.state_dict(),
                "exits": exits.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
            }
            torch.save(state, checkpoint)
    model.eval()
    speech_model.save(model, given.folder)
    # The exits are those of the weights as they were rounded to half precision.
    rounded = speech_model.build()
    rounded.load_state_dict({name: v.half().float() if v.is_floating_point() else v for name, v in model.state_dict().items()})
    SampleExits(list(exits), facts_of(rounded), record=exits.record | {"steps": step}).save_pretrained(given.folder)


if __name__ == "__main__":
    main()
