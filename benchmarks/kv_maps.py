"""`make kv-maps`: what a policy for the K,V of skipped tokens does to the tokens that stay.

A share of the judged rows leaves at an exit by lot; of the others, KL(full || dynamic) and agreement with full depth are
measured, teacher-forced with real back-fill (which equals decoding the same text), on text that no map has seen and on the
model's own answers. Writes `kv_maps.json`; the folder keeps corpus, maps and tuning runs, so that it resumes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from band_maps import regressed
from exit_heads import load_or_collect
from torch import Tensor

from dyndepth.closed_form.measure import Lottery
from dyndepth.closed_form.progress import Progress
from dyndepth.closed_form.search import with_criterion
from dyndepth.data import FIT, TEST, TUNE, Piece, deal, encode, sections, text_pieces
from dyndepth.demo.weights import load_model
from dyndepth.exits import Band, Exits
from dyndepth.files import replacing
from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.fingerprint import facts_of
from dyndepth.runtime.score import HEAD_ROWS, score
from dyndepth.training import TeacherCache, TrainConfig
from dyndepth.training.batches import Batches
from dyndepth.training.losses import kl
from dyndepth.training.objective import Objective
from dyndepth.training.run import frequent_answers
from dyndepth.training.skip import SkipStudent
from dyndepth.training.student import released
from dyndepth.training.trainer import Trainer, readout_of

EXITS, SHARES = (10, 15, 20, 25), (0.1, 0.3)
FEW, MANY = 16_384, 65_536
TUNED = (15, 20)
_TUNED_ROWS, _TEST_ROWS = 60_000, 2_000


def main(folder: Path) -> None:
    model, tokenizer = load_model()
    bound = bind(model)
    facts = facts_of(bound)
    report = Progress(True)
    with torch.no_grad(), report:
        own = load_or_collect(folder, model, tokenizer, report)
        texts = sections(encode(prose(), tokenizer), 256)
        text = deal([], text_pieces(texts, 1 << 20, 256), bound.hidden_size, 0)
        fitting = _alternating(own.of(FIT), text.of(FIT))
        maps = {name: _maps(folder / f"maps-{count}.pt", bound, first_tokens(fitting, count), report)
                for name, count in (("predict, 16k tokens", FEW), ("predict, 64k tokens", MANY))}  # fmt: skip
        tuning = judged_rows(_alternating(own.of(TUNE), text.of(TUNE)), _TEST_ROWS)
        tuned = _tuned(folder, bound, maps["predict, 64k tokens"], first_tokens(fitting, MANY), tuning, report)
        maps["predict, 64k tokens, tuned"] = tuned
        rows: list[dict[str, Any]] = []
        tests = {"unseen text": judged_rows(text.of(TEST), _TEST_ROWS), "own answers": judged_rows(own.of(TEST), _TEST_ROWS)}
        total = len(tests) * len(SHARES) * (len(EXITS) * 3 + len(TUNED))
        with report.stage("measuring", total) as advance:
            for kind, pieces in tests.items():
                full = ready(model, pieces, None, None)
                for leave in EXITS:
                    for share in SHARES:
                        for name in ("propagate", *maps):
                            if name != "propagate" and leave not in maps[name]:
                                continue
                            band = maps["predict, 64k tokens"][leave] if name == "propagate" else maps[name][leave]
                            exits = Exits([with_criterion(band, Lottery(share))], facts)
                            policy = "propagate" if name == "propagate" else "predict"
                            rows.append({"text": kind, "exit": leave, "share": share, "policy": name,
                                         **compared(bound, full, ready(model, pieces, exits, policy))})  # fmt: skip
                            advance(1)
    size = sum(p.numel() for p in model.parameters())
    result = {
        "model": "SmolLM2-135M-Instruct", "dtype": "bfloat16", "rows": rows,
        "share_of_model": {str(e): sum(p.numel() for p in _kv(maps["predict, 64k tokens"][e])) / size for e in EXITS},
    }  # fmt: skip
    with replacing(folder / "kv_maps.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


def prose() -> list[str]:
    """Real prose that every Python carries: its own language reference."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items()) if len(text) > 4000]


