"""Part of `make policies`: Draft & Verify on the demo's model: which layers drafts can do without, and whether it pays."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from dyndepth.demo.measure import interleaved
from dyndepth.recipes import draft_verify

DRAFTS = 4


def search(bench: Any, prompts: int, tokens: int, most: int) -> dict[str, Any]:
    """The best set of every size, by counts: the same on any machine."""
    found = draft_verify.search(bench.model, bench.rows[10 : 10 + prompts], drafts=DRAFTS, tokens=tokens, most=most)
    record = found.record["draft_verify"]
    sizes: dict[int, dict[str, Any]] = {}
    for trial in record["trials"]:
        size = len(trial["layers"])
        if size not in sizes or trial["gain"] > sizes[size]["gain"]:
            sizes[size] = trial
    return {"drafts": DRAFTS, "prompts": prompts, "tokens": tokens, "trials": len(record["trials"]), "best": record["layers"],
            "sizes": [sizes[size] for size in sorted(sizes)]}  # fmt: skip


def timed(
    bench: Any, layers: Sequence[Sequence[int]], batches: Sequence[int], tokens: int, repetitions: int
) -> list[dict[str, Any]]:
    """Tokens per second with drafts that leave out these sets of layers, beside full depth, in turn."""
    rows = []
    for batch in batches:
        call = functools.partial(bench.call, bench.inputs(0, batch), tokens)
        calls: dict[str, Callable[[], Any]] = {"full depth": call}
        for chosen in layers:
            exits = draft_verify.exits(bench.model, chosen)
            for name, confidence in (("never stopped", None), ("stopped where unsure", draft_verify.CONFIDENCE)):
                named = f"without {', '.join(map(str, chosen))}; {name}"
                calls[named] = functools.partial(call, exits=exits, mode="lossless", drafts=DRAFTS, confidence=confidence)
        first, seconds = interleaved(calls, repetitions, lambda: None)
        full = statistics.median(seconds["full depth"])
        for name, times in seconds.items():
            out = first[name]
            counts = {key: getattr(out, key) for key in ("drafted", "accepted")}
            rows.append({"batch": batch, "system": name, "tokens_per_s": batch * tokens / statistics.median(times),
                         "times_full": full / statistics.median(times), "rows_x_layers": out.work.fraction,
                         **{key: None if value is None else int(value.sum()) for key, value in counts.items()}})  # fmt: skip
            print(rows[-1], flush=True)
    return rows
