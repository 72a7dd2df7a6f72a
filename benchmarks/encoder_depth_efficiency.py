"""Depth efficiency of encoders: of the time that a perfect machine would save by running fewer samples, the share saved.

Samples leave at random with known rates, so the samples x layers removed are exact and the quality of exits plays no part. A
perfect machine's stretch of layers takes what it was measured to take with that many samples, in the same run: sum over layers
of (time of a layer with all samples - time with those that are left). Not part of it, and therefore counted against us: moving
samples, heads of those that leave, deciding, and everything between layers. Models have random weights: time does not see them.

    PYTHONPATH=benchmarks python benchmarks/encoder_depth_efficiency.py build [--batches 32,128] [--rounds 5] [--models vit]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndepth import info
from dyndepth.encoders import DynamicEncoder, LinearHead, SampleExit, SampleExits, Samples, facts_of
from dyndepth.exits import FixedDepth
from dyndepth.files import replacing

#: (exits as shares of the depth, share of the live samples that leaves at each).
SCENARIOS = (((2 / 3,), 0.25), ((2 / 3,), 0.5), ((1 / 3, 2 / 3), 0.25), ((1 / 3, 2 / 3), 0.5))


def vit(layers: int = 12) -> Any:
    """A ViT of DeiT-S's width and heads, on 128 x 128 images: 65 tokens."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config: Any = ViTConfig
    return ViTForImageClassification(
        config(
            hidden_size=384,
            num_hidden_layers=layers,
            num_attention_heads=6,
            intermediate_size=1536,
            image_size=128,
            patch_size=16,
            num_labels=100,
        )
    ).eval()


def minilm(layers: int = 6) -> Any:
    """A BERT of the sizes of all-MiniLM-L6, with a classifier."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config: Any = BertConfig
    return BertForSequenceClassification(
        config(
            hidden_size=384,
            num_hidden_layers=layers,
            num_attention_heads=12,
            intermediate_size=1536,
            vocab_size=2000,
            num_labels=20,
        )
    ).eval()


def inputs_of(name: str, batch: int) -> dict[str, Tensor]:
    """Images of one size; texts of 8 to 64 tokens, padded."""
    generator = torch.Generator().manual_seed(batch)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 128, 128, generator=generator)}
    lengths = torch.randint(8, 65, (batch,), generator=generator)
    mask = (torch.arange(64) < lengths[:, None]).long()
    return {"input_ids": torch.randint(5, 2000, (batch, 64), generator=generator) * mask, "attention_mask": mask}


def drawn(depth: int, shares: tuple[float, ...], rate: float, batch: int) -> tuple[list[int], Tensor]:
    """Boundaries, and int64 [batch]: where each sample leaves (-1: nowhere)."""
    generator = torch.Generator().manual_seed(1)
    leaves = [round(share * depth) for share in shares]
    where = torch.full((batch,), -1)
    for leave in leaves:
        here = (where < 0).nonzero()[:, 0]
        gone = here[torch.randperm(len(here), generator=generator)[: round(rate * len(here))]]
        where[gone] = leave
    return leaves, where


def interleaved(runs: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of every run, in turn, after one round that does not count."""
    found: dict[Any, list[float]] = {key: [] for key in runs}
    for number in range(rounds + 1):
        for key, run in runs.items():
            begin = time.perf_counter()
            run()
            if number:
                found[key].append(time.perf_counter() - begin)
    return found


