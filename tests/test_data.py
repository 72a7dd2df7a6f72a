"""What fit learns from: documents, their pieces and openings, splits that share none, prompts the model writes itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch

from dyndepth.data import (
    FIT,
    TEST,
    TUNE,
    Corpus,
    Piece,
    collect,
    deal,
    document,
    encode,
    openings,
    own_prompts,
    sections,
    text_pieces,
)
from dyndepth.errors import ArgumentError, CacheError, NotEnoughDataError


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


class Chat:
    """A tokenizer of letters with a chat template: `<message>|`, and `|` asks for the answer."""

    chat_template: str | None = "{before}{message}{after}"

    def __init__(self, before: str = "[<", after: str = ">|") -> None:
        self.before, self.after = before, after

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens, "the template brings its own"
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        (message,) = messages
        assert message["role"] == "user"
        return self.before + message["content"] + self.after


class Scripted:
    """A model that says what it is told to, round by round."""

    device = torch.device("cpu")

    def __init__(self, *rounds: list[str]) -> None:
        self.rounds, self.asked = list(rounds), list[dict[str, Any]]()
        self.generation_config = SimpleNamespace(eos_token_id=[ord("."), ord(">")])

    def generate(self, **options: Any) -> torch.Tensor:
        self.asked.append(options)
        said = self.rounds.pop(0) if self.rounds else ["" for _ in options["input_ids"]]
        made = [[ord(letter) for letter in text.ljust(8, ">")[:8]] for text in said]
        return torch.cat([options["input_ids"], torch.tensor(made)], dim=1)


def _shown(prompts: list[torch.Tensor]) -> list[str]:
    return ["".join(map(chr, prompt.tolist())) for prompt in prompts]


def test_own_prompts_are_what_the_model_ended_itself() -> None:
    """Too short, unended, ended by another token than the template's, and repeated messages are left out."""
    model = Scripted(["abcd>", "abc>", "abcdefgh", "abcde.>>", "abcd>xy>"], ["efghi>", "abcd>", "jklmnop>", "qrst>", "uvwx>"])
    told: list[int] = []
    made = own_prompts(model, Chat(), 3, new_tokens=8, batch=5, temperature=0.5, top_p=0.75, advance=told.append)
    assert _shown(made) == ["[<abcd>|", "[<efghi>|", "[<jklmnop>|"]
    assert all(prompt.dtype == torch.int64 for prompt in made)
    assert told == [1, 2]
    asked = model.asked[0]
    assert _shown(list(asked["input_ids"])) == ["[<"] * 5
    assert asked["attention_mask"].tolist() == [[1, 1]] * 5
    assert asked["eos_token_id"] == [ord("."), ord(">")]
    assert (asked["temperature"], asked["top_p"], asked["top_k"], asked["max_new_tokens"]) == (0.5, 0.75, 0, 8)


def test_own_prompts_end_in_reason() -> None:
    """512 samples in a row that brought nothing; one new message among them starts the count anew."""
    model = Scripted(["abcd>"] * 200, ["abc>"] * 150 + ["abcdefgh"] * 50, ["abcd>"] * 200, ["efgh>"] * 200)
    told = (
        r"own_prompts: wanted 3 prompts, got 2: of 1400 sampled 50 did not end within 8 tokens, 750 had fewer than 4, "
        r"598 were there already, and the last 600 brought nothing new"
    )
    with pytest.raises(NotEnoughDataError, match=f"^{told}$"):
        own_prompts(model, Chat(), 3, new_tokens=8, batch=200)
    assert len(model.asked) == 7


