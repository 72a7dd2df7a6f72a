"""CALM (arXiv 2207.07061): after every layer a row asks how sure it is; the threshold is calibrated and falls with position.

Three measures: `softmax` (largest minus second probability of the exit head), `state` (cosine of the residual with the one at
the boundary before) and `meta` (a linear classifier of the residual that predicts "the full model says the same"). Rows that
leave give the layers above K,V of their own exit residual (`kv="propagate"`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyndepth import calibration
from dyndepth.calibration import Reliability, brier
from dyndepth.closed_form.heads import exit_argmax
from dyndepth.closed_form.router import fit_router
from dyndepth.closed_form.trace import trace
from dyndepth.data import FIT, TEST, TEXT_PIECE, TUNE, Corpus, document, encode
from dyndepth.data.corpus import deal
from dyndepth.data.pieces import sections, text_pieces
from dyndepth.errors import ArgumentError
from dyndepth.exits import Band, BlockHead, Decay, Exits, Margin, Router, RouterScore, Saturation
from dyndepth.exits.heads import Head, StoredBlock
from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.fingerprint import check_exits, facts_of
from dyndepth.runtime.score import HEAD_ROWS

MEASURES = ("softmax", "state", "meta")
#: What the classifier learns: every boundary by itself (the paper found it better), or the first that agrees.
TARGETS = ("independent", "geometric")
#: The paper's threshold for up to 512 new tokens.
DECAY = Decay(tau=4.0, length=512)
#: Thresholds that calibration tries for scores that are probabilities, strictest first.
_GRID = (1.0, 0.99, 0.975, 0.95, 0.925, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
#: For cosines, which crowd near 1 by an amount of the model's own: the shares of rows of other texts that score higher.
_SHARES = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
#: Pairs of a row and a boundary that the classifier is fitted on: a gigabyte at a width of 4096.
_PAIRS = 65536
_MOST_BANDS = 62


def exits(
    model: Any,
    texts: Sequence[str | Tensor] | Corpus = (),
    tokenizer: Any = None,
    *,
    measure: str = "softmax",
    leave: Sequence[int] = (),
    heads: Exits | None = None,
    decay: Decay | None = DECAY,
    shortlist: Tensor | None = None,
    target: str = "independent",
    shared: bool = True,
    tokens: int = 16384,
    seed: int = 0,
) -> Exits:
    """Exits under one of CALM's measures, so strict that nobody leaves unless sure beyond rounding: `calibrate` opens them.

    Args:
        model: a supported transformers causal LM in eval mode.
        texts: strings (with `tokenizer`), int64 [t] tensors or a corpus (dyndepth.data.Corpus). `meta` learns from them, the
            path of `state` is read off them; `softmax` needs none. Calibration must see other prompts.
        measure: `softmax`, `state` or `meta`.
        leave: boundaries; by default those of the heads, else every one (every second, third, ... of more than 63 layers).
            `state` compares neighbours of this list, and its first boundary never fires.
        heads: trained heads, or exits that have some (dyndepth.train, dyndepth.fit); elsewhere the final norm is the head.
        decay: the position-dependent threshold; None keeps it constant.
        shortlist: int64 [v], words that `softmax` looks at instead of all: a full head per boundary costs layers.
        target: `independent` or `geometric`, the classifier's loss (only `meta`). Independent labels are balanced: rows that
            agree and rows that do not weigh the same.
        shared: one classifier for all boundaries, as in the paper, or one for each.
        tokens: size of the corpus that is taken from `texts`.
        seed: dealing of the corpus and of the rows that the classifier sees.

    Returns exits without K,V maps, so that kv=None means `propagate`. `record["calm"]` has the settings, the levels that
    calibration will try (`grid`) and, for `meta`, what the classifier reaches on rows it has not seen.
    """
    for name, value, known in (("measure", measure, MEASURES), ("target", target, TARGETS)):
        if value not in known:
            raise ArgumentError(f"calm.exits: {name} must be one of {', '.join(known)}, got {value!r}")
    bound = bind(model)
    found = _heads(heads, bound)
    chosen = sorted(set(leave) or set(found) or set(range(1, bound.depth, -(-(bound.depth - 1) // _MOST_BANDS))))
    if not chosen or not all(1 <= at < bound.depth for at in chosen):
        raise ArgumentError(f"calm.exits: leave must be boundaries in [1, {bound.depth}), got {chosen}")
    criterion = Margin() if measure == "softmax" else Saturation() if measure == "state" else None
    bands = [
        Band(at, bound.depth, criterion, head=found.get(at), decay=decay, shortlist=shortlist if measure == "softmax" else None)
        for at in chosen
    ]
    about: dict[str, Any] = {"measure": measure, "levels": list(_GRID)}
    documents = set(heads.record.get("documents", ())) if heads is not None else set()
    with torch.no_grad():
        if measure == "meta" or (measure == "state" and len(texts.pieces if isinstance(texts, Corpus) else texts)):
            corpus, names = _corpus(bound, texts, tokenizer, tokens, seed)
            documents |= names
            if measure == "state":
                about["levels"] = _levels(bound, chosen, corpus)
            else:
                pairs = _pairs(bound, bands, corpus, target, seed)
                routers, about["meta"] = _classifiers(pairs, chosen, balanced=target == "independent", shared=shared)
                about |= {"target": target, "shared": shared}
                bands = [_judged_by(band, router) for band, router in zip(bands, routers, strict=True)]
        elif measure == "state":
            about["levels"] = []
    record = {"method": "CALM (arXiv 2207.07061)", "calm": about, "documents": sorted(documents)}
    if heads is not None and "training" in heads.record:
        record["training"] = heads.record["training"]
    result = Exits(bands, facts_of(bound), record)
    return result.with_thresholds([_falling_to(about["levels"][0] if about["levels"] else 1.0, band) for band in result])


def grid(exits: Exits) -> list[list[float]]:
    """Threshold vectors for dyndepth.calibrate, strictest first: one number for all boundaries, as CALM searches it.

    The numbers are fixed before a prompt is seen: a grid for probabilities; for cosines the highest that was seen on the texts
    given to `exits`, and lower ones by the share of rows above them. A threshold that decays is set so that it falls *to* the
    number. Raises ArgumentError for exits that are not of `calm.exits`, or of `state` without texts.
    """
    about = exits.record.get("calm")
    if not isinstance(about, dict) or not about.get("levels"):
        raise ArgumentError("calm.grid: wanted exits of calm.exits, made with texts where the measure is state; or give path=")
    return [[_falling_to(level, band) for band in exits] for level in about["levels"]]


def calibrate(
    model: Any,
    exits: Exits,
    prompts: Sequence[str | Tensor],
    tokenizer: Any = None,
    *,
    loss: str = "inconsistency",
    path: Sequence[Sequence[float]] | None = None,
    kv: str = "propagate",
    **options: Any,
) -> Exits:
    """Learn-then-Test over thresholds (dyndepth.calibrate, whose `options` these are), by default for textual consistency.

    With the chosen confidence a new request's text differs from full depth's by at most `risk` (1 - ROUGE-L) on average;
    `loss="disagreement"` bounds the share of different tokens instead.
    """
    vectors = grid(exits) if path is None else path
    return calibration.calibrate(model, exits, prompts, tokenizer, loss=loss, path=vectors, kv=kv, **options)


def _heads(heads: Exits | None, model: Model) -> dict[int, Head]:
    if heads is None:
        return {}
    check_exits(heads, model)
    return {band.leave: band.head_or_norm() for band in heads if band.resume == model.depth}


def _falling_to(level: float, band: Band) -> float:
    """The threshold that ends at `level` when all the steps there can be are done; `level` itself without a decay."""
    if band.decay is None:
        return level
    low, high = (float(band.decay.apply(value, torch.tensor(1 << 30))) for value in (0.0, 1.0))
    return (level - low) / (high - low)


# -- rows to learn from ---------------------------------------------------------------------------------------------------


def _corpus(
    model: Model, texts: Sequence[str | Tensor] | Corpus, tokenizer: Any, tokens: int, seed: int
) -> tuple[Corpus, set[str]]:
    """Pieces of the texts in splits that share no document, and the names of all that was given."""
    if isinstance(texts, Corpus):
        return texts, {piece.document for piece in texts.pieces}
    given = encode(texts, tokenizer, "calm.exits: texts", special=True)
    longest = model.positions_limit or getattr(model.config, "max_position_embeddings", None) or TEXT_PIECE
    piece = min(TEXT_PIECE, longest)
    corpus = deal([], text_pieces(sections(given, piece), tokens, piece), model.hidden_size, seed)
    return corpus, {document(text) for text in given} | {piece.document for piece in corpus.pieces}


def _levels(model: Model, boundaries: Sequence[int], corpus: Corpus) -> list[float]:
    """Cosines between neighbouring boundaries: the highest over judged rows and boundaries, and lower ones by _SHARES."""
    seen: list[Tensor] = []
    for at, chunk in _chunks(model, boundaries, corpus):
        judged = torch.cat([torch.arange(p.tokens.shape[0]) >= p.start for p in at])
        streams = [chunk.residual[e].cpu().float()[judged] for e in boundaries]
        seen += [torch.cosine_similarity(b, a, dim=-1, eps=1e-20) for a, b in itertools.pairwise(streams)]
    if not seen:
        raise ArgumentError("calm.exits: state compares neighbouring boundaries, so wanted at least two in leave, got one")
    cosines = torch.cat(seen).sort(descending=True).values
    return [float(cosines[min(int(share * len(cosines)), len(cosines) - 1)]) for share in _SHARES]


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """Judged rows at boundaries: would the exit there have said what the full model says?"""

    residual: Tensor  # float32 [n, d]
    agrees: Tensor  # bool [n]
    boundary: Tensor  # int64 [n]
    split: list[str]  # [n]


def _chunks(model: Model, boundaries: Sequence[int], corpus: Corpus) -> Any:
    """(pieces, chunk) of full-depth passes over the corpus."""
    first = 0
    for chunk in trace(model, [piece.tokens for piece in corpus.pieces], boundaries, ()):
        last, rows = first, 0
        while rows < chunk.ready.shape[0]:
            rows += corpus.pieces[last].tokens.shape[0]
            last += 1
        yield corpus.pieces[first:last], chunk
        first = last


def _pairs(model: Model, bands: Sequence[Band], corpus: Corpus, target: str, seed: int) -> _Pairs:
    """A lot of at most about _PAIRS pairs; under `geometric` only those that its likelihood speaks of.

    CALM's geometric-like loss of a row whose first agreeing boundary is i: -log s_i - sum_{j < i} log(1 - s_j). That is the
    cross-entropy of the labels of the boundaries up to i, so leaving out those after i is all it takes.
    """
    for band in bands:
        if isinstance(band.head, BlockHead | StoredBlock):
            raise ArgumentError(
                f"calm.exits: the head at boundary {band.leave} is a block, which attends to other rows; meta wants norm, "
                "translator or mlp heads"
            )
    generator = torch.Generator().manual_seed(seed)
    share = _PAIRS / max(1, len(bands) * sum(piece.judged for piece in corpus.pieces))
    splits = {id(piece): split for piece, split in zip(corpus.pieces, corpus.split, strict=True)}
    residual, agrees, boundary, split = [], [], [], []
    for pieces, chunk in _chunks(model, [band.leave for band in bands], corpus):
        rows = torch.cat([torch.arange(p.tokens.shape[0]) >= p.start for p in pieces]).nonzero()[:, 0]
        names = [splits[id(p)] for p in pieces for _ in range(p.judged)]
        ready = chunk.ready[rows.to(chunk.ready.device)]
        answers = torch.cat([model.argmax(part).cpu() for part in ready.split(HEAD_ROWS)])
        open_still = torch.ones_like(answers, dtype=torch.bool)
        for band in bands:
            stream = chunk.residual[band.leave][rows.to(chunk.ready.device)]
            right = exit_argmax(model, band, stream) == answers
            kept = ((torch.rand(len(rows), generator=generator) < share) & open_still).nonzero()[:, 0]
            if target == "geometric":
                open_still &= ~right
            residual.append(stream.cpu().float()[kept])
            agrees.append(right[kept])
            boundary.append(torch.full_like(kept, band.leave))
            split += [names[i] for i in kept.tolist()]
    return _Pairs(torch.cat(residual), torch.cat(agrees), torch.cat(boundary), split)


def _classifiers(
    pairs: _Pairs, boundaries: Sequence[int], *, balanced: bool, shared: bool
) -> tuple[list[Router], dict[str, dict[str, float]]]:
    """A router per boundary (the same one where shared), and what each reaches on the test split, by boundary or `all`.

    `brier` and `calibration_error` are of the score as it is: balanced labels put it nearer to one half than agreement is.
    """
    split = torch.tensor([(FIT, TUNE, TEST).index(name) for name in pairs.split])
    found: dict[str, tuple[Router, dict[str, float]]] = {}
    for name in ["all"] if shared else [str(at) for at in boundaries]:
        here = torch.ones_like(pairs.agrees) if shared else pairs.boundary == int(name)
        learn, test = here & (split < 2), here & (split == 2)
        if not bool(test.any()) or not bool((here & (split == 0)).any()):
            raise ArgumentError(f"calm.exits: no row reaches boundary {name} in one of the splits; give more texts")
        router, reached = fit_router(pairs.residual[learn], pairs.agrees[learn], split[learn] == 1, balanced=balanced)
        scores, agrees = router(pairs.residual[test]).numpy(), pairs.agrees[test].numpy()
        rate = float(agrees.mean())
        reached |= {
            "brier": brier(scores, agrees), "brier_of_constant": rate * (1 - rate),
            "calibration_error": Reliability.of(scores, agrees).calibration_error, "agreement": rate, "rows": len(agrees),
        }  # fmt: skip
        found[name] = router, reached
    routers = [found["all" if shared else str(at)][0] for at in boundaries]
    return routers, {name: reached for name, (_, reached) in found.items()}


def _judged_by(band: Band, router: Router) -> Band:
    return Band(band.leave, band.resume, RouterScore(router), head=band.head, decay=band.decay)
