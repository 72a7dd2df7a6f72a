"""What a report measures along the path of thresholds, and which tokens leave where as the exits come."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dyndepth.calibration import Lost, Requests, default_path
from dyndepth.data.own import end_tokens
from dyndepth.demo.measure import Rates, interleaved
from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits, Never
from dyndepth.exits.codec import number_to_json
from dyndepth.report.kinds import KINDS, kinds_of
from dyndepth.runtime.entry import generate
from dyndepth.runtime.score import score

Advance = Callable[[int], None]

CLOSED, GIVEN = "closed", "as they come"


@dataclass(frozen=True)
class Point:
    """One vector of thresholds on the way from strict to free."""

    name: str
    thresholds: list[float | str]
    #: Mean over requests of the share of tokens that differ from full depth's, given full depth's text so far.
    disagreement: float
    #: Of that mean, over requests; None for a single request.
    standard_error: float | None
    #: Share of rows x layers run by rows that produce tokens, in the same passes.
    rows_x_layers: float
    tokens_per_s: Rates


@dataclass(frozen=True)
class Frontier:
    points: list[Point]
    full_depth: Rates
    #: Disagreement that rounding alone causes: between decoding at full depth and scoring at full depth.
    rounding_floor: float
    #: Prompts decoded as one batch for the tokens per second.
    timed_prompts: int
    #: Why there is no path of thresholds, if there is none.
    note: str | None


@dataclass(frozen=True)
class Histogram:
    """Judged rows by the kind of the token they emit (KINDS) and the layers they ran, with the thresholds as they come."""

    layers: list[int]
    #: Per kind, rows that ran `layers[i]` layers.
    rows: dict[str, list[int]]


def frontier(
    requests: Requests, exits: Exits, kv: str | None, repetitions: int, stage: Callable[[str, int], Advance]
) -> Frontier:
    """Disagreement, work and tokens per second along the default path of `calibrate`, closed exits first."""
    named, note = path(exits)
    lost: list[Lost] = []
    for number, (_, thresholds) in enumerate(named, 1):
        advance = stage(f"point {number} of {len(named)}", len(requests))
        lost.append(requests.lost(_at(exits, thresholds), "disagreement", kv, advance))
    calls = _calls(requests, [None, *(_at(exits, thresholds) for _, thresholds in named)], kv)
    advance = stage("timing, interleaved", len(calls) * (1 + repetitions))
    _, seconds = interleaved(calls, repetitions, lambda: advance(1))
    timed = min(requests.batch, len(requests))
    rates = [Rates.of(timed * requests.new_tokens, seconds[number]) for number in range(len(calls))]
    points = [
        Point(
            name=name,
            thresholds=[number_to_json(band.threshold) for band in _at(exits, thresholds)],
            disagreement=float(found.losses.mean()),
            standard_error=float(found.losses.std(ddof=1)) / math.sqrt(len(requests)) if len(requests) > 1 else None,
            rows_x_layers=found.work.fraction,
            tokens_per_s=rate,
        )
        for (name, thresholds), found, rate in zip(named, lost, rates[1:], strict=True)
    ]
    return Frontier(points, rates[0], requests.rounding, timed, note)


def path(exits: Exits) -> tuple[list[tuple[str, list[float] | None]], str | None]:
    """Named threshold vectors, None for closed exits, and why they are no path if they are none."""
    closed: tuple[str, list[float] | None] = CLOSED, None
    given = [band.threshold for band in exits]
    if all(band.criterion.kind == Never.kind or (band.criterion.scored and band.threshold == math.inf) for band in exits):
        return [closed], "The exits are closed: no row can leave, and no path of thresholds follows from infinite ones."
    if not any(band.criterion.scored for band in exits):
        kinds = ", ".join(sorted({band.criterion.kind for band in exits}))
        return [closed, (GIVEN, given)], f"No band has a score that a threshold could be compared with (criteria: {kinds})."
    try:
        vectors = default_path(exits)
    except ArgumentError:
        odd = [
            f"band [{band.leave}, {band.resume}) has criterion {band.criterion.kind} with threshold {band.threshold:.4g}"
            for band in exits
            if band.criterion.scored and not (math.isfinite(band.criterion.most) and math.isfinite(band.threshold))
        ]
        return [closed, (GIVEN, given)], f"No path of thresholds leads through these exits: {'; '.join(odd)}."
    named: list[tuple[str, list[float] | None]] = [closed]
    for number, vector in enumerate(vectors, 1):
        same = all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) for a, b in zip(vector, given, strict=True))
        if named[-1][0] != GIVEN or not same:  # thresholds at the highest score there can be have no stricter ones
            named.append((GIVEN, given) if same else (str(number), vector))
    return named, None


def histogram(requests: Requests, exits: Exits, kv: str | None, tokenizer: Any, advance: Advance) -> Histogram:
    """Teacher-forced over the full model's answers, with real decisions and the real K,V policy."""
    counts: Counter[tuple[int, int]] = Counter()
    for tokens, start in groups(requests):
        scored = score(requests.model, tokens, exits, start=start, kv=kv)
        emitted, layers = scored.argmax()[scored.judged].tolist(), scored.layers_run[scored.judged].tolist()
        counts.update(zip(emitted, layers, strict=True))
        advance(len(tokens))
    kinds = kinds_of(tokenizer, {token for token, _ in counts})
    seen = sorted({depth for _, depth in counts})
    rows = {name: [0] * len(seen) for name in KINDS}
    for (token, depth), count in counts.items():
        rows[kinds[token]][seen.index(depth)] += count
    return Histogram(seen, rows)


def _at(exits: Exits, thresholds: list[float] | None) -> Exits:
    return exits.closed() if thresholds is None else exits.with_thresholds(thresholds)


def groups(requests: Requests) -> Iterator[tuple[list[Tensor], list[int]]]:
    """(tokens, start) of `batch` requests at a time; the last token's row produces nothing that was generated."""
    for begin in range(0, len(requests), requests.batch):
        part = slice(begin, begin + requests.batch)
        yield [tokens[:-1] for tokens in requests.tokens[part]], requests.start[part]


def _calls(requests: Requests, all_exits: list[Exits | None], kv: str | None) -> dict[int, Callable[[], Any]]:
    """Greedy generate calls for a fixed number of new tokens, so that all do the same work, on the first batch of prompts."""
    model = requests.model
    prompts = [text[: start + 1] for text, start in zip(requests.tokens, requests.start, strict=True)][: requests.batch]
    pad = model.generation_config.pad_token_id
    pad = next(iter(end_tokens(model)), 0) if pad is None else pad

    def padded(rows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left").to(model.device)

    fixed = {
        "input_ids": padded(prompts, pad), "attention_mask": padded([torch.ones_like(prompt) for prompt in prompts], 0),
        "max_new_tokens": requests.new_tokens, "do_sample": False, "num_beams": 1,
        "min_new_tokens": requests.new_tokens, "pad_token_id": pad, "custom_generate": generate,
    }  # fmt: skip

    def call(exits: Exits | None) -> Callable[[], Any]:
        return lambda: model.generate(**fixed, exits=exits, kv=None if exits is None else kv)

    return {number: call(exits) for number, exits in enumerate(all_exits)}
