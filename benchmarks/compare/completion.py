"""Requests that arrive at once over so many slots: tokens per second, and when each of them is complete.

Answers differ in length, as they do in life, and there are twice as many requests as slots, so that the second half waits for
the first. dyndepth's engine lets a request join when another one is over. transformers' own `generate` has no slots: its batch
of so many requests is over when the longest is, and everybody's answer comes then.
"""

from __future__ import annotations

import functools
import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compare.generated import exit_points
from compare.journal import Journal
from compare.measure import PREEMPTED
from dyndepth.engine import Engine, Request
from dyndepth.exits import Exits

#: What drafts are let through at, beside the shipped thresholds: a rejected draft costs time, not quality.
DRAFTING = 0.4
#: Of the wanted number of new tokens, what the requests ask for in turn.
LENGTHS = (0.5, 1.0, 1.5)
DRAFTS = 2


@dataclass(frozen=True)
class Load:
    """Requests: prompts int64 [t] each and how many tokens each wants, over `slots` at once."""

    model: Any
    exits: Exits
    prompts: list[Tensor]
    tokens: list[int]
    slots: int

    @classmethod
    def of(cls, model: Any, exits: Exits, prompts: list[Tensor], slots: int, new_tokens: int) -> Load:
        tokens = [max(1, round(LENGTHS[number % len(LENGTHS)] * new_tokens)) for number in range(len(prompts))]
        return cls(model, exits, prompts, tokens, slots)


@dataclass(frozen=True)
class Serving:
    """One way to answer a load; `run` gives seconds from the arrival to the end of every request, and what work there was."""

    system: str
    mode: str
    run: Callable[[Load], dict[str, Any]]
    #: Runs where there is one slot only.
    alone: bool = False

    @property
    def name(self) -> str:
        return f"serving: {self.system}, {self.mode}"


@dataclass(frozen=True)
class Plan:
    """What of it a run of the comparison holds."""

    dtype: str
    context: int
    slots: Sequence[int]
    repetitions: int
    systems: list[Serving]


def serving_systems() -> list[Serving]:
    ours = functools.partial(Serving, "dyndepth")
    return [
        ours("full depth", functools.partial(_engine, with_exits=False)),
        ours("dynamic", _engine),
        ours("propagate", functools.partial(_engine, kv="propagate")),
        ours("recompute", functools.partial(_engine, kv="recompute")),
        ours("lossless", functools.partial(_engine, kv="recompute", mode="lossless")),
        ours(f"lossless at {DRAFTING}", functools.partial(_engine, kv="recompute", mode="lossless", threshold=DRAFTING)),
        Serving("transformers", "dynamic cache", _batches),
        Serving("transformers", "self-speculation", functools.partial(_batches, speculate=True), alone=True),
    ]


def measure(journal: Journal, plan: Plan, load: Callable[[int], Load], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every system in turn at every number of slots, what the journal knows left out; rows of what is known then."""
    for slots in plan.slots:
        systems = [system for system in plan.systems if slots == 1 or not system.alone]
        key = (plan.dtype, slots, plan.context)
        left = {system.name: plan.repetitions - len(journal.of(key, system.name, "served")) for system in systems}
        if not any(count > 0 for count in left.values()):
            continue
        asked = load(slots)
        for system in systems:  # to be warm: allocations, and what is made once per size
            system.run(Load(asked.model, asked.exits, asked.prompts[:slots], [2] * min(slots, len(asked.prompts)), slots))
        for repetition in range(plan.repetitions):
            for system in systems:
                if left[system.name] < plan.repetitions - repetition:
                    continue
                say(f"{plan.dtype}, {slots} slots: repetition {repetition + 1}, {system.name}")
                switches, begin = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw, time.perf_counter()
                found = system.run(asked)
                seconds = time.perf_counter() - begin
                switched = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - switches
                journal.add(key, system.name, "served", preempted=switched / seconds > PREEMPTED,
                            requests=len(asked.tokens), new_tokens=sum(asked.tokens), **found)  # fmt: skip
    return rows(journal, plan)


def rows(journal: Journal, plan: Plan) -> list[dict[str, Any]]:
    """Per number of slots and system: tokens/s (median over repetitions), completion times of all their requests."""
    found = []
    for slots in plan.slots:
        for system in plan.systems:
            runs = journal.of((plan.dtype, slots, plan.context), system.name, "served")
            if not runs:
                continue
            quiet = [run for run in runs if not run["preempted"]]
            kept = quiet if 2 * len(quiet) >= len(runs) else runs
            ends = sorted(end for run in kept for end in run["ends"])
            found.append({
                "dtype": plan.dtype, "context": plan.context, "slots": slots, "system": system.system, "mode": system.mode,
                "requests": runs[0]["requests"], "new_tokens": runs[0]["new_tokens"], "repetitions": len(kept),
                "preempted": len(runs) - len(quiet),
                "tokens_per_s": runs[0]["new_tokens"] / statistics.median(max(run["ends"]) for run in kept),
                "p50_s": quantile(ends, 0.5), "p99_s": quantile(ends, 0.99),
                **{key: runs[0].get(key) for key in ("rows_x_layers", "drafted", "accepted")},
            })  # fmt: skip
    return found


def quantile(ordered: list[float], share: float) -> float:
    """The least of the sorted values that at least this share of them does not exceed."""
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]


def _engine(
    load: Load, *, with_exits: bool = True, kv: str | None = None, mode: str = "dynamic", threshold: float | None = None
) -> dict[str, Any]:
    exits = None if not with_exits else load.exits if threshold is None else load.exits.with_thresholds(threshold)
    longest = max(len(prompt) + tokens for prompt, tokens in zip(load.prompts, load.tokens, strict=True))
    engine = Engine(load.model, exits, kv=kv, slots=load.slots, longest=longest)
    begin = time.perf_counter()
    asked = [
        engine.add_request(Request(prompt, max_new_tokens=tokens, mode=mode, drafts=DRAFTS))
        for prompt, tokens in zip(load.prompts, load.tokens, strict=True)
    ]
    ends = {event.request.number: time.perf_counter() - begin for event in engine.stream() if event.last}
    found: dict[str, Any] = {"ends": [ends[request.number] for request in asked], "rows_x_layers": engine.work.fraction}
    if mode == "lossless":
        found |= {name: sum(getattr(request, name) for request in asked) for name in ("drafted", "accepted")}
    return found


def _batches(load: Load, *, speculate: bool = False) -> dict[str, Any]:
    """In batches of `slots`, each until its longest answer is done."""
    options = {"assistant_early_exit": min(exit_points(load.exits))} if speculate else {}
    begin, ends = time.perf_counter(), []
    for at in range(0, len(load.prompts), load.slots):
        prompts, tokens = load.prompts[at : at + load.slots], max(load.tokens[at : at + load.slots])
        width = max(map(len, prompts))
        ids = torch.stack([torch.cat([prompt.new_zeros(width - len(prompt)), prompt]) for prompt in prompts])
        mask = torch.stack([(torch.arange(width) >= width - len(prompt)).long() for prompt in prompts])
        load.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
            **options,
        )  # fmt: skip
        ends += [time.perf_counter() - begin] * len(prompts)
    return {"ends": ends}
