"""Packed or padded: one encoder's full depth in both layouts beside transformers' own forward, by batch and spread of lengths.

    python benchmarks/encoder_layouts.py FOLDER

Writes FOLDER/encoder_layouts.json. The encoder has MiniLM-L6's shape and random weights: only time is measured here. Lengths
are alike (64 tokens), or drawn from a log-normal whose longest of a batch is two to three times its mean, as sentences are.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from dyndepth import info
from dyndepth.encoders import DynamicEncoder, SampleExits, facts_of
from dyndepth.files import replacing

BATCHES = (1, 8, 32, 128)
ROUNDS, WARM = 9, 2


def encoder(dtype: torch.dtype) -> Any:
    """A BERT of MiniLM-L6's shape."""
    torch.manual_seed(0)
    config = transformers.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    config.num_labels = 8
    return transformers.BertForSequenceClassification(config).eval().to(dtype)


def batch(size: int, spread: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    if spread == "alike":
        lengths = torch.full((size,), 64)
    else:
        drawn = torch.exp(3.2 + 0.6 * torch.randn(size, generator=generator))
        lengths = drawn.round().long().clamp(4, 128)
    longest = int(lengths.max())
    ids = torch.randint(1000, 20000, (size, longest), generator=generator)
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def timed(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each call, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARM + ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn >= WARM:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def measure() -> list[dict[str, Any]]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = encoder(dtype)
        exits = SampleExits([], facts_of(model))
        layouts = {layout: DynamicEncoder(model, exits, layout=layout) for layout in ("packed", "padded")}
        for spread in ("alike", "sentences"):
            for size in BATCHES:
                inputs = batch(size, spread)
                calls: dict[str, Callable[[], Any]] = {
                    name: functools.partial(found, **inputs) for name, found in layouts.items()
                }
                calls["transformers"] = functools.partial(model, **inputs)
                with torch.no_grad():
                    seconds = timed(calls)
                    want = model(**inputs).logits.float()
                    for found in layouts.values():  # refuse to time wrong answers
                        torch.testing.assert_close(found(**inputs).logits.float(), want, rtol=5e-2, atol=5e-2)
                mask = inputs["attention_mask"]
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "lengths": spread,
                        "batch": size,
                        "tokens": int(mask.sum()),
                        "padding": 1 - float(mask.float().mean()),
                        **{f"{name}_s": statistics.median(taken) for name, taken in seconds.items()},
                        "raw": seconds,
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "rounds": ROUNDS, "machine": info.collect(), "rows": measure()}
    with replacing(folder / "encoder_layouts.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    for row in found["rows"]:
        print({name: value for name, value in row.items() if name != "raw"})


if __name__ == "__main__":
    main()
