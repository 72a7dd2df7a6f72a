"""The command that generates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dyndepth.cli.common import app, chat_of, load


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A transformers checkpoint: folder or hub name.")],
    prompts: Annotated[list[str], typer.Argument(help="Prompts, decoded as one batch.")],
    exits: Annotated[Path | None, typer.Option(help="Exits folder; none runs at full depth.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    chat: Annotated[bool, typer.Option(help="Apply the tokenizer's chat template.")] = False,
    kv: Annotated[str | None, typer.Option(help="predict, propagate, copy, recompute, release or none.")] = None,
    mode: Annotated[str, typer.Option(help="dynamic, or lossless: early exits draft, the full model verifies.")] = "dynamic",
    drafts: Annotated[int, typer.Option(help="With --mode lossless, drafts before they are verified.")] = 4,
    graphs: Annotated[bool, typer.Option(help="Replay CUDA graphs.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
) -> None:
    """Continue prompts with dynamic depth, every token coloured by the layers it ran."""
    import dyndepth
    from dyndepth.demo import show

    causal_lm, tokenizer = load(model, dtype)
    loaded = None if exits is None else dyndepth.Exits.from_pretrained(exits)
    texts = chat_of(tokenizer, list(prompts), chat)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not chat)
    out = causal_lm.generate(
        **inputs, custom_generate=dyndepth.generate, exits=loaded, kv=kv, mode=mode, drafts=drafts,
        graphs=graphs, max_new_tokens=max_new_tokens, do_sample=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    console = Console()
    width, depth = inputs["input_ids"].shape[1], causal_lm.config.num_hidden_layers
    show.continuations(console, tokenizer, list(prompts), out, width, depth, len(prompts))
    console.print(
        f"{out.work.run} of {out.work.possible} rows x layers ({out.work.fraction:.1%}), K,V policy {out.kv}",
        highlight=False,
    )
    if out.drafted is not None:
        console.print(f"{int(out.accepted.sum())} of {int(out.drafted.sum())} drafts accepted; the text is the full model's")
    if loaded is not None and loaded.certificate is not None:
        from dyndepth.calibration import describe

        console.print(describe(loaded.certificate), highlight=False)
        if loaded.certificate["kv"] not in (None, out.kv):
            console.print(f"this run used K,V policy {out.kv}: the certificate does not speak for it", style="yellow")
