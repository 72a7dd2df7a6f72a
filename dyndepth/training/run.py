"""dyndepth.train: from texts or prompts to exits, in one folder that a killed run goes on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndepth.closed_form.progress import Progress
from dyndepth.data import FIT, TUNE, Corpus, collect, encode, own_prompts
from dyndepth.errors import ArgumentError
from dyndepth.exits import Band, Exits
from dyndepth.exits.heads import Head
from dyndepth.files import writable
from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.fingerprint import facts_of
from dyndepth.training.batches import Batches
from dyndepth.training.cache import TeacherCache
from dyndepth.training.config import TrainConfig
from dyndepth.training.objective import Objective
from dyndepth.training.starts import fit_readout, start_head
from dyndepth.training.student import Student, released
from dyndepth.training.trainer import Trained, Trainer, readout_of

CORPUS, CACHE, RUN = "corpus.safetensors", "cache", "run"
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
    report = Progress(progress)
    with torch.no_grad(), report:
        corpus = _corpus(model, bound, texts, tokenizer, prompts, config, folder, report)
        kept = [piece for piece, split in zip(corpus.pieces, corpus.split, strict=True) if split in (FIT, TUNE)]
        splits = [split for split in corpus.split if split in (FIT, TUNE)]
        with report.stage("caching the teacher", sum(piece.tokens.shape[0] for piece in kept)) as advance:
            cache = TeacherCache.build(bound, kept, exits, folder / CACHE, say=report.console.print, advance=advance)
        trained = _heads(bound, cache, splits, config, folder / RUN, report)
    bands = []
    for leave, head in sorted(trained.heads.items()):
        kept_head: Any = released(head, bound.dtype)
        bands.append(Band(leave, bound.depth, head=kept_head))
    result = Exits(bands, facts_of(bound), _record(corpus, config, trained))
    result.save_pretrained(folder / "exits")
    _draw(folder, report)
    return result


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
    if (folder / CORPUS).exists():
        return Corpus.load(folder / CORPUS)
    given = encode(texts, tokenizer, "train: texts", special=True)
    own = 1.0 if not given else config.own
    asked = None if prompts is None else encode(prompts, tokenizer, "train: prompts", special=True)
    if asked is None and not given:
        count = max(1, round(config.corpus / config.new_tokens))
        with report.stage("writing prompts", count) as advance:
            asked = own_prompts(model, tokenizer, count, batch=config.decode, seed=config.seed, advance=advance)
    for name, part in (("texts", given), ("prompts", asked or [])):
        for number, ids in enumerate(part):
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < bound.vocab_size:
                raise ArgumentError(
                    f"train: {name}[{number}] must hold token ids in [0, {bound.vocab_size}); was it encoded by the tokenizer "
                    "of another model?"
                )
    context = bound.positions_limit or getattr(bound.config, "max_position_embeddings", None) or 1 << 20
    with report.stage("continuing prompts", round(config.corpus * own)) as advance:
        corpus = collect(
            model, given, asked, tokens=config.corpus, own=own, new_tokens=config.new_tokens, batch=config.decode,
            seed=config.seed, width=bound.hidden_size, context=context, advance=advance,
        )  # fmt: skip
    corpus.save(folder / CORPUS)
    return corpus


def _heads(
    model: Model, cache: TeacherCache, splits: Sequence[str], config: TrainConfig, folder: Path, report: Progress
) -> Trained:
    exits = config.at(model.depth)
    training, validation = (
        Batches(cache, [i for i, split in enumerate(splits) if split == name], config.batch, config.seed, exits)
        for name in (FIT, TUNE)
    )
    student = started(model, training, config)
    objective = Objective(config, readout_of(model), frequent_answers(training, model.vocab_size, config.frequent))
    trainer = Trainer(model, student, objective, training, validation, config, folder)
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
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
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
    frequency = torch.zeros(words, dtype=torch.int64)
    for batch in training.once():
        frequency += torch.bincount(batch.answers[batch.judged], minlength=words)
    return frequency.argsort(descending=True, stable=True)[: min(count, words)].sort().values


def _record(corpus: Corpus, config: TrainConfig, trained: Trained) -> dict[str, Any]:
    """Plain JSON about how the heads came to be and what they reach."""
    return {
        "method": "trained heads (dyndepth.train)",
        "training": {
            "config": dataclasses.asdict(config),
            "tokens": {name: corpus.count(name) for name in (FIT, TUNE)},
            "tokens_sha256": corpus.digest,
            "updates": trained.updates,
            "best_update": trained.best_update,
            "rows_shown": trained.tokens,
            "validation": {str(leave): dataclasses.asdict(quality) for leave, quality in trained.quality.items()},
        },
        "documents": sorted({piece.document for piece in corpus.pieces}),
    }


def _draw(folder: Path, report: Progress) -> None:
    from dyndepth.training.curves import draw

    try:
        draw(folder / RUN, folder / "curves.png")
    except ModuleNotFoundError as error:
        report.console.print(str(error), style="yellow")
