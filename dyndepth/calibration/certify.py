"""dyndepth.calibrate: thresholds with a certificate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

import dyndepth
from dyndepth.calibration.bounds import fraction, p_value_of
from dyndepth.calibration.requests import LOSSES, Lost, Requests
from dyndepth.calibration.selection import Selection, learn_then_test
from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.exits import Exits
from dyndepth.exits.codec import number_to_json
from dyndepth.runtime.bind import bind
from dyndepth.runtime.fingerprint import check_exits

#: Strictness of the default path: 0 would be the highest score a criterion can give, 1 is the threshold the exits came with.
_LEVELS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5, 2.0)


def calibrate(
    model: Any,
    exits: Exits,
    prompts: Sequence[str | Tensor] | Requests,
    tokenizer: Any = None,
    *,
    risk: float = 0.05,
    confidence: float = 0.95,
    loss: str = "disagreement",
    bound: str = "betting",
    path: Sequence[Sequence[float]] | None = None,
    kv: str | None = None,
    new_tokens: int = 64,
    batch: int = 16,
    progress: bool = True,
) -> Exits:
    """The same exits with the freest thresholds whose expected loss is certified, or closed if none is.

    Learn-then-Test with fixed-sequence testing: threshold vectors along `path`, safest first, are measured on the prompts'
    continuations with real decisions and the real K,V policy until one's p-value exceeds 1 - confidence. With that
    confidence (over the draw of prompts) a new request of the same kind loses at most `risk` on average. The unit is a
    request, because tokens of one text are not independent.

    Args:
        model: the transformers causal LM the exits were made for.
        prompts: independent requests (strings with `tokenizer`, chat template applied, or int64 [t]), drawn as those to come
            will be, none of them seen by `fit` or `train`, none twice. Or Requests that were answered before, which makes
            `new_tokens` and `batch` idle: for several risks on the same prompts.
        risk: bound on the expected loss, in (0, 1).
        loss: `disagreement` or `inconsistency` (dyndepth.calibration.requests.LOSSES).
        bound: p-value: `betting` (the sharpest here: losses of requests vary little), `hoeffding_bentkus` or `hoeffding`.
        path: threshold vectors (one number per band), safest first, chosen without looking at these prompts. None goes from
            strict to twice as free as the thresholds the exits came with.
        kv: K,V policy, as in generate; the certificate holds for it only.
        new_tokens: length of the continuations; the certificate holds for such.

    Returns exits whose `certificate` says what holds: {certified, loss, risk, confidence, method, n, measured_risk,
    rows_x_layers, data_hash, ...}. If nothing can be certified the exits are closed and `certified` is false.

    Raises NotEnoughDataError when so few prompts could certify nothing even without a single loss.
    """
    error = 1 - fraction(confidence, "calibrate", "confidence")
    fraction(risk, "calibrate", "risk")
    if loss not in LOSSES:
        raise ArgumentError(f"calibrate: loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    p_value = p_value_of(bound, error, "calibrate")
    vectors = default_path(exits) if path is None else _checked(path, exits)
    _enough(len(prompts), risk, error, bound, p_value)
    check_exits(exits, bind(model))  # before hundreds of prompts are answered for exits that cannot run
    console = Console(stderr=True, quiet=not progress)
    with Progress(
        TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, disable=not progress,
    ) as bars:  # fmt: skip
        requests = _requests(model, exits, prompts, tokenizer, new_tokens, batch, _stage(bars, "answering", len(prompts)))
        measured: list[Lost] = []

        def losses() -> Iterator[np.ndarray]:
            for number, thresholds in enumerate(vectors, 1):
                advance = _stage(bars, f"testing {number} of {len(vectors)}", len(requests))
                measured.append(requests.lost(exits.with_thresholds(thresholds), loss, kv, advance))
                yield measured[-1].losses

        selection = learn_then_test(losses(), risk, error, bound)
        certificate = {
            "certified": selection.chosen is not None,
            "loss": loss,
            "risk": risk,
            "confidence": confidence,
            "method": f"learn-then-test, fixed sequence, {bound}",
            "n": len(requests),
            "new_tokens": requests.new_tokens,
            "kv": kv,
            "dtype": str(model.dtype).removeprefix("torch."),
            "data_hash": requests.data_hash,
            "rounding_floor": requests.rounding,
            "tested": _tested(vectors, measured, selection),
            "versions": {"dyndepth": dyndepth.__version__, "torch": torch.__version__},
        }
        if selection.chosen is None:
            result = exits.closed()
        else:
            result = exits.with_thresholds(vectors[selection.chosen])
            held = measured[selection.chosen]
            certificate["measured_risk"] = float(held.losses.mean())
            certificate["rows_x_layers"] = held.work.fraction
            other = LOSSES[1 - LOSSES.index(loss)]
            advance = _stage(bars, f"measuring {other}", len(requests))
            certificate["other_loss"] = {other: float(requests.lost(result, other, kv, advance).losses.mean())}
    certificate["thresholds"] = [number_to_json(band.threshold) for band in result]
    result.record = {**exits.record, "certificate": certificate}
    console.print(describe(certificate), highlight=False)
    return result


def default_path(exits: Exits) -> list[list[float]]:
    """Threshold vectors from strict to free: `most - level (most - threshold)`, `most` the highest score of the criterion."""
    scored = [band for band in exits if band.criterion.scored]
    for band in scored:
        if not math.isfinite(band.criterion.most) or not math.isfinite(band.threshold):
            raise ArgumentError(
                f"calibrate: band [{band.leave}, {band.resume}) has criterion {band.criterion.kind} with threshold "
                f"{band.threshold}, from which no path follows; give path="
            )
    levels = _LEVELS if scored else (1.0,)

    def at(level: float) -> list[float]:
        return [
            band.criterion.most - level * (band.criterion.most - band.threshold) if band.criterion.scored else band.threshold
            for band in exits
        ]

    return [at(level) for level in levels]


def describe(certificate: dict[str, Any]) -> str:
    """One sentence for people."""
    claim = f"expected {certificate['loss']} at most {certificate['risk']:.4g} with {certificate['confidence']:.0%} confidence"
    if not certificate["certified"]:
        first = certificate["tested"][0]
        return (
            f"not certified: {claim} does not follow from {certificate['n']} requests (the strictest thresholds lose "
            f"{first['loss']:.3f}, p {first['p_value']:.3f}); exits are closed"
        )
    return (
        f"certified: {claim} ({certificate['method']}, n {certificate['n']}, measured {certificate['measured_risk']:.3f}, "
        f"{certificate['rows_x_layers']:.1%} of rows x layers, K,V policy {certificate['kv'] or 'of the exits'})"
    )


def _requests(
    model: Any,
    exits: Exits,
    prompts: Sequence[str | Tensor] | Requests,
    tokenizer: Any,
    new_tokens: int,
    batch: int,
    advance: Callable[[int], None],
) -> Requests:
    if isinstance(prompts, Requests):
        requests = prompts
        if requests.model is not model:
            raise ArgumentError("calibrate: the requests were answered by another model")
    else:
        requests = Requests(model, prompts, tokenizer, new_tokens=new_tokens, batch=batch, advance=advance)
    seen = set(exits.record.get("documents", ()))
    both = [number for number, name in enumerate(requests.documents) if name in seen]
    if both:
        raise ArgumentError(
            f"calibrate: prompts {both[:5]}{'...' if len(both) > 5 else ''} were seen by fit; a certificate needs fresh ones"
        )
    return requests


def _enough(n: int, risk: float, error: float, bound: str, p_value: Callable[[ArrayLike, float], float]) -> None:
    """Refuses what cannot succeed before any work is done."""

    def best(count: int) -> float:
        return p_value(np.zeros(count), risk)

    if n > 0 and best(n) <= error:
        return
    wanted = max(1, n)
    while best(wanted) > error and wanted < 10**7:
        wanted = math.ceil(wanted * 1.01 + 1)
    while wanted > 1 and best(wanted - 1) <= error:
        wanted -= 1
    raise NotEnoughDataError(
        f"calibrate: a risk of {risk} with confidence {1 - error:.4g} takes at least {wanted} prompts even if none loses "
        f"anything ({bound}), got {n}"
    )


def _checked(path: Sequence[Sequence[float]], exits: Exits) -> list[list[float]]:
    vectors = [list(vector) for vector in path]
    if not vectors or any(len(v) != len(exits) or any(math.isnan(x) for x in v) for v in vectors):
        raise ArgumentError(
            f"calibrate: path must be threshold vectors of {len(exits)} numbers that are not NaN, got {vectors}"
        )
    return vectors


def _tested(vectors: Sequence[Sequence[float]], measured: Sequence[Lost], selection: Selection) -> list[dict[str, Any]]:
    return [
        {
            "thresholds": [number_to_json(t) for t in thresholds],
            "loss": float(lost.losses.mean()),
            "p_value": p,
            "rows_x_layers": lost.work.fraction,
        }
        for thresholds, lost, p in zip(vectors, measured, selection.p_values, strict=False)
    ]


def _stage(bars: Progress, description: str, total: int) -> Callable[[int], None]:
    task = bars.add_task(description, total=total)
    return lambda count: bars.advance(task, count)
