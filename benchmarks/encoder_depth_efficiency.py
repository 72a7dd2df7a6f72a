"""Depth efficiency of encoders: of the time that a perfect machine would save by running fewer samples, the share saved.

Samples leave at random with known rates, so the samples x layers removed are exact and the quality of exits plays no part. A
perfect machine's stretch of layers takes what it was measured to take with that many samples, in the same run: sum over layers
of (time of a layer with all samples - time with those that are left). Not part of it, and therefore counted against us: moving
samples, heads of those that leave, deciding, and everything between layers. Models have random weights: time does not see them.

Both passes are timed from the last layer below the first exit: what runs below it is the same, and would only add noise.
Runs of a twentieth of a second take turns, for a machine whose speed drifts. Beside the perfect machine's saving stands what
would be saved if layers took time in proportion to tokens, so that one sees what the machine's own products make of fewer rows.

    PYTHONPATH=benchmarks python benchmarks/encoder_depth_efficiency.py build [--batches 32,128] [--rounds 15] [--seconds 80]
        [--models vit] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import math
import random
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

#: Runs shorter than this are repeated within a block.
BLOCK_S = 0.05
#: mallopt's names for these numbers.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


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


def keep_memory() -> bool:
    """Tell glibc to keep freed memory; False where there is no glibc.

    It gives large tensors back to the system otherwise and faults them in again, a fifth of a pass at batch 128, and how
    much depends on what ran before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def interleaved(runs: dict[Any, Callable[[], Any]], rounds: int, times: int, limit: float = math.inf) -> dict[Any, list[float]]:
    """Seconds of every run, `times` in a row, in another order every round, after one round that does not count.

    No round begins that would end after `limit` seconds, going by the longest.
    """
    found: dict[Any, list[float]] = {key: [] for key in runs}
    shuffled = random.Random(0)
    start, longest = time.perf_counter(), 0.0
    for number in range(rounds + 1):
        began = time.perf_counter()
        if number > 1 and began - start + longest > limit:
            break
        for key in shuffled.sample(list(runs), len(runs)):
            run = runs[key]
            begin = time.perf_counter()
            for _ in range(times):
                run()
            if number:
                found[key].append((time.perf_counter() - begin) / times)
        longest = max(longest, time.perf_counter() - began)
    return found