def _alternating(one: Sequence[Piece], other: Sequence[Piece]) -> list[Piece]:
    """Both kinds in turn, as long as both last."""
    return [piece for pair in zip(one, other, strict=False) for piece in pair] + list(one[len(other) :])


def first_tokens(pieces: Sequence[Piece], tokens: int) -> list[Piece]:
    taken, count = [], 0
    for piece in pieces:
        if count >= tokens:
            break
        taken.append(piece)
        count += piece.tokens.shape[0]
    return taken


def judged_rows(pieces: Sequence[Piece], rows: int) -> list[Piece]:
    taken, count = [], 0
    for piece in pieces:
        if count >= rows:
            break
        taken.append(piece)
        count += piece.judged
    return taken


def _maps(path: Path, model: Model, pieces: Sequence[Piece], report: Progress) -> dict[int, Band]:
    """Ridge maps of all exits."""
    if not path.exists():
        fitter = regressed(model, [(leave, model.depth) for leave in EXITS], pieces, path.stem, report)
        Exits([fitter.band((leave, model.depth))[0] for leave in EXITS], facts_of(model)).save_pretrained(path.with_suffix(""))
        path.touch()
    return {band.leave: band for band in Exits.from_pretrained(path.with_suffix(""))}


def _tuned(
    folder: Path, model: Model, maps: dict[int, Band], fitting: list[Piece], tuning: list[Piece], report: Progress
) -> dict[int, Band]:
    """Some of the maps, trained on by what they do to the rows that stay."""
    pieces = [*fitting, *tuning]
    with report.stage("caching the teacher", sum(p.tokens.shape[0] for p in pieces)) as advance:
        cache = TeacherCache.build(model, pieces, TUNED, folder / "tuning-cache", advance=advance)
    found = {}
    for leave in TUNED:
        config = TrainConfig(
            tokens=_TUNED_ROWS, batch=3000, lr=3e-4, evaluate_every=10, checkpoint_every=10, evaluate_rows=_TEST_ROWS
        )
        training = Batches(cache, range(len(fitting)), config.batch, 0, [leave])
        validation = Batches(cache, range(len(fitting), len(pieces)), config.batch, 0, [leave])
        objective = Objective(config, readout_of(model), frequent_answers(training, model.vocab_size, config.frequent))
        student = SkipStudent(model, [maps[leave]], 0.3, 0)
        trainer = Trainer(model, student, objective, training, validation, config, folder / f"tuned-{leave}")
        with report.stage(f"tuning exit {leave}", trainer.updates) as advance:
            trainer.advance = advance
            trained: Any = released(trainer.run().heads[leave], model.dtype)
        band = maps[leave]
        found[leave] = Band(leave, model.depth, head=band.head, kv=trained.kv)
    return found


def ready(model: Any, pieces: Sequence[Piece], exits: Exits | None, policy: str | None) -> Any:
    return score(model, [p.tokens for p in pieces], exits, start=[p.start for p in pieces], kv=policy)


def compared(model: Model, full: Any, other: Any) -> dict[str, float]:
    """KL and agreement of the judged rows that stayed."""
    stayed = other.judged & (other.layers_run == model.depth)
    divergence, agrees, rows = 0.0, 0, int(stayed.sum())
    for mine, theirs in zip(_parts(other.ready[stayed]), _parts(full.ready[stayed]), strict=True):
        logits, wanted = model.logits(mine), model.logits(theirs)
        divergence += float(kl(logits, wanted).sum(dtype=torch.float64))
        agrees += int((logits.argmax(-1) == wanted.argmax(-1)).sum())
    return {"kl": divergence / rows, "agreement": agrees / rows, "rows": rows}


def _parts(rows: Tensor) -> Sequence[Tensor]:
    return rows.split(HEAD_ROWS)


def _kv(band: Band) -> list[Tensor]:
    assert band.kv is not None
    return list(band.kv.parameters())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
