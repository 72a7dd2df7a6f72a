"""`make band-frontier`: mean layers run at three agreements with full depth, for early exits, for bands, and for both together.

Real passes over unseen answers: decisions, jumps and predicted K,V of skipped layers included, so what one row does to the
next counts. Routers see what a row already skipped; beside them top-1 probability and margin, of the exit's own head or, for
bands that resume, of a ridge readout at their boundary. How true scores are comes from the tuning split, where sets of bands
grow greedily; one price per layer then sets all thresholds of a set. The price of each wanted agreement is found in real passes
over the tuning split, and so is which set runs fewest layers there; the test split is passed once per answer, and says what
agreement was reached and how many layers ran, with intervals over documents.

Takes corpus, exits' heads and bands' maps from the folder of `make exit-heads` and `make jump-maps` (and makes what is
missing there); it resumes, and names of confidences after the folder do only those. Writes `band_frontier.json`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from band_maps import Span, first, ridge_bands, ridge_readouts, spans
from by_document import interval
from exit_heads import EXITS, KINDS, SHARES, TRAIN_ROWS, load_or_collect, trained
from jump_maps import MAP_ROWS
from operating import between, meeting
from torch import Tensor
from truth import Truth

from dyndepth.closed_form.heads import exit_argmax, exit_statistics, frequent, judging_cost
from dyndepth.closed_form.history import Seen, below, see
from dyndepth.closed_form.measure import Sample
from dyndepth.closed_form.progress import Progress
from dyndepth.closed_form.router import fit_router
from dyndepth.closed_form.search import Candidate, expected_price, greedy, probe, thresholds, with_criterion
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

#: Bands that are tried together, one per boundary: of each boundary one that lost least per layer when rows skipped by lot.
BANDS: tuple[Span, ...] = ((5, 15), (8, 13), (10, 20), (13, 18), (15, 20), (18, 23))
CONFIDENCES = ("router", "top-1 probability", "margin")
ROUTER, TOP, MARGIN = CONFIDENCES
#: Routers that do not see what a row skipped: only how well they sort is reported.
BLIND = "router, blind to what was skipped"
_FIT_ROWS, _TUNE_ROWS, _TEST_ROWS, _MAP_AND_JUMP_ROWS, _READOUT_ROWS = 12_000, 5_000, 8_000, 72_000, 15_000
_FIT_ROUNDS, _TUNE_ROUNDS, _PROBE_ROWS, _MOST, _WORDS = 2, 2, 4000, 4, 1024
#: No price beyond is tried: disagreements per layer saved. Nor more prices of one set and agreement than `_TRIES`.
_PRICE, _TRIES = 0.1, 5


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
    #: Bands whose maps were trained on from ridge.
    trained: list[Span]
    #: Of the tuning split's judged rows: residuals by boundary, and chances to agree by confidence and band.
    residual: dict[int, Tensor] = field(default_factory=dict)
    chances: dict[str, list[Tensor]] = field(default_factory=dict)
    #: What passes over a split found: bands that are closed by their threshold make no difference.
    passed: dict[Any, dict[str, Any]] = field(default_factory=dict)
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
        readouts = ridge_readouts(folder / "bands" / "readouts.pt", model, [leave for leave, _ in BANDS], seen, report)
        trained_by_kl = []
        for kept in sorted((folder / "bands").glob("band-*-linear")):  # make jump-maps
            band = Exits.from_pretrained(kept).bands[0]
            bands[band.leave, band.resume] = band
            trained_by_kl.append((band.leave, band.resume))
        return cls(folder, model, report, corpus, bands, readouts, samples[0], samples[1], samples[2], trained_by_kl)

    def run(self, only: Sequence[str]) -> None:
        words = frequent(self.fit.answers[self.fit.judged], _WORDS)
        self.group = self._group(words)
        families: dict[str, Callable[[Span], bool]] = {
            "exits": lambda span: span[1] == self.model.depth,
            "bands": lambda span: span[1] < self.model.depth,
            "bands and exits": lambda span: True,
        }
        for confidence in only or CONFIDENCES:
            sets: dict[str, list[int]] = {}  # of exits and of bands alone: both together are tried beside what grows of all
            for family, wanted in families.items():
                mine = [i for i, candidate in enumerate(self.group.candidates) if wanted(candidate.span)]
                kept = self.folder / "bands" / _kept(family, confidence)
                if not kept.exists():
                    found = self._frontier(family, confidence, mine, sets)
                    with replacing(kept) as temporary:
                        temporary.write_text(json.dumps(found))
                sets[family] = json.loads(kept.read_text())["widest"]
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
        for confidence in CONFIDENCES:
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
        if confidence == ROUTER:
            router = group.routers[ROUTER][i]
            return router(residual, None, self._stats(band, residual), skipped if router.history else None)
        head = self.readouts[band.leave] if band.resume < self.model.depth else band.head
        assert isinstance(head, TranslatorHead)
        return shown(readout_stats(self.model, head.to(self.model.dtype), residual), confidence)

    def _criterion(self, i: int, confidence: str) -> Criterion:
        group = self.group
        band = group.candidates[i].band
        if confidence == ROUTER:
            return RouterScore(group.routers[ROUTER][i])
        if band.resume == self.model.depth:
            return TopProbability() if confidence == TOP else Margin()
        return Confidence(self.model, self.readouts[band.leave].to(self.model.dtype), confidence)

    # -- sets, thresholds, points -----------------------------------------------------------------------------------------

    def _frontier(self, family: str, confidence: str, mine: Sequence[int], others: dict[str, list[int]]) -> dict[str, Any]:
        """Per wanted agreement the set and price that run fewest layers on the tuning split, and what the test split says."""
        tuned: list[dict[str, Any]] = []
        at: dict[str, dict[str, Any]] = {}
        grown: list[int] = []
        widest: list[int] = []
        together = sorted({i for chosen in others.values() for i in chosen})
        with self.report.stage(f"{family}: {confidence}", len(SHARES)) as advance:
            for share in sorted(SHARES):
                grown = self._grown(mine, confidence, share) or grown
                widest = max(widest, grown, key=len)
                best: tuple[dict[str, Any], list[int]] | None = None
                for chosen in [grown, together] if grown != together else [grown]:
                    if not chosen:
                        continue
                    opens = min(c.harm / c.saved for c in (self.group.candidates[i] for i in chosen))
                    guess = max(self._expected(chosen, confidence, share), 1.1 * opens)
                    tried, met = meeting(
                        lambda price, chosen=chosen: self._passed("tune", chosen, confidence, price),  # type: ignore[misc]
                        share, opens, guess, _PRICE, _TRIES,
                    )  # fmt: skip
                    tuned += [{"wanted": share, **point} for point in tried]
                    if met is not None and (best is None or met["mean_layers"] < best[0]["mean_layers"]):
                        best = met, chosen
                found = self._closed() if best is None else self._passed("test", best[1], confidence, best[0]["price"])
                found |= {} if best is None else {"tuned": {key: best[0][key] for key in ("agreement", "mean_layers")}}
                at[f"{share:.0%}"] = found
                advance(1)
        points = [self._closed(), *at.values()]
        read = {f"{share:.0%}": between(points, share) for share in SHARES}
        return {
            "family": family, "confidence": confidence, "at": {f"{share:.0%}": at[f"{share:.0%}"] for share in SHARES},
            "between": read, "tuned": tuned, "widest": widest,
        }  # fmt: skip

    def _grown(self, mine: Sequence[int], confidence: str, share: float) -> list[int]:
        """The set that grows greedily for an agreement, as the tuning split expects it; empty where nothing is expected."""
        candidates, chances = [self.group.candidates[i] for i in mine], [self._chances(confidence)[i] for i in mine]
        grown = greedy(candidates, chances, share, _MOST, self._offsets(mine) if confidence == ROUTER else None)
        return [mine[i] for i in grown[-1][1]] if grown else []

    def _expected(self, chosen: Sequence[int], confidence: str, share: float) -> float:
        """The price at which the tuning split's scores expect an agreement."""
        candidates, chances = [self.group.candidates[i] for i in chosen], [self._chances(confidence)[i] for i in chosen]
        return expected_price(candidates, chances, 1 - share, self._offsets(chosen) if confidence == ROUTER else None)[0]

    def _closed(self) -> dict[str, Any]:
        return {"spans": [], "agreement": 1.0, "mean_layers": float(self.model.depth), "taken": [], "several": 0.0}

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

    def _passed(self, split: str, chosen: Sequence[int], confidence: str, price: float) -> dict[str, Any]:
        """A set of bands at a price per layer saved, in a real pass over a split."""
        group = self.group
        limits = thresholds([group.candidates[i] for i in chosen], price)
        raw = {i: group.truth[confidence][i].score(limit) for i, limit in zip(chosen, limits, strict=True)}
        raw = {i: score for i, score in raw.items() if score < math.inf}
        if not raw:
            return {**self._closed(), "price": price, "thresholds": []}
        key = split, confidence, tuple(raw.items())
        if key not in self.passed:
            self.passed[key] = self._pass(self.tune if split == "tune" else self.test, raw, confidence)
        return {**self.passed[key], "price": price}

    def _pass(self, sample: Sample, raw: dict[int, float], confidence: str) -> dict[str, Any]:
        candidates = [self.group.candidates[i] for i in raw]
        bands = [with_criterion(c.band, self._criterion(i, confidence)) for c, i in zip(candidates, raw, strict=True)]
        for band in bands:
            if confidence in (TOP, MARGIN):
                band.shortlist = None
        measured = sample.run(Exits(bands, facts_of(self.model)).with_thresholds(list(raw.values())), "predict")
        judged = measured.judged
        agrees, layers = measured.agrees[judged], measured.scored.layers_run[judged]
        document = torch.repeat_interleave(torch.tensor([t.shape[0] for t in sample.tokens]))[judged]
        taken = measured.scored.bands_taken[judged]
        return {
            "spans": [list(c.span) for c in candidates], "thresholds": [str(value) for value in raw.values()],
            "agreement": float(agrees.double().mean()), "agreement_95": interval(agrees, document),
            "mean_layers": float(layers.double().mean()), "mean_layers_95": interval(layers, document),
            "taken": [float(((taken >> bit) & 1).double().mean()) for bit in range(len(candidates))],
            "several": float(((taken & (taken - 1)) != 0).double().mean()),
        }  # fmt: skip

    def _write(self, families: Sequence[str]) -> None:
        paths = [self.folder / "bands" / _kept(family, confidence) for confidence in CONFIDENCES for family in families]
        result = {
            "model": "SmolLM2-135M-Instruct", "dtype": "bfloat16", "tokens_sha256": self.corpus.digest,
            "rows": {"fit": int(self.fit.judged.sum()), "tune": int(self.tune.judged.sum()),
                     "test": int(self.test.judged.sum())},
            "documents": {"fit": len(self.fit.tokens), "tune": len(self.tune.tokens), "test": len(self.test.tokens)},
            "trained_maps": [list(span) for span in self.trained],
            "bands": [{"span": list(c.span), "agreement": c.agreement, "harm": c.harm, "router": c.router}
                      for c in self.group.candidates],
            "frontier": [json.loads(path.read_text()) for path in paths if path.exists()],
        }  # fmt: skip
        with replacing(self.folder / "band_frontier.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


def _kept(family: str, confidence: str) -> str:
    return f"frontier-{CONFIDENCES.index(confidence)}-{family.replace(' ', '-')}.json"


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


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