@torch.no_grad()
def measure(name: str, batch: int, layout: str, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """All scenarios of one model, batch size and layout, with what a perfect machine would save in each."""
    model = {"vit": vit, "minilm": minilm}[name]().to(dtype)
    inputs = inputs_of(name, batch)
    facts = facts_of(model)
    runs: dict[Any, Callable[[], Any]] = {}
    cells: list[dict[str, Any]] = []
    plain = DynamicEncoder(model, SampleExits([], facts), layout=layout)
    runs["full"] = lambda: plain(**inputs)
    runs["transformers"] = lambda: model(**inputs)
    for number, (shares, rate) in enumerate(SCENARIOS):
        leaves, where = drawn(plain.depth, shares, rate, batch)
        points = [SampleExit(at, LinearHead(facts.width, facts.vocab_size), FixedDepth()) for at in leaves]
        encoder = DynamicEncoder(model, SampleExits(points, facts), layout=layout)
        runs["dynamic", number] = lambda encoder=encoder, where=where: encoder(**inputs, depth=where)
        closed = torch.full_like(where, -1)
        runs["nobody", number] = lambda encoder=encoder, closed=closed: encoder(**inputs, depth=closed)
        # Layers above each exit, all samples against those that are left: what the perfect machine saves.
        ends = [*leaves[1:], plain.depth]
        for leave, end in zip(leaves, ends, strict=True):
            left = ((where < 0) | (where > leave)).nonzero()[:, 0]
            for who, rows in (("all", torch.arange(batch)), ("left", left)):
                samples = _taken(plain, inputs, rows)
                runs["layers", number, leave, who] = lambda s=samples, a=leave, b=end: _layers(plain, s, a, b)
        run = encoder(**inputs, depth=where).work
        cells.append({"exits": leaves, "rate": rate, "samples_x_layers": run.fraction})
    raw = interleaved(runs, rounds)
    seconds = {key: statistics.median(taken) for key, taken in raw.items()}
    for number, cell in enumerate(cells):
        perfect = sum(
            seconds["layers", number, leave, "all"] - seconds["layers", number, leave, "left"] for leave in cell["exits"]
        )
        spread = []
        for at in range(rounds):
            ideal = sum(
                raw["layers", number, leave, "all"][at] - raw["layers", number, leave, "left"][at] for leave in cell["exits"]
            )
            spread.append((raw["full"][at] - raw["dynamic", number][at]) / ideal if ideal > 0 else float("nan"))
        saved = seconds["full"] - seconds["dynamic", number]
        cell |= {
            "dynamic_s": seconds["dynamic", number], "nobody_s": seconds["nobody", number], "saved_s": saved,
            "perfect_s": perfect, "efficiency": saved / perfect, "efficiency_min": min(spread), "efficiency_max": max(spread),
        }  # fmt: skip
    return {
        "model": name, "batch": batch, "layout": layout, "full_s": seconds["full"],
        "transformers_s": seconds["transformers"], "cells": cells,
    }  # fmt: skip


def _taken(encoder: DynamicEncoder, inputs: dict[str, Tensor], rows: Tensor) -> Samples:
    """Those samples (the caller's numbers) as they stand in a batch at boundary 0: shortest first."""
    samples = encoder.begin(**inputs)
    kept = torch.isin(samples.ids, rows)
    return samples.split(~kept)


def _layers(encoder: DynamicEncoder, samples: Samples, first: int, last: int) -> None:
    for layer in range(first, last):
        samples = encoder.family.step(layer, samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[32, 128])
    parser.add_argument("--models", type=lambda text: text.split(","), default=["vit", "minilm"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    wish = parser.parse_args()
    path = wish.folder / "encoder_depth_efficiency.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    found["machine"] = info.collect()
    found["settings"] = {"rounds": wish.rounds, "threads": torch.get_num_threads()}
    layouts = {"vit": ["padded"], "minilm": ["packed", "padded"]}
    for name in wish.models:
        for layout in layouts[name]:
            for batch in wish.batches:
                row = measure(name, batch, layout, wish.rounds, getattr(torch, wish.dtype)) | {"dtype": wish.dtype}
                key = ("model", "batch", "layout", "dtype")
                found["rows"] = [old for old in found["rows"] if any(old[part] != row[part] for part in key)] + [row]
                print(f"{name} {layout} batch {batch}: full {row['full_s']:.3f} s, transformers {row['transformers_s']:.3f} s")
                for cell in row["cells"]:
                    print(f"  exits {cell['exits']} rate {cell['rate']}: work {cell['samples_x_layers']:.1%}, saved "
                          f"{cell['saved_s'] * 1e3:.1f} of {cell['perfect_s'] * 1e3:.1f} ms: {cell['efficiency']:.1%} "
                          f"({cell['efficiency_min']:.0%}-{cell['efficiency_max']:.0%}), nobody leaves "
                          f"{cell['nobody_s'] / row['full_s'] - 1:+.1%}", flush=True)  # fmt: skip
                with replacing(path) as temporary:
                    temporary.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
