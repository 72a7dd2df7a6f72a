"""The command line: `dyndepth info | demo | fit | calibrate | report | exits | generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dyndepth.errors import (
    ArgumentError,
    BackendError,
    ExitsError,
    NotEnoughDataError,
    PagesFullError,
    UnsupportedModelError,
)
from dyndepth.files import writable

app = typer.Typer(
    help="Dynamic-depth batched inference.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

_ERRORS = (
    ArgumentError,
    BackendError,
    ExitsError,
    NotEnoughDataError,
    PagesFullError,
    UnsupportedModelError,
    OSError,
    ModuleNotFoundError,
)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False) -> None:
    """Versions, instruction sets, and per op which providers can run here, or why not."""
    from dyndepth.info import collect

    facts = collect()
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
        return
    console = Console()
    extension = facts["extension"]
    console.print(f"dyndepth {facts['dyndepth']}, Python {facts['python']}, {facts['platform']}", highlight=False)
    console.print(", ".join(f"{name} {version or '(absent)'}" for name, version in facts["packages"].items()), highlight=False)
    console.print(
        f"CPU: {facts['cpu']['name']}; torch uses {facts['cpu']['capability']}, {facts['threads']} threads", highlight=False
    )
    console.print(f"CUDA devices: {', '.join(facts['cuda']) or 'none'}", highlight=False)
    console.print("extension: " + ", ".join(f"{key} {value}" for key, value in extension.items()), highlight=False)
    names = list(next(iter(facts["ops"].values())))
    table = Table("op", *names)
    reasons: list[str] = []
    for op, providers in facts["ops"].items():
        cells = []
        for answer in providers.values():
            if answer in ("ok", "none"):
                cells.append("ok" if answer == "ok" else "-")
                continue
            if answer not in reasons:
                reasons.append(answer)
            cells.append(f"no ({reasons.index(answer) + 1})")
        table.add_row(op, *cells)
    console.print(table)
    for number, reason in enumerate(reasons, 1):
        console.print(f"({number}) {reason}", highlight=False)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where demo.json and demo.png go.")] = Path("build"),
    new_tokens: Annotated[int, typer.Option(min=2, help="New tokens per prompt.")] = 64,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed repetitions of the batch of 16.")] = 4,
) -> None:
    """SmolLM2-135M with every token leaving at its own depth, beside full depth and transformers."""
    from dyndepth.demo.run import run

    run(folder, new_tokens=new_tokens, repetitions=repetitions)


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
) -> None:
    """Make exits for a model in closed form and save them."""
    from dyndepth.closed_form import fit as run
    from dyndepth.data import read_texts

    writable(output)
    contents = read_texts(texts)
    causal_lm, tokenizer = _load(model, dtype)
    exits = run(causal_lm, contents, tokenizer, agreement=agreement, tokens=tokens, own=own, bands=bands, seed=seed)
    exits.save_pretrained(output)
    typer.echo(f"wrote {output}")


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
    requests = [prompt for path in prompts for prompt in _prompts(path)]
    causal_lm, tokenizer = _load(model, dtype)
    result = dyndepth.calibrate(
        causal_lm, loaded, _chat(tokenizer, requests, chat), tokenizer, risk=risk,
        confidence=confidence, loss=loss, bound=bound, kv=kv, new_tokens=new_tokens,
    )  # fmt: skip
    result.save_pretrained(output)
    typer.echo(f"wrote {output}")


@app.command()
def report(
    model: Annotated[str, typer.Argument(help="A checkpoint: folder or hub name; or `demo`, alone (./demo for a folder).")],
    output: Annotated[Path, typer.Option(help="Folder for report.json, report.png and report.html.")],
    exits: Annotated[Path | None, typer.Argument(help="Exits folder; `demo` brings its own.", show_default=False)] = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Argument(help="Files of prompts, as for calibrate; `demo` brings its own.", show_default=False),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="New tokens per prompt.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Prompts decoded at once; the first so many are timed.")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts.", show_default="all")] = None,
    kv: Annotated[str | None, typer.Option(help="predict, propagate or none.")] = None,
    chat: Annotated[bool, typer.Option(help="Apply the tokenizer's chat template; `demo` always does.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    repetitions: Annotated[int, typer.Option(min=1, help="Timed calls per point.")] = 3,
) -> None:
    """Draw risk against work and speed, how true the scores are, and which tokens leave: numbers, a picture, a page."""
    import dyndepth
    from dyndepth.report import FILES, table
    from dyndepth.report import report as run

    given = [str(path) for path in (exits, *(prompts or ())) if path is not None]
    if model == "demo":
        if given:
            raise ArgumentError(f"report: `demo` brings its own exits and prompts, got {' '.join(given)} (./demo for a folder)")
        from dyndepth.demo.prompts import calibrating

        kind = _dtype(dtype)
        writable(output)
        causal_lm, tokenizer, loaded = dyndepth.demo.load(kind)
        texts, chat = calibrating(), True
    elif exits is None or not prompts:
        raise ArgumentError(f"report: wanted MODEL EXITS PROMPTS..., or `demo` alone, got {' '.join([model, *given])}")
    else:
        writable(output)
        loaded = dyndepth.Exits.from_pretrained(exits)
        texts = [prompt for path in prompts for prompt in _prompts(path)]
        causal_lm, tokenizer = _load(model, dtype)
    facts = run(
        causal_lm, loaded, _chat(tokenizer, texts[:limit], chat), tokenizer, output, new_tokens=new_tokens, batch=batch, kv=kv,
        repetitions=repetitions,
    )  # fmt: skip
    console = Console()
    console.print(table(facts))
    for note in facts["notes"]:
        console.print(note, style="yellow", highlight=False)
    for name in FILES:
        typer.echo(f"wrote {output / name}")


exits_app = typer.Typer(help="Look at exits.", no_args_is_help=True)
app.add_typer(exits_app, name="exits")


@exits_app.callback()
def _exits() -> None:
    """A callback keeps `show` a command of its own while it is the only one."""


@exits_app.command()
def show(
    path: Annotated[str, typer.Argument(help="Exits folder, or `demo` for the demo's (fitted if need be).")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Bands, thresholds, how they were made, and the certificate."""
    import dyndepth
    from dyndepth.calibration import describe
    from dyndepth.exits.codec import band_to_json

    exits = dyndepth.demo.load()[2] if path == "demo" else dyndepth.Exits.from_pretrained(path)
    if as_json:
        import dataclasses

        facts = {
            "model": dataclasses.asdict(exits.model),
            "bands": [band_to_json(band) for band in exits],
            "record": exits.record,
            "certificate": exits.certificate,
        }
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
        return
    console = Console(highlight=False)
    console.print(f"exits of a {exits.model.model_type} with {exits.model.layers} layers, width {exits.model.width}")
    table = Table("band", "criterion", "threshold", "head or jump", "K,V maps", "MiB")
    for band in exits:
        part = band.head_or_norm() if band.resume == exits.model.layers else band.jump
        size = sum(value.numel() * value.element_size() for value in band.state_dict().values())
        table.add_row(
            f"[{band.leave}, {band.resume})",
            band.criterion.kind,
            f"{band.threshold:.4g}",
            "identity" if part is None else type(part).__name__,
            "yes" if band.kv is not None else "no",
            f"{size / 2**20:.1f}",
        )
    console.print(table)
    if "method" in exits.record:
        console.print(f"made by {exits.record['method']}")
    console.print("no certificate (dyndepth calibrate)" if exits.certificate is None else describe(exits.certificate))


