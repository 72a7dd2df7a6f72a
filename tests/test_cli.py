"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers

from dyndepth.exits import Exits
from dyndepth.op import REGISTRY

ROOT = Path(__file__).parent.parent


def run(*arguments: str, expect: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    done = subprocess.run(
        [sys.executable, "-m", "dyndepth.cli", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
        cwd="/",
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def test_info_json() -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert set(facts["ops"]) == set(REGISTRY)
    for providers in facts["ops"].values():
        assert list(providers) == ["cuda", "triton", "cpp", "torch"]
        assert providers["torch"] == providers["cpp"] == "ok"
    assert facts["packages"]["torch"] == torch.__version__
    assert "instruction_set" in facts["extension"]


def test_info_table_gives_reasons() -> None:
    forced = run("info", DYNDEPTH_BACKEND="torch").stdout
    assert "not among the forced providers (torch)" in forced
    assert "compact_rows" in run("info").stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of bytes, and texts to fit on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    tiny_models.tiny("llama", vocab_size=300).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: i + 3 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(
        folder
    )
    for number in range(3):
        # Words in ever another order: sections that repeat each other would count once.
        words = torch.randint(0, 9, (180,), generator=torch.Generator().manual_seed(number)).tolist()
        text = " ".join(["the", "quick", "brown", "fox", "jumps", "over", "some", "lazy", "dog"][word] for word in words)
        (folder / f"{number}.txt").write_text(text)
    return folder


def test_fit_then_generate(checkpoint: Path, tmp_path: Path) -> None:
    texts = [str(checkpoint / "0.txt"), str(tmp_path / "more")]
    (tmp_path / "more").mkdir()
    for name in ("1.txt", "2.txt"):
        (tmp_path / "more" / name).write_bytes((checkpoint / name).read_bytes())
    made = run(
        "fit",
        str(checkpoint),
        *texts,
        "--output",
        str(tmp_path / "exits"),
        "--tokens",
        "2500",
        "--own",
        "0.1",
        "--agreement",
        "0.7",
        "--dtype",
        "float32",
    )
    assert f"wrote {tmp_path / 'exits'}" in made.stdout
    assert "MiB beside the model" in made.stderr
    assert len(Exits.from_pretrained(tmp_path / "exits")) >= 1
    out = run(
        "generate",
        str(checkpoint),
        "hello",
        "what",
        "--exits",
        str(tmp_path / "exits"),
        "--max-new-tokens",
        "5",
        "--dtype",
        "float32",
    )
    assert "rows x layers" in out.stdout
    assert "> hello" in out.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{model}", "hi", "--exits", "/nowhere", "--dtype", "float32"], "exits.json does not exist"),
        (["generate", "{model}", "hi", "--dtype", "float8"], "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        (
            ["generate", "{model}", "hi", "--kv", "clone"],
            "kv must be one of predict, propagate, copy, recompute, release, none",
        ),
        (["fit", "{model}", "{model}/0.txt", "--output", "/tmp/x", "--tokens", "50"], "corpus: wanted at least 256 tokens"),
        (["generate", "{model}", "", "--dtype", "float32"], "every prompt must have at least one token"),
        (["generate", "{model}", "hi", "--chat", "--dtype", "float32"], "this tokenizer has no chat template"),
        (["generate", "/no/model", "hi"], "model: there is no folder /no/model"),
        (["generate", "{empty}", "hi"], "cannot be loaded"),
        (["generate", "{broken}", "hi"], "cannot be loaded"),
        (["fit", "{model}", "{model}/0.txt", "--output", "{model}/0.txt"], "File exists"),
        (["calibrate", "{model}", "/nowhere", "{model}/0.txt", "--output", "{empty}/out"], "exits.json does not exist"),
        (["exits", "show", "/nowhere"], "exits.json does not exist"),
        (["fit", "{model}", "/no/text.txt", "--output", "/tmp/x"], "read_texts: there is no file or folder /no/text.txt"),
        (["fit", "{model}", "/no/folder/", "--output", "{empty}/out"], "read_texts: there is no file or folder /no/folder"),
        (["fit", "{model}", "{empty}", "--output", "{empty}/out"], "read_texts: wanted at least one document, got none in"),
        (["fit", "{model}", "{model}/model.safetensors", "--output", "{empty}/out"], "must end in .txt, .md, .jsonl, .parquet"),
    ],
)
def test_errors_are_one_line(checkpoint: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    import shutil

    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    shutil.copytree(checkpoint, broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    done = run(*(argument.format(model=checkpoint, empty=empty, broken=broken) for argument in arguments), expect=1)
    ours = [line for line in done.stderr.splitlines() if line.startswith("dyndepth: ")]
    assert len(ours) == 1
    assert message in ours[0]
    assert done.stderr.rstrip().endswith(ours[0]), "nothing follows the one line"
    assert "Traceback" not in done.stderr


def test_calibrate_and_show(checkpoint: Path, tmp_path: Path) -> None:
    """From the command line: nothing certified is said, written and closed; files of prompts that are wrong are named."""
    import tiny_exits
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tiny_exits.exits_of(model, tiny_exits.band(model, 1, 6, threshold=0.1)).save_pretrained(tmp_path / "exits")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"number {i}"}) for i in range(30)))
    options = [
        "--dtype",
        "float32",
        "--risk",
        "0.1",
        "--confidence",
        "0.9",
        "--new-tokens",
        "3",
        "--output",
        str(tmp_path / "new"),
    ]
    done = run("calibrate", str(checkpoint), str(tmp_path / "exits"), str(prompts), *options)
    assert "not certified: expected disagreement at most 0.1 with 90% confidence" in " ".join(done.stderr.split())
    shown = json.loads(run("exits", "show", str(tmp_path / "new"), "--json").stdout)
    assert shown["certificate"]["certified"] is False
    assert shown["bands"][0]["threshold"] == "inf"
    assert shown["certificate"]["n"] == 30
    assert "exits are closed" in " ".join(run("exits", "show", str(tmp_path / "new")).stdout.split())
    out = run(
        "generate", str(checkpoint), "hi", "--exits", str(tmp_path / "new"), "--max-new-tokens", "3", "--dtype", "float32"
    )
    assert "exits are closed" in " ".join(out.stdout.split())
    prompts.write_text('{"text": 1}')
    done = run("calibrate", str(checkpoint), str(tmp_path / "exits"), str(prompts), *options, expect=1)
    assert "entry 1 must be a JSON object with a key `prompt`" in done.stderr


