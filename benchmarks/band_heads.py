"""Heads of the exits of `make band-frontier`: translators, trained as in `make exit-heads`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from confidences import MARGIN, TOP, readout_stats, shown
from exit_heads import EXITS, KINDS, TRAIN_ROWS
from torch import Tensor

from dyndepth.closed_form.measure import Sample
from dyndepth.closed_form.progress import Progress
from dyndepth.closed_form.search import Candidate
from dyndepth.closed_form.trace import trace
from dyndepth.data import Piece
from dyndepth.exits import Band, Exits, TranslatorHead
from dyndepth.files import replacing
from dyndepth.runtime.bind import Model
from dyndepth.runtime.fingerprint import facts_of
from dyndepth.training import TeacherCache, TrainConfig
from dyndepth.training.batches import Batches
from dyndepth.training.objective import Objective
from dyndepth.training.run import frequent_answers, started
from dyndepth.training.student import released
from dyndepth.training.trainer import Trainer, readout_of

#: Rows whose scores are kept: a file of some tens of KiB.
_KEPT_ROWS = 6_000


def translators(
    folder: Path, model: Model, learned: Sequence[Piece], looks: Sequence[Piece], report: Progress
) -> dict[int, TranslatorHead]:
    """Per exit its translator, from ridge starts, with the weights of the best look; kept in the folder."""
    kept = folder / "heads"
    if not (kept / "exits.json").exists():
        pieces = [*learned, *looks]
        with report.stage("caching the teacher", sum(p.tokens.shape[0] for p in pieces)) as advance:
            cache = TeacherCache.build(model, pieces, EXITS, folder / "teacher", advance=advance)
        parts = range(len(learned)), range(len(learned), len(pieces))
        training, looking = (Batches(cache, part, 4096, 0, EXITS) for part in parts)
        settings: dict[str, Any] = {"exits": EXITS, "tokens": TRAIN_ROWS, "lr": 1e-3, **KINDS["translator"]}
        config = TrainConfig.of(settings | {"evaluate_every": 10, "checkpoint_every": 10})
        student = started(model, training, config)
        objective = Objective(config, readout_of(model), frequent_answers(training, model.vocab_size, config.frequent))
        trainer = Trainer(model, student, objective, training, looking, config, folder / "run-heads")
        with report.stage("training heads", trainer.updates) as advance:
            trainer.advance = advance
            done = trainer.run()
        heads: dict[int, Any] = {leave: released(head, model.dtype) for leave, head in done.heads.items()}
        bands = [Band(leave, model.depth, head=head) for leave, head in heads.items()]
        Exits(bands, facts_of(model), {"rows": done.rows}).save_pretrained(kept)
    return {band.leave: band.head for band in Exits.from_pretrained(kept)}  # type: ignore[misc]


def keep_scores(path: Path, model: Model, candidates: Sequence[Candidate], sample: Sample) -> None:
    """What every exit's head says of the first judged rows, past tokens exact.

    Arrays [rows, exits]: float16 `top1` and `margin`, bool `agrees`; and `exits` [exits] int64, their boundaries.
    """
    exits = [c.band for c in candidates if c.band.resume == model.depth]
    if path.exists() or not exits:
        return
    few = sample.head(_KEPT_ROWS)
    leaves = [band.leave for band in exits]
    chunks = list(trace(model, few.tokens, leaves, ()))
    found: dict[str, list[Tensor]] = {"top1": [], "margin": [], "agrees": []}
    for band in exits:
        assert isinstance(band.head, TranslatorHead)
        residual = torch.cat([chunk.residual[band.leave] for chunk in chunks])[few.judged][:_KEPT_ROWS]
        stats = readout_stats(model, band.head.to(model.dtype), residual)
        found["top1"].append(shown(stats, TOP).half())
        found["margin"].append(shown(stats, MARGIN).half())
        found["agrees"].append(stats.argmax == few.answers[few.judged][:_KEPT_ROWS])
    with replacing(path) as temporary, temporary.open("wb") as file:
        top, margin, agrees = (torch.stack(parts, dim=1).numpy() for parts in found.values())
        np.savez_compressed(file, top1=top, margin=margin, agrees=agrees, exits=np.array(leaves))
