"""`make band-frontier`: mean layers run at three agreements with full depth, for early exits, for bands, and for both together.

Real passes over unseen answers: decisions, jumps and predicted K,V of skipped layers included, so what one row does to the
next counts. Routers see what a row already skipped; beside them top-1 probability and margin, of the exit's own head or, for
bands that resume, of a ridge readout at their boundary. How true scores are comes from the tuning split, where sets of bands
grow greedily; one price per layer then sets all thresholds of a set. Every price tried is a point on the test split, and the
layers at an agreement are read between the points that no other point beats.

Takes corpus, exits' heads and bands' maps from the folder of `make exit-heads` and `make jump-maps` (and makes what is
missing there); it resumes, and names of confidences after the folder do only those. Writes `band_frontier.json`.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from band_maps import Span, first, ridge_bands, spans
from exit_heads import EXITS, KINDS, SHARES, TRAIN_ROWS, load_or_collect, trained
from jump_maps import MAP_ROWS
from torch import Tensor
from truth import Truth

from dyndepth.closed_form.heads import exit_argmax, exit_statistics, frequent, judging_cost
from dyndepth.closed_form.history import Seen, below, see
from dyndepth.closed_form.measure import Sample
from dyndepth.closed_form.progress import Progress
from dyndepth.closed_form.router import fit_router
from dyndepth.closed_form.search import Candidate, expected_price, greedy, pareto, probe, thresholds, with_criterion
from dyndepth.closed_form.trace import trace
from dyndepth.data import FIT, TEST, TUNE
from dyndepth.demo.weights import load_model
from dyndepth.exits import Band, Exits, Margin, Router, RouterScore, TopProbability, TranslatorHead
from dyndepth.exits.criteria import Criterion, View
from dyndepth.exits.router import stat_features
from dyndepth.files import replacing
from dyndepth.ops import ExitStats, exit_stats
from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.fingerprint import facts_of
from dyndepth.training import TeacherCache, TrainConfig
from dyndepth.training.batches import Batches
from dyndepth.training.starts import fit_readout

#: Bands that are tried together, one per boundary: of each boundary one that lost least per layer when rows skipped by lot.
BANDS: tuple[Span, ...] = ((5, 15), (8, 13), (10, 20), (13, 18), (15, 20), (18, 23))
CONFIDENCES = ("router", "router, blind to what was skipped", "top-1 probability", "margin")
ROUTER, BLIND, TOP, MARGIN = CONFIDENCES
_FIT_ROWS, _TUNE_ROWS, _TEST_ROWS, _MAP_AND_JUMP_ROWS, _READOUT_ROWS = 5_000, 2_500, 3_000, 72_000, 15_000
_FIT_ROUNDS, _TUNE_ROUNDS, _PROBE_ROWS, _MOST, _WORDS = 2, 2, 1000, 4, 1024
#: No price beyond is tried: disagreements per layer saved.
_PRICE = 0.1


@dataclass(frozen=True)
class Confidence(Criterion):
    """Top-1 probability or margin of a readout at a boundary whose band resumes, and so has no head of its own."""

    kind: ClassVar[str] = "confidence"
    model: Any = None
    head: Any = None
    which: str = TOP

    def score(self, view: View) -> Tensor:
        return shown(readout_stats(self.model, self.head, view.hidden), self.which)


def readout_stats(model: Model, head: TranslatorHead, residual: Tensor) -> ExitStats:
    """Statistics of a readout's logits over the whole vocabulary."""
    plain = model.plain_head()
    assert plain is not None
    parts = [exit_stats(head(part, model.finish).contiguous(), plain[0], head_bias=plain[1]) for part in residual.split(512)]
    return ExitStats(*(torch.cat(values) for values in zip(*parts, strict=True)))


def shown(stats: ExitStats, which: str) -> Tensor:
    top = torch.exp(stats.top1 - stats.logsumexp)
    return top if which == TOP else top - torch.exp(stats.top2 - stats.logsumexp)


@dataclass
class Group:
    """Bands and exits that are tried together: what was seen of rows that came by, their routers and how true scores are."""

    candidates: list[Candidate]
    fitted: list[Seen]
    tuned: list[Seen]
    routers: dict[str, list[Router]] = field(default_factory=dict)
    #: Per confidence and band: how true scores are on the tuning rows.
    truth: dict[str, list[Truth]] = field(default_factory=dict)


