"""The speech demo: espeak-ng reads phrases in voices that the model never heard, a small Conformer with CTC exits writes them.

The weights come with the package (benchmarks/train_speech_demo.py made them); what is heard is spoken when the demo runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from dyndepth.calibration import calibrate_samples
from dyndepth.demo.tasks import espeak, speech_model
from dyndepth.demo.tasks.measure import Inputs, Problem, run_and_write
from dyndepth.encoders import DynamicEncoder
from dyndepth.encoders.ctc import greedy
from dyndepth.recipes import asr

RISK, CONFIDENCE = 0.1, 0.95
CALIBRATION, TEST = 384, 256
#: Seeds of the phrases; 0 and 1 are training's.
_SEEDS = {"calibration": 2, "test": 3}
#: Entropy per frame and symbol (nats) that an exit may have, strictest first: fixed before a phrase is heard.
PATH = tuple(-float(value) for value in np.geomspace(1e-5, 0.03, 24))


def spoken(part: str, count: int) -> tuple[list[str], list[NDArray[np.float32]]]:
    """Texts and noisy sounds of the held-out voices."""
    chosen = espeak.utterances(count, _SEEDS[part], held_out=True)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # each call waits for a process of its own
        sounds = list(pool.map(lambda u: espeak.noisy(espeak.clean(u), u), chosen))
    return [u.text for u in chosen], sounds


def text_of(logits: Tensor) -> str:
    """What one sample's logits [frames, symbols] say, by the best path."""
    symbols = greedy(logits, torch.tensor([len(logits)]))[0]
    return "".join(speech_model.VOCABULARY[symbol] for symbol in symbols)


def problem_of(encoder: DynamicEncoder, texts: Sequence[str], sounds: Sequence[NDArray[np.float32]]) -> Problem:
    """The measurement: word error rate of these sounds."""

    def full(inputs: Inputs) -> list[Tensor]:
        # transformers' own pass over the batch; its convolutions read padding, so that texts may differ from a sample alone.
        frames = encoder.model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1)).tolist()
        logits = encoder.model(**inputs).logits
        return [row[:length] for row, length in zip(logits, frames, strict=True)]

    return Problem(
        "speech",
        encoder,
        lambda numbers: speech_model.batch([sounds[i] for i in numbers]),
        len(texts),
        lambda logits: asr.error_rates([text_of(row) for row in logits], texts)["wer"],
        "WER",
        full,
    )


def run(
    folder: Path,
    *,
    batches: Sequence[int] = (1, 8, 32, 128),
    repetitions: int = 5,
    calibration: int = CALIBRATION,
    test: int = TEST,
) -> dict[str, Any]:
    """Speak, set the threshold on calibration phrases, measure on test phrases; writes speech.json and speech.png."""
    console = Console()
    espeak.require()
    model, exits = speech_model.load()
    console.print(f"espeak-ng reads {calibration + test} phrases in {len(espeak.HELD_OUT_VOICES)} voices new to the model")
    _, heard = spoken("calibration", calibration)
    given = [speech_model.batch(heard[at : at + 64]) for at in range(0, calibration, 64)]
    exits = calibrate_samples(
        model, exits, given, risk=RISK, confidence=CONFIDENCE, path=PATH, same=lambda a, b: text_of(a) == text_of(b)
    )
    certificate = exits.record["certificate"]
    console.print(
        f"thresholds from {calibration} calibration phrases: "
        + (
            f"another text than at full depth for at most {RISK:.0%} of phrases, with {CONFIDENCE:.0%} confidence "
            f"(measured {certificate['measured_risk']:.1%})"
            if certificate["certified"]
            else "nothing could be certified, so the exits are closed"
        ),
        highlight=False,
    )
    texts, sounds = spoken("test", test)
    problem = problem_of(DynamicEncoder(model, exits), texts, sounds)
    facts = {
        "model": f"Conformer, {model.config.num_hidden_layers} layers of {model.config.hidden_size}, CTC over letters",
        "data": f"espeak-ng, {len(espeak.WORDS)} words, phrases of 1 to 4, white noise at 3 to 35 dB",
        "voices": {"learned": list(espeak.VOICES), "held out": list(espeak.HELD_OUT_VOICES)},
        "phrases": {"calibration": calibration, "test": test},
        "exits": [point.leave for point in exits],
        "record": exits.record,
    }
    title = f"{test} phrases, {facts['model']}, exits after {', '.join(str(point.leave) for point in exits)}"
    return run_and_write(problem, folder, batches, repetitions, facts, title)
