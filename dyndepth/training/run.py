"""dyndepth.train: from texts or prompts to exits, in one folder that a killed run goes on from."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndepth.closed_form.progress import Progress
from dyndepth.data import FIT, TUNE, Corpus, document, encoded, gather, own_prompts
from dyndepth.errors import ArgumentError
from dyndepth.exits import Band, Exits
from dyndepth.exits.heads import Head
from dyndepth.files import sweep, writable
from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.fingerprint import check_exits, facts_of
from dyndepth.training.batches import Batches
from dyndepth.training.cache import TeacherCache
from dyndepth.training.config import TrainConfig
from dyndepth.training.evaluate import mixed
from dyndepth.training.objective import Objective
from dyndepth.training.skip import SkipStudent
from dyndepth.training.starts import fit_readout, start_head, start_jump
from dyndepth.training.student import Student, released
from dyndepth.training.trainer import Trained, Trainer, check, readout_of

CORPUS, CACHE, RUN, EXITS = "corpus.safetensors", "cache", "run", "exits"
#: Rows that a closed-form start is fitted on; its error stops falling long before.
_START_ROWS = 65536


def train(
    model: Any,
    texts: Sequence[str | Tensor] = (),
    tokenizer: Any = None,
    *,
    output: str | Path,
    prompts: Sequence[str | Tensor] | None = None,
    config: TrainConfig | None = None,
    progress: bool = True,
) -> Exits:
    """Train exit heads of a frozen model against its own answers.

    1. A corpus: pieces of `texts` and the model's own greedy continuations of `prompts`; with neither, of prompts that the
       model writes itself (Magpie, arXiv 2406.08464). Kept in `output`/corpus.safetensors.
    2. One pass of the frozen model over it: residuals at the exits, final states, top logits. Kept in `output`/cache.
    3. Closed-form starts, then gradients on cached rows; checkpoints and metrics in `output`/run. A killed run that is
       started again with the same arguments goes on where it was and ends with the same weights.

    Args:
        model: a supported transformers causal LM in eval mode; it is not changed.
        texts, prompts: strings (with `tokenizer`) or int64 [t] tensors, as for dyndepth.fit.
        output: folder of the run; the exits are saved there too.
        config: settings (TrainConfig, or TrainConfig.read of a TOML file).

    Returns closed exits with the trained heads, without K,V maps, routers or thresholds: `dyndepth.fit(..., heads=...)` adds
    those. Their `record["training"]` says what they learned from and what they reach.
    """
    config = config or TrainConfig()
    folder = Path(output)
    writable(folder)
    bound = bind(model)
    exits = config.at(bound.depth)
    check(bound, config)
    if config.head == "norm":
        raise ArgumentError("train: a norm head has nothing to train; use it as it is, or take translator, mlp or block")
    report = Progress(progress)
    with torch.no_grad(), report:
        corpus = _corpus(model, bound, texts, tokenizer, prompts, config, folder, report)
        training, validation = _cached(bound, corpus, exits, config, folder, report)
        trained = _run(bound, started(bound, training, config), training, validation, config, folder, report)
    bands = []
    for leave, head in sorted(trained.heads.items()):
        kept: Any = released(head, bound.dtype)
        bands.append(Band(leave, bound.depth, head=kept))
    result = Exits(bands, facts_of(bound), _record("trained heads (dyndepth.train)", corpus, config, trained))
    result.save_pretrained(folder / EXITS)
    _draw(folder, report)
    return result


def tune_maps(
    model: Any,
    exits: Exits,
    texts: Sequence[str | Tensor] = (),
    tokenizer: Any = None,
    *,
    output: str | Path,
    prompts: Sequence[str | Tensor] | None = None,
    config: TrainConfig | None = None,
    share: float = 0.3,
    jump: str = "linear",
    progress: bool = True,
) -> Exits:
    """Train the K,V maps (and jumps) of bands by what they do to the rows that see them, through the frozen layers above.

    Ridge regression makes K,V that are near the exact ones; what counts is what the layers above make of them. A share of the
    rows skips a band by lot, and the KL of the others (of all rows, where the band resumes) is lowered.

    Args:
        exits: fitted exits, whose bands either all end the network or all resume; each is trained alone.
        share: chance of a row to skip.
        jump: kind of jump that bands which resume end with (dyndepth.exits.JUMPS): `linear`, `mlp`, or `adapter` (FlexiDepth's
            light path), with `config.inner` neurons (per layer). It starts as the fitted linear one.
        texts, prompts, output, config: as for `train`; of the settings, `exits`, `head` and `init` are idle.

    Returns the same exits with other maps, and without a certificate or measured agreement: those spoke of
    the old ones.
    """
    config = config or TrainConfig()
    folder = Path(output)
    writable(folder)
    bound = bind(model)
    check_exits(exits, bound)
    check(bound, config)
    generator = torch.Generator().manual_seed(config.seed)
    started_bands = [_with_jump(band, start_jump(jump, band, config.inner or None, generator)) for band in exits]
    student = SkipStudent(bound, started_bands, share, config.seed)
    report = Progress(progress)
    with torch.no_grad(), report:
        corpus = _corpus(model, bound, texts, tokenizer, prompts, config, folder, report)
        training, validation = _cached(bound, corpus, [band.leave for band in exits], config, folder, report)
        trained = _run(bound, student, training, validation, config, folder, report)
    bands = []
    for band in exits:
        maps: Any = released(trained.heads[band.leave], bound.dtype)
        other = _with_jump(band, maps.jump)
        other.kv = maps.kv
        bands.append(other)
    record = {key: value for key, value in exits.record.items() if key not in ("certificate", "tune", "test")}
    learned = _record("trained maps (dyndepth.training.tune_maps)", corpus, config, trained)
    record["tuned_maps"] = {**learned["training"], "share": share, "jump": jump}
    record["documents"] = sorted({*exits.record.get("documents", ()), *learned["documents"]})
    result = Exits(bands, exits.model, record)
    result.save_pretrained(folder / EXITS)
    _draw(folder, report)
    return result


def _with_jump(band: Band, jump: Any) -> Band:
    """The band with another jump; its other parts are shared."""
    other = copy.copy(band)
    other._modules = dict(band._modules)
    other.jump = jump
    return other


def _corpus(
    model: Any,
    bound: Model,
    texts: Sequence[str | Tensor],
    tokenizer: Any,
    prompts: Sequence[str | Tensor] | None,
    config: TrainConfig,
    folder: Path,
    report: Progress,
) -> Corpus:
    """Collected, or what an earlier run of the same call collected."""
    given, asked = encoded(bound, texts, tokenizer, prompts, "train")
    key = _asked(bound, given, asked, config)
    sweep(folder)
    if (folder / CORPUS).exists():
        return Corpus.load(folder / CORPUS, key)
    if asked is None and not given:
        count = max(1, round(config.corpus / config.new_tokens))
        with report.stage("writing prompts", count) as advance:
            asked = own_prompts(model, tokenizer, count, batch=config.decode, seed=config.seed, advance=advance)
    own = config.own if given else 1.0
    with report.stage("continuing prompts", round(config.corpus * own)) as advance:
        corpus = gather(
            model, given, None, asked, "train", tokens=config.corpus, own=own, new_tokens=config.new_tokens,
            batch=config.decode, seed=config.seed, advance=advance,
        )  # fmt: skip
    if corpus.count() < 0.9 * config.corpus:
        report.console.print(
            f"train: wanted {config.corpus} tokens, the texts and prompts gave {corpus.count()}", style="yellow"
        )
    corpus.save(folder / CORPUS, key)
    return corpus


def _asked(model: Model, texts: Sequence[Tensor], prompts: Sequence[Tensor] | None, config: TrainConfig) -> str:
    """What a corpus is collected for: SHA-256 of the model's facts, texts, prompts and settings."""
    settings = (config.corpus, config.own, config.new_tokens, config.decode, config.seed)
    digest = hashlib.sha256(repr((facts_of(model), settings)).encode())
    for name, part in (("texts", texts), ("prompts", prompts or [])):
        digest.update(f"{name} {prompts is None}".encode())
        for ids in part:
            digest.update(document(ids).encode())
    return digest.hexdigest()