def main(folder: Path, only: list[str]) -> None:
    model, tokenizer = load_model()
    bound = bind(model)
    report = Progress(True)
    with torch.no_grad(), report:
        bench = Bench.of(folder, model, bound, tokenizer, report)
        bench.run(only)


@dataclass
class Bench:
    folder: Path
    model: Model
    report: Progress
    corpus: Any
    bands: dict[Span, Band]
    readouts: dict[int, TranslatorHead]
    fit: Sample
    tune: Sample
    test: Sample
    #: Of the tuning split's judged rows: residuals by boundary, and chances to agree by confidence and band.
    residual: dict[int, Tensor] = field(default_factory=dict)
    chances: dict[str, list[Tensor]] = field(default_factory=dict)
    group: Group = field(init=False)

    @classmethod
    def of(cls, folder: Path, causal_lm: Any, model: Model, tokenizer: Any, report: Progress) -> Bench:
        corpus = load_or_collect(folder, causal_lm, tokenizer, report)
        mapped = first(corpus.of(FIT), MAP_ROWS)
        bands = ridge_bands(folder / "bands" / "ridge", model, spans(model.depth, EXITS), mapped, report)
        for leave, head in _heads(folder, model, corpus, report).items():
            ridge = bands[leave, model.depth]
            bands[leave, model.depth] = Band(leave, model.depth, head=head, kv=ridge.kv)
        with report.stage("answers at full depth", 3) as advance:
            samples = []
            for name, rows, skip in (
                (FIT, _FIT_ROWS, _MAP_AND_JUMP_ROWS),
                (TUNE, _TUNE_ROWS, 0),
                (TEST, _TEST_ROWS, 0),
            ):
                pieces = first(corpus.of(name), rows, skip)
                tokens, start = [p.tokens for p in pieces], [p.start for p in pieces]
                kept = folder / "bands" / f"answers-{name}-{rows}.pt"
                if not kept.exists():
                    sample = Sample.of(causal_lm, tokens, start)
                    with replacing(kept) as temporary:
                        torch.save([sample.answers, sample.judged], temporary)
                samples.append(Sample(causal_lm, tokens, start, *torch.load(kept, weights_only=True)))
                advance(1)
        seen = [piece.tokens for piece in first(mapped, _READOUT_ROWS)]
        readouts = _readouts(folder / "bands" / "readouts.pt", model, [leave for leave, _ in BANDS], seen, report)
        for kept in (folder / "bands").glob("band-*-linear"):  # trained by KL (make jump-maps)
            band = Exits.from_pretrained(kept).bands[0]
            bands[band.leave, band.resume] = band
        return cls(folder, model, report, corpus, bands, readouts, samples[0], samples[1], samples[2])

    def run(self, only: Sequence[str]) -> None:
        words = frequent(self.fit.answers[self.fit.judged], _WORDS)
        self.group = self._group(words)
        families: dict[str, Callable[[Span], bool]] = {
            "exits": lambda span: span[1] == self.model.depth,
            "bands": lambda span: span[1] < self.model.depth,
            "bands and exits": lambda span: True,
        }
        for confidence in only or CONFIDENCES:
            for family, wanted in families.items():
                if family != "exits" or confidence != BLIND:
                    mine = [i for i, candidate in enumerate(self.group.candidates) if wanted(candidate.span)]
                    kept = self.folder / "bands" / _kept(family, confidence)
                    if not kept.exists():
                        found = self._frontier(family, confidence, mine)
                        with replacing(kept) as temporary:
                            temporary.write_text(json.dumps(found))
                    self._write(list(families))

    # -- what rows show at the boundaries ---------------------------------------------------------------------------------

    def _group(self, words: Tensor) -> Group:
        bands = [self.bands[span] for span in sorted([*BANDS, *((leave, self.model.depth) for leave in EXITS)])]
        for band in bands:
            if band.resume == self.model.depth:
                band.shortlist = torch.nn.Parameter(words, requires_grad=False)
        candidates = [Candidate(band, {}, judging=judging_cost(self.model, band) if band.head else 0.0) for band in bands]
        path = self.folder / "bands" / "seen.pt"
        if not path.exists():
            facts = facts_of(self.model)
            with self.report.stage("labelling rows", _FIT_ROUNDS + _TUNE_ROUNDS + len(bands)) as advance:
                fitted = see(bands, self.fit, facts, rounds=_FIT_ROUNDS, advance=lambda: advance(1))
                tuned = see(bands, self.tune, facts, rounds=_TUNE_ROUNDS, advance=lambda: advance(1))
                for candidate in candidates:
                    probe([candidate], self.fit.head(_PROBE_ROWS), facts, 0.3, lambda: advance(1))
            for sample, seen in ((self.fit, fitted), (self.tune, tuned)):
                for band, part in zip(bands, seen, strict=True):
                    if part.agrees is None:
                        part.agrees = exit_argmax(self.model, band, part.residual) == sample.answers[part.rows]
            odds = [(c.agreement, c.harm) for c in candidates]
            with replacing(path) as temporary:
                torch.save([[vars(part) for part in seen] for seen in (fitted, tuned)] + [odds], temporary)
        fitted, tuned, odds = torch.load(path, weights_only=True)
        for candidate, (agreement, harm) in zip(candidates, odds, strict=True):
            candidate.agreement, candidate.harm = agreement, harm
        group = Group(candidates, [Seen(**part) for part in fitted], [Seen(**part) for part in tuned])
        self._routers(group)
        for confidence in (ROUTER, BLIND, TOP, MARGIN):
            group.truth[confidence] = []
            for i, part in enumerate(group.tuned):
                assert part.agrees is not None
                scores = self._scores(group, i, confidence, part.residual, part.skipped)
                group.truth[confidence].append(Truth.of(scores, part.agrees, confidence == MARGIN))
        return group

    def _routers(self, group: Group) -> None:
        bands = [candidate.band for candidate in group.candidates]
        group.routers = {ROUTER: [], BLIND: []}
        for candidate, seen in zip(group.candidates, group.fitted, strict=True):
            assert seen.agrees is not None
            stats = self._stats(candidate.band, seen.residual)
            held_out = seen.rows % 5 == 0
            history = below(bands, candidate.band.leave)
            candidate.router = {"rows": len(seen.rows), "agree": float(seen.agrees.double().mean())}
            for name, told in ((ROUTER, bool(history)), (BLIND, False)):
                router, quality = fit_router(
                    seen.residual, seen.agrees, held_out, stats,
                    skipped=seen.skipped if told else None, history=history if told else (),
                )  # fmt: skip
                group.routers[name].append(router)
                candidate.router |= {f"{name}: {key}": value for key, value in quality.items()}
            if stats is None:  # what a readout beside the residual would add: no criterion of bands that resume reads one
                read = readout_stats(self.model, self.readouts[candidate.band.leave], seen.residual)
                told_all = torch.cat([seen.skipped, stat_features(read)], dim=1)
                _, quality = fit_router(
                    seen.residual, seen.agrees, held_out, skipped=told_all, history=range(told_all.shape[1])
                )
                candidate.router |= {f"with a readout: {key}": value for key, value in quality.items()}

    def _stats(self, band: Band, residual: Tensor) -> ExitStats | None:
        return None if band.resume < self.model.depth else exit_statistics(self.model, band, residual)

    def _scores(self, group: Group, i: int, confidence: str, residual: Tensor, skipped: Tensor | None) -> Tensor:
        """What the criterion scores, of residuals at the boundary."""
        band = group.candidates[i].band
        if confidence in (ROUTER, BLIND):
            router = group.routers[confidence][i]
            return router(residual, None, self._stats(band, residual), skipped if router.history else None)
        head = self.readouts[band.leave] if band.resume < self.model.depth else band.head
        assert isinstance(head, TranslatorHead)
        return shown(readout_stats(self.model, head.to(self.model.dtype), residual), confidence)

    def _criterion(self, i: int, confidence: str) -> Criterion:
        group = self.group
        band = group.candidates[i].band
        if confidence in (ROUTER, BLIND):
            return RouterScore(group.routers[confidence][i])
        if band.resume == self.model.depth:
            return TopProbability() if confidence == TOP else Margin()
        return Confidence(self.model, self.readouts[band.leave].to(self.model.dtype), confidence)

    # -- sets, thresholds, points -----------------------------------------------------------------------------------------

    def _frontier(self, family: str, confidence: str, mine: Sequence[int]) -> dict[str, Any]:
        """Per wanted agreement the set that grows greedily for it, at the price expected to meet it; and what they make."""
        candidates, chances = [self.group.candidates[i] for i in mine], [self._chances(confidence)[i] for i in mine]
        offsets = self._offsets(mine) if confidence == ROUTER else None
        points: list[dict[str, Any]] = [
            {"spans": [], "agreement": 1.0, "mean_layers": float(self.model.depth), "taken": [], "several": 0.0}
        ]
        with self.report.stage(f"{family}: {confidence}", len(SHARES)) as advance:
            for share in sorted(SHARES):
                grown = greedy(candidates, chances, share, _MOST, offsets)
                if not grown:
                    continue
                chosen = grown[-1][1]
                part = None if offsets is None else offsets[chosen][:, chosen]
                price, _ = expected_price([candidates[i] for i in chosen], [chances[i] for i in chosen], 1 - share, part)
                points.append(self._measured([mine[i] for i in chosen], confidence, price))
                while share == min(SHARES) and points[-1]["agreement"] > share and price < _PRICE:
                    price *= 2  # what was expected was too gloomy
                    points.append(self._measured([mine[i] for i in chosen], confidence, price))
                advance(1)
        best = [points[i] for i in pareto([(point["agreement"], point["mean_layers"]) for point in points])]
        at = {f"{share:.0%}": _between(best, share) for share in SHARES}
        return {"family": family, "confidence": confidence, "points": points, "mean_layers": at}

    def _chances(self, confidence: str) -> list[Tensor]:
        """Per band, the chance to agree of every judged row of the tuning split, had it skipped nothing before."""
        group = self.group
        if not self.residual:
            parts: dict[int, list[Tensor]] = {c.band.leave: [] for c in group.candidates}
            for chunk in trace(self.model, self.tune.tokens, sorted(parts), ()):
                for leave in parts:
                    parts[leave].append(chunk.residual[leave])
            self.residual = {leave: torch.cat(part)[self.tune.judged] for leave, part in parts.items()}
        if confidence not in self.chances:
            self.chances[confidence] = []
            for i, candidate in enumerate(group.candidates):
                scores = self._scores(group, i, confidence, self.residual[candidate.band.leave], None)
                chance = group.truth[confidence][i].chance(scores)
                self.chances[confidence].append(chance)
        return self.chances[confidence]

    def _offsets(self, mine: Sequence[int]) -> Tensor:
        group = self.group
        places = {group.candidates[i].band.leave: place for place, i in enumerate(mine)}
        offsets = torch.zeros(len(mine), len(mine))
        for row, i in enumerate(mine):
            router = group.routers[ROUTER][i]
            if router.history_weight is not None:
                for leave, weight in zip(router.history, router.history_weight[0].tolist(), strict=True):
                    if leave in places:
                        offsets[row, places[leave]] = weight * group.truth[ROUTER][i].slope
        return offsets

    def _measured(self, chosen: Sequence[int], confidence: str, price: float) -> dict[str, Any]:
        """A set of bands at a price per layer saved, in a real pass over the test split."""
        group, candidates = self.group, [self.group.candidates[i] for i in chosen]
        bands = [with_criterion(c.band, self._criterion(i, confidence)) for c, i in zip(candidates, chosen, strict=True)]
        for band in bands:
            if confidence in (TOP, MARGIN):
                band.shortlist = None
        limits = thresholds(candidates, price)
        raw = [group.truth[confidence][i].score(limit) for i, limit in zip(chosen, limits, strict=True)]
        exits = Exits(bands, facts_of(self.model)).with_thresholds(raw)
        of = [candidate.span for candidate in candidates]
        key = {"spans": [list(span) for span in of], "price": price, "thresholds": [str(value) for value in raw]}
        measured = self.test.run(exits, "predict")
        judged = measured.judged
        taken = measured.scored.bands_taken[judged]
        return {
            **key, "agreement": float(measured.agrees[judged].double().mean()),
            "mean_layers": float(measured.scored.layers_run[judged].double().mean()),
            "taken": [float(((taken >> bit) & 1).double().mean()) for bit in range(len(of))],
            "several": float(((taken & (taken - 1)) != 0).double().mean()),
        }  # fmt: skip

    def _write(self, families: Sequence[str]) -> None:
        paths = [self.folder / "bands" / _kept(family, confidence) for confidence in CONFIDENCES for family in families]
        result = {
            "model": "SmolLM2-135M-Instruct", "dtype": "bfloat16", "tokens_sha256": self.corpus.digest,
            "rows": {"fit": int(self.fit.judged.sum()), "tune": int(self.tune.judged.sum()),
                     "test": int(self.test.judged.sum())},
            "bands": [{"span": list(c.span), "agreement": c.agreement, "harm": c.harm, "router": c.router}
                      for c in self.group.candidates],
            "frontier": [json.loads(path.read_text()) for path in paths if path.exists()],
        }  # fmt: skip
        with replacing(self.folder / "band_frontier.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


def _kept(family: str, confidence: str) -> str:
    return f"frontier-{CONFIDENCES.index(confidence)}-{family.replace(' ', '-')}.json"


def _between(best: Sequence[dict[str, Any]], share: float) -> float | None:
    """Mean layers at an agreement, read on the line between the two points of the frontier around it; None below them all."""
    points = sorted((point["agreement"], point["mean_layers"]) for point in best)
    for (low, fewer), (high, more) in itertools.pairwise(points):
        if low <= share <= high:
            return fewer + (more - fewer) * (share - low) / max(high - low, 1e-12)
    return None


def _heads(folder: Path, model: Model, corpus: Any, report: Progress) -> dict[int, TranslatorHead]:
    """The trained translators of `make exit-heads`."""
    if (folder / "bands" / "heads" / "exits.json").exists():
        return {band.leave: band.head for band in Exits.from_pretrained(folder / "bands" / "heads")}  # type: ignore[misc]
    with report.stage("caching the teacher", corpus.count()) as advance:
        cache = TeacherCache.build(model, corpus.pieces, EXITS, folder / "cache", say=report.console.print, advance=advance)
    parts = {name: [i for i, split in enumerate(corpus.split) if split == name] for name in (FIT, TUNE, TEST)}
    batches = {name: Batches(cache, parts[name], 4096, 0, EXITS) for name in parts}
    config = TrainConfig.of({"exits": EXITS, "tokens": TRAIN_ROWS, "lr": 1e-3, **KINDS["translator"]})
    student, _, _ = trained(model, batches, config, folder / "translator", report)
    heads: dict[int, Any] = {int(leave): head.to(model.dtype) for leave, head in student.heads.items()}
    kept = [Band(leave, model.depth, head=head) for leave, head in heads.items()]
    Exits(kept, facts_of(model)).save_pretrained(folder / "bands" / "heads")
    return heads


def _readouts(
    path: Path, model: Model, leaves: Sequence[int], tokens: Sequence[Tensor], report: Progress
) -> dict[int, TranslatorHead]:
    """Ridge readouts at boundaries of bands: what top-1 probability and margin are read from there."""
    heads = {leave: TranslatorHead(model.hidden_size, model.ready_size, None) for leave in leaves}
    if not path.exists():
        parts: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {leave: [] for leave in leaves}
        with report.stage("regressing readouts", sum(len(t) for t in tokens)) as advance:
            for chunk in trace(model, tokens, leaves, (), advance=advance):
                for leave in leaves:
                    stream = chunk.residual[leave]
                    usual = stream.float().norm(dim=1) < 10 * stream.float().norm(dim=1).median()  # no attention sinks
                    parts[leave].append((stream[usual], model.finish(stream[usual]), chunk.ready[usual]))
        for leave in leaves:
            fit_readout(heads[leave], parts.pop(leave))
        with replacing(path) as temporary:
            torch.save({leave: head.state_dict() for leave, head in heads.items()}, temporary)
    for leave, state in torch.load(path, weights_only=True).items():
        heads[leave].load_state_dict(state)
    return {leave: head.to(model.dtype) for leave, head in heads.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