@torch.no_grad()
def measure(name: str, batch: int, rounds: int, dtype: torch.dtype, limit: float = math.inf) -> dict[str, Any]:
    """All scenarios of one model and batch size in its faster layout, with what a perfect machine would save in each."""
    layout = "packed" if name == "minilm" or dtype == torch.bfloat16 else "padded"
    model = {"vit": vit, "minilm": minilm}[name]().to(dtype)
    inputs = inputs_of(name, batch)
    facts = facts_of(model)
    runs: dict[Any, Callable[[], Any]] = {}
    cells: list[dict[str, Any]] = []
    stretches: list[list[tuple[Any, Any, float]]] = []
    plain = DynamicEncoder(model, SampleExits([], facts), layout=layout)
    runs["full"] = lambda: plain(**inputs)
    runs["transformers"] = lambda: model(**inputs)
    for number, (shares, rate) in enumerate(SCENARIOS):
        leaves, where = drawn(plain.depth, shares, rate, batch)
        points = [SampleExit(at, LinearHead(facts.width, facts.vocab_size), FixedDepth()) for at in leaves]
        encoder = DynamicEncoder(model, SampleExits(points, facts), layout=layout)
        closed = torch.full_like(where, -1)
        below, _ = plain.advance(plain.begin(**inputs), leaves[0] - 1)
        # Neither depends on who leaves: scenarios with the same exits share them.
        runs["full", shares] = functools.partial(_upwards, plain, below, None)
        runs["nobody", shares] = functools.partial(_upwards, encoder, below, closed)
        runs["dynamic", number] = functools.partial(_upwards, encoder, below, where)
        # Layers above each exit, all samples against those that are left: what the perfect machine saves.
        stretch = []
        for leave, end in zip(leaves, [*leaves[1:], plain.depth], strict=True):
            gone = (where >= 0) & (where <= leave)
            left, _ = below.split(gone[below.ids])
            every, fewer = ("all", leave, end), ("left", number, leave)
            runs[every] = functools.partial(_layers, plain, below, leave, end)
            runs[fewer] = functools.partial(_layers, plain, left, leave, end)
            stretch.append((every, fewer, 1 - left.total / below.total))
        stretches.append(stretch)
        work = encoder(**inputs, depth=where).work
        cells.append({"exits": leaves, "rate": rate, "samples_x_layers": work.fraction})
    begin = time.perf_counter()
    plain(**inputs)
    raw = interleaved(runs, rounds, max(1, round(BLOCK_S / (time.perf_counter() - begin))), limit)
    rounds = len(raw["full"])
    seconds = {key: statistics.median(taken) for key, taken in raw.items()}
    for number, (cell, stretch, (shares, _)) in enumerate(zip(cells, stretches, SCENARIOS, strict=True)):
        perfect = _perfect(seconds, stretch)
        saved = seconds["full", shares] - seconds["dynamic", number]
        by_round = [{key: taken[at] for key, taken in raw.items()} for at in range(rounds)]
        spread = sorted((one["full", shares] - one["dynamic", number]) / _perfect(one, stretch) for one in by_round)
        cell |= {
            "dynamic_s": seconds["dynamic", number], "from_s": seconds["full", shares], "nobody_s": seconds["nobody", shares],
            "saved_s": saved, "perfect_s": perfect, "efficiency": saved / perfect,
            "by_tokens_s": sum(gone * seconds[every] for every, _, gone in stretch),
            "efficiency_p25": spread[rounds // 4], "efficiency_p75": spread[(3 * rounds) // 4],
        }  # fmt: skip
    return {
        "model": name, "batch": batch, "layout": layout, "full_s": seconds["full"],
        "transformers_s": seconds["transformers"], "rounds": rounds, "cells": cells,
    }  # fmt: skip


def _perfect(seconds: dict[Any, float], stretch: list[tuple[Any, Any, float]]) -> float:
    """Above each exit, time with all samples less time with those that are left."""
    return sum(seconds[every] - seconds[fewer] for every, fewer, _ in stretch)


def _upwards(encoder: DynamicEncoder, samples: Samples, depth: Tensor | None) -> None:
    """The rest of a pass, answers included."""
    samples, _ = encoder.advance(samples, depth=depth)
    if samples.count:
        encoder.finish(samples)


def _layers(encoder: DynamicEncoder, samples: Samples, first: int, last: int) -> None:
    for layer in range(first, last):
        samples = encoder.family.step(layer, samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[32, 128])
    parser.add_argument("--models", type=lambda text: text.split(","), default=["vit", "minilm"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for the rounds of one model and batch size")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    wish = parser.parse_args()
    kept = keep_memory()
    path = wish.folder / "encoder_depth_efficiency.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    found["machine"] = info.collect()
    found["settings"] = {"threads": torch.get_num_threads(), "memory_kept": kept}
    for name in wish.models:
        for batch in wish.batches:
            row = measure(name, batch, wish.rounds, getattr(torch, wish.dtype), wish.seconds) | {"dtype": wish.dtype}
            key = ("model", "batch", "dtype")
            found["rows"] = [old for old in found["rows"] if any(old[part] != row[part] for part in key)] + [row]
            print(f"{name} {row['layout']} {batch}: full {row['full_s']:.3f} s, transformers {row['transformers_s']:.3f} s")
            for cell in row["cells"]:
                print(f"  exits {cell['exits']} rate {cell['rate']}: work {cell['samples_x_layers']:.1%}, saved "
                      f"{cell['saved_s'] * 1e3:.1f} of {cell['perfect_s'] * 1e3:.1f} ms: {cell['efficiency']:.1%} "
                      f"({cell['efficiency_p25']:.0%}-{cell['efficiency_p75']:.0%}), nobody leaves "
                      f"{cell['nobody_s'] / cell['from_s'] - 1:+.1%}", flush=True)  # fmt: skip
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
