"""What a fit tells while it runs: the plan with its memory, one bar per stage, the result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dyndepth.exits import Exits


class Advance(Protocol):
    """Advances a bar by some steps, with a word on how it goes."""

    def __call__(self, steps: int, text: str = "") -> None: ...


class Progress:
    """A context manager; silent when `show` is false."""

    def __init__(self, show: bool) -> None:
        self.console = Console(stderr=True, quiet=not show)
        self.bar = Bar(
            TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"), console=self.console, disable=not show,
        )  # fmt: skip

    def plan(self, tokens: int, candidates: int, memory: int) -> None:
        self.console.print(
            f"fit: {tokens} tokens, {candidates} candidate bands, about {memory / 2**20:.0f} MiB beside the model"
        )

    def result(self, exits: Exits) -> None:
        test = exits.record["test"]
        bands = ", ".join(f"[{band.leave}, {band.resume}) at {band.threshold:.3f}" for band in exits)
        if all(math.isinf(band.threshold) for band in exits):
            self.console.print(
                f"fit: no threshold reached the wanted agreement of {exits.record['wanted_agreement']:.1%} on the tuning "
                "split: the exits are closed. Give more tokens, or ask for less.",
                style="yellow",
            )
            return
        self.console.print(
            f"fit: bands {bands or 'none'}; on unseen rows {test['agreement']:.1%} agree with full depth, "
            f"{test['rows_x_layers']:.1%} of rows x layers run"
        )

    @contextmanager
    def stage(self, description: str, total: int) -> Iterator[Advance]:
        """A bar of `total` steps; yields the function that advances it."""
        task = self.bar.add_task(description, total=total, text="")

        def advance(steps: int, text: str = "") -> None:
            self.bar.update(task, advance=steps, text=text)

        yield advance
        self.bar.update(task, completed=total)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()
