"""`make exit-choices`: what each choice about exits gives, one changed at a time: where they are, what kind of head, how many
rows it learned from, which text, how rows are judged.

Every choice is measured on the same unseen answers of the model: mean layers run where 95 (98) of 100 tokens agree with the
full model, and by how much that differs from the choice beside which it stands, with an interval over answers drawn anew. Past
tokens are exact: `kv_maps.json` has what back-fill costs on top. The folder keeps corpora, teacher cache and runs, and a call
after a kill goes on. Writes `exit_choices.json` there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exit_heads import load_or_collect, trained
from exit_walk import Split, calibrated, judged, stats_of, walk
from kv_maps import prose
from torch import Tensor

from dyndepth.closed_form.progress import Progress
from dyndepth.closed_form.router import fit_router
from dyndepth.data import FIT, TEST, TUNE, Piece, deal, encode, sections, text_pieces
from dyndepth.demo.weights import load_model
from dyndepth.files import replacing
from dyndepth.runtime.bind import Model, bind
from dyndepth.training import TeacherCache, TrainConfig
from dyndepth.training.batches import Batches
from dyndepth.training.run import frequent_answers
from dyndepth.training.student import Student

EXITS = (20, 25)
EVERYWHERE = (15, 18, 20, 22, 23, 25, 27, 28)
PLACEMENTS: tuple[tuple[int, ...], ...] = (
    EXITS, (20,), (22,), (25,), (27,), (28,), (15, 20, 25), (22, 25), (23, 27), (25, 28), (20, 25, 28),
    (20, 23, 25, 27, 28), EVERYWHERE,
)  # fmt: skip
ROWS = 80_000
HEADS: dict[str, dict[str, Any]] = {
    "translator": {"head": "translator"}, "translator, rank 64": {"head": "translator", "rank": 64},
    "mlp": {"head": "mlp"}, "block": {"head": "block"},
}  # fmt: skip
SHOWN = (20_000, 40_000, 80_000, 160_000)
SHARES = (0.98, 0.95)
CORPUS_TOKENS = 300_000
_JUDGED_ROWS, _WORDS, _DRAWS = 16_000, 1024, 2000
#: Disagreement per layer saved: from nobody leaves to everybody does.
_PRICES = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, 160)])


@dataclass
class Curve:
    """One choice on the test split: sums per document at every price, [prices, documents]."""

    right: np.ndarray
    layers: np.ndarray
    judgements: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, depth: int, chance: Mapping[int, Tensor], split: Split) -> Curve:
        _, document = next(iter(split.values()))["document"].unique(return_inverse=True)
        count = int(document.max()) + 1

        def summed(values: Tensor) -> np.ndarray:
            return torch.bincount(document, values.double(), minlength=count).numpy()

        found: list[tuple[np.ndarray, ...]] = []
        for price in _PRICES:
            right, layers = walk(depth, chance, split, float(price))
            asked = torch.stack([layers >= leave for leave in chance]).sum(0)
            found.append((summed(right), summed(layers), summed(asked)))
        agreed, ran, judgements = (np.stack(parts) for parts in zip(*found, strict=True))
        return cls(agreed, ran, judgements, summed(torch.ones(len(document))))

    @property
    def documents(self) -> int:
        return len(self.rows)

    def at(self, share: float, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean layers, mean judgements) [draws] where `share` of the rows agree, documents counted as `weights` [draws,
        documents] says: on the line between the two prices around it, the first time that agreement falls below."""
        rows = weights @ self.rows
        agreement, layers, asked = (weights @ part.T / rows[:, None] for part in (self.right, self.layers, self.judgements))
        below = (agreement < share).argmax(1)
        below[~(agreement < share).any(1)] = len(_PRICES) - 1  # everybody leaves and still enough agree
        draw, above = np.arange(len(weights)), np.maximum(below - 1, 0)
        gap = agreement[draw, above] - agreement[draw, below]
        part = np.clip((agreement[draw, above] - share) / np.where(gap > 0, gap, 1), 0, 1)

        def between(values: np.ndarray) -> np.ndarray:
            found: np.ndarray = values[draw, above] * (1 - part) + values[draw, below] * part
            return found

        return between(layers), between(asked)