def _cached(
    model: Model, corpus: Corpus, exits: Sequence[int], config: TrainConfig, folder: Path, report: Progress
) -> tuple[Batches, Batches]:
    """Batches of the training and the validation split, from the teacher cache."""
    kept = [(piece, split) for piece, split in zip(corpus.pieces, corpus.split, strict=True) if split in (FIT, TUNE)]
    sweep(folder / CACHE)
    sweep(folder / EXITS)
    with report.stage("caching the teacher", sum(piece.tokens.shape[0] for piece, _ in kept)) as advance:
        cache = TeacherCache.build(
            model, [piece for piece, _ in kept], exits, folder / CACHE, say=report.console.print, advance=advance
        )
    generator = torch.Generator().manual_seed(config.seed)
    found = []
    for name in (FIT, TUNE):
        parts = [i for i, (_, split) in enumerate(kept) if split == name]
        # Shuffled: starts and looks at the validation split take the first rows, which must be of every kind.
        order = torch.randperm(len(parts), generator=generator).tolist()
        found.append(Batches(cache, [parts[i] for i in order], config.batch, config.seed, exits, model.device))
    return found[0], found[1]


def _run(
    model: Model,
    student: Student | SkipStudent,
    training: Batches,
    validation: Batches,
    config: TrainConfig,
    folder: Path,
    report: Progress,
) -> Trained:
    objective = Objective(config, readout_of(model), frequent_answers(training, model.vocab_size, config.frequent))
    trainer = Trainer(model, student, objective, training, validation, config, folder / RUN)
    with report.stage("training", trainer.updates) as advance:
        trainer.advance = advance
        return trainer.run()


