"""`make exit-heads FOLDER=...`: what each kind of exit head reaches after the same training, and what that is worth in layers.

The folder keeps the corpus, the teacher cache and the runs, so that a second call (or one after a kill) goes on. Writes
`exit_heads.json` there. Past tokens are exact in all of it: what back-fill costs on top is in `kv_maps.json`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from by_document import interval
from exit_walk import calibrated, judged, price_of, stats_of, walk
from torch import Tensor

from dyndepth.closed_form.progress import Progress
from dyndepth.closed_form.router import fit_router
from dyndepth.data import FIT, TEST, TUNE, Corpus, collect, own_prompts
from dyndepth.demo.weights import load_model
from dyndepth.files import replacing
from dyndepth.runtime.bind import Model, bind
from dyndepth.training import TeacherCache, TrainConfig
from dyndepth.training.batches import Batches
from dyndepth.training.evaluate import Quality, evaluate, selective
from dyndepth.training.objective import Objective
from dyndepth.training.run import frequent_answers, started
from dyndepth.training.student import Student
from dyndepth.training.trainer import Trainer, metrics, readout_of

EXITS = (20, 25)
CORPUS_TOKENS, TRAIN_ROWS = 480_000, 150_000
KINDS: dict[str, dict[str, Any]] = {
    "translator": {"head": "translator"},
    "translator, rank 128": {"head": "translator", "rank": 128},
    "mlp": {"head": "mlp"},
    "block": {"head": "block"},
    "block, Balcony's start": {"head": "block", "init": "last"},
}
SHARES = (0.99, 0.98, 0.95)
_JUDGED_ROWS = 12_000
_TIMED_ROWS = 16


def main(folder: Path, only: list[str], tokens: int) -> None:
    model, tokenizer = load_model()
    bound = bind(model)
    report = Progress(True)
    with torch.no_grad(), report:
        corpus = load_or_collect(folder, model, tokenizer, report, tokens)
        with report.stage("caching the teacher", corpus.count()) as advance:
            cache = TeacherCache.build(bound, corpus.pieces, EXITS, folder / "cache", say=report.console.print, advance=advance)
        parts = {name: [i for i, split in enumerate(corpus.split) if split == name] for name in (FIT, TUNE, TEST)}
        batches = {name: Batches(cache, parts[name], 4096, 0, EXITS) for name in parts}
        rows: list[dict[str, Any]] = []
        found: dict[str, dict[str, Any]] = {}
        for kind, settings in KINDS.items():
            if only and kind not in only:
                continue
            config = TrainConfig.of({"exits": EXITS, "tokens": TRAIN_ROWS, "lr": 1e-3, **settings})
            student, before, rate = trained(bound, batches, config, folder / kind.replace(", ", "-").replace(" ", "-"), report)
            rows += _quality(kind, bound, student, batches[TEST], before, rate)
            if kind in ("translator", "block"):
                found[kind] = _frontier(bound, student, batches)
        rows = [*_untrained(bound, batches[TEST]), *rows]
    result = {
        "model": "SmolLM2-135M-Instruct", "dtype": "bfloat16", "corpus": {n: corpus.count(n) for n in (FIT, TUNE, TEST)},
        "tokens_sha256": corpus.digest, "rows_shown": TRAIN_ROWS, "heads": rows, "frontier": found,
    }  # fmt: skip
    with replacing(folder / "exit_heads.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


def load_or_collect(folder: Path, model: Any, tokenizer: Any, report: Progress, tokens: int = CORPUS_TOKENS) -> Corpus:
    """The model's answers to prompts that it writes itself."""
    path = folder / "corpus.safetensors"
    if path.exists():
        return Corpus.load(path)
    count = tokens // 200
    with report.stage("writing prompts", count) as advance:
        prompts = own_prompts(model, tokenizer, count, advance=advance)
    with report.stage("answering", tokens) as advance:
        corpus = collect(
            model, [], prompts, tokens=tokens, own=1.0, new_tokens=160, batch=128, seed=0,
            width=bind(model).hidden_size, context=2048, advance=advance,
        )  # fmt: skip
    corpus.save(path)
    return corpus


def trained(
    model: Model, batches: dict[str, Batches], config: TrainConfig, folder: Path, report: Progress
) -> tuple[Student, dict[int, float], float]:
    """The student with its best weights, its agreement before any step, and the rows per second it learned at."""
    student = started(model, batches[FIT], config)
    objective = Objective(config, readout_of(model), frequent_answers(batches[FIT], model.vocab_size, config.frequent))
    before = {leave: q.agreement for leave, q in evaluate(student, objective.readout, batches[TEST], _JUDGED_ROWS).items()}
    trainer = Trainer(model, student, objective, batches[FIT], batches[TUNE], config, folder)
    with report.stage(f"training {folder.name}", trainer.updates) as advance:
        trainer.advance = advance
        done = trainer.run()
    if done.rows_per_s:
        (folder / "rate.json").write_text(json.dumps(done.rows_per_s))
    assert any(True for _ in metrics(folder))
    return student.requires_grad_(False), before, float(json.loads((folder / "rate.json").read_text()))


