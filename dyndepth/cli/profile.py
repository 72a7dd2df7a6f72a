"""The command that says where time goes: profile."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dyndepth.cli.common import app, chat_of, dtype_of, load, prompts_of
from dyndepth.errors import ArgumentError
from dyndepth.files import writable


@app.command()
def profile(
    model: Annotated[str, typer.Option(help="A checkpoint: folder or hub name; or `demo` (./demo for a folder).")] = "demo",
    exits: Annotated[
        str | None, typer.Option(help="Exits folder, `demo` or `none`.", show_default="`demo` for the demo, else `none`")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts, as for calibrate.", show_default="the demo's")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows decoded at once.")] = 16,
    context: Annotated[int, typer.Option(min=2, help="Tokens of every prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="New tokens per prompt.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    kv: Annotated[str | None, typer.Option(help="predict, propagate or none.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed calls.")] = 3,
    trace: Annotated[
        Path | None, typer.Option(help="Write every span of the last call here (open in ui.perfetto.dev).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Time of a decode step by part and layer, Python included, rows x layers, and weights read beside a read roof."""
    kind = dtype_of(dtype)
    if trace is not None:
        if trace.is_dir():
            raise ArgumentError(f"--trace: wanted a file, got the folder {trace}")
        writable(trace.parent)
    causal_lm, tokenizer, loaded = _subject(model, exits, kind, dtype)
    import dyndepth.profiling as profiling
    from dyndepth.demo.prompts import SHOWN, calibrating
    from dyndepth.info import collect
    from dyndepth.profiling import prompts as lengths
    from dyndepth.profiling import tables
    from dyndepth.profiling import trace as traces

    texts = list(SHOWN) if prompts is None else prompts_of(prompts)
    if not texts:
        raise ArgumentError(f"--prompts: {prompts} has no prompts")
    filling = calibrating() if prompts is None else texts
    templated = chat_of(tokenizer, texts, bool(getattr(tokenizer, "chat_template", None)))
    rows = lengths.prompts(tokenizer, templated, filling, batch, context)
    found = profiling.profile(causal_lm, rows, loaded, new_tokens=new_tokens, kv=kv, repetitions=repetitions)
    machine = collect()
    about = {"model": model, "dyndepth": machine["dyndepth"], "cpu": machine["cpu"], "torch": machine["packages"]["torch"]}
    facts = {"about": about, **found.facts}
    if trace is not None:
        traces.write(trace, found.spans, {**about, **facts["setting"]})
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
        return
    console = Console(highlight=False)
    for part in tables.render(facts):
        console.print(part, soft_wrap=isinstance(part, str))
    if trace is not None:
        console.print(f"wrote {trace}", soft_wrap=True)


def _subject(model: str, exits: str | None, kind: Any, dtype: str) -> tuple[Any, Any, Any]:
    """(model, tokenizer, exits or None); cheap errors come before weights are read."""
    import dyndepth

    named = exits if exits is not None else ("demo" if model == "demo" else "none")
    loaded = None
    if named == "demo":
        loaded = dyndepth.demo.load_exits()
    elif named != "none":
        loaded = dyndepth.Exits.from_pretrained(named)
    causal_lm, tokenizer = dyndepth.demo.load_model(kind) if model == "demo" else load(model, dtype)
    return causal_lm, tokenizer, loaded