def test_version_is_one() -> None:
    import tomllib

    import dyndepth

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == dyndepth.__version__


def test_train_goes_from_texts_to_heads_that_fit_takes(checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "train.toml"
    config.write_text("exits = [2, 4]\ncorpus = 4000\nown = 0.2\nnew_tokens = 16\nbatch = 400\nfrequent = 40\nrandom = 40\n")
    options = ["--config", str(config), "--set", "tokens=4000", "--set", "head=translator", "--dtype", "float32"]
    texts = [str(checkpoint / f"{number}.txt") for number in range(3)]
    done = run("train", str(checkpoint), *texts, "--output", str(tmp_path / "run"), *options)
    assert f"wrote {tmp_path / 'run' / 'exits'}" in done.stdout
    assert "MiB to write to" in done.stderr.replace("\n", " ")
    heads = Exits.from_pretrained(tmp_path / "run" / "exits")
    assert [band.leave for band in heads] == [2, 4]
    assert heads.record["training"]["config"]["tokens"] == 4000
    shown = json.loads(run("exits", "show", str(tmp_path / "run" / "exits"), "--json").stdout)
    assert shown["record"]["training"]["validation"].keys() == {"2", "4"}
    run(
        "fit", str(checkpoint), *texts, "--output", str(tmp_path / "fitted"), "--tokens", "4000",
        "--own", "0", "--agreement", "0.3", "--dtype", "float32", "--heads", str(tmp_path / "run" / "exits"),
    )  # fmt: skip
    assert "training" in Exits.from_pretrained(tmp_path / "fitted").record


def test_train_refuses_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    for change, message in (
        ("tokens", "wanted name=value"),
        ("tokens=[", "no value that TOML knows"),
        ("tokens=many", "no value that TOML knows"),
        ("tokens=1.5", "tokens must be a whole number"),
        ("exits=20", "exits must be a list of boundaries"),
        ("tensorboard=False", "no value that TOML knows"),
        ("tensorboard=1", "tensorboard must be true or false"),
        ("lrate=1", "unknown settings lrate"),
    ):
        done = run("train", str(checkpoint), "--output", str(tmp_path), "--set", change, expect=1)
        assert message in done.stderr
        assert done.stderr.count("\n") <= 3
        assert "Traceback" not in done.stderr
    done = run("train", str(checkpoint), "--output", str(tmp_path), expect=1)
    assert "chat template" in done.stderr, "the model cannot write prompts"
