"""Commands that make exits: fit, train, calibrate."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from dyndepth.cli.common import app, chat_of, load, prompts_of
from dyndepth.errors import ArgumentError
from dyndepth.files import writable


@app.command()
def fit(
    model: Annotated[str, typer.Argument(help="A transformers checkpoint: folder or hub name.")],
    texts: Annotated[list[Path], typer.Argument(help="Files (.txt, .md, .jsonl, .parquet) or folders to learn from.")],
    output: Annotated[Path, typer.Option(help="Folder for the exits.")],
    agreement: Annotated[float, typer.Option(help="Wanted share of tokens that equal full depth's.")] = 0.95,
    tokens: Annotated[int, typer.Option(help="Tokens to learn from.")] = 16384,
    own: Annotated[float, typer.Option(help="Share of them that the model continues itself.")] = 0.5,
    bands: Annotated[int, typer.Option(help="At most this many bands.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Shuffling of the texts.")] = 0,
    heads: Annotated[Path | None, typer.Option(help="Exits folder with trained heads (dyndepth train).")] = None,
    kv_rank: Annotated[int | None, typer.Option(help="Rank of the K,V maps; whole ones without.")] = None,
) -> None:
    """Make exits for a model in closed form and save them."""
    from dyndepth.closed_form import fit as run
    from dyndepth.data import read_texts
    from dyndepth.exits import Exits

    writable(output)
    contents = read_texts(texts)
    trained = None if heads is None else Exits.from_pretrained(heads)
    causal_lm, tokenizer = load(model, dtype)
    exits = run(
        causal_lm, contents, tokenizer, heads=trained, agreement=agreement, tokens=tokens, own=own, bands=bands, seed=seed,
        kv_rank=kv_rank,
    )  # fmt: skip
    exits.save_pretrained(output)
    typer.echo(f"wrote {output}")


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="A transformers checkpoint: folder or hub name.")],
    output: Annotated[Path, typer.Option(help="Folder of the run; a killed run goes on when it is named again.")],
    texts: Annotated[
        list[Path] | None,
        typer.Argument(help="Files or folders to learn from; without, and without prompts, the model writes its own prompts."),
    ] = None,
    prompts: Annotated[
        list[Path] | None, typer.Option(help="Files of prompts to continue: .jsonl with a key `prompt`, else one a line.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings (dyndepth.training.TrainConfig).")] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting on top, as in TOML: --set lr=1e-3 --set 'exits=[20, 25]' --set head=mlp"),
    ] = None,
    chat: Annotated[bool, typer.Option(help="Apply the tokenizer's chat template to the prompts.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
) -> None:
    """Train exit heads of a frozen model against its own answers; `fit --heads` makes exits of them."""
    import dyndepth
    from dyndepth.data import read_texts
    from dyndepth.training import TrainConfig

    writable(output)
    changes = settings(change or [])
    settled = TrainConfig.of(changes) if config is None else TrainConfig.read(config, **changes)
    given = read_texts(texts) if texts else []
    asked = None if not prompts else [prompt for path in prompts for prompt in prompts_of(path)]
    causal_lm, tokenizer = load(model, dtype)
    dyndepth.train(
        causal_lm, given, tokenizer, output=output, prompts=None if asked is None else chat_of(tokenizer, asked, chat),
        config=settled,
    )  # fmt: skip
    typer.echo(f"wrote {output / 'exits'}")


def settings(changes: list[str]) -> dict[str, Any]:
    """`name=value` entries, values as in TOML; a bare word is a string where the setting is one."""
    from dyndepth.training import TrainConfig

    words = {field.name for field in dataclasses.fields(TrainConfig) if field.type == "str"}
    found: dict[str, Any] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or not name.strip():
            raise ArgumentError(f"--set: wanted name=value, got {change!r}")
        try:
            found[name.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            if name.strip() not in words:
                raise ArgumentError(f"--set: {change!r} has no value that TOML knows (true, 1e-3, [20, 25])") from None
            found[name.strip()] = value.strip()
    return found


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="A transformers checkpoint: folder or hub name.")],
    exits: Annotated[Path, typer.Argument(help="Exits folder.")],
    prompts: Annotated[list[Path], typer.Argument(help="Files of prompts: .jsonl with a key `prompt`, else one a line.")],
    output: Annotated[Path, typer.Option(help="Folder for the exits with certified thresholds.")],
    risk: Annotated[float, typer.Option(help="Bound on the expected loss of a request.")] = 0.05,
    confidence: Annotated[float, typer.Option(help="With this confidence.")] = 0.95,
    loss: Annotated[str, typer.Option(help="disagreement or inconsistency.")] = "disagreement",
    bound: Annotated[str, typer.Option(help="betting, hoeffding_bentkus or hoeffding.")] = "betting",
    new_tokens: Annotated[int, typer.Option(min=1, help="New tokens per request.")] = 64,
    kv: Annotated[str | None, typer.Option(help="predict, propagate or none.")] = None,
    chat: Annotated[bool, typer.Option(help="Apply the tokenizer's chat template.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
) -> None:
    """Certify thresholds: the freest whose expected loss is bounded, or closed exits."""
    import dyndepth

    writable(output)
    loaded = dyndepth.Exits.from_pretrained(exits)
    requests = [prompt for path in prompts for prompt in prompts_of(path)]
    causal_lm, tokenizer = load(model, dtype)
    result = dyndepth.calibrate(
        causal_lm, loaded, chat_of(tokenizer, requests, chat), tokenizer, risk=risk,
        confidence=confidence, loss=loss, bound=bound, kv=kv, new_tokens=new_tokens,
    )  # fmt: skip
    result.save_pretrained(output)
    typer.echo(f"wrote {output}")