def started(model: Model, training: Batches, config: TrainConfig) -> Student:
    """Heads at their starts, closed-form readouts fitted on the training split."""
    generator = torch.Generator().manual_seed(config.seed)
    exits, init = config.at(model.depth), config.starting()
    heads: dict[int, Head] = {
        leave: start_head(
            config.head, model, leave, init, rank=config.rank or None, inner=config.inner or None, generator=generator
        )
        for leave in exits
    }
    student = Student(model, heads)
    if "ridge" in init:
        with torch.no_grad(), mixed(readout_of(model).weight):
            for leave, head in heads.items():
                readout: Any = head if config.head == "translator" else getattr(head, "readout", None)
                fit_readout(readout, _start_rows(student, leave, training))
    return student


def _start_rows(student: Student, leave: int, training: Batches) -> Any:
    seen = 0
    for batch in training.once():
        stream = student.stream(leave, batch, batch.judged)
        yield stream, student.finish(leave, stream), batch.ready[batch.judged]
        seen += stream.shape[0]
        if seen >= _START_ROWS:
            return


def frequent_answers(training: Batches, words: int, count: int) -> Tensor:
    """int64 ids of the teacher's most frequent answers, ascending."""
    return training.frequencies(words).argsort(descending=True, stable=True)[: min(count, words)].sort().values


def _record(method: str, corpus: Corpus, config: TrainConfig, trained: Trained) -> dict[str, Any]:
    """Plain JSON about how the heads came to be and what they reach."""
    return {
        "method": method,
        "training": {
            "config": dataclasses.asdict(config),
            "tokens": {name: corpus.count(name) for name in (FIT, TUNE)},
            "tokens_sha256": corpus.digest,
            "updates": trained.updates,
            "best_update": trained.best_update,
            "rows_shown": trained.rows,
            # By which fit keeps them out of what tunes and tests.
            "documents": sorted({piece.document for piece in corpus.of(FIT)}),
            "validation": {str(leave): dataclasses.asdict(quality) for leave, quality in trained.quality.items()},
        },
        "documents": corpus.documents,
    }


def _draw(folder: Path, report: Progress) -> None:
    from dyndepth.training.curves import draw

    try:
        draw(folder / RUN, folder / "curves.png")
    except ModuleNotFoundError as error:
        report.console.print(str(error), style="yellow")
