"""Requests that arrive at once over so many slots: tokens per second, and when each of them is complete.

Answers differ in length, as they do in life, and there are at least twice as many requests as slots, so that some wait. Nobody
stops at an end-of-sequence token. dyndepth's engine and transformers' continuous batching let a request join when another is
over; transformers' `generate` knows batches only: one of as many requests is over when its longest is, and everybody's answer
comes then.
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

from torch import Tensor

from compare.generated import exit_points
from compare.journal import Journal
from compare.measure import PREEMPTED, attempt
from compare.texts import padded
from dyndepth.engine import Engine, Request
from dyndepth.exits import Exits

#: What drafts are let through at, beside the shipped thresholds: a rejected draft costs time, not quality.
DRAFTING = 0.4
#: Of the wanted number of new tokens, what the requests ask for in turn.
LENGTHS = (0.5, 1.0, 1.5)
DRAFTS = 2
#: Rows of prompts in one pass of transformers' continuous batching, as in the engine's.
_CHUNK = 512


def requests_of(slots: int) -> int:
    """Twice as many as slots, and every length at least twice."""
    return max(2 * slots, 2 * len(LENGTHS))


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

    @property
    def longest(self) -> int:
        return max(len(prompt) + tokens for prompt, tokens in zip(self.prompts, self.tokens, strict=True))

    def warming(self) -> Load:
        """As many requests as slots, two tokens each."""
        prompts = self.prompts[: self.slots]
        return Load(self.model, self.exits, prompts, [2] * len(prompts), self.slots)


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
        Serving("transformers", "continuous batching", _continuous),
    ]


def measure(
    journal: Journal,
    plan: Plan,
    load: Callable[[int], Load],
    write: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Every system in turn at every number of slots, what the journal knows left out; `write` is called after each number."""
    for slots in plan.slots:
        systems = [system for system in plan.systems if slots == 1 or not system.alone]
        if all(_done(journal, plan, slots, system) for system in systems):
            continue
        asked = load(slots)
        warm: set[str] = set()
        for repetition in range(plan.repetitions):
            for system in systems:
                if _done(journal, plan, slots, system) or len(_runs(journal, plan, slots, system)) > repetition:
                    continue
                say(f"{plan.dtype}, {slots} slots: repetition {repetition + 1}, {system.name}")
                run = functools.partial(_timed, journal, plan, asked, system, warm)
                attempt(journal, (plan.dtype, slots, plan.context), system.name, run)
        write()


def _timed(journal: Journal, plan: Plan, load: Load, system: Serving, warm: set[str]) -> None:
    if system.name not in warm:  # allocations, and what is made once per size
        system.run(load.warming())
        warm.add(system.name)
    switches, begin = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw, time.perf_counter()
    found = system.run(load)
    switched = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - switches
    seconds = time.perf_counter() - begin
    journal.add(
        (plan.dtype, load.slots, plan.context), system.name, "served", preempted=switched / seconds > PREEMPTED,
        tokens=load.tokens, drafts=DRAFTS, **found,
    )  # fmt: skip


def _runs(journal: Journal, plan: Plan, slots: int, system: Serving) -> list[dict[str, Any]]:
    return journal.of((plan.dtype, slots, plan.context), system.name, "served")


def _done(journal: Journal, plan: Plan, slots: int, system: Serving) -> bool:
    failed = journal.of((plan.dtype, slots, plan.context), system.name, "failed")
    return bool(failed) or len(_runs(journal, plan, slots, system)) >= plan.repetitions


def rows(journal: Journal, plan: Plan) -> list[dict[str, Any]]:
    """Per number of slots and system: tokens/s (median over repetitions), completion times of all their requests."""
    found = []
    for slots in plan.slots:
        for system in plan.systems:
            runs = _runs(journal, plan, slots, system)
            if not runs:
                continue
            quiet = [run for run in runs if not run["preempted"]]
            kept = quiet if 2 * len(quiet) >= len(runs) else runs
            ends = sorted(end for run in kept for end in run["ends"])
            found.append({
                "dtype": plan.dtype, "context": plan.context, "slots": slots, "system": system.system, "mode": system.mode,
                "requests": len(runs[0]["tokens"]), "new_tokens": sum(runs[0]["tokens"]),
                "lengths": sorted(set(runs[0]["tokens"])), "repetitions": len(kept), "preempted": len(runs) - len(quiet),
                "tokens_per_s": sum(runs[0]["tokens"]) / statistics.median(max(run["ends"]) for run in kept),
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
    engine = Engine(load.model, exits, kv=kv, slots=load.slots, longest=load.longest)
    begin = time.perf_counter()
    asked = [
        engine.add_request(Request(prompt, max_new_tokens=tokens, mode=mode, drafts=DRAFTS))
        for prompt, tokens in zip(load.prompts, load.tokens, strict=True)
    ]
    ends = {event.request.number: time.perf_counter() - begin for event in engine.stream() if event.last}
    _complete([len(request.tokens) for request in asked], load.tokens)
    found: dict[str, Any] = {"ends": [ends[request.number] for request in asked], "rows_x_layers": engine.work.fraction}
    if mode == "lossless":
        found |= {name: sum(getattr(request, name) for request in asked) for name in ("drafted", "accepted")}
    return found


def _batches(load: Load, *, speculate: bool = False) -> dict[str, Any]:
    """In batches of `slots`, each until its longest answer is done."""
    options = {"assistant_early_exit": min(exit_points(load.exits))} if speculate else {}
    begin, ends, made = time.perf_counter(), [], []
    for at in range(0, len(load.prompts), load.slots):
        prompts, wanted = load.prompts[at : at + load.slots], load.tokens[at : at + load.slots]
        width = max(map(len, prompts))
        inputs = padded([prompt.tolist() for prompt in prompts], width, 0)
        out = load.model.generate(
            **inputs, max_new_tokens=max(wanted), do_sample=False, eos_token_id=None, pad_token_id=0, **options
        )
        ends += [time.perf_counter() - begin] * len(prompts)
        made += [min(tokens, out.shape[1] - width) for tokens in wanted]
    _complete(made, load.tokens)
    return {"ends": ends}


def _continuous(load: Load) -> dict[str, Any]:
    """transformers' own continuous batching, its cache as large as the requests can need; without its start."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    settings = ContinuousBatchingConfig(
        max_requests_per_batch=load.slots, max_batch_tokens=_CHUNK, num_blocks=load.slots * (load.longest // 256 + 2),
        use_async_batching=False, use_cuda_graph=False, allow_block_sharing=False,
    )  # fmt: skip
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(load.tokens))
    manager = load.model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=settings, warmup=False
    )
    with manager as running:
        begin = time.perf_counter()
        names = [
            running.add_request(prompt.tolist(), max_new_tokens=tokens)
            for prompt, tokens in zip(load.prompts, load.tokens, strict=True)
        ]
        ends: dict[str, float] = {}
        made: dict[str, int] = {}
        while len(ends) < len(names):
            result = running.get_result(timeout=1)
            if result is None:
                if not running.is_running():
                    raise RuntimeError("transformers' continuous batching stopped before all requests were complete")
            elif result.is_finished():
                ends[result.request_id] = time.perf_counter() - begin
                made[result.request_id] = len(result.generated_tokens)
    _complete([made[name] for name in names], load.tokens)
    return {"ends": [ends[name] for name in names]}


def _complete(made: list[int], wanted: list[int]) -> None:
    """Who makes fewer tokens is done sooner: no result."""
    if made != wanted:
        raise ValueError(f"wanted {wanted} new tokens, got {made}")