def compared(curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """A row per choice; differences are to the first of them, on the same draws of documents."""
    count = next(iter(curves.values())).documents
    draws = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=_DRAWS).astype(np.float64)
    weights = np.concatenate([np.ones((1, count)), draws])
    rows: list[dict[str, Any]] = []
    first: dict[float, np.ndarray] = {}
    for choice, curve in curves.items():
        row: dict[str, Any] = {"choice": choice}
        for share in SHARES:
            layers, asked = curve.at(share, weights)
            base = first.setdefault(share, layers)
            low, high = np.quantile((layers - base)[1:], [0.025, 0.975])
            row[f"{share:.0%}"] = {
                "mean_layers": float(layers[0]), "judgements": float(asked[0]),
                "more": float(layers[0] - base[0]), "more_95": [float(low), float(high)],
            }  # fmt: skip
        rows.append(row)
    return rows


def main(folder: Path, tokens: int) -> None:
    model, tokenizer = load_model()
    bound = bind(model)
    report = Progress(True)
    with torch.no_grad(), report:
        own = load_or_collect(folder, model, tokenizer, report, tokens)
        texts = sections(encode(prose(), tokenizer), 256)
        text = deal([], text_pieces(texts, 1 << 20, 256), bound.hidden_size, 0)
        pieces: list[Piece] = [*own.pieces, *text.pieces]
        with report.stage("caching the teacher", sum(piece.tokens.shape[0] for piece in pieces)) as advance:
            cache = TeacherCache.build(bound, pieces, EVERYWHERE, folder / "cache", say=report.console.print, advance=advance)
        parts = {name: [i for i, split in enumerate(own.split) if split == name] for name in (FIT, TUNE, TEST)}
        prose_parts = list(range(len(own.pieces), len(pieces)))
        learned = {
            "own answers": parts[FIT], "Python's reference": prose_parts,
            "half and half": _half(parts[FIT], prose_parts),
        }  # fmt: skip

        def student_of(name: str, exits: Sequence[int], part: list[int], **settings: Any) -> Student:
            chosen = {key: Batches(cache, of, 4096, 0, exits) for key, of in {**parts, FIT: part}.items()}
            config = TrainConfig.of({"exits": exits, "tokens": ROWS, "lr": 1e-3, **settings})
            return trained(bound, chosen, config, folder / "runs" / name, report)[0]

        measure = Measure(bound, {name: Batches(cache, part, 4096, 0, EVERYWHERE) for name, part in parts.items()})
        groups: dict[str, dict[str, Curve]] = {}

        def keep() -> None:
            _write(folder / "exit_choices.json", own, text, parts, groups)

        everywhere = measure.splits(student_of("everywhere", EVERYWHERE, parts[FIT]))
        groups["exits after"] = {}
        for exits in PLACEMENTS:
            tune, test = ({leave: everywhere[name][leave] for leave in exits} for name in (TUNE, TEST))
            groups["exits after"][", ".join(map(str, exits))] = measure.curve(tune, test)
        keep()
        base = student_of("translator", EXITS, parts[FIT])
        splits = measure.splits(base, routers=True)
        groups["rows are judged by"] = measure.judges(splits)
        keep()
        plain = measure.curve(splits[TUNE], splits[TEST])
        groups["head"] = {"translator": plain}
        for head, settings in list(HEADS.items())[1:]:
            made = measure.splits(student_of(head.replace(", ", "-").replace(" ", "-"), EXITS, parts[FIT], **settings))
            groups["head"][head] = measure.curve(made[TUNE], made[TEST])
            keep()
        groups["rows shown"] = {}
        for rows in (ROWS, *(count for count in SHOWN if count != ROWS)):
            made = splits if rows == ROWS else measure.splits(student_of(f"rows-{rows}", EXITS, parts[FIT], tokens=rows))
            groups["rows shown"][str(rows)] = measure.curve(made[TUNE], made[TEST])
            keep()
        groups["learned from"] = {"own answers": plain}
        for name, part in list(learned.items())[1:]:
            made = measure.splits(student_of(name.replace(" ", "-").replace("'", ""), EXITS, part))
            groups["learned from"][name] = measure.curve(made[TUNE], made[TEST])
            keep()


