"""What the demo prints: the table, and continuations with every token coloured by the layers it ran."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor

from dyndepth.demo.measure import Row


def table(rows: list[Row], title: str) -> Table:
    """The rows as a rich table that fits eighty columns, so that nothing is cut where output is piped."""
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("B", "system", "tokens/s", "p10-p90", "work", "agree", "free"):
        result.add_column(heading, justify="left" if heading == "system" else "right", no_wrap=True)
    for number, row in enumerate(rows):
        result.add_row(
            str(row.batch),
            f"{row.system}, {row.mode}",
            f"{row.tokens_per_s_median:.1f}",
            f"{row.tokens_per_s_p10:.0f}-{row.tokens_per_s_p90:.0f}",
            f"{row.rows_x_layers:.1%}",
            f"{row.agreement_teacher_forced:.1%}",
            f"{row.agreement_free:.1%}",
            end_section=number + 1 < len(rows) and rows[number + 1].batch != row.batch,
        )
    return result


def colour(layers_run: int, depth: int) -> Style:
    """From green (few layers) to plain (all of them)."""
    if layers_run >= depth:
        return Style()
    share = layers_run / depth
    return Style(color=f"rgb({int(40 + 160 * share)},{int(210 - 40 * share)},90)", bold=share < 0.5)


def coloured(tokenizer: Any, tokens: Tensor, layers_run: Tensor, depth: int) -> Text:
    """One continuation [t] with its tokens coloured; stops at the end of the sequence."""
    text = Text()
    pending: list[int] = []
    for token, layers in zip(tokens.tolist(), layers_run.tolist(), strict=True):
        if layers < 0 or token == tokenizer.eos_token_id:
            break
        pending.append(token)
        piece = tokenizer.decode(pending)
        if not piece.endswith("\ufffd"):  # a character of several tokens is shown, whole, with the last of them
            text.append(piece, colour(layers, depth))
            pending = []
    return text


def legend(depth: int, seen: set[int]) -> Text:
    text = Text("layers run per token: ")
    for layers in sorted(seen):
        text.append(f" {layers} ", colour(layers, depth) + Style(reverse=True))
        text.append(" ")
    return text


def continuations(
    console: Console, tokenizer: Any, prompts: list[str], output: Any, width: int, depth: int, count: int
) -> None:
    """Print the first `count` continuations of a dynamic generate output."""
    seen = {layers for layers in output.layers_run.flatten().tolist() if layers >= 0}
    console.print(legend(depth, seen))
    for number in range(min(count, len(prompts))):
        console.print(Text("> " + prompts[number], style="bold"))
        console.print(coloured(tokenizer, output.sequences[number, width:], output.layers_run[number], depth))
        console.print()
