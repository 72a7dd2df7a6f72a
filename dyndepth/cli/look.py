"""Commands that show: info, demo, exits show, report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dyndepth.cli.common import app, chat_of, dtype_of, load, prompts_of
from dyndepth.errors import ArgumentError
from dyndepth.files import writable


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    launch: Annotated[
        str | None,
        typer.Option(help="Instead: tile sizes of Triton's launches on an architecture (sm_90, ...).", show_default=False),
    ] = None,
    model: Annotated[str, typer.Option(help="With --launch: a known model, or a config.json.")] = "Llama-3-8B",
    rows: Annotated[str, typer.Option(help="With --launch: rows of a pass.")] = "1,16,32,64,256",
) -> None:
    """Versions, instruction sets, and per op which providers can run here, or why not."""
    from dyndepth.info import collect

    if launch is not None:
        from dyndepth.cli import tune

        tune.choices(launch, model, rows, as_json)
        return

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
    folder: Annotated[Path, typer.Option(help="Where demo.json and demo.png go (<task>.json and .png).")] = Path("build"),
    new_tokens: Annotated[int, typer.Option(min=2, help="New tokens per prompt.")] = 64,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed repetitions (of the batch of 16).")] = 4,
    task: Annotated[
        str | None, typer.Option(help="image, speech or text: an encoder whose whole samples leave early, instead.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes of a task.", show_default="1 8 32 128")] = None,
) -> None:
    """SmolLM2-135M with every token leaving at its own depth, beside full depth and transformers; or an encoder's task."""
    from dyndepth.demo.run import run

    if task is not None:
        from dyndepth.demo.tasks import run_task

        run_task(task, folder, batches=batch or (1, 8, 32, 128), repetitions=repetitions)
        return
    if batch:
        raise ArgumentError("demo: --batch goes with --task")
    run(folder, new_tokens=new_tokens, repetitions=repetitions)


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

        kind = dtype_of(dtype)
        writable(output)
        causal_lm, tokenizer, loaded = dyndepth.demo.load(kind)
        texts, chat = calibrating(), True
    elif exits is None or not prompts:
        raise ArgumentError(f"report: wanted MODEL EXITS PROMPTS..., or `demo` alone, got {' '.join([model, *given])}")
    else:
        writable(output)
        loaded = dyndepth.Exits.from_pretrained(exits)
        texts = [prompt for path in prompts for prompt in prompts_of(path)]
        causal_lm, tokenizer = load(model, dtype)
    facts = run(
        causal_lm, loaded, chat_of(tokenizer, texts[:limit], chat), tokenizer, output, new_tokens=new_tokens, batch=batch,
        kv=kv, repetitions=repetitions,
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
    path: Annotated[str, typer.Argument(help="Exits folder, or `demo` for those that the demo ships.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Bands, thresholds, how they were made, and the certificate."""
    import dyndepth
    from dyndepth.calibration import describe
    from dyndepth.exits.codec import band_to_json

    exits = dyndepth.demo.load_exits() if path == "demo" else dyndepth.Exits.from_pretrained(path)
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
