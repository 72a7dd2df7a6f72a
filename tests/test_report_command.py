"""`dyndepth report` as a user runs it, and the kinds of tokens it tells apart."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from tiny_reports import Words, one

from dyndepth.report import FILES, KINDS, kind
from dyndepth.report.kinds import kinds_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of bytes, its exits in `exits`, prompts in `prompts.txt`."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    model = tiny_models.tiny("llama", vocab_size=300)
    model.save_pretrained(folder)
    one(model, 0.5).save_pretrained(folder / "exits")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {letter: i + 3 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(
        folder
    )
    (folder / "prompts.txt").write_text("one prompt\n\nanother one\na third\n")
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`dyndepth report ...`; the exit code."""
    from dyndepth import cli

    monkeypatch.setattr(sys, "argv", ["dyndepth", "report", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


SETTINGS = ("--new-tokens", "4", "--repetitions", "1", "--dtype", "float32")


def test_the_command(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(checkpoint), str(checkpoint / "exits"), str(checkpoint / "prompts.txt")]
    assert command(monkeypatch, *given, "--output", str(tmp_path / "out"), "--limit", "2", *SETTINGS) == 0
    printed = capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert facts["prompts"]["first"] == ["one prompt", "another one"]
    assert facts["settings"]["new_tokens"] == 4
    for name in FILES:
        assert f"wrote {tmp_path / 'out' / name}" in printed
    assert "none: full depth" in printed
    assert f"{facts['frontier']['points'][-1]['disagreement']:.2%}" in printed


def test_the_command_on_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`demo` brings model, exits and chat prompts."""
    import dyndepth.demo

    model = tiny_models.shared("llama")

    class Chats(Words):
        chat_template = "yes"

        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            return f"<{messages[0]['content']}>"

    monkeypatch.setattr(dyndepth.demo, "load", lambda dtype: (model, Chats(), one(model, 0.5)))
    assert command(monkeypatch, "demo", "--output", str(tmp_path), "--limit", "3", *SETTINGS) == 0
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["prompts"]["first"][0] == "<Tell me something surprising about bicycles.>"
    assert facts["prompts"]["count"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "{model}/exits"], "report: `demo` brings its own exits and prompts, got {model}/exits"),
        (["{model}"], "report: wanted MODEL EXITS PROMPTS..., or `demo` alone, got {model}"),
        (["{model}", "{model}/exits"], "report: wanted MODEL EXITS PROMPTS..., or `demo` alone"),
        (["{model}", "/nowhere", "{model}/prompts.txt"], "exits.json does not exist"),
        (["/no/model", "{model}/exits", "{model}/prompts.txt"], "model: there is no folder /no/model"),
        (["{model}", "{model}/exits", "/no/prompts.txt"], "No such file or directory: '/no/prompts.txt'"),
        (["{model}", "{model}/exits", "{model}/prompts.txt", "--chat"], "this tokenizer has no chat template"),
        (["{model}", "{model}/exits", "{empty}"], "report: prompts must hold at least one prompt, got none"),
        (["demo", "--dtype", "float8"], "dtype must be one of float32, bfloat16, float16, got 'float8'"),
    ],
)
def test_errors_are_one_line(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    import dyndepth.demo

    monkeypatch.setattr(dyndepth.demo, "load", lambda *_: pytest.fail("the demo was loaded"))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    filled = [argument.format(model=checkpoint, empty=empty) for argument in arguments]
    assert command(monkeypatch, *filled, "--output", str(tmp_path / "out")) == 1
    said = capsys.readouterr().err
    ours = [line for line in said.splitlines() if line.startswith("dyndepth: ")]
    assert len(ours) == 1
    assert message.format(model=checkpoint) in ours[0]
    assert said.rstrip().endswith(ours[0])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (" the", "word start"),
        ("\nThe", "word start"),
        (" don't", "word start"),
        (" été", "word start"),
        (" हिन्दी", "word start"),
        ("ing", "word continuation"),
        ("'s", "word continuation"),
        ("日本", "word continuation"),
        ("7", "number"),
        (" 1,000.5", "number"),
        (" $5", "number"),
        ("50%", "number"),
        ("½", "number"),
        (".", "punctuation"),
        (" (", "punctuation"),
        (".\n", "punctuation"),
        ("-", "punctuation"),
        ("'", "punctuation"),
        ("+", "punctuation"),
        ("`", "punctuation"),
        (" ", "whitespace/newline"),
        ("\n\n", "whitespace/newline"),
        ("\t", "whitespace/newline"),
        ("a1", "other"),
        ("😀", "other"),
        ("\ufffd", "other"),
        ("", "other"),
        ("\x00", "other"),
    ],
)
def test_kinds(text: str, wanted: str) -> None:
    assert kind(text) == wanted
    assert kind(text, special=True) == "special"
    assert wanted in KINDS


def test_kinds_of_sentencepiece_tokens() -> None:
    """Its tokenizers drop the leading space of what they decode; the piece still has it."""

    class Pieces:
        all_special_ids = (0,)
        pieces = ("<s>", "▁the", "the")

        def decode(self, ids: list[int]) -> str:
            return "".join(self.pieces[i] for i in ids).replace("▁", " ").removeprefix(" ")

        def convert_ids_to_tokens(self, token: int) -> str:
            return self.pieces[token]

    assert kinds_of(Pieces(), [0, 1, 2, 2]) == {0: "special", 1: "word start", 2: "word continuation"}
    assert kinds_of(None, [5]) == {5: "other"}
