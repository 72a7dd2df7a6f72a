"""`make band-frontier`: mean layers run at three agreements with full depth, for early exits, for bands, and for both together.

Real passes over unseen answers: decisions, jumps and predicted K,V of skipped layers included, so what one row does to the
next counts. Routers see what a row already skipped; beside them top-1 probability and margin, of the exit's own head or, for
bands that resume, of a ridge readout at their boundary. How true scores are comes from the tuning split, where sets of bands
grow greedily; one price per layer then sets all thresholds of a set. The price of each wanted agreement is found in real passes
over the tuning split, and so is which set runs fewest layers there; the test split is passed once per answer, and says what
agreement was reached and how many layers ran, with intervals over documents.

Takes the corpus from the folder of `make exit-heads` (or makes it there) and what `make jump-maps` trained, if it did; it
resumes, and names of families or confidences after the folder do only those. Writes `band_frontier.json`, and
`exit_scores.npz`: what heads say of the first rows of the test split, which tests of bounds draw from.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from band_heads import keep_scores, translators
from band_maps import Span, first, ridge_bands, ridge_readouts
from by_document import interval
from confidences import CONFIDENCES, MARGIN, ROUTER, TOP, Confidence, readout_stats, shown
from exit_heads import EXITS, SHARES, load_or_collect
from jump_maps import MAP_ROWS
from operating import between, meeting, widened
from torch import Tensor
from truth import Truth

from dyndepth.closed_form.heads import exit_argmax, exit_statistics, frequent, judging_cost
from dyndepth.closed_form.history import Seen, below, see
from dyndepth.closed_form.measure import Sample
from dyndepth.closed_form.progress import Progress
from dyndepth.closed_form.router import fit_router
from dyndepth.closed_form.search import Candidate, expected_price, greedy, probe, thresholds, with_criterion
from dyndepth.closed_form.trace import trace
from dyndepth.data import FIT, TEST, TUNE, Corpus
from dyndepth.demo.weights import load_model
from dyndepth.exits import Band, Exits, Margin, Router, RouterScore, TopProbability, TranslatorHead
from dyndepth.exits.criteria import Criterion
from dyndepth.exits.router import stat_features
from dyndepth.files import replacing
from dyndepth.ops import ExitStats
from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.fingerprint import facts_of

#: Bands that are tried together, one per boundary: of each boundary one that lost least per layer when rows skipped by lot.
BANDS: tuple[Span, ...] = ((5, 15), (8, 13), (10, 20), (13, 18), (15, 20), (18, 23))
FAMILIES = ("exits", "bands", "bands and exits")
#: Routers that do not see what a row skipped: only how well they sort is reported.
BLIND = "router, blind to what was skipped"
_FIT_ROWS, _TUNE_ROWS, _TEST_ROWS, _MAP_AND_JUMP_ROWS, _READOUT_ROWS = 12_000, 5_000, 8_000, 72_000, 15_000
_HEAD_ROWS, _LOOK_ROWS = 75_000, 3_000
_HEAD_ROWS, _LOOK_ROWS = 75_000, 3_000
_FIT_ROUNDS, _TUNE_ROUNDS, _PROBE_ROWS, _MOST, _WORDS = 2, 2, 4000, 4, 1024
#: No price beyond is tried: disagreements per layer saved. Nor more prices of one set and agreement than `_TRIES`.
_PRICE, _TRIES = 0.1, 5


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
        confidences, families = ([name for name in names if name in only] or list(names) for names in (CONFIDENCES, FAMILIES))
        bench = Bench.of(folder, model, bound, tokenizer, report, exits=families != ["bands"])
        bench.run(confidences, families)


@dataclass
class Bench:
    folder: Path
    model: Model
    report: Progress
    corpus: Corpus
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
    def of(cls, folder: Path, causal_lm: Any, model: Model, tokenizer: Any, report: Progress, exits: bool = True) -> Bench:
        corpus = load_or_collect(folder, causal_lm, tokenizer, report)
        trained_by_kl = [Exits.from_pretrained(kept).bands[0] for kept in sorted((folder / "bands").glob("band-*-linear"))]
        mapped = first(corpus.of(FIT), MAP_ROWS)
        wanted = [*BANDS, *((leave, model.depth) for leave in EXITS)]
        bands = ridge_bands(folder / "bands" / "ridge-frontier", model, wanted, mapped, report)
        for leave, head in (cls.heads(folder, model, corpus, report) if exits else {}).items():
            ridge = bands[leave, model.depth]
            bands[leave, model.depth] = Band(leave, model.depth, head=head, kv=ridge.kv)
        with report.stage("answers at full depth", 3) as advance:
            samples = []
            for name, rows, skip in (
                (FIT, _FIT_ROWS, _MAP_AND_JUMP_ROWS if trained_by_kl else MAP_ROWS),
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
        for band in trained_by_kl:  # make jump-maps
            bands[band.leave, band.resume] = band
        trained = [(band.leave, band.resume) for band in trained_by_kl]
        return cls(folder, model, report, corpus, bands, readouts, samples[0], samples[1], samples[2], trained)

    @staticmethod
    def heads(folder: Path, model: Model, corpus: Corpus, report: Progress) -> dict[int, TranslatorHead]:
        """Translators learn from answers that fit neither maps nor routers, and are looked at on the tuning split."""
        learned = first(corpus.of(FIT), _HEAD_ROWS, _MAP_AND_JUMP_ROWS + _FIT_ROWS)
        return translators(folder / "bands", model, learned, first(corpus.of(TUNE), _LOOK_ROWS), report)

    def run(self, confidences: Sequence[str] = CONFIDENCES, families: Sequence[str] = FAMILIES) -> None:
        words = frequent(self.fit.answers[self.fit.judged], _WORDS)
        self.group, self.residual, self.chances = self._group(words, list(families) != ["bands"]), {}, {}
        depth = self.model.depth
        wanted: dict[str, Callable[[Candidate], bool]] = {
            "exits": lambda candidate: candidate.band.resume == depth,
            "bands": lambda candidate: candidate.band.resume < depth,
            "bands and exits": lambda candidate: True,
        }
        for confidence in confidences:
            sets: dict[str, list[int]] = {}  # of exits and of bands alone: both together are tried beside what grows of all
            for family in families:
                mine = [i for i, candidate in enumerate(self.group.candidates) if wanted[family](candidate)]
                kept = self.folder / "bands" / _kept(family, confidence)
                if not kept.exists():
                    together = [i for i in mine if any(i in chosen for chosen in sets.values())] if len(sets) > 1 else []
                    found = self._frontier(family, confidence, mine, together)
                    with replacing(kept) as temporary:
                        temporary.write_text(json.dumps(found))
                widest = json.loads(kept.read_text())["widest"]
                sets[family] = [i for i in mine if list(self.group.candidates[i].span) in widest]
                self._write()

    # -- what rows show at the boundaries ---------------------------------------------------------------------------------

    def _group(self, words: Tensor, exits: bool) -> Group:
        bands = [self.bands[span] for span in sorted([*BANDS, *((leave, self.model.depth) for leave in EXITS)])]
        for band in bands:
            if band.resume == self.model.depth:
                band.shortlist = torch.nn.Parameter(words, requires_grad=False)
        fitted, tuned = self._seen(bands)
        taken = [i for i, band in enumerate(bands) if exits or band.resume < self.model.depth]
        candidates = [
            Candidate(bands[i], {}, judging=judging_cost(self.model, bands[i]) if bands[i].head else 0.0) for i in taken
        ]
        with self.report.stage("skipping by lot", len(candidates)) as advance:
            for candidate in candidates:
                self._odds(candidate)
                advance(1)
        group = Group(candidates, [fitted[i] for i in taken], [tuned[i] for i in taken])
        for sample, seen in ((self.fit, group.fitted), (self.tune, group.tuned)):
            for candidate, part in zip(candidates, seen, strict=True):
                if part.agrees is None:
                    part.agrees = exit_argmax(self.model, candidate.band, part.residual) == sample.answers[part.rows]
        if exits:
            keep_scores(self.folder / "exit_scores.npz", self.model, candidates, self.test)
        self._routers(group)
        for confidence in CONFIDENCES:
            group.truth[confidence] = []
            for i, part in enumerate(group.tuned):
                assert part.agrees is not None
                scores = self._scores(group, i, confidence, part.residual, part.skipped)
                group.truth[confidence].append(Truth.of(scores, part.agrees, confidence == MARGIN))
        return group

    def _seen(self, bands: Sequence[Band]) -> tuple[list[Seen], list[Seen]]:
        """Rows of the fitting and of the tuning split that came by; no head of an exit makes a difference to them."""
        path, facts = self.folder / "bands" / "seen.pt", facts_of(self.model)
        if not path.exists():
            with self.report.stage("labelling rows", _FIT_ROUNDS + _TUNE_ROUNDS) as advance:
                found = [
                    see(bands, sample, facts, rounds=rounds, advance=lambda: advance(1))
                    for sample, rounds in ((self.fit, _FIT_ROUNDS), (self.tune, _TUNE_ROUNDS))
                ]
            with replacing(path) as temporary:
                torch.save([[vars(part) for part in seen] for seen in found], temporary)
        fitted, tuned = ([Seen(**part) for part in seen] for seen in torch.load(path, weights_only=True))
        return fitted, tuned

    def _odds(self, candidate: Candidate) -> None:
        """What skipping a band by lot does, measured once."""
        path = self.folder / "bands" / f"odds-{candidate.band.leave}-{candidate.band.resume}.json"
        if not path.exists():
            probe([candidate], self.fit.head(_PROBE_ROWS), facts_of(self.model), 0.3, lambda: None)
            with replacing(path) as temporary:
                temporary.write_text(json.dumps([candidate.agreement, candidate.harm]))
        candidate.agreement, candidate.harm = json.loads(path.read_text())

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

    def _frontier(self, family: str, confidence: str, mine: Sequence[int], together: list[int]) -> dict[str, Any]:
        """Per wanted agreement the set and price that run fewest layers on the tuning split, and what the test split says.

        `together` is tried beside the set that grows greedily.
        """
        tuned: list[dict[str, Any]] = []
        at: dict[str, dict[str, Any]] = {}
        grown: list[int] = []
        widest: list[int] = []
        with self.report.stage(f"{family}: {confidence}", len(SHARES)) as advance:
            for share in sorted(SHARES):
                grown = self._grown(mine, confidence, share) or grown
                widest = max(widest, grown, key=len)
                best: tuple[dict[str, Any], list[int]] | None = None
                for chosen in [grown, together]:
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
            "between": read, "tuned": tuned, "widest": [list(self.group.candidates[i].span) for i in widest],
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
        key = split, confidence, tuple((group.candidates[i].span, score) for i, score in raw.items())
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

    def _write(self) -> None:
        rows = []
        for confidence in CONFIDENCES:
            paths = [self.folder / "bands" / _kept(family, confidence) for family in FAMILIES]
            found = [json.loads(path.read_text()) for path in paths if path.exists()]
            alone = [row for row in found if row["family"] != FAMILIES[-1]]
            rows += [row if row in alone else widened(row, alone, self.model.depth) for row in found]
        result = {
            "model": "SmolLM2-135M-Instruct", "dtype": "bfloat16", "tokens_sha256": self.corpus.digest,
            "rows": {"fit": int(self.fit.judged.sum()), "tune": int(self.tune.judged.sum()),
                     "test": int(self.test.judged.sum())},
            "documents": {"fit": len(self.fit.tokens), "tune": len(self.tune.tokens), "test": len(self.test.tokens)},
            "trained_maps": [list(span) for span in self.trained],
            "bands": [{"span": list(c.span), "agreement": c.agreement, "harm": c.harm, "router": c.router}
                      for c in self.group.candidates],
            "frontier": rows,
        }  # fmt: skip
        with replacing(self.folder / "band_frontier.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


def _kept(family: str, confidence: str) -> str:
    return f"frontier-{CONFIDENCES.index(confidence)}-{family.replace(' ', '-')}.json"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