def test_own_prompts_are_fixed_by_the_seed_and_leave_torchs_alone() -> None:
    model = tiny_models.shared("llama")
    options: dict[str, Any] = {"new_tokens": 24, "batch": 64, "temperature": 3.0, "top_p": 1.0}
    state = torch.get_rng_state()
    made = own_prompts(model, Chat(), 12, seed=1, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again, more = own_prompts(model, Chat(), 12, seed=1, **options), own_prompts(model, Chat(), 20, seed=1, **options)
    assert _shown(again) == _shown(made)
    assert _shown(more)[:12] == _shown(made), "the first of a larger count are the same"
    shown = _shown(more)
    assert len(set(shown)) == 20
    assert not set(shown) & set(_shown(own_prompts(model, Chat(), 20, seed=2, **options)))
    for text in shown:
        message = text.removeprefix("[<").removesuffix(">|")
        assert 4 <= len(message) < 24
        assert len(text) == len(message) + 4
        assert ">" not in message
        assert "\x02" not in message, "the model's own EOS ends a message that is not the template's"


def test_own_prompts_of_a_model_that_repeats_itself() -> None:
    """Near greedy, every sample is the same."""
    model = tiny_models.shared("llama")
    ids = torch.tensor([[ord("["), ord("<")]])
    greedy = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
    closing = chr(int(greedy[0, -1]))
    assert closing not in map(chr, greedy[0, 2:-1].tolist())
    options: dict[str, Any] = {"new_tokens": 8, "batch": 256, "temperature": 1e-3}
    assert _shown(own_prompts(model, Chat(after=closing), 1, **options)) == _shown(list(greedy))
    with pytest.raises(NotEnoughDataError, match=r"got 1: of 768 sampled 0 did not end .* 767 were there already"):
        own_prompts(model, Chat(after=closing), 2, **options)


def test_a_blank_before_the_message_is_left_to_the_message() -> None:
    assert _shown(own_prompts(Scripted(["abcd>"]), Chat(before="[ "), 1, new_tokens=8, batch=1)) == ["[abcd>|"]


@pytest.mark.parametrize(("before", "after"), [("", ">"), (" ", ">"), ("<", ""), ("<", ">QXQmessageQXQ>")])
def test_templates_without_two_sides_are_refused(before: str, after: str) -> None:
    with pytest.raises(ArgumentError, match=r"own_prompts: the chat template must have text before and after a user's message"):
        own_prompts(Scripted(), Chat(before, after), 1)


def test_own_prompts_refuse_wrong_arguments() -> None:
    plain = Chat()
    plain.chat_template = None
    with pytest.raises(ArgumentError, match="own_prompts: tokenizer must have a chat template, got none"):
        own_prompts(Scripted(), plain, 1)
    with pytest.raises(ArgumentError, match="own_prompts: tokenizer must have a chat template, got none"):
        own_prompts(Scripted(), None, 1)
    for name, least in (("count", 1), ("new_tokens", 5), ("batch", 1)):
        with pytest.raises(ArgumentError, match=rf"own_prompts: {name} must be at least {least}, got {least - 1}"):
            own_prompts(Scripted(), Chat(), **({"count": 1} | {name: least - 1}))


def test_documents_that_were_learned_from_neither_tune_nor_test() -> None:
    pieces = _pieces("own", 40, 2, 200)
    before = deal(pieces, [], 8, 0)
    learned = {piece.document for piece, split in zip(before.pieces, before.split, strict=True) if split == FIT}
    again = deal(pieces, [], 8, 5, learned)
    for piece, split in zip(again.pieces, again.split, strict=True):
        assert split == FIT or piece.document not in learned
    assert len({p.document for p in again.of(TUNE)}) == len({p.document for p in again.of(TEST)}) == 5
    with pytest.raises(NotEnoughDataError, match="in the tune split"):
        deal(pieces, [], 8, 5, {piece.document for piece in pieces})


def test_a_corpus_knows_what_it_was_taken_from(tmp_path: Path) -> None:
    """Few texts are cut into sections, documents of their own; a certificate must not be drawn from the texts either."""
    texts = [torch.randint(3, 90, (2000,), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    options: dict[str, Any] = {"own": 0.0, "new_tokens": 8, "batch": 4, "seed": 0, "width": 8, "context": 64}
    corpus = collect(None, texts, None, tokens=6000, **options)
    assert {document(text) for text in texts} <= set(corpus.documents)
    corpus.save(tmp_path / "corpus.safetensors", "these")
    loaded = Corpus.load(tmp_path / "corpus.safetensors", "these")
    assert (loaded.digest, loaded.split, loaded.documents) == (corpus.digest, corpus.split, corpus.documents)
    with pytest.raises(CacheError, match="other texts, prompts or settings"):
        Corpus.load(tmp_path / "corpus.safetensors", "those")


def test_prompts_that_leave_no_room_are_said() -> None:
    prompts = [torch.arange(3, 60)] * 3
    with pytest.raises(NotEnoughDataError, match="none of 1 prompts leaves room for 16 new tokens in a context of 64"):
        collect(None, [], prompts, tokens=500, own=1.0, new_tokens=16, batch=4, seed=0, width=8, context=64)
