"""dyndepth.fit: exits for a model nobody prepared, in closed form and without a gradient step."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dyndepth.closed_form.candidates import MapFitter, candidate_spans
from dyndepth.closed_form.heads import block_ready, exit_argmax, exit_statistics, frequent, judging_cost
from dyndepth.closed_form.history import tell_of_history
from dyndepth.closed_form.measure import Measured, Sample
from dyndepth.closed_form.progress import Progress
from dyndepth.closed_form.router import fit_router
from dyndepth.closed_form.search import Candidate, choose, label, probe, promising, set_price, with_criterion
from dyndepth.closed_form.trace import trace
from dyndepth.data import FIT, TEST, TEXT_PIECE, TUNE, Corpus, gather
from dyndepth.errors import ArgumentError
from dyndepth.exits import Band, Exits, ModelFacts, RouterScore
from dyndepth.exits.heads import Head, StoredBlock
from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.block import restore
from dyndepth.runtime.fingerprint import check_exits, facts_of
from dyndepth.runtime.score import HEAD_ROWS

Span = tuple[int, int]

_PROBE_ROWS = 1024
_PROBE_SHARE = 0.3
#: Bands that resume which go on to routers, beside all early exits.
_RESUMING = 2
#: Vocabulary ids an exit's router looks at: 2 % of a large vocabulary, a seventh of a layer's work, and as good as all.
_SHORTLIST_WORDS = 1024
_LABEL_ROUNDS = 1
_PRICE_STEPS = 7


def fit(
    model: Any,
    texts: Sequence[str | Tensor] | Corpus = (),
    tokenizer: Any = None,
    *,
    prompts: Sequence[str | Tensor] | None = None,
    heads: Exits | None = None,
    agreement: float = 0.95,
    tokens: int = 16384,
    own: float = 0.5,
    bands: int = 3,
    candidates: Sequence[Span] | None = None,
    kv_rank: int | None = None,
    new_tokens: int = 128,
    batch: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Exits:
    """Find bands, maps, routers and thresholds by regression and measurement.

    1. The model's own greedy continuations of `prompts` and pieces of `texts` make the corpus: of every eight documents six
       fit, one tunes, one reports.
    2. One streaming pass accumulates normal equations (fp64) for the jump maps, translators and K,V maps of all candidate
       bands; ridge penalties by held-out error.
    3. Every candidate is tried on a random share of rows, back-fill included. The bands that lose least per layer saved go
       on, and all early exits.
    4. Routers by logistic regression: random skips label rows for bands that resume; an exit's own arg max labels its rows,
       and its router also sees its head's statistics over the most frequent tokens. Routers above a band that resumes see
       whether the row skipped it.
    5. The set of bands expected to save most, net of judging, is taken, and one price per layer is bisected until the
       measured agreement on the tuning split meets `agreement`.
    6. The test split gives the numbers in `exits.record`.

    Args:
        model: a supported transformers causal LM in eval mode.
        texts: strings (with `tokenizer`) or int64 [t] tensors; or a corpus that was collected before (dyndepth.data.Corpus),
            which makes `tokens`, `own`, `new_tokens` and `seed` idle.
        prompts: prompts for the continuations, ready to be continued (chat template applied); None takes the first 32
            tokens of each piece of the texts. Strings get the tokenizer's BOS unless they bring it.
        heads: exits whose trained heads (dyndepth.train) early exits at the same boundaries take instead of a fitted
            translator; their boundaries join the candidates, unless those are given. Documents that the heads learned
            from neither tune nor test.
        agreement: wanted share of tokens whose arg max is the full model's, over all judged tokens.
        tokens: size of the corpus; `own` of it are continuations (with their prompts). Documents, not sequences, are dealt
            over the splits; a prompt is a document, and so is a text, or a section of it where texts are few.
        bands: at most this many bands.
        candidates: spans (leave, resume) to consider; None takes dyndepth.closed_form.candidates.candidate_spans.
        kv_rank: of the K,V maps, below the model's width: all skipped layers of a band then read one product of the residual
            with so many rows, which costs less and is less exact (docs/speed-zen5.md). Bands so short that whole maps are fewer
            numbers keep those. None: whole maps.
        new_tokens, batch: length and number of continuations decoded at once.
        seed: shuffling of the corpus. The same arguments give the same exits.
        progress: print the plan (with the memory it will take) and a progress bar.

    Raises NotEnoughDataError when the corpus is too small for the model's width.
    """
    if not 0 < agreement <= 1:
        raise ArgumentError(f"fit: agreement must be in (0, 1], got {agreement}")
    if not 0 <= own <= 1:
        raise ArgumentError(f"fit: own must be in [0, 1], got {own}")
    if tokens < 1 or bands < 1 or new_tokens < 1 or batch < 1:
        raise ArgumentError(
            f"fit: tokens, bands, new_tokens and batch must be at least 1, got {tokens}, {bands}, {new_tokens}, {batch}"
        )
    bound, facts = bind(model), facts_of(bind(model))
    trained = _trained(heads, bound)
    spans = _spans(candidates, trained, bound.depth)
    if kv_rank is not None and not 1 <= kv_rank < bound.hidden_size:
        raise ArgumentError(f"fit: kv_rank must be in [1, {bound.hidden_size}), the model's width, got {kv_rank}")
    report = Progress(progress)
    if isinstance(texts, Corpus):
        tokens = texts.count()
    report.plan(tokens, len(spans), MapFitter.memory(bound, spans) + _memory_of_residuals(bound, tokens))
    with report, torch.no_grad():
        learned = () if heads is None else _learned(heads)
        with report.stage("continuing prompts", round(tokens * own)) as advance:
            data = gather(
                model, texts, tokenizer, prompts, "fit", tokens=tokens, own=own, new_tokens=new_tokens, batch=batch,
                seed=seed, learned=learned, advance=advance,
            )  # fmt: skip
        found = fit_maps(bound, data, spans, report, trained, kv_rank)
        fit_sample, tune, test = (Sample.of(model, *data.part(name)) for name in (FIT, TUNE, TEST))
        with report.stage("measuring bands", len(found)) as advance:
            probe(found, fit_sample.head(_PROBE_ROWS), facts, _PROBE_SHARE, lambda: advance(1))
        chosen = _judged(bound, promising(found, bound.depth, _RESUMING), fit_sample, tune, facts, agreement, bands, report)
        exits = Exits([c.band for c in chosen], facts)
        with report.stage("setting thresholds", _PRICE_STEPS) as advance:
            exits, tuned = set_price(chosen, exits, tune, agreement, _PRICE_STEPS, lambda: advance(1))
        tested = test.run(exits, "predict")
    for band in exits:
        for part in (band.head, band.jump, band.kv):
            if part is not None:
                part.to(bound.dtype)  # what the runtime would round them to anyway; halves the file of a bf16 model
    exits.record = _record(data, found, chosen, agreement, tuned, tested)
    names = {*data.documents, *(() if heads is None else heads.record.get("documents", ()))}
    exits.record["documents"] = sorted(names)  # by which calibrate knows prompts that were learned from
    if heads is not None and any(band.leave in trained and band.resume == bound.depth for band in exits):
        exits.record["training"] = heads.record.get("training")
    report.result(exits)
    return exits


def _learned(heads: Exits) -> frozenset[str]:
    """Documents that gradients saw, and, where the record does not tell those apart, all that training knew."""
    record = heads.record.get("training") or {}
    return frozenset(record.get("documents") or heads.record.get("documents", ()))


def _trained(heads: Exits | None, model: Model) -> dict[int, Head]:
    """Heads by boundary."""
    if heads is None:
        return {}
    check_exits(heads, model)
    found = {band.leave: copy.deepcopy(band.head_or_norm()) for band in heads if band.resume == model.depth}
    return {leave: restore(head, model, leave) if isinstance(head, StoredBlock) else head for leave, head in found.items()}


def _spans(candidates: Sequence[Span] | None, trained: dict[int, Head], layers: int) -> list[Span]:
    spans = candidate_spans(layers) if candidates is None else sorted(set(candidates))
    if candidates is None:
        spans = sorted({*spans, *((leave, layers) for leave in trained)})
    if not spans:
        raise ArgumentError(f"fit: no candidate bands for a model of {layers} layers")
    for leave, resume in spans:
        if not 1 <= leave < resume <= layers:
            raise ArgumentError(f"fit: candidates must be spans 1 <= leave < resume <= {layers}, got ({leave}, {resume})")
    return spans


def _memory_of_residuals(model: Model, tokens: int) -> int:
    """Residuals at the boundaries that go on are kept for the routers; scoring holds the logits of some rows at a time."""
    residuals = model.dtype.itemsize * (_RESUMING + 4) * tokens * model.hidden_size
    return residuals + HEAD_ROWS * model.vocab_size * (4 + model.dtype.itemsize)


def fit_maps(
    model: Model, data: Corpus, spans: Sequence[Span], report: Progress, trained: Mapping[int, Head] | None = None,
    kv_rank: int | None = None,
) -> list[Candidate]:  # fmt: skip
    """Candidate bands with their maps, by regression in one pass over the corpus; `trained` heads replace translators."""
    trained = trained or {}
    fitter = MapFitter(model, spans, kv_rank)
    pieces = [*data.of(FIT), *data.of(TUNE)]
    total, fitting = sum(p.tokens.shape[0] for p in pieces), data.count(FIT)
    # Rows that can never leave must not weigh in: the first token of a text is an attention sink with a residual a hundred
    # times larger than any other, and one in 256 rows bent every map (docs/notes/routers.md).
    judged = torch.cat([torch.arange(p.tokens.shape[0]) >= p.start for p in pieces])
    with report.stage("regressing maps", total) as advance:
        for chunk in trace(model, [p.tokens for p in pieces], *fitter.needs(), advance=advance):
            part = slice(chunk.begin, chunk.begin + chunk.ready.shape[0])
            early = torch.arange(part.start, part.stop) < fitting
            fitter.add(chunk, judged[part] & early, judged[part] & ~early)
    found = [Candidate(*fitter.band(span)) for span in spans]
    for candidate in found:
        if candidate.band.resume == model.depth and candidate.band.leave in trained:
            candidate.band.head = trained[candidate.band.leave]
            candidate.errors.pop("head")
    return found


def _judged(
    model: Model,
    short: list[Candidate],
    fit_sample: Sample,
    tune: Sample,
    facts: ModelFacts,
    agreement: float,
    most: int,
    report: Progress,
) -> list[Candidate]:
    """Routers for the shortlist, then the bands to keep."""
    resuming = [c for c in short if c.band.resume < model.depth]
    with report.stage("labelling rows", _LABEL_ROUNDS) as advance:
        labels = dict(
            zip(
                [c.span for c in resuming],
                label(resuming, fit_sample, facts, _LABEL_ROUNDS, lambda: advance(1)),
                strict=True,
            )
        )
    words = frequent(fit_sample.answers[fit_sample.judged], _SHORTLIST_WORDS)
    boundaries = sorted({c.band.leave for c in short})
    fit_residuals, tune_residuals = (residuals_at(model, s.tokens, boundaries) for s in (fit_sample, tune))
    chances = []
    for candidate in short:
        leave, top = candidate.band.leave, candidate.band.resume == model.depth
        residual = fit_residuals[leave].to(model.dtype)
        if top:
            # An exit's own answer is known without a pass: its arg max beside the full model's, on every judged row.
            rows = fit_sample.judged.nonzero()[:, 0]
            candidate.band.shortlist = torch.nn.Parameter(words, requires_grad=False)
            candidate.judging = judging_cost(model, candidate.band)
            ready, tuned = (_block_rows(candidate.band, facts, sample) for sample in (fit_sample, tune))
            agrees = exit_argmax(model, candidate.band, residual[rows], ready) == fit_sample.answers[rows]
        else:
            rows, agrees, ready, tuned = labels[candidate.span].rows, labels[candidate.span].agrees, None, None
        stats = exit_statistics(model, candidate.band, residual[rows], ready) if top else None
        router, candidate.router = fit_router(residual[rows], agrees, rows % 5 == 0, stats)
        candidate.band = with_criterion(candidate.band, RouterScore(router), threshold=1.0)
        seen = tune_residuals[leave].to(model.dtype)[tune.judged]
        chances.append(router(seen, None, exit_statistics(model, candidate.band, seen, tuned) if top else None))
    chosen = [short[i] for i in choose(short, chances, agreement, most)]
    return tell_of_history(model, chosen, fit_sample, facts)


def _block_rows(band: Band, facts: ModelFacts, sample: Sample) -> Tensor | None:
    """Head-ready rows of a block head, of judged rows, which no residual alone tells; None for other heads."""
    if not band.has_block:
        return None
    return block_ready(sample.causal_lm, band, facts, sample.tokens, sample.start)[sample.judged]


def residuals_at(model: Model, tokens: Sequence[Tensor], boundaries: Sequence[int]) -> dict[int, Tensor]:
    """Residuals [n, d] by boundary."""
    parts: dict[int, list[Tensor]] = {boundary: [] for boundary in boundaries}
    for chunk in trace(model, tokens, boundaries, ()):
        for boundary in parts:
            parts[boundary].append(chunk.residual[boundary].cpu())
    return {boundary: torch.cat(part) for boundary, part in parts.items()}


def _record(
    data: Corpus,
    found: Sequence[Candidate],
    chosen: Sequence[Candidate],
    agreement: float,
    tuned: Measured,
    tested: Measured,
) -> dict[str, Any]:
    """Plain JSON about how the exits came to be and what they reach."""
    return {
        "method": "closed form (dyndepth.fit)",
        "tokens": {name: data.count(name) for name in (FIT, TUNE, TEST)},
        "text_piece": TEXT_PIECE,
        "tokens_sha256": data.digest,
        "wanted_agreement": agreement,
        "tune": {"agreement": tuned.agreement, "rows_x_layers": tuned.rows_x_layers, "rows": int(tuned.judged.sum())},
        "test": {
            "agreement": tested.agreement,
            "rows_x_layers": tested.rows_x_layers,
            "rows": int(tested.judged.sum()),
        },
        "bands": {f"{c.band.leave}-{c.band.resume}": {"errors": c.errors, "router": c.router} for c in chosen},
        "probed": [{"leave": c.band.leave, "resume": c.band.resume, "agreement": c.agreement, "harm": c.harm} for c in found],
    }
