"""The report: the accuracy/depth frontier, how true the scores are, which tokens leave; as numbers, a picture and a page."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from dyndepth.calibration import Requests
from dyndepth.data import check_ids, document, encode
from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits
from dyndepth.exits.codec import band_to_json
from dyndepth.files import replacing, require, writable
from dyndepth.info import collect
from dyndepth.report import figures, page
from dyndepth.report.kinds import KINDS, kind
from dyndepth.report.measure import Advance, frontier, histogram
from dyndepth.report.reliability import reliability
from dyndepth.report.show import table
from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.fingerprint import check_exits
from dyndepth.runtime.policies import check_policy
from dyndepth.runtime.session import default_policy

__all__ = ["FILES", "KINDS", "kind", "report", "table"]

#: What a report writes: all numbers, all figures, and the page with both.
FILES = ("report.json", "report.png", "report.html")
#: So many prompts are shown, and so much of the end of each: chat templates begin all alike.
_SHOWN, _LETTERS = 3, 200


def report(
    model: Any,
    exits: Exits,
    prompts: Sequence[str | Tensor],
    tokenizer: Any,
    folder: str | Path,
    *,
    new_tokens: int = 64,
    batch: int = 16,
    kv: str | None = None,
    repetitions: int = 3,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure exits on prompts and write report.json, report.png and report.html into `folder`; returns report.json.

    1. Frontier: along the path of thresholds that `calibrate` tests, disagreement with full depth (teacher-forced, with the
       real decisions and K,V policy), rows x layers, and tokens per second of decoding a fixed number of new tokens.
    2. Reliability: per band, its criterion's scores against whether the row that takes the band says what the full model says.
    3. Histogram: layers run by kind of emitted token, with the thresholds as they come.

    Args:
        model: the transformers causal LM the exits were made for.
        prompts: strings (with `tokenizer`, chat template applied) or int64 [t]; a prompt given twice counts once. Prompts that
            `fit` has seen are counted in the notes: for them the numbers are too good.
        tokenizer: also names the kinds of tokens; None with prompts of token ids puts all of them under `other`.
        new_tokens: length of the answers that are judged, and of those that are timed.
        batch: prompts run at once; the first so many are timed.
        kv: K,V policy, as in generate.
        repetitions: timed calls per point, after one that is not counted.

    Nothing is written before everything is measured and drawn. Raises ArgumentError for prompts that are missing, empty or
    not of this model's vocabulary, ExitsError for exits of another model or a policy they cannot run under, OSError where
    `folder` cannot be written, ModuleNotFoundError without matplotlib.
    """
    require("matplotlib", "report: the figures need matplotlib: pip install 'dyndepth[demo]'")
    for name, value in (("new_tokens", new_tokens), ("batch", batch), ("repetitions", repetitions)):
        if value < 1:
            raise ArgumentError(f"report: {name} must be at least 1, got {value}")
    bound = bind(model)
    _check_exits(exits, bound, kv)
    tokens, notes = _prompts(prompts, tokenizer, bound.vocab_size)
    folder = Path(folder)
    writable(folder)
    with Progress(
        TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True, quiet=not progress), disable=not progress,
    ) as bars, torch.no_grad():  # fmt: skip

        def stage(description: str, total: int) -> Advance:
            task = bars.add_task(description, total=total)
            return lambda count: bars.advance(task, count)

        requests = Requests(model, tokens, new_tokens=new_tokens, batch=batch, advance=stage("answering", len(tokens)))
        found = {
            "frontier": asdict(frontier(requests, exits, kv, repetitions, stage)),
            "reliability": [asdict(band) for band in reliability(requests, exits, kv, stage("reliability", len(tokens)))],
            "histogram": asdict(histogram(requests, exits, kv, tokenizer, stage("layers by kind", len(tokens)))),
        }
    seen = sorted(set(requests.documents) & set(exits.record.get("documents", ())))
    if seen:
        notes.append(f"{len(seen)} of {len(tokens)} prompts were seen by fit: for them the numbers are too good.")
    if tokenizer is None:
        notes.append("Without a tokenizer the kinds of tokens are unknown.")
    policy = default_policy(exits) if kv is None else kv
    if exits.certificate is not None and exits.certificate["kv"] not in (None, policy):
        notes.append(f"This report used K,V policy {policy}: the certificate does not speak for it.")
    result = {
        "model": {
            "name": _name(model), "type": bound.model_type, "layers": bound.depth, "width": bound.hidden_size,
            "vocab_size": bound.vocab_size, "dtype": str(bound.dtype).removeprefix("torch."), "device": str(bound.device),
        },
        "exits": {
            "bands": [band_to_json(band) for band in exits],
            "record": {name: value for name, value in exits.record.items() if name not in ("documents", "certificate")},
            "certificate": exits.certificate,
        },
        "settings": {
            "new_tokens": new_tokens, "batch": batch, "kv": policy, "repetitions": repetitions,
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
        "prompts": {
            "count": len(requests), "seen_by_fit": len(seen), "judged_rows": _judged(requests),
            "data_hash": requests.data_hash, "first": _first(prompts, tokenizer),
        },
        **found,
        "notes": notes,
        "machine": collect(),
    }  # fmt: skip
    _write(folder, result)
    return result


def _check_exits(exits: Exits, bound: Model, kv: str | None) -> None:
    """What a pass would refuse, before any work."""
    if not isinstance(exits, Exits):
        raise ArgumentError(f"report: exits must be dyndepth.Exits, got {type(exits).__name__}")
    check_exits(exits, bound)
    check_policy(exits, default_policy(exits) if kv is None else kv)


def _prompts(prompts: Sequence[str | Tensor], tokenizer: Any, vocab_size: int) -> tuple[list[Tensor], list[str]]:
    """Different prompts as int64 [t], and a note if some came twice."""
    encoded = encode(prompts, tokenizer, "report: prompts", special=True)
    if not encoded:
        raise ArgumentError("report: prompts must hold at least one prompt, got none")
    for number, prompt in enumerate(encoded):
        if prompt.shape[0] == 0:
            raise ArgumentError(f"report: prompts[{number}] is empty")
    check_ids(encoded, vocab_size, "report: prompts")
    different = list({document(prompt): prompt for prompt in encoded}.values())
    again = len(encoded) - len(different)
    return different, [f"{again} prompts came twice and count once."] if again else []


def _judged(requests: Requests) -> int:
    return sum(tokens.shape[0] - 1 - start for tokens, start in zip(requests.tokens, requests.start, strict=True))


def _name(model: Any) -> str:
    """As it was loaded; of a folder only its own name, because a report is shown around."""
    name = str(getattr(model.config, "_name_or_path", "") or model.config.model_type)
    return Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name


def _first(prompts: Sequence[str | Tensor], tokenizer: Any) -> list[str]:
    texts = [
        prompt if isinstance(prompt, str) else "" if tokenizer is None else str(tokenizer.decode(prompt.tolist()))
        for prompt in prompts[:_SHOWN]
    ]
    texts = [" ".join(text.split()) for text in texts]
    return [text if len(text) <= _LETTERS else "…" + text[1 - _LETTERS :] for text in texts if text]


def _write(folder: Path, result: dict[str, Any]) -> None:
    """Everything is made before anything is written, each file in one step."""
    picture = figures.png(figures.draw(result))
    text = page.render(result, *(figures.sections(result, theme) for theme in (figures.LIGHT, figures.DARK)))
    numbers = json.dumps(result, indent=1, allow_nan=False) + "\n"
    for name, content in zip(FILES, (numbers.encode(), picture, text.encode()), strict=True):
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)
