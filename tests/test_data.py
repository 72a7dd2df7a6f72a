"""What fit learns from: documents, their pieces and openings, and splits that share none."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from dyndepth.data import (
    FIT,
    TEST,
    TUNE,
    Piece,
    collect,
    deal,
    encode,
    openings,
    sections,
    text_pieces,
)
from dyndepth.errors import ArgumentError, NotEnoughDataError


def _pieces(kind: str, documents: int, each: int, length: int) -> list[Piece]:
    return [Piece(torch.full((length,), d), 3, f"{kind} {d}") for d in range(documents) for _ in range(each)]


def test_splits_never_share_a_document_and_are_fixed_by_the_seed() -> None:
    own, text = _pieces("own", 24, 2, 30), _pieces("text", 16, 3, 40)
    data = deal(own, text, 10, seed=1)
    names = {name: {piece.document for piece in data.of(name)} for name in (FIT, TUNE, TEST)}
    assert not names[FIT] & names[TUNE]
    assert not names[FIT] & names[TEST]
    assert not names[TUNE] & names[TEST]
    assert len(set().union(*names.values())) == 40
    assert sum(data.judged(name) for name in names) == 48 * 27 + 48 * 37
    assert all(any(n.startswith(kind) for n in names[name]) for name in names for kind in ("own", "text"))
    again, other = deal(own, text, 10, seed=1), deal(own, text, 10, seed=2)
    assert [p.document for p in again.pieces] == [p.document for p in data.pieces]
    assert [p.document for p in other.pieces] != [p.document for p in data.pieces]


def test_a_texts_continuation_stays_with_the_text() -> None:
    both = [Piece(torch.zeros(60), 3, f"text {d}") for d in range(24)]
    data = deal(both, [Piece(torch.ones(60), 3, p.document) for p in both], 10, seed=0)
    split = {}
    for piece, name in zip(data.pieces, data.split, strict=True):
        assert split.setdefault(piece.document, name) == name


def test_few_texts_are_cut_into_sections_and_many_are_not() -> None:
    book = torch.arange(10_000)
    found = sections([book, book], 256)
    assert sum(part.shape[0] for part in found.values()) == 10_000, "a text given twice counts once"
    assert len(found) >= 12
    assert max(part.shape[0] for part in found.values()) <= 1024
    texts = [torch.arange(i, i + 2000) for i in range(30)]
    assert [part.shape[0] for part in sections(texts, 256).values()] == [2000] * 30


def test_pieces_respect_the_budget() -> None:
    texts = {"a": torch.arange(1000), "b": torch.arange(5), "c": torch.arange(700)}
    found = text_pieces(texts, 900, 256)
    assert 900 <= sum(p.tokens.shape[0] for p in found) <= 902
    assert max(p.tokens.shape[0] for p in found) <= 256
    assert sum(p.tokens.shape[0] for p in text_pieces(texts, 10**6, 256)) == 1705
    assert text_pieces({}, 100, 256) == []
    assert [(name, start[0].item()) for name, start in openings(texts, 256)][:5] == [
        ("a", 0),
        ("b", 0),
        ("c", 0),
        ("a", 256),
        ("c", 256),
    ]


def test_few_texts_are_continued_until_the_share_is_met() -> None:
    """One long text: its pieces' openings are continued, and every split holds generated text."""
    model = tiny_models.shared("llama")
    book = torch.randint(3, tiny_models.VOCABULARY, (16000,))
    data = collect(
        model, [book], None, tokens=8000, own=0.5, new_tokens=24, batch=8, seed=0, width=48, context=1 << 20
    )  # fmt: skip
    mine = [p for p in data.pieces if p.start == 31]  # given text is judged from its sixteenth token
    assert sum(p.tokens.shape[0] for p in mine) >= 3500
    for name in (FIT, TUNE, TEST):
        assert any(p.start == 31 for p in data.of(name))


def test_no_piece_is_longer_than_the_context() -> None:
    data = collect(
        tiny_models.shared("gpt2"), [torch.randint(3, 90, (9000,))], None, tokens=3000, own=0.3, new_tokens=24, batch=8, seed=0,
        width=48, context=128,
    )  # fmt: skip
    assert max(p.tokens.shape[0] for p in data.pieces) == 128


@pytest.mark.parametrize(("pieces", "name"), [((4, 1, 300), "fit"), ((7, 1, 5000), "test"), ((8, 1, 102), "tune")])
def test_too_little_data_is_refused(pieces: tuple[int, int, int], name: str) -> None:
    """The split that lacks rows is named, whichever it is."""
    with pytest.raises(NotEnoughDataError, match=rf"wanted at least \d+ tokens to judge in the {name} split, got \d+ of"):
        deal(_pieces("own", *pieces), [], {"fit": 1000, "test": 10, "tune": 10}[name] if name != "tune" else 10, seed=0)


class Bos:
    """A tokenizer that opens with token 1 and closes with token 2 unless told not to."""

    bos_token, eos_token, eos_token_id = "<s>", "</s>", 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [10 + ord(letter) for letter in text.removeprefix("<s>")]
        opened = [1, *ids] if add_special_tokens or text.startswith("<s>") else ids
        return {"input_ids": [*opened, 2] if add_special_tokens else opened}


def test_strings_open_as_generation_opens_them() -> None:
    for text in ("ab", "<s>ab"):
        assert encode([text], Bos(), special=True)[0].tolist() == [1, 107, 108]
    assert encode(["ab"], Bos())[0].tolist() == [107, 108]
    with pytest.raises(ArgumentError, match=r"texts must be a sequence of strings .* got one str"):
        encode("the quick brown fox", Bos())