def _prompts(path: Path) -> list[str]:
    """Prompts of a file, empty lines left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return lines
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError):
            raise ArgumentError(f"{path}: entry {number} must be a JSON object with a key `prompt`") from None
    return found


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A transformers checkpoint: folder or hub name.")],
    prompts: Annotated[list[str], typer.Argument(help="Prompts, decoded as one batch.")],
    exits: Annotated[Path | None, typer.Option(help="Exits folder; none runs at full depth.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    chat: Annotated[bool, typer.Option(help="Apply the tokenizer's chat template.")] = False,
    kv: Annotated[str | None, typer.Option(help="predict, propagate or none.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
) -> None:
    """Continue prompts with dynamic depth, every token coloured by the layers it ran."""
    import dyndepth
    from dyndepth.demo import show

    causal_lm, tokenizer = _load(model, dtype)
    loaded = None if exits is None else dyndepth.Exits.from_pretrained(exits)
    texts = _chat(tokenizer, list(prompts), chat)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not chat)
    out = causal_lm.generate(
        **inputs, custom_generate=dyndepth.generate, exits=loaded, kv=kv, max_new_tokens=max_new_tokens, do_sample=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    console = Console()
    width, depth = inputs["input_ids"].shape[1], causal_lm.config.num_hidden_layers
    show.continuations(console, tokenizer, list(prompts), out, width, depth, len(prompts))
    console.print(
        f"{out.work.run} of {out.work.possible} rows x layers ({out.work.fraction:.1%}), K,V policy {out.kv}",
        highlight=False,
    )
    if loaded is not None and loaded.certificate is not None:
        from dyndepth.calibration import describe

        console.print(describe(loaded.certificate), highlight=False)
        if loaded.certificate["kv"] not in (None, out.kv):
            console.print(f"this run used K,V policy {out.kv}: the certificate does not speak for it", style="yellow")


def _load(name: str, dtype: str) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ArgumentError(f"model: there is no folder {name}")
    kind = _dtype(dtype)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=kind)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArgumentError(f"model: {name} cannot be loaded: {' '.join(str(error).split())}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _dtype(name: str) -> Any:
    import torch

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in kinds:
        raise ArgumentError(f"dtype must be one of {', '.join(kinds)}, got {name!r}")
    return kinds[name]


def _chat(tokenizer: Any, prompts: list[str], wanted: bool) -> list[str]:
    """The prompts, in the tokenizer's chat template if wanted."""
    from dyndepth.demo.weights import chat as templated

    if not wanted:
        return prompts
    if not getattr(tokenizer, "chat_template", None):
        raise ArgumentError("--chat: this tokenizer has no chat template")
    return [templated(tokenizer, prompt) for prompt in prompts]


def main() -> None:
    """Entry point: our own errors are one line, not a traceback."""
    try:
        app()
    except _ERRORS as error:
        typer.secho(f"dyndepth: {error}", fg="red", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
