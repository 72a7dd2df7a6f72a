"""From the journal to files: compare.json, compare.csv, compare_raw.csv. Rows are the demo's and what a comparison adds."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compare import planned
from compare.completion import Serving
from compare.journal import Journal
from compare.measure import Key
from compare.system import System
from dyndepth.demo.measure import Rates, Row
from dyndepth.files import replacing


@dataclass(frozen=True)
class Compared:
    """The demo's row of a system in a cell, and prefill and decode apart."""

    row: Row
    new_tokens: int
    #: Prompt tokens of the batch without padding.
    prompt_tokens: int
    #: Repetitions that the figures are of, and how many were left out because the process was preempted in them.
    repetitions: int
    preempted: int
    #: Seconds of a call for one new token: the prompt and that token.
    first_token_s_median: float
    prefill_tokens_per_s_median: float
    prefill_tokens_per_s_p10: float
    prefill_tokens_per_s_p90: float
    #: New tokens after the first per second of the whole call less that of a call for one new token; NaN where that
    #: difference is not positive.
    decode_tokens_per_s_median: float
    decode_tokens_per_s_p10: float
    decode_tokens_per_s_p90: float
    note: str

    def flat(self) -> dict[str, Any]:
        """The row's keys, then the others; None for what is not known."""
        rest = asdict(self)
        found = rest.pop("row") | rest
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in found.items()}


def compared(journal: Journal, key: Key, system: System, new_tokens: int, prompt_tokens: int) -> Compared | None:
    """None while the system has no repetition in this cell."""
    judged = journal.of(key, system.name, "judged")
    blocks = journal.of(key, system.name, "block")
    if not judged or not blocks:
        return None
    quiet = [block for block in blocks if not block["first_token_preempted"] and not block["whole_preempted"]]
    kept = quiet if 2 * len(quiet) >= len(blocks) else blocks
    dtype, batch, context = key
    whole, first = ([block[f"{kind}_s"] for block in kept] for kind in ("whole", "first_token"))
    rates, prefill = Rates.of(new_tokens * batch, whole), Rates.of(prompt_tokens, first)
    decoding = [all_ - one for all_, one in zip(whole, first, strict=True)]
    nothing = Rates(math.nan, math.nan, math.nan)
    decode = Rates.of((new_tokens - 1) * batch, decoding) if min(decoding) > 0 and new_tokens > 1 else nothing
    share = judged[-1]["share"]
    return Compared(
        row=Row(
            system=system.system,
            mode=system.mode,
            dtype=dtype,
            batch=batch,
            context=context,
            tokens_per_s_median=rates.median,
            tokens_per_s_p10=rates.p10,
            tokens_per_s_p90=rates.p90,
            rows_x_layers=math.nan if share is None else share,
            agreement_teacher_forced=judged[-1]["teacher"],
            agreement_free=statistics.median(block["free"] for block in blocks),
        ),
        new_tokens=new_tokens,
        prompt_tokens=prompt_tokens,
        repetitions=len(kept),
        preempted=len(blocks) - len(quiet),
        first_token_s_median=statistics.median(first),
        prefill_tokens_per_s_median=prefill.median,
        prefill_tokens_per_s_p10=prefill.p10,
        prefill_tokens_per_s_p90=prefill.p90,
        decode_tokens_per_s_median=decode.median,
        decode_tokens_per_s_p10=decode.p10,
        decode_tokens_per_s_p90=decode.p90,
        note=system.note,
    )


def not_run(journal: Journal, systems: Iterable[System | Serving]) -> list[dict[str, Any]]:
    """Configurations that could not run or stopped running, with their reasons."""
    names = {system.name: system for system in systems}
    return [
        {
            "system": names[event["name"]].system, "mode": _mode(names[event["name"]]), "dtype": event["cell"][0],
            "batch": event["cell"][1], "context": event["cell"][2], "reason": event["reason"],
        }
        for event in journal.events
        if event["kind"] == "failed" and event["name"] in names
    ]  # fmt: skip


def _mode(system: System | Serving) -> str:
    return f"{system.mode}, over slots" if isinstance(system, Serving) else system.mode


def raw(journal: Journal) -> list[dict[str, Any]]:
    """Every repetition that was run."""
    return [
        dict(zip(("dtype", "batch", "context"), event["cell"], strict=True))
        | {key: value for key, value in event.items() if key not in ("cell", "kind")}
        for event in journal.events
        if event["kind"] == "block"
    ]


def write(
    folder: Path,
    machine: dict[str, Any],
    journal: Journal,
    rows: list[dict[str, Any]],
    failed: list[dict[str, Any]],
    served: list[dict[str, Any]],
) -> None:
    """compare.json (with `served`, completion times), compare.csv (rows, then what could not run and why), compare_raw.csv."""
    found = {
        "settings": journal.settings, "machine": machine, "rows": rows, "not_run": failed, "served": served,
        "planner": planned.error(rows),
    }  # fmt: skip
    with replacing(folder / "compare.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _csv(folder / "compare.csv", [*rows, *failed])
    _csv(folder / "compare_raw.csv", raw(journal))


def _csv(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
