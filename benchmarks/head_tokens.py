"""`make head-tokens`: how the agreement of exit heads grows with the rows they were shown, and what rounding alone changes.

Every count is a run of its own with its own warm-up and cosine, on the corpus and teacher cache of `make exit-heads`, whose
folder this takes (and fills where it is empty). Writes `head_tokens.json` there.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from exit_heads import EXITS, load_or_collect, trained

from dyndepth.closed_form.progress import Progress
from dyndepth.data import FIT, TEST, TUNE
from dyndepth.demo.weights import load_model
from dyndepth.files import replacing
from dyndepth.runtime.bind import bind
from dyndepth.runtime.score import score
from dyndepth.training import TeacherCache, TrainConfig
from dyndepth.training.batches import Batches
from dyndepth.training.evaluate import evaluate
from dyndepth.training.trainer import metrics, readout_of

ROWS = (20_000, 50_000, 100_000, 200_000)
_JUDGED_ROWS, _FLOOR_ROWS = 12_000, 12_000


def main(folder: Path) -> None:
    model, tokenizer = load_model()
    bound = bind(model)
    report = Progress(True)
    with torch.no_grad(), report:
        corpus = load_or_collect(folder, model, tokenizer, report)
        with report.stage("caching the teacher", corpus.count()) as advance:
            cache = TeacherCache.build(bound, corpus.pieces, EXITS, folder / "cache", say=report.console.print, advance=advance)
        parts = {name: [i for i, split in enumerate(corpus.split) if split == name] for name in (FIT, TUNE, TEST)}
        batches = {name: Batches(cache, parts[name], 4096, 0, EXITS) for name in parts}
        floor = rounding_floor(model, *corpus.part(TEST))
        runs: list[dict[str, Any]] = []
        for rows in ROWS:
            config = TrainConfig.of({"exits": EXITS, "tokens": rows, "lr": 1e-3, "evaluate_every": 10})
            run = folder / "tokens" / str(rows)
            student, before, _ = trained(bound, batches, config, run, report)
            reached = evaluate(student, readout_of(bound), batches[TEST], _JUDGED_ROWS)
            if not runs:
                runs.append({"rows": 0, "agreement": {str(e): before[e] for e in EXITS}})
            runs.append(
                {
                    "rows": rows, "agreement": {str(e): q.agreement for e, q in reached.items()},
                    "kl": {str(e): q.kl for e, q in reached.items()}, "curve": _curve(run),
                }
            )  # fmt: skip
            result = {
                "model": "SmolLM2-135M-Instruct", "dtype": "bfloat16", "head": "translator", "tokens_sha256": corpus.digest,
                "judged_rows_of_the_corpus": corpus.judged(FIT), "measured_on": reached[EXITS[0]].rows,
                "rounding_floor": floor, "runs": runs,
            }  # fmt: skip
            with replacing(folder / "head_tokens.json") as temporary:
                temporary.write_text(json.dumps(result, indent=1) + "\n")


def rounding_floor(model: Any, tokens: list[Any], start: list[int]) -> dict[str, float]:
    """Share of judged rows where bfloat16 and the same weights in float32 have the same arg max, over unseen answers."""
    taken, count = 0, 0
    while count < _FLOOR_ROWS and taken < len(tokens):
        count += tokens[taken].shape[0] - start[taken]
        taken += 1
    tokens, start = tokens[:taken], start[:taken]
    half = score(model, tokens, None, start=start)
    exact = score(copy.deepcopy(model).float(), tokens, None, start=start)
    same = (half.argmax() == exact.argmax())[half.judged]
    return {"agreement": float(same.double().mean()), "rows": len(same)}


def _curve(run: Path) -> list[dict[str, Any]]:
    """Looks at the validation split as the run went on: rows shown so far, agreement and KL per exit."""
    shown, curve = 0, []
    for entry in metrics(run):
        shown += entry.get("rows", 0)
        if "validation" in entry:
            curve.append({"rows": shown, **{e: [q["agreement"], q["kl"]] for e, q in entry["validation"].items()}})
    return curve


if __name__ == "__main__":
    main(Path(sys.argv[1]))
