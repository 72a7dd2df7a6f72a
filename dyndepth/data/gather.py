"""From what a caller gives (strings, token ids, a corpus that was collected before) to a corpus for one model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from dyndepth.data.corpus import Corpus, collect, deal
from dyndepth.data.encode import check_ids, encode
from dyndepth.data.pieces import TEXT_PIECE
from dyndepth.runtime.bind import Model, bind


def gather(
    causal_lm: Any,
    texts: Sequence[str | Tensor] | Corpus,
    tokenizer: Any,
    prompts: Sequence[str | Tensor] | None,
    op: str,
    *,
    tokens: int,
    own: float,
    new_tokens: int,
    batch: int,
    seed: int,
    learned: Collection[str] = (),
    advance: Callable[[int], None] = lambda count: None,
) -> Corpus:
    """A corpus of `texts` and continuations of `prompts` (see `collect`), or `texts` itself if it is one; errors name `op`.

    Documents named in `learned` end in no split that tunes or tests.
    """
    bound = bind(causal_lm)
    if isinstance(texts, Corpus):
        check_ids([piece.tokens for piece in texts.pieces], bound.vocab_size, f"{op}: pieces")
        again = any(piece.document in learned for piece, split in zip(texts.pieces, texts.split, strict=True) if split != "fit")
        if not again:
            return texts
        dealt = deal(texts.pieces, [], bound.hidden_size, seed, learned)
        return Corpus(dealt.pieces, dealt.split, texts.sources)
    given, asked = encoded(bound, texts, tokenizer, prompts, op)
    context = bound.positions_limit or getattr(bound.config, "max_position_embeddings", None) or TEXT_PIECE + new_tokens
    return collect(
        causal_lm, given, asked, tokens=tokens, own=own, new_tokens=new_tokens, batch=batch, seed=seed,
        width=bound.hidden_size, context=context, learned=learned, advance=advance,
    )  # fmt: skip


def encoded(
    model: Model, texts: Sequence[str | Tensor], tokenizer: Any, prompts: Sequence[str | Tensor] | None, op: str
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Token ids of texts and prompts, checked against the model's vocabulary."""
    given = encode(texts, tokenizer, f"{op}: texts", special=True)
    asked = None if prompts is None else encode(prompts, tokenizer, f"{op}: prompts", special=True)
    check_ids(given, model.vocab_size, f"{op}: texts")
    check_ids(asked or [], model.vocab_size, f"{op}: prompts")
    return given, asked
