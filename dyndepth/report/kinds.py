"""Kinds of tokens: what depth is looked at by."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

KINDS = ("word start", "word continuation", "number", "punctuation", "whitespace/newline", "special", "other")

#: Inside words: don't, co-operate.
_JOINING = str.maketrans("", "", "'’-")


def kind(text: str, special: bool = False) -> str:
    """One of KINDS for a token's decoded text; `special` tokens are known by their id, not by their text.

    A word starts with white space before its letters, as byte-pair vocabularies spell it; the first word of a line has none
    and counts as a continuation. Numbers may bring their punctuation and currency ("3.", " $5"). Signs are punctuation;
    emoji, part of a character and letters mixed with digits are `other`.
    """
    if special:
        return "special"
    if text.isspace():
        return "whitespace/newline"
    body = text.strip()
    letters = {unicodedata.category(sign)[0] for sign in body.translate(_JOINING)}
    if "L" in letters and letters <= {"L", "M"}:
        return "word start" if text[0].isspace() else "word continuation"
    classes = {unicodedata.category(sign) for sign in body}
    signs = {name for name in classes if name[0] == "P" or name in ("Sm", "Sc", "Sk")}
    if classes != signs and classes - signs <= {"Nd", "Nl", "No"}:
        return "number"
    return "punctuation" if classes and classes == signs else "other"


def kinds_of(tokenizer: Any, tokens: Iterable[int]) -> dict[int, str]:
    """The kind of every token id; `other` for all of them without a tokenizer."""
    if tokenizer is None:
        return dict.fromkeys(tokens, "other")
    special = set(getattr(tokenizer, "all_special_ids", ()))
    return {token: kind(_spelled(tokenizer, token), token in special) for token in set(tokens)}


def _spelled(tokenizer: Any, token: int) -> str:
    """The token's text. SentencePiece tokenizers drop the space of the first token they decode: its piece still has it."""
    text = str(tokenizer.decode([token]))
    pieces = getattr(tokenizer, "convert_ids_to_tokens", None)
    if pieces is not None and not text[:1].isspace() and str(pieces(token)).startswith("▁"):
        return " " + text
    return text
