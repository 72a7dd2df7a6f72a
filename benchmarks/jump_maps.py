"""`make jump-maps`: jumps beyond the linear one, trained by KL through the frozen layers above for equally many rows.

Ridge gives the linear jump; an MLP beside it and FlexiDepth's light path start there (the light path also alone, as in the
paper), and K,V maps are trained along. Takes the corpus of `make exit-heads` and keeps its runs in the same folder. Writes
`jump_maps.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from band_maps import Span, first, ridge_bands, spans
from exit_heads import EXITS, load_or_collect

from dyndepth.closed_form.measure import Sample
from dyndepth.closed_form.progress import Progress
from dyndepth.closed_form.search import Candidate, probe
from dyndepth.data import FIT, TEST, TUNE
from dyndepth.demo.weights import load_model
from dyndepth.exits import AdapterJump, Band, Exits
from dyndepth.files import replacing
from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.fingerprint import facts_of
from dyndepth.training import TeacherCache, TrainConfig
from dyndepth.training.batches import Batches
from dyndepth.training.objective import Objective
from dyndepth.training.run import frequent_answers
from dyndepth.training.skip import SkipStudent
from dyndepth.training.starts import start_jump
from dyndepth.training.student import released
from dyndepth.training.trainer import Trainer, metrics, readout_of

KINDS: dict[Span, tuple[str, ...]] = {
    (5, 15): ("linear",),
    (10, 20): ("linear", "mlp", "adapter", "adapter alone"),
}
MAP_ROWS, TRAIN_ROWS, SHARE = 40_000, 20_000, 0.3
_CORPUS_ROWS, _LOOK_ROWS, _TEST_ROWS = 32_000, 2_000, 4_000


def main(folder: Path) -> None:
    model, tokenizer = load_model()
    bound = bind(model)
    report = Progress(True)
    with torch.no_grad(), report:
        corpus = load_or_collect(folder, model, tokenizer, report)
        ridge = ridge_bands(
            folder / "bands" / "ridge", bound, spans(bound.depth, EXITS), first(corpus.of(FIT), MAP_ROWS), report
        )
        training = first(corpus.of(FIT), _CORPUS_ROWS, MAP_ROWS)  # other text than the ridge maps have seen
        pieces = [*training, *first(corpus.of(TUNE), _LOOK_ROWS)]
        with report.stage("caching the teacher", sum(p.tokens.shape[0] for p in pieces)) as advance:
            cache = TeacherCache.build(
                bound, pieces, [leave for leave, _ in KINDS], folder / "bands" / "cache", advance=advance
            )
        tested = first(corpus.of(TEST), _TEST_ROWS)
        sample = Sample.of(model, [p.tokens for p in tested], [p.start for p in tested])
        rows: list[dict[str, Any]] = []
        for span, kinds in KINDS.items():
            rows.append({"span": span, "jump": "linear, ridge", **_measured(bound, ridge[span], sample)})
            for kind in kinds:
                band, looks = tuned(folder / "bands", bound, ridge[span], kind, cache, len(training), report)
                rows.append({"span": span, "jump": kind, **_measured(bound, band, sample), **looks})
                _write(folder, rows)


def tuned(
    folder: Path, model: Model, band: Band, kind: str, cache: TeacherCache, training: int, report: Progress
) -> tuple[Band, dict[str, Any]]:
    """The band with its maps trained as a jump of a kind, kept in the folder; and what the validation split said."""
    name = f"{band.leave}-{band.resume}-{kind.replace(' ', '-')}"
    config = TrainConfig(tokens=TRAIN_ROWS, batch=2000, lr=5e-4, evaluate_every=7, checkpoint_every=7, evaluate_rows=_LOOK_ROWS)
    run, kept = folder / f"run-{name}", folder / f"band-{name}"
    if not (kept / "exits.json").exists():
        jump = start_jump(kind.split()[0], band, None, torch.Generator().manual_seed(0))
        if isinstance(jump, AdapterJump) and kind == "adapter alone":
            jump.linear = None
        started = Band(band.leave, band.resume, jump=jump, kv=band.kv)
        batches = Batches(cache, range(training), config.batch, 0, [band.leave])
        looks = Batches(cache, range(training, sum(len(s.lengths) for s in cache)), config.batch, 0, [band.leave])
        objective = Objective(config, readout_of(model), frequent_answers(batches, model.vocab_size, config.frequent))
        trainer = Trainer(model, SkipStudent(model, [started], SHARE, 0), objective, batches, looks, config, run)
        with report.stage(f"training {name}", trainer.updates) as advance:
            trainer.advance = advance
            done = trainer.run()
        maps: Any = released(done.heads[band.leave], model.dtype)
        Exits(
            [Band(band.leave, band.resume, jump=maps.jump, kv=maps.kv)], facts_of(model), {"rows": done.rows}
        ).save_pretrained(kept)
    exits = Exits.from_pretrained(kept)
    seen = [entry["validation"][str(band.leave)] for entry in metrics(run) if "validation" in entry]
    best = min(seen, key=lambda look: look["kl"])
    found = {"kl_at_start": seen[0]["kl"], "kl": best["kl"], "looked_at": best["rows"], "rows_shown": exits.record["rows"]}
    return exits.bands[0], found


def _measured(model: Model, band: Band, sample: Sample) -> dict[str, Any]:
    """What skipping by lot does on unseen answers, in real passes: to those that skip and to those that do not."""
    candidate = Candidate(band, {})
    probe([candidate], sample, facts_of(model), SHARE, lambda: None)
    assert band.jump is not None
    return {
        "agreement": candidate.agreement, "harm": candidate.harm, "judged": int(sample.judged.sum()),
        "jump_weights": sum(p.numel() for p in band.jump.parameters()),
    }  # fmt: skip


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    result = {"model": "SmolLM2-135M-Instruct", "dtype": "bfloat16", "share": SHARE, "rows": rows}
    with replacing(folder / "jump_maps.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
