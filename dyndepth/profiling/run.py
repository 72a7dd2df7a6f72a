"""The profile of decoding: timed generation beside untimed, single layers and ops apart, a read roof in the same run."""

from __future__ import annotations

import functools
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits
from dyndepth.profiling import alone
from dyndepth.profiling.steps import PARTS, REST, Step, quiet, steps_of
from dyndepth.profiling.timers import MARKS, Span, Target, timing
from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.entry import generate


@dataclass(frozen=True)
class Profile:
    """`facts` is plain JSON (docs: keys end in their unit, `_s` seconds); `spans` are those of the last timed call."""

    facts: dict[str, Any]
    spans: list[Span]


def profile(
    causal_lm: Any,
    prompts: Sequence[Tensor],
    exits: Exits | None = None,
    *,
    new_tokens: int = 32,
    kv: str | None = None,
    repetitions: int = 3,
    rounds: int = 7,
    roof_bytes: int = alone.ROOF_BYTES,
) -> Profile:
    """Decode `new_tokens` tokens of prompts (ids [t], decoded as one batch), end-of-sequence tokens suppressed.

    Args:
        repetitions: timed calls, each beside one that is timed as a whole only; one more of each is not counted.
        rounds: of the measurements of single layers and ops.
        roof_bytes: bytes that the read roof reads at once.
    """
    if not prompts or any(len(prompt) < 2 for prompt in prompts):
        raise ArgumentError("profile: wanted prompts of at least 2 tokens, got " + str([len(prompt) for prompt in prompts]))
    for name, value in (("new_tokens", new_tokens), ("repetitions", repetitions), ("rounds", rounds)):
        if value < 1:
            raise ArgumentError(f"profile: {name} must be at least 1, got {value}")
    call = functools.partial(_generate, causal_lm, _inputs(prompts, causal_lm.device), exits, kv, new_tokens)
    out = call()
    plain: list[Step] = []
    timed: list[Step] = []
    spans: list[Span] = []
    missing: list[str] = []
    for _ in range(repetitions):
        plain += steps_of(_spans(call, MARKS)[0])
        spans, missing = _spans(call, None)
        timed += steps_of(spans)
    model = bind(causal_lm)
    apart = alone.measure(model, prompts, exits, rounds, roof_bytes)
    facts = _facts(model, plain, timed, apart)
    work = out.work
    facts |= {
        "setting": {
            "batch": len(prompts), "prompt_tokens": [len(prompt) for prompt in prompts], "new_tokens": new_tokens,
            "kv": out.kv, "bands": [[band.leave, band.resume] for band in exits or ()], "repetitions": repetitions,
            "threads": torch.get_num_threads(), "dtype": str(model.dtype).removeprefix("torch."),
            "layers": "one call of C++ a span" if not isinstance(model.stack, str) else f"modules: {model.stack}",
        },
        "work": {
            "rows_x_layers": work.run, "of": work.possible, "share": work.fraction, "by_layer": work.layers,
            "exit_blocks": {str(boundary): rows for boundary, rows in work.blocks.items()},
        },
        "untimed": missing,
    }  # fmt: skip
    return Profile(facts, spans)


def _generate(causal_lm: Any, inputs: dict[str, Tensor], exits: Exits | None, kv: str | None, new_tokens: int) -> Any:
    return causal_lm.generate(
        **inputs, custom_generate=generate, exits=exits, kv=kv, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, return_dict_in_generate=True,
    )  # fmt: skip


def _spans(call: Callable[[], Any], targets: Sequence[Target] | None) -> tuple[list[Span], list[str]]:
    with timing() if targets is None else timing(targets) as recorder:
        call()
    return recorder.spans, recorder.missing


def _inputs(prompts: Sequence[Tensor], device: torch.device) -> dict[str, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([(torch.arange(width) >= width - len(prompt)).long() for prompt in prompts])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _facts(model: Model, plain: Sequence[Step], timed: Sequence[Step], apart: alone.Alone) -> dict[str, Any]:
    kept_plain, dropped_plain = quiet(plain)
    kept, dropped = quiet(timed)
    step_s = statistics.median(step.whole for step in kept_plain) / 1e9
    timed_s = statistics.median(step.whole for step in kept) / 1e9
    batch = len(plain) and max((rows for step in timed for rows in step.rows_by_layer.values()), default=0)
    return {
        "step": {
            "median_s": step_s, "tokens_per_s": batch / step_s, "with_timers_median_s": timed_s,
            "cost_of_timers": timed_s / step_s - 1, "steps": len(kept), "preempted_steps": dropped + dropped_plain,
        },
        "parts": parts(kept),
        "spans": _spans_by_place(kept),
        "weights": _weights(model, kept, step_s, apart.read_roof_bytes_per_s),
        "alone": apart.to_json(),
    }  # fmt: skip


def parts(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Per part of PARTS, median and mean seconds a step and its share of the mean step.

    Means add up to the mean step. Medians are made to add up to the median step by the last part, which is the difference.
    """
    whole = [step.whole for step in steps]
    mean_whole = statistics.mean(whole)
    medians = {part: statistics.median(step.parts[part] for step in steps) for part in PARTS}
    medians[REST] = statistics.median(whole) - sum(value for part, value in medians.items() if part != REST)
    means = {part: statistics.mean(step.parts[part] for step in steps) for part in PARTS}
    return [
        {"part": part, "median_s": medians[part] / 1e9, "mean_s": means[part] / 1e9, "share": means[part] / mean_whole}
        for part in PARTS
    ]


def _spans_by_place(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Spans of layers as they really ran: per [begin, end), how often a step ran it, its rows and its time."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for step in steps:
        for begin, end, live, taken in step.layers:
            found[begin, end].append((live, taken))
    return [
        {
            "begin": begin, "end": end, "runs_per_step": len(entries) / len(steps),
            "rows": statistics.mean(live for live, _ in entries),
            "median_s": statistics.median(taken for _, taken in entries) / 1e9,
            "per_layer_s": statistics.median(taken for _, taken in entries) / 1e9 / (end - begin),
        }
        for (begin, end), entries in sorted(found.items())
    ]  # fmt: skip


def _weights(model: Model, steps: Sequence[Step], step_s: float, roof: float) -> dict[str, Any]:
    """Bytes of weights that a step reads: of every layer that a row ran, once, and of the LM head."""
    sizes = [sum(p.numel() * p.element_size() for p in layer.module.parameters()) for layer in model.layers]
    head = sum(p.numel() * p.element_size() for p in model.head.parameters())
    in_layers = [sum(sizes[layer] for layer, live in step.rows_by_layer.items() if live > 0) for step in steps]
    by_part = {part["part"]: part["mean_s"] for part in parts(steps)}
    read = statistics.mean(in_layers)
    return {
        "layers_bytes": read, "head_bytes": head, "bytes_per_step": read + head,
        "bytes_per_s": (read + head) / step_s,
        "in_layers_bytes_per_s": read / by_part["layers"] if by_part["layers"] else 0.0,
        "in_head_bytes_per_s": head / by_part["LM head"] if by_part["LM head"] else 0.0,
        "read_roof_bytes_per_s": roof, "share_of_roof": (read + head) / step_s / roof,
    }  # fmt: skip
