"""A corpus: pieces of text and of the model's own continuations, dealt over splits that share no document."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dyndepth.data.encode import document
from dyndepth.data.own import continuations
from dyndepth.data.pieces import TEXT_PIECE, Piece, openings, sections, text_pieces
from dyndepth.errors import CacheError, NotEnoughDataError
from dyndepth.files import replacing

#: Of every eight documents six fit maps and routers, one tunes thresholds, one reports.
FIT, TUNE, TEST = "fit", "tune", "test"
_SPLIT = (FIT, FIT, FIT, TUNE, FIT, FIT, FIT, TEST)
#: Judged rows without which a split's agreement says nothing: its standard error at 95 % is two points.
_JUDGED = 100


@dataclass(frozen=True)
class Corpus:
    """Pieces in the order they are used, dealt over the splits."""

    pieces: list[Piece]
    split: list[str]
    #: Names of the whole texts and prompts it was taken from, sections and pieces left out or not.
    sources: list[str] = field(default_factory=list)

    @property
    def documents(self) -> list[str]:
        """Names of everything in it and of what that was taken from, sorted: what a certificate must not be drawn from."""
        return sorted({*self.sources, *(piece.document for piece in self.pieces)})

    def of(self, name: str) -> list[Piece]:
        return [piece for piece, split in zip(self.pieces, self.split, strict=True) if split == name]

    def part(self, name: str) -> tuple[list[Tensor], list[int]]:
        """(tokens, start) of a split."""
        chosen = self.of(name)
        return [piece.tokens for piece in chosen], [piece.start for piece in chosen]

    def count(self, name: str | None = None) -> int:
        """Tokens of a split, or of all."""
        return sum(piece.tokens.shape[0] for piece in (self.pieces if name is None else self.of(name)))

    def judged(self, name: str) -> int:
        return sum(piece.judged for piece in self.of(name))

    def save(self, path: Path, asked: str = "") -> None:
        """Write to a safetensors file, in full or not at all. `asked` says what it was collected for."""
        tensors = {
            "tokens": torch.cat([piece.tokens for piece in self.pieces]).int(),
            "lengths": torch.tensor([piece.tokens.shape[0] for piece in self.pieces], dtype=torch.int32),
            "start": torch.tensor([piece.start for piece in self.pieces], dtype=torch.int32),
        }
        about = {
            "documents": [piece.document for piece in self.pieces],
            "split": self.split,
            "sources": self.sources,
            "asked": asked,
        }
        with replacing(path) as temporary:  # one entry of metadata: several would be written in any order
            save_file(tensors, temporary, metadata={"corpus": json.dumps(about)})

    @classmethod
    def load(cls, path: Path, asked: str | None = None) -> Corpus:
        """What `save` wrote; CacheError if it is something else, or was collected for something other than `asked`."""
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["corpus"])
                tokens, lengths, start = (file.get_tensor(name) for name in ("tokens", "lengths", "start"))
            parts = tokens.long().split(lengths.tolist())
            pieces = [Piece(*entry) for entry in zip(parts, start.tolist(), about["documents"], strict=True)]
            found = cls(pieces, about["split"], about["sources"])
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise CacheError(f"corpus: {path} is damaged ({error}); remove it to collect anew") from error
        if asked is not None and about["asked"] != asked:
            raise CacheError(
                f"corpus: {path} was collected from other texts, prompts or settings, or by another model; choose another "
                "folder or remove it"
            )
        return found

    @property
    def digest(self) -> str:
        """SHA-256 of all token ids in order."""
        whole = hashlib.sha256()
        for piece in self.pieces:
            whole.update(piece.tokens.numpy().tobytes())
        return whole.hexdigest()


def collect(
    causal_lm: Any,
    texts: Sequence[Tensor],
    prompts: Sequence[Tensor] | None,
    *,
    tokens: int,
    own: float,
    new_tokens: int,
    batch: int,
    seed: int,
    width: int,
    context: int,
    learned: Collection[str] = (),
    advance: Callable[[int], None] = lambda count: None,
) -> Corpus:
    """`tokens` tokens for a fit: `own` of them continuations with their prompts, the rest given text.

    A prompt is a document; without prompts, texts are continued from the openings of their pieces. Nothing is longer than
    `context` positions. Documents named in `learned` are kept out of the splits that tune and test.
    """
    piece = min(TEXT_PIECE, context)
    documents = sections(texts, piece)
    wanted = round(tokens * own)
    starts = openings(documents, piece) if prompts is None else [(document(p), p) for p in prompts if p.shape[0]]
    starts = list({(name, document(prompt)): (name, prompt) for name, prompt in starts}.values())  # none twice
    fitting = [(name, prompt) for name, prompt in starts if prompt.shape[0] + new_tokens <= context]
    if wanted and prompts and starts and not fitting:  # openings of texts are ours to drop; prompts were asked for
        raise NotEnoughDataError(
            f"corpus: none of {len(starts)} prompts leaves room for {new_tokens} new tokens in a context of {context}; wanted "
            "shorter prompts or fewer new tokens"
        )
    starts = fitting
    mine: list[Piece] = []
    if wanted and starts:
        made, begun = continuations(causal_lm, [prompt for _, prompt in starts], wanted, new_tokens, batch, advance)
        mine = [Piece(text, begin, name) for text, begin, (name, _) in zip(made, begun, starts, strict=False)]
    text = text_pieces(documents, tokens - sum(p.tokens.shape[0] for p in mine), piece)
    whole = sorted({document(source) for source in [*texts, *(prompts or [])]})
    return dataclasses.replace(deal(mine, text, width, seed, learned), sources=whole)


def deal(own: Sequence[Piece], text: Sequence[Piece], width: int, seed: int, learned: Collection[str] = ()) -> Corpus:
    """Shuffle documents (of continuations, then those of text alone) and deal them; refuse what cannot carry the estimates.

    Documents named in `learned` were learned from before and go to the fit split; the others fill the tuning and the test
    split first.
    """
    generator = torch.Generator().manual_seed(seed)
    place: dict[str, str] = {}
    order: list[str] = []
    for part in (own, text):
        names = [name for name in dict.fromkeys(piece.document for piece in part) if name not in place]
        shuffled = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
        wanted = [_SPLIT[i % len(_SPLIT)] for i in range(len(names))]
        if any(name in learned for name in names):
            shuffled.sort(key=lambda name: name in learned)
            wanted.sort(key=lambda split: split == FIT)  # stable: tune and test in turn, then what fits
        for name, split in zip(shuffled, wanted, strict=True):
            place[name] = FIT if name in learned else split
            order.append(name)
    rank = {name: number for number, name in enumerate(order)}
    pieces = sorted([*own, *text], key=lambda piece: rank[piece.document])
    result = Corpus(pieces, [place[piece.document] for piece in pieces])
    # Below a few rows per weight of one column the regression only memorises; 4 is where held-out error starts to fall.
    for name, least in ((FIT, max(256, 4 * width)), (TUNE, _JUDGED), (TEST, _JUDGED)):
        if result.judged(name) < least:
            raise NotEnoughDataError(
                f"corpus: wanted at least {least} tokens to judge in the {name} split, got {result.judged(name)} of "
                f"{result.count()} tokens in {len(order)} documents; give more texts or prompts, or ask for more tokens"
            )
    return result