@dataclass
class Measure:
    """What a student's rows say on the tuning and the test split, and its curve from that."""

    model: Model
    batches: Mapping[str, Batches]

    def splits(self, student: Student, *, routers: bool = False) -> dict[str, dict[int, dict[str, Tensor]]]:
        words = frequent_answers(self.batches[FIT], self.model.vocab_size, _WORDS)
        exits = [int(leave) for leave in student.heads]
        found = {}
        for name in (FIT, TUNE, TEST) if routers else (TUNE, TEST):
            batches = self.batches[name]
            mine = Batches(batches.cache, batches.parts, batches.rows, batches.seed, exits)
            found[name] = judged(self.model, student, mine, words, _JUDGED_ROWS)
        return found

    def curve(self, tune: Split, test: Split, score: Callable[[Split, int], Tensor] | None = None) -> Curve:
        """Of rows judged by `score(split, exit)`, top-1 probability over the whole vocabulary where none is given."""
        of = score or (lambda split, leave: split[leave]["top1"])
        chance = {leave: calibrated(of(tune, leave), tune[leave]["agrees"])(of(test, leave)) for leave in test}
        return Curve.of(self.model.depth, chance, test)

    def judges(self, splits: Mapping[str, Split]) -> dict[str, Curve]:
        """Confidences and routers with more and fewer features, each from the same rows."""
        fit, tune, test = splits[FIT], splits[TUNE], splits[TEST]
        scores: dict[str, Callable[[Split, int], Tensor]] = {
            "top-1 probability": lambda split, leave: split[leave]["top1"],
            "margin": lambda split, leave: split[leave]["margin"],
            f"top-1 probability of {_WORDS} words": lambda split, leave: (
                split[leave]["short"][:, 1] - split[leave]["short"][:, 3]
            ),
        }
        for name, with_stats in (("router: residual", False), (f"router: residual and {_WORDS} words", True)):
            routers = {}
            for leave, rows in fit.items():
                stats = stats_of(rows["short"]) if with_stats else None
                held = torch.arange(len(rows["agrees"])) % 5 == 0
                routers[leave] = fit_router(rows["residual"], rows["agrees"], held, stats)[0]

            def score(split: Split, leave: int, routers: Any = routers, with_stats: bool = with_stats) -> Tensor:
                stats = stats_of(split[leave]["short"]) if with_stats else None
                found: Tensor = routers[leave](split[leave]["residual"].contiguous(), None, stats)
                return found

            scores[name] = score
        return {name: self.curve(tune, test, score) for name, score in scores.items()}


def _half(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """Sequences of both in turn, as long as both last."""
    return [part for pair in zip(one, other, strict=False) for part in pair]


def _write(path: Path, own: Any, text: Any, parts: Mapping[str, Sequence[int]], groups: Mapping[str, Any]) -> None:
    some = next(iter(next(iter(groups.values())).values()))
    result = {
        "model": "SmolLM2-135M-Instruct", "dtype": "bfloat16", "tokens_sha256": own.digest, "rows_shown": ROWS,
        "corpus": {name: own.count(name) for name in (FIT, TUNE, TEST)}, "prose": text.count(),
        "judged_rows": int(some.rows.sum()), "documents": some.documents, "draws": _DRAWS,
        "groups": {name: compared(curves) for name, curves in groups.items() if curves},
    }  # fmt: skip
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=CORPUS_TOKENS, help="of a corpus that is not there yet")
    given = parser.parse_args()
    main(given.folder, given.tokens)