def _quality(
    kind: str, model: Model, student: Student, test: Batches, before: dict[int, float], rate: float
) -> list[dict[str, Any]]:
    seen = judged(model, student, test, _words(model, test), _JUDGED_ROWS)
    rows = []
    for leave, part in seen.items():
        head = student.heads[str(leave)]
        rows.append(
            {
                "kind": kind, "exit": leave, "agreement_at_start": before[leave],
                "agreement": float(part["agrees"].float().mean()),
                "selective_top1": {f"{s:.0%}": selective(part["top1"], part["agrees"], s) for s in SHARES},
                "selective_margin": {f"{s:.0%}": selective(part["margin"], part["agrees"], s) for s in SHARES},
                "mib": 2 * sum(p.numel() for p in head.parameters()) / 2**20,
                "ms_per_16_rows": head_ms(model, head, leave, test),
                "training_rows_per_s": rate, "rows": len(part["agrees"]),
            }
        )  # fmt: skip
    return rows


def _untrained(model: Model, test: Batches) -> list[dict[str, Any]]:
    """The bare final norm: CALM's and LayerSkip's head on a base that was never trained for it."""
    config = TrainConfig(exits=EXITS, head="norm")
    student = started(model, test, config)
    found: dict[int, Quality] = evaluate(student, readout_of(model), test, _JUDGED_ROWS)
    rows = _quality("norm", model, student, test, {leave: q.agreement for leave, q in found.items()}, float("nan"))
    return [{**row, "training_rows_per_s": None} for row in rows]


def _words(model: Model, batches: Batches) -> Tensor:
    """What routers' statistics are over."""
    return frequent_answers(batches, model.vocab_size, 1024)


def _frontier(model: Model, student: Student, batches: dict[str, Batches]) -> dict[str, Any]:
    """Mean layers run at three agreements for three confidences, thresholds set on one split and measured on another."""
    words = _words(model, batches[FIT])
    fit, tune, test = (judged(model, student, batches[name], words, _JUDGED_ROWS) for name in (FIT, TUNE, TEST))
    scores: dict[str, Callable[[dict[int, dict[str, Any]], int], Tensor]] = {
        "top-1 probability": lambda split, leave: split[leave]["top1"],
        "margin": lambda split, leave: split[leave]["margin"],
    }
    routers = {}
    for leave in EXITS:
        rows = torch.arange(len(fit[leave]["agrees"]))
        routers[leave], _ = fit_router(
            fit[leave]["residual"], fit[leave]["agrees"], rows % 5 == 0, stats_of(fit[leave]["short"])
        )
    scores["router, 1024 words"] = lambda split, leave: routers[leave](
        split[leave]["residual"].contiguous(), None, stats_of(split[leave]["short"])
    )
    result: dict[str, Any] = {}
    for name, score in scores.items():
        chance = {leave: calibrated(score(tune, leave), tune[leave]["agrees"]) for leave in EXITS}
        mine, theirs = ({e: chance[e](score(split, e)) for e in EXITS} for split in (tune, test))
        result[name] = {}
        for share in SHARES:
            price = price_of(model.depth, mine, tune, share)
            right, layers = walk(model.depth, theirs, test, price)
            document = test[EXITS[0]]["document"]
            result[name][f"{share:.0%}"] = {
                "agreement": float(right.double().mean()), "agreement_95": interval(right, document),
                "mean_layers": float(layers.double().mean()), "mean_layers_95": interval(layers, document),
                "rows": len(right), "documents": len(document.unique()),
            }  # fmt: skip
    return result


def head_ms(model: Model, head: Any, leave: int, batches: Batches) -> float:
    """Median milliseconds of the head alone, in the model's dtype, for sixteen rows of one sequence."""
    student = Student(model, {leave: copy.deepcopy(head)}).to(model.dtype).requires_grad_(False)
    batch = next(batches.once())
    every = torch.ones(_TIMED_ROWS, dtype=torch.bool)
    small = dataclasses.replace(
        batch, lengths=[_TIMED_ROWS], judged=every, residual={leave: batch.residual[leave][:_TIMED_ROWS]}
    )
    taken = []
    for _ in range(200):
        began = time.perf_counter()
        student.ready(leave, small, every)
        taken.append(time.perf_counter() - began)
    return 1e3 * sorted(taken)[len(taken) // 2]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("only", nargs="*", help="kinds of head; all of them where none is named")
    parser.add_argument("--tokens", type=int, default=CORPUS_TOKENS, help="of a corpus that is not there yet")
    given = parser.parse_args()
    main(given.folder, given.only, given.tokens)
