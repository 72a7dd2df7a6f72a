"""`make policies`: K,V policies, lossless generation and re-batching on the demo's model, side by side in one run.

*Lossless*: greedy tokens of mode="lossless" against our own full depth in bfloat16 and against transformers in
float32, token for token. *Speed*: tokens per second of every policy and of lossless generation, interleaved, beside full
depth and transformers' own self-speculation (batch 1). *Quality*: a share of the tokens leaves by lot; agreement of the
others with the full model and KL of their next-token distribution, per policy. *Engine*: requests over fewer slots, with
rules that let rows wait; tokens per second and completion times. *Skips* (draft_skips.py): drafts that leave out layers. Writes
policies.json and policies.png; `--only` one part, `--batch` one batch size of speed, keeps the others. Completion times of
policies and lossless requests, 1 to 64 slots, are `make compare`'s.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import draft_skips
import torch
from torch import Tensor

from dyndepth import info
from dyndepth.closed_form.measure import Lottery
from dyndepth.closed_form.search import with_criterion
from dyndepth.demo import chat, load
from dyndepth.demo.measure import interleaved
from dyndepth.demo.prompts import SHOWN, calibrating
from dyndepth.engine import Engine, Filled, Immediate, Request
from dyndepth.exits import Exits
from dyndepth.files import replacing, require
from dyndepth.runtime.bind import bind
from dyndepth.runtime.entry import generate
from dyndepth.runtime.score import HEAD_ROWS, Scored, score
from dyndepth.training.losses import kl

POLICIES = ("predict", "propagate", "copy", "recompute", "release")
SHARES = (0.1, 0.2, 0.3, 0.5, 0.7)
#: What drafts are let through at, beside the shipped threshold: a rejected draft costs time, not quality.
DRAFTING = 0.4


class Bench:
    def __init__(self, dtype: torch.dtype) -> None:
        self.model, self.tokenizer, self.exits = load(dtype)
        texts = [chat(self.tokenizer, text) for text in (*SHOWN, *calibrating()[:48])]
        self.rows = [torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]

    def inputs(self, begin: int, batch: int) -> dict[str, Tensor]:
        rows = self.rows[begin : begin + batch]
        width = max(len(row) for row in rows)
        ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
        mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def at(self, threshold: float) -> Exits:
        exits = copy.deepcopy(self.exits)
        for band in exits:
            band.threshold = threshold
        return exits

    def call(self, inputs: dict[str, Tensor], tokens: int, **options: Any) -> Any:
        settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        own = {} if options.pop("theirs", False) else {"custom_generate": generate, "return_dict_in_generate": True}
        return self.model.generate(**inputs, **settings, **own, **options)

    def made(self, prompts: int, batch: int, tokens: int, **options: Any) -> tuple[Tensor, list[Any]]:
        """New tokens int64 [prompts, tokens] in batches of `batch`, and what the calls returned."""
        outs = [self.call(self.inputs(at, min(batch, prompts - at)), tokens, **options) for at in range(0, prompts, batch)]
        texts = [out if isinstance(out, Tensor) else out.sequences for out in outs]
        return torch.cat([text[:, -tokens:] for text in texts]), outs


def lossless(prompts: int, tokens: int) -> list[dict[str, Any]]:
    """Sequences that differ from the full model's, over `prompts` prompts of ragged lengths; that one runs sixteen at once."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        bench = Bench(dtype)
        exits, theirs = bench.at(DRAFTING), dtype == torch.float32

        full, _ = bench.made(prompts, 16, tokens, theirs=theirs)
        for batch in (1, 4, 16):
            mine, outs = bench.made(prompts, batch, tokens, exits=exits, mode="lossless")
            against = "transformers" if theirs else "dyndepth, full depth"
            rows.append({"dtype": str(dtype).removeprefix("torch."), "against": against, "batch": batch, "sequences": prompts,
                         "tokens": tokens, "different": int((mine != full).any(1).sum()),
                         "drafted": sum(int(out.drafted.sum()) for out in outs),
                         "accepted": sum(int(out.accepted.sum()) for out in outs)})  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def speed(bench: Bench, batches: Sequence[int], tokens: int, repetitions: int) -> list[dict[str, Any]]:
    rows = []
    for batch in batches:
        inputs = bench.inputs(0, batch)
        call = functools.partial(bench.call, inputs, tokens)
        calls: dict[str, Callable[[], Any]] = {"full depth": call}
        for policy in POLICIES:
            calls[f"dynamic, {policy}"] = functools.partial(call, exits=bench.exits, kv=policy)
        for threshold in (None, DRAFTING):
            exits = bench.exits if threshold is None else bench.at(threshold)
            name = "shipped threshold" if threshold is None else f"threshold {threshold}"
            for drafts in (1, 2, 4):
                named = f"lossless, {name}, {drafts} drafts"
                calls[named] = functools.partial(call, exits=exits, mode="lossless", drafts=drafts)
        if batch == 1:
            leave = next(iter(bench.exits)).leave
            calls["transformers"] = functools.partial(call, theirs=True)
            calls["transformers, assistant_early_exit"] = functools.partial(call, theirs=True, assistant_early_exit=leave)
        first, seconds = interleaved(calls, repetitions, lambda: None)
        full = statistics.median(seconds["full depth"])
        for name in calls:
            out, times = first[name], sorted(seconds[name])
            work = getattr(out, "work", None)
            rows.append({"batch": batch, "system": name, "tokens_per_s": batch * tokens / statistics.median(times),
                         "p10": batch * tokens / times[-1 - len(times) // 10], "p90": batch * tokens / times[len(times) // 10],
                         "times_full": full / statistics.median(times),
                         "rows_x_layers": None if work is None else work.fraction,
                         "drafted": _sum(out, "drafted"), "accepted": _sum(out, "accepted")})  # fmt: skip
            print(f"batch {batch}, {name}: {rows[-1]['tokens_per_s']:.1f} tok/s ({rows[-1]['times_full']:.2f})", flush=True)
    return rows


def _sum(out: Any, name: str) -> int | None:
    value = getattr(out, name, None)
    return None if value is None else int(value.sum())


@torch.no_grad()
def quality(bench: Bench, prompts: int, tokens: int) -> list[dict[str, Any]]:
    """Tokens that stay, when a share of the others left by lot: they suffer only from the K,V they read."""
    inputs = bench.inputs(0, prompts)
    made = bench.call(inputs, tokens).sequences[:, inputs["input_ids"].shape[1] :]
    sequences = [torch.cat([row, made[number]]) for number, row in enumerate(bench.rows[:prompts])]
    starts = [len(row) - 1 for row in bench.rows[:prompts]]
    full = score(bench.model, sequences, start=starts)
    rows = []
    for share in SHARES:
        exits = Exits([with_criterion(band, Lottery(share)) for band in bench.exits], bench.exits.model)
        for policy in POLICIES[:4]:
            mine = score(bench.model, sequences, exits, start=starts, kv=policy, pending=1 << 20)
            found = _compared(bind(bench.model), full, mine)
            rows.append({"share": share, "policy": policy, "rows_x_layers": mine.work.fraction, **found})
            print(rows[-1], flush=True)
    return rows


def _compared(model: Any, full: Scored, mine: Scored) -> dict[str, Any]:
    stayed = mine.judged & (mine.exit_layer == model.depth)
    total, same, count = 0.0, 0, int(stayed.sum())
    for begin in range(0, count, HEAD_ROWS):
        rows = stayed.nonzero()[begin : begin + HEAD_ROWS, 0]
        wanted, got = model.logits(full.ready[rows]), model.logits(mine.ready[rows])
        total += float(kl(wanted, got).sum())
        same += int((wanted.argmax(-1) == got.argmax(-1)).sum())
    return {"kl": total / count, "agreement": same / count, "tokens": count}


def engine(bench: Bench, requests: int, slots: int, tokens: int, repetitions: int) -> list[dict[str, Any]]:
    """All requests arrive at once, more than there are slots."""
    systems: dict[str, tuple[Exits | None, Any]] = {
        "full depth": (None, None),
        "nobody waits": (bench.exits, Immediate()),
        "until half of the slots wait": (bench.exits, Filled(slots // 2)),
    }
    low = bench.at(DRAFTING)
    systems |= {f"{name}, threshold {DRAFTING}": (low, systems[name][1]) for name in list(systems)[1:]}

    def run(name: str) -> dict[str, Any]:
        exits, rule = systems[name]
        machine = Engine(bench.model, exits, rule=rule, slots=slots, longest=512)
        begin = time.perf_counter()
        for row in bench.rows[:requests]:
            machine.add_request(Request(row, max_new_tokens=tokens))
        ends = [time.perf_counter() - begin for event in machine.stream() if event.last]
        return {"seconds": ends[-1], "ends": ends, "counts": machine.counts, "work": machine.work.fraction}

    for name in systems:
        run(name)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    for _ in range(repetitions):
        for name in systems:
            runs[name].append(run(name))
    rows = []
    for name, found in runs.items():
        ends = sorted(end for one in found for end in one["ends"])
        counts = found[0]["counts"]
        judged = sum(counts.judged.values())
        rows.append({"system": name, "slots": slots, "requests": requests,
                     "tokens_per_s": requests * tokens / statistics.median(one["seconds"] for one in found),
                     "p50_s": ends[len(ends) // 2], "p99_s": ends[math.ceil(0.99 * len(ends)) - 1],
                     "rows_x_layers": found[0]["work"], "passes": counts.passes, "flushed": sum(counts.flushed.values()),
                     "longest_wait": counts.longest_wait,
                     "left": sum(counts.left.values()) / judged if judged else 0.0})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def skips(bench: Bench, known: dict[str, Any] | None, quick: bool) -> dict[str, Any]:
    """The search, unless it is known (it counts, and counts do not change), and its best sets in time."""
    found = (known or {}).get("search") or draft_skips.search(bench, 2 if quick else 8, 8 if quick else 32, 3 if quick else 12)
    sizes = {len(each["layers"]): each["layers"] for each in found["sizes"]}
    sets = [found["best"], *(sizes[size] for size in (4, 8) if size in sizes)]
    return {"search": found, "timed": draft_skips.timed(bench, sets, (1,) if quick else (1, 16), 16 if quick else 64, 2)}


def plot(path: Path, found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.2), constrained_layout=True)
    for policy in POLICIES[:4]:
        own = [row for row in found["quality"] if row["policy"] == policy]
        left.plot([row["share"] for row in own], [row["kl"] for row in own], marker="o", label=policy)
    left.set(xlabel="share of tokens that left at the exit", ylabel="KL(full ‖ dynamic) of the tokens that stayed, nats")
    left.set_yscale("symlog", linthresh=0.01)
    left.legend()
    names = list(dict.fromkeys(row["system"] for row in found["speed"]))
    batches = sorted({row["batch"] for row in found["speed"]})
    for name in names:
        own = [row for row in found["speed"] if row["system"] == name]
        if len(own) > 1 and ("predict" in name or "recompute" in name or "lossless" in name):
            right.plot([row["batch"] for row in own], [row["times_full"] for row in own], marker="o", label=name)
    right.axhline(1, color="grey", linewidth=0.8)
    right.set(xlabel="rows in the batch", ylabel="times as fast as full depth", xscale="log")
    right.set_xticks(batches, [str(batch) for batch in batches])
    right.minorticks_off()
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="a few prompts and tokens: minutes")
    names = ["speed", "quality", "engine", "lossless", "skips"]
    parser.add_argument("--only", choices=names, help="one part; the others are kept")
    parser.add_argument("--batch", type=int, help="of speed; the others are kept")
    wish = parser.parse_args()
    if wish.batch is not None and wish.only != "speed":
        raise SystemExit("--batch is of speed: wanted --only speed beside it")
    require("matplotlib", "the picture needs matplotlib: pip install 'dyndepth[demo]'")
    path = wish.folder / "policies.json"
    found: dict[str, Any] = json.loads(path.read_text()) if wish.only and path.exists() else {}
    quick = wish.quick
    bench = Bench(torch.bfloat16)

    def speeds() -> list[dict[str, Any]]:
        """Every batch size, or the one that is asked for and the others as they were."""
        kept = [row for row in found.get("speed", []) if wish.batch is not None and row["batch"] != wish.batch]
        batches = (1, 16) if quick else (1, 4, 16, 64)
        rows = speed(bench, batches if wish.batch is None else (wish.batch,), 32 if quick else 64, 2 if quick else 3)
        return sorted([*kept, *rows], key=lambda row: int(row["batch"]))

    parts: dict[str, Callable[[], Any]] = {
        "speed": speeds,
        "quality": lambda: quality(bench, 8 if quick else 32, 32 if quick else 96),
        "engine": lambda: engine(bench, 16 if quick else 48, 16, 16 if quick else 48, 1 if quick else 2),
        "lossless": lambda: lossless(4 if quick else 32, 32 if quick else 128),
        "skips": lambda: skips(bench, found.get("skips"), quick),
    }
    found["machine"] = info.collect()
    found["settings"] = {"model": "SmolLM2-135M-Instruct", "threads": torch.get_num_threads(), "drafting": DRAFTING}
    for name, run in parts.items():
        if wish.only in (None, name):
            found[name] = run()
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(found, indent=1) + "\n")
    if {"quality", "speed"} <= found.keys():
        plot(wish.folder / "policies.png", found)
    print(f"wrote policies.json and policies.png into {wish.folder}")


if __name__ == "__main__":
    main()
