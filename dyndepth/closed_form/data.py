"""Token sequences to learn from: given text, and the model's own continuations (what it will decode)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.runtime.entry import generate
from dyndepth.runtime.session import Work

#: Tokens per sequence of given text; longer texts are cut into pieces of this length.
TEXT_PIECE = 256
#: Tokens of a text that a continuation starts from when no prompts are given.
_OPENING = 32
#: Fewer texts than this are cut into sections that count as documents of their own.
_DOCUMENTS = 24
#: Of every eight documents six fit maps and routers, one tunes thresholds, one reports.
FIT, TUNE, TEST = "fit", "tune", "test"
_SPLIT = (FIT, FIT, FIT, TUNE, FIT, FIT, FIT, TEST)
#: Judged rows without which a split's agreement says nothing: its standard error at 95 % is two points.
_JUDGED = 100


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


@dataclass(frozen=True)
class Corpus:
    """Pieces in the order they are used, dealt over the splits."""

    pieces: list[Piece]
    split: list[str]

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


def encode(texts: Sequence[str | Tensor], tokenizer: Any, name: str = "texts", *, special: bool = False) -> list[Tensor]:
    """Strings to int64 [t]; tensors pass through.

    `special` adds the tokenizer's special tokens (BOS) to strings that do not bring it, as generation's callers do.
    """
    if isinstance(texts, str | Tensor):
        raise ArgumentError(f"{name} must be a sequence of strings or int64 [t] tensors, got one {type(texts).__name__}")
    encoded = []
    for number, text in enumerate(texts):
        if isinstance(text, Tensor):
            if text.dim() != 1 or text.is_floating_point():
                raise ArgumentError(f"{name}[{number}] must be a string or int64 [t], got {text.dtype} {list(text.shape)}")
            encoded.append(text.long().cpu())
            continue
        if tokenizer is None:
            raise ArgumentError(f"{name}[{number}] is a string, so a tokenizer is needed")
        begins = getattr(tokenizer, "bos_token", None)
        ids = tokenizer(text, add_special_tokens=special and not (begins and text.startswith(begins)))["input_ids"]
        end = getattr(tokenizer, "eos_token_id", None)
        if special and len(ids) > 1 and ids[-1] == end and not text.endswith(str(getattr(tokenizer, "eos_token", None))):
            ids = ids[:-1]  # some tokenizers close what they are given; a prompt must stay open
        encoded.append(torch.tensor(ids, dtype=torch.int64))
    return encoded


def document(tokens: Tensor) -> str:
    """Name of a text: sixteen digits of the SHA-256 of its token ids."""
    return hashlib.sha256(tokens.long().cpu().numpy().tobytes()).hexdigest()[:16]


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


def continuations(
    causal_lm: Any,
    prompts: Sequence[Tensor],
    budget: int,
    new_tokens: int,
    batch: int,
    advance: Callable[[int], None],
    works: list[Work] | None = None,
    **options: Any,
) -> tuple[list[Tensor], list[int]]:
    """Greedy continuations of `prompts` until `budget` tokens (prompts included) are there; up to and with an EOS token.

    At full depth unless `options` (of dyndepth.generate) say otherwise. Each batch's work goes to `works`.
    """
    config = causal_lm.generation_config
    eos = config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    pad = config.pad_token_id if config.pad_token_id is not None else next(iter(ends), 0)
    tokens: list[Tensor] = []
    start: list[int] = []
    total = 0
    for begin in range(0, len(prompts), batch):
        group = prompts[begin : begin + batch]
        group = group[: max(1, -(-(budget - total) // new_tokens))]
        width = max(prompt.shape[0] for prompt in group)
        ids = torch.stack([torch.nn.functional.pad(p, (width - p.shape[0], 0), value=pad) for p in group])
        mask = torch.stack([(torch.arange(width) >= width - p.shape[0]).long() for p in group])
        out = causal_lm.generate(
            input_ids=ids.to(causal_lm.device), attention_mask=mask.to(causal_lm.device), custom_generate=generate,
            max_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=pad, return_dict_in_generate=True, **options,
        )  # fmt: skip
        if works is not None:
            works.append(out.work)
        sequences = out.sequences.cpu()
        for row, prompt in enumerate(group):
            made = sequences[row, width:]
            stops = [i for i, token in enumerate(made.tolist()) if token in ends]
            made = made[: stops[0] + 1] if stops else made
            tokens.append(torch.cat([prompt, made]))
            start.append(prompt.shape[0] - 1)
            total += tokens[-1].shape[0]
            advance(tokens[-1].shape[0])
        if total >= budget:
            break
    return tokens, start


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
    advance: Callable[[int], None] = lambda count: None,
) -> Corpus:
    """`tokens` tokens for a fit: `own` of them continuations with their prompts, the rest given text.

    A prompt is a document; without prompts, texts are continued from the openings of their pieces. Nothing is longer than
    `context` positions.
    """
    piece = min(TEXT_PIECE, context)
    documents = sections(texts, piece)
    wanted = round(tokens * own)
    starts = openings(documents, piece) if prompts is None else [(document(p), p) for p in prompts if p.shape[0]]
    starts = list({(name, document(prompt)): (name, prompt) for name, prompt in starts}.values())  # none twice
    starts = [(name, prompt) for name, prompt in starts if prompt.shape[0] + new_tokens <= context]
    mine: list[Piece] = []
    if wanted and starts:
        made, begun = continuations(causal_lm, [prompt for _, prompt in starts], wanted, new_tokens, batch, advance)
        mine = [Piece(text, begin, name) for text, begin, (name, _) in zip(made, begun, starts, strict=False)]
    return deal(mine, text_pieces(documents, tokens - sum(p.tokens.shape[0] for p in mine), piece), width, seed)


def deal(own: Sequence[Piece], text: Sequence[Piece], width: int, seed: int) -> Corpus:
    """Shuffle documents (of continuations, then those of text alone) and deal them; refuse what cannot carry the estimates."""
    generator = torch.Generator().manual_seed(seed)
    place: dict[str, str] = {}
    order: list[str] = []
    for part in (own, text):
        names = [name for name in dict.fromkeys(piece.document for piece in part) if name not in place]
        for dealt, i in enumerate(torch.randperm(len(names), generator=generator).tolist()):
            place[names[i]] = _SPLIT[dealt % len(_SPLIT)]
            order.append(names[i])
    rank = {name: number for number, name in enumerate(order)}
    pieces = sorted([*own, *text], key=lambda piece: rank[piece.document])
    result = Corpus(pieces, [place[piece.document] for piece in pieces])
    # Below a few rows per weight of one column the regression only memorises; 4 is where held-out error starts to fall.
    for name, wanted in ((FIT, max(256, 4 * width)), (TUNE, _JUDGED), (TEST, _JUDGED)):
        if result.judged(name) < wanted:
            raise NotEnoughDataError(
                f"fit: wanted at least {wanted} tokens to judge in the {name} split, got {result.judged(name)} of "
                f"{result.count()} tokens in {len(order)} documents; give more texts or prompts, or ask for more tokens"
            )
    return result
