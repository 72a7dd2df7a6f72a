"""Heads of the exits of `make band-frontier`: translators, trained as in `make exit-heads`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exit_heads import EXITS, KINDS, TRAIN_ROWS

from dyndepth.closed_form.progress import Progress
from dyndepth.data import Piece
from dyndepth.exits import Band, Exits, TranslatorHead
from dyndepth.runtime.bind import Model
from dyndepth.runtime.fingerprint import facts_of
from dyndepth.training import TeacherCache, TrainConfig
from dyndepth.training.batches import Batches
from dyndepth.training.objective import Objective
from dyndepth.training.run import frequent_answers, started
from dyndepth.training.student import released
from dyndepth.training.trainer import Trainer, readout_of


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
