"""Depth efficiency: of the time that a perfect machine would save by leaving rows out of layers, the share that is saved.

Rows leave with known rates (depth_forced.py): the rows x layers removed are exact and the quality of exits plays no part. A
perfect machine's layer takes what it was measured to take with that many rows, in the same run, on the same pages: sum over
layers of (time with all rows - time with the rows that are left), nothing for no rows. Not part of it, and therefore counted
against us: boundaries, judges, moving rows, exit heads, K,V back-fill, jumps. Beside it, how long the weights of boundaries
take to read, at the rate at which a layer of one row reads its own; and what exits cost that nobody takes: the shipped ones
with thresholds that no score reaches.

    PYTHONPATH=benchmarks python benchmarks/depth_efficiency.py build [--quick]
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from depth_forced import Draw, Scenario, at_rates, boundary_bytes, draw, forced_exits, perfect_saving
from torch import Tensor

from dyndepth import info
from dyndepth.demo import chat, load
from dyndepth.demo.prompts import SHOWN, calibrating
from dyndepth.exits import Exits
from dyndepth.files import replacing, require
from dyndepth.profiling.alone import run_layers
from dyndepth.profiling.prompts import prompts
from dyndepth.profiling.timers import timing
from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.session import Session

#: Involuntary context switches per second above which a block counts as preempted; one is always forgiven.
PREEMPTED = 50.0
#: Below this share of a full step a perfect saving is as small as what two runs of the same differ by.
RESOLVED = 0.02
#: No score of a shipped criterion (a probability) reaches it.
NEVER_REACHED = 2.0
#: How often blocks are drawn again to say how sure a median is.
RESAMPLED = 200
Key = tuple[str, Any]


def scenarios(depth: int, kv_ranks: Sequence[int | None] = (None,)) -> list[Scenario]:
    """One exit at two thirds and two exits, with judges and by lot, and one band that resumes; at a quarter and at a half of
    the live rows each, and with K,V maps of each rank."""
    first, second, band = depth // 3, 2 * depth // 3, (depth // 6, depth // 3)
    found = []
    for kv_rank, rate in itertools.product(kv_ranks, (0.25, 0.5)):
        found += [
            Scenario(f"exit at {second}", ((second, depth, rate),), kv_rank),
            Scenario(f"exits at {first} and {second}", ((first, depth, rate), (second, depth, rate)), kv_rank),
            Scenario(f"exit at {second}, by lot", ((second, depth, rate),), kv_rank, by_lot=True),
            Scenario(
                f"exits at {first} and {second}, by lot", ((first, depth, rate), (second, depth, rate)), kv_rank, by_lot=True
            ),
            Scenario(f"band [{band[0]}, {band[1]}), by lot", ((*band, rate),), kv_rank, by_lot=True),
        ]
    return found


def steps_of(batch: int) -> int:
    """Steps of a block. Short ones: a machine's speed drifts within seconds, and the shorter the blocks that take turns, the
    more alike what they meet (docs/notes/boundaries.md); but a quarter of a block's rows must be rows."""
    return max(4, 8 // batch)


@dataclass(frozen=True)
class Sample:
    """One block: seconds a step (or a layer), and whether something else had a core meanwhile."""

    seconds: float
    preempted: bool


class Bench:
    """One batch of rows with the same context, decoded over the same positions and tokens by every system."""

    def __init__(self, causal_lm: Any, rows: Sequence[Tensor], steps: int) -> None:
        self.model: Model = bind(causal_lm)
        self.batch, self.steps, self.context = len(rows), steps, len(rows[0]) - 1
        self.capacity = [self.context + steps] * self.batch
        self.full = Session(self.model, self.capacity)
        self.full.prefill([row[:-1] for row in rows], self.full.work())
        self.tokens = [torch.stack([row[-1] for row in rows])]
        for step in range(steps):  # full depth's own text, forced on everybody
            self.tokens.append(self.step(self.full, step)[0])

    def session(self, exits: Exits) -> Session:
        """A session with exits on the pages of the others: every system has the same context, and memory is taken once."""
        session = Session(self.model, self.capacity, exits, kv="predict", first=[1] * self.batch)
        session.pages = self.full.pages
        return session

    def step(self, session: Session, step: int) -> tuple[Tensor, list[int]]:
        """(arg max, rows that ran each layer)."""
        result = session.run(
            range(self.batch), [self.context + step] * self.batch, tokens=self.tokens[step], step=[step] * self.batch
        )
        return self.model.argmax(result.ready), result.work

    def work(self, exits: Exits) -> list[list[int]]:
        """Live rows by layer, per step."""
        session = self.session(exits)
        return [self.step(session, step)[1] for step in range(self.steps)]

    def block(self, session: Session, expected: list[list[int]]) -> tuple[Callable[[], object], Callable[[], float]]:
        """What to do before, and all steps; these return the steps, for seconds a step. Raises if other rows ran than are
        expected. Before comes the first step once more: decoding goes on from a step of its own, not from another session's.
        """

        def before() -> object:
            return self.step(session, 0)

        def run() -> float:
            for step in range(self.steps):
                _, work = self.step(session, step)
                if work != expected[step]:
                    raise RuntimeError(f"step {step}: wanted {expected[step]} rows by layer, {work} ran")
            return self.steps

        return before, run

    def layers(self, count: int) -> tuple[Callable[[], object], Callable[[], float]]:
        """What to do before, and a span of all layers on `count` of the rows; it returns the layers."""
        at = self.context + self.steps // 2
        rows, context = self.full.rows(range(count), [at] * count, tokens=self.tokens[self.steps // 2][:count])
        hidden = rows.hidden.clone()

        def before() -> None:
            # The head's weights go through the caches between two passes of decoding too.
            self.model.argmax(self.model.finish(rows.hidden))
            hidden.copy_(rows.hidden)

        def run() -> float:
            run_layers(self.model, 0, self.model.depth, hidden, count, rows, context)
            return self.model.depth

        return before, run


def sample(run: Callable[[], float], before: Callable[[], object] = lambda: None) -> Sample:
    """`run` timed once; it returns by what its seconds are to be divided."""
    before()
    switches, begin = _switches(), time.perf_counter()
    parts = run()
    seconds = time.perf_counter() - begin
    return Sample(seconds / parts, _switches() - switches > 1 + PREEMPTED * seconds)


def by_part(runs: Mapping[Key, Callable[[], float]], repetitions: int = 3) -> dict[Key, dict[str, float]]:
    """Per run, seconds a step by part of the runtime (dyndepth.profiling): medians of repetitions in turn, with timers."""
    found: dict[Key, dict[str, list[float]]] = {key: {} for key in runs}
    for _ in range(repetitions):
        for key, run in runs.items():
            with timing() as recorder:
                steps = run()
            for part in {span.part for span in recorder.spans}:
                own = sum(span.own for span in recorder.spans if span.part == part)
                found[key].setdefault(part, []).append(own / 1e9 / steps)
    return {key: {part: statistics.median(seconds) for part, seconds in sorted(parts.items())} for key, parts in found.items()}


def _switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@torch.no_grad()
def measure(
    causal_lm: Any, rows: Sequence[Tensor], shipped: Exits, steps: int, rounds: int, seed: int = 5,
    kv_ranks: Sequence[int | None] = (None,),
) -> dict[str, Any]:  # fmt: skip
    """All scenarios of one batch, in an order by lot, `rounds` times after one round that does not count."""
    bench = Bench(causal_lm, rows, steps)
    model, batch = bench.model, bench.batch
    wanted = scenarios(model.depth, kv_ranks)
    alike = len(wanted) // len(kv_ranks)  # the same lots whatever the rank
    draws = [draw(each, model.depth, steps, batch, seed + number % alike) for number, each in enumerate(wanted)]
    everybody = [[batch] * model.depth] * steps
    runs: dict[Key, tuple[Callable[[], object], Callable[[], float]]] = {
        ("full", None): bench.block(bench.full, everybody),
        ("configured", None): bench.block(bench.session(shipped.with_thresholds(NEVER_REACHED)), everybody),
    }
    maps: dict[str, str] = {}
    read: list[float] = []
    for number, scenario in enumerate(wanted):
        exits, said = forced_exits(model, scenario, draws[number], list(shipped))
        exits, draws[number] = at_rates(exits, scenario, draws[number], bench.work)
        maps |= {span if scenario.kv_rank is None else f"{span} of rank {scenario.kv_rank}": of for span, of in said.items()}
        read.append(boundary_bytes(exits, draws[number], model.hidden_size))
        runs["forced", number] = bench.block(bench.session(exits), draws[number].live)
    for count in sorted({1, batch, *(count for drawn in draws for count in drawn.counts)}):
        runs["layer", count] = bench.layers(count)
    samples: dict[Key, list[Sample]] = {key: [] for key in runs}
    shuffling = random.Random(seed)
    for round_number in range(rounds + 1):
        # In another order every round: what a block follows, and when in a round it comes, is nobody's advantage.
        for key, (before, run) in shuffling.sample(list(runs.items()), len(runs)):
            found = sample(run, before)
            if round_number:
                samples[key].append(found)
    parts = by_part({key: run for key, (_, run) in runs.items() if key[0] != "layer"})
    layer_s = {key[1]: middle(taken) for key, taken in samples.items() if key[0] == "layer"}
    layer_bytes = sum(weight.numel() * weight.element_size() for weight in model.layers[0].module.parameters())
    return {
        "batch": batch,
        "maps": maps,
        "layer_s": {str(count): seconds for count, seconds in layer_s.items()},
        "preempted": sum(one.preempted for taken in samples.values() for one in taken),
        "blocks": sum(map(len, samples.values())),
        "machinery": {**machinery(samples), "parts_s": parts["configured", None]},
        "full_parts_s": parts["full", None],
        "cells": [
            {
                "batch": batch,
                **cell(scenario, drawn, samples, ("forced", number), batch),
                "boundary_weights_s": read[number] * layer_s[1] / layer_bytes,
                "parts_s": parts["forced", number],
            }
            for number, (scenario, drawn) in enumerate(zip(wanted, draws, strict=True))
        ],
    }


def kept(samples: Sequence[Sample]) -> list[float]:
    """Seconds of blocks that were not preempted; of all, where those are fewer than half."""
    quiet = [one.seconds for one in samples if not one.preempted]
    return quiet if 2 * len(quiet) >= len(samples) else [one.seconds for one in samples]


def middle(samples: Sequence[Sample]) -> float:
    return statistics.median(kept(samples))


def resampled(samples: Mapping[Key, Sequence[Sample]], keys: Iterable[Key]) -> Iterator[dict[Key, float]]:
    """Medians of the blocks of each key, drawn with replacement: how far medians of so many blocks scatter (bootstrap)."""
    drawing, taken = random.Random(0), {key: kept(samples[key]) for key in keys}
    for _ in range(RESAMPLED):
        yield {key: statistics.median(drawing.choices(seconds, k=len(seconds))) for key, seconds in taken.items()}


def cell(scenario: Scenario, drawn: Draw, samples: Mapping[Key, Sequence[Sample]], key: Key, batch: int) -> dict[str, Any]:
    """One scenario: medians over blocks, and the efficiency with what it would scatter by."""
    layers: list[Key] = [("layer", count) for count in {*drawn.counts, batch}]
    full, dynamic = middle(samples["full", None]), middle(samples[key])
    perfect = perfect_saving(drawn, {layer[1]: middle(samples[layer]) for layer in layers}, batch)
    spread = []
    for found in resampled(samples, [("full", None), key, *layers]):
        ideal = perfect_saving(drawn, {layer[1]: found[layer] for layer in layers}, batch)
        if ideal > 0:
            spread.append((found["full", None] - found[key]) / ideal)
    possible = len(drawn.live) * len(drawn.live[0]) * batch
    return {
        "scenario": scenario.name, "bands": [list(band) for band in scenario.bands], "rate": scenario.rate,
        "kv_rank": scenario.kv_rank, "by_lot": scenario.by_lot,
        "rows_x_layers": drawn.run / possible, "full_s": full, "dynamic_s": dynamic, "saved_s": full - dynamic,
        "perfect_s": perfect, "efficiency": (full - dynamic) / perfect if perfect > 0 else None,
        "efficiency_p10": quantile(spread, 0.1), "efficiency_p90": quantile(spread, 0.9),
        "resolved": perfect >= RESOLVED * full, "rounds_kept": len(kept(samples[key])),
    }  # fmt: skip


def machinery(samples: Mapping[Key, Sequence[Sample]]) -> dict[str, Any]:
    """What exits cost that nobody takes, as a share of a full step."""
    of = ("full", None), ("configured", None)
    costs = [found[of[1]] / found[of[0]] - 1 for found in resampled(samples, of)]
    full, configured = (middle(samples[key]) for key in of)
    return {
        "full_s": full, "configured_s": configured, "cost": configured / full - 1,
        "cost_p10": quantile(costs, 0.1), "cost_p90": quantile(costs, 0.9), "rounds_kept": len(kept(samples[of[1]])),
    }  # fmt: skip


def quantile(values: Sequence[float], share: float) -> float | None:
    """Linear between neighbours; None of nothing."""
    if not values:
        return None
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def plot(path: Path, found: dict[str, Any]) -> None:
    """Efficiency by batch size and scenario, and the cost of exits that nobody takes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), width_ratios=(2, 1), constrained_layout=True)
    cells = [cell for batch in found["batches"] for cell in batch["cells"] if cell["resolved"]]
    names = list(dict.fromkeys(_name(cell) for cell in cells))
    for name, rate in dict.fromkeys((_name(cell), cell["rate"]) for cell in cells):
        own = [cell for cell in cells if (_name(cell), cell["rate"]) == (name, rate)]
        middles = [100 * cell["efficiency"] for cell in own]
        left.plot(
            [cell["batch"] for cell in own], middles, "-" if rate < 0.5 else "--", color=f"C{names.index(name)}", marker="o",
            label=f"{name}, {rate:.0%} of the live rows",
        )  # fmt: skip
    left.axhline(100, color="grey", linewidth=0.8)
    left.set(xlabel="rows in the batch", ylabel="depth efficiency, % of a perfect machine's saving", xscale="log")
    left.legend(fontsize=8)
    batches = [batch["batch"] for batch in found["batches"]]
    right.plot(batches, [100 * batch["machinery"]["cost"] for batch in found["batches"]], marker="o")
    right.axhline(0, color="grey", linewidth=0.8)
    right.set(xlabel="rows in the batch", ylabel="exits configured, none taken: % of a full step", xscale="log")
    for axis in (left, right):
        axis.set_xticks(batches, [str(batch) for batch in batches], minor=False)
        axis.minorticks_off()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def _name(cell: Mapping[str, Any]) -> str:
    rank = cell.get("kv_rank")  # files of older versions have none
    return str(cell["scenario"]) + ("" if rank is None else f", K,V maps of rank {rank}")


def _say(found: dict[str, Any]) -> None:
    cost = found["machinery"]
    print(f"batch {found['batch']}: full step {cost['full_s'] * 1e3:.2f} ms, configured {cost['cost']:+.1%}, "
          f"{found['preempted']} of {found['blocks']} blocks preempted")  # fmt: skip
    for cell in found["cells"]:
        share = "nothing to save" if not cell["resolved"] else f"{cell['efficiency']:.0%}"
        print(f"  {_name(cell)}, {cell['rate']:.0%}: {cell['rows_x_layers']:.1%} rows x layers, saved "
              f"{cell['saved_s'] * 1e3:.2f} of {cell['perfect_s'] * 1e3:.2f} ms: {share}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="batches 1, 16, 64 and few rounds: below two minutes")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--context", type=int, default=128, help="tokens before the first step")
    parser.add_argument("--steps", type=int, help="decode steps of a block: as few as a quarter of their rows can leave in")
    parser.add_argument("--rounds", type=int, help="60; 12 with --quick")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="float32 has files of its own")
    parser.add_argument("--kv-rank", type=int, help="everything once more with K,V maps of this rank, in the same rounds")
    wish = parser.parse_args()
    require("matplotlib", "the picture needs matplotlib: pip install 'dyndepth[demo]'")
    batches = wish.batches or ([1, 16, 64] if wish.quick else [1, 4, 16, 32, 64])
    rounds = wish.rounds or (12 if wish.quick else 60)
    if min(*batches, 1 if wish.steps is None else wish.steps, rounds, wish.context, wish.kv_rank or 1) < 1:
        parser.error("batches, context, steps, rounds and kv-rank must be at least 1")
    kv_ranks = (None,) if wish.kv_rank is None else (None, wish.kv_rank)
    causal_lm, tokenizer, shipped = load(getattr(torch, wish.dtype))
    name = "depth_efficiency" + (f"_{wish.dtype}" if wish.dtype != "bfloat16" else "")
    name += f"_context{wish.context}" if wish.context != 128 else ""
    name += "" if wish.kv_rank is None else f"_rank{wish.kv_rank}"
    texts = [chat(tokenizer, text) for text in (*SHOWN, *calibrating()[:48])]
    found: dict[str, Any] = {
        "machine": info.collect(),
        "settings": {
            "model": "SmolLM2-135M-Instruct", "dtype": wish.dtype, "context": wish.context, "rounds": rounds, "kv": "predict",
            "steps": [wish.steps or steps_of(batch) for batch in batches], "threads": torch.get_num_threads(),
            "resolved_from": RESOLVED, "resampled": RESAMPLED,
            "threshold_of_configured": NEVER_REACHED,
        },
        "batches": [],
    }  # fmt: skip
    for batch in batches:
        rows = prompts(tokenizer, texts, calibrating()[112:284], batch, wish.context + 1)
        found["batches"].append(measure(causal_lm, rows, shipped, wish.steps or steps_of(batch), rounds, kv_ranks=kv_ranks))
        _say(found["batches"][-1])
        with replacing(wish.folder / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")
    plot(wish.folder / f"{name}.png", found)
    print(f"wrote {name}.json and {name}.png into {wish.folder}")


if __name__ == "__main__":
    main()
