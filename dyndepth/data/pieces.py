"""Pieces of documents: what fits, trains and measures runs over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dyndepth.data.encode import document

#: Tokens per sequence of given text; longer texts are cut into pieces of this length.
TEXT_PIECE = 256
#: Tokens of a text that a continuation starts from when no prompts are given.
_OPENING = 32
#: Fewer texts than this are cut into sections that count as documents of their own.
_DOCUMENTS = 24


@dataclass(frozen=True)
class Piece:
    """A sequence to learn from; `start` is the first position that generation would judge."""

    tokens: Tensor  # int64 [t], on the CPU
    start: int
    #: What it was taken from: pieces of one document are never in different splits.
    document: str

    @property
    def judged(self) -> int:
        return self.tokens.shape[0] - self.start


def sections(texts: Sequence[Tensor], piece: int) -> dict[str, Tensor]:
    """Documents by name, duplicates once: the texts, or consecutive sections of them when the texts are few."""
    length = max((text.shape[0] for text in texts), default=0) + 1
    if len(texts) < _DOCUMENTS:
        length = max(piece, min(4 * piece, sum(text.shape[0] for text in texts) // _DOCUMENTS))
    parts = [part for text in texts for part in text.split(length) if part.shape[0] >= 2]
    return {document(part): part for part in parts}


def text_pieces(documents: dict[str, Tensor], budget: int, piece: int) -> list[Piece]:
    """Pieces of at most `piece` tokens, taken round-robin over the documents until `budget` tokens are there."""
    queues = [(name, list(text.split(piece))) for name, text in documents.items()]
    chosen: list[Piece] = []
    total = 0
    while total < budget and any(queue for _, queue in queues):
        for name, queue in queues:
            if queue and total < budget:
                tokens = queue.pop(0)[: max(2, budget - total)]
                if tokens.shape[0] >= 2:
                    chosen.append(Piece(tokens, min(16, tokens.shape[0] - 1), name))
                    total += tokens.shape[0]
    return chosen


def openings(documents: dict[str, Tensor], piece: int) -> list[tuple[str, Tensor]]:
    """(document, first tokens of a piece) to continue, every document before a document comes again."""
    queues = [(name, [part[:_OPENING] for part in text.split(piece) if part.shape[0] >= 2]) for name, text in documents.items()]
    found: list[tuple[str, Tensor]] = []
    for turn in range(max((len(queue) for _, queue in queues), default=0)):
        found += [(name, queue[turn]) for name, queue in queues if turn < len(queue)]
    return found
