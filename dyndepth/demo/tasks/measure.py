"""What the task demos measure, in one run, in turn: five ways to answer the same samples with the same model and exits.

- *full depth*: the transformers model itself on whole batches.
- *batch-1 loop*: a sample at a time, as the papers' own code runs (PABEE, DeeBERT, LGViT, ...).
- *waits for the slowest*: a batch leaves at the first exit where every one of its samples would (CALM's loop, PABEE's `all`).
- *dynamic*: `DynamicEncoder` on whole batches; they shrink as samples leave.
- *dynamic, stream*: `SampleStream`; they are kept full.

Timed is what the model does: batches are tokenised, padded and stacked before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from dyndepth import info
from dyndepth.calibration.samples import answers
from dyndepth.demo.measure import Rates, interleaved
from dyndepth.demo.tasks.plain import together
from dyndepth.encoders import DynamicEncoder, SampleStream
from dyndepth.errors import ArgumentError
from dyndepth.files import replacing

Inputs = Mapping[str, Tensor]
FULL, LOOP, WAITING, DYNAMIC, STREAM = (
    "full depth", "batch-1 loop", "waits for the slowest", "dynamic", "dynamic, stream",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One way at one batch size: the schema of every comparison of encoders."""

    task: str
    system: str
    mode: str
    batch: int
    samples: int
    samples_per_s_median: float
    samples_per_s_p10: float
    samples_per_s_p90: float
    #: Of samples x layers, the share that was run.
    samples_x_layers: float
    metric: str
    #: By `metric`, on these samples.
    quality: float
    #: Share of samples with the arg max (of every frame) that the model has at full depth.
    agreement: float


@dataclass
class Problem:
    """Samples to be answered, and how good answers are."""

    task: str
    encoder: DynamicEncoder
    #: Samples by number -> keyword arguments of the model.
    collate: Callable[[Sequence[int]], dict[str, Tensor]]
    count: int
    #: The logits of every sample, in order, [classes] or [frames, classes] -> a number.
    quality: Callable[[Sequence[Tensor]], float]
    metric: str = "accuracy"
    #: The model at full depth without us; None calls it and takes its logits.
    full: Callable[[Inputs], Sequence[Tensor]] | None = None

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        return [self.collate(range(at, min(at + size, self.count))) for at in range(0, self.count, size)]

    @torch.no_grad()
    def whole(self, batches: Sequence[Inputs]) -> tuple[list[Tensor], float]:
        """Every sample's logits from the model itself."""
        full = self.full or (lambda inputs: self.encoder.model(**inputs).logits)
        return [logits for inputs in batches for logits in full(inputs)], 1.0

    def waiting(self, batches: Sequence[Inputs]) -> tuple[list[Tensor], float]:
        found: list[Tensor] = []
        layers = 0
        for inputs in batches:
            logits, depth = together(self.encoder, inputs)
            found += logits
            layers += depth * len(logits)
        return found, layers / (self.count * self.encoder.depth)

    def dynamic(self, batches: Sequence[Inputs]) -> tuple[list[Tensor], float]:
        found, work = answers(self.encoder, batches)
        return found, work.fraction

    def stream(self, batches: Sequence[Inputs], size: int) -> tuple[list[Tensor], float]:
        stream = SampleStream(self.encoder, batch=size)
        return [answer.logits for answer in stream(batches)], stream.work.fraction

    def ways(self, size: int) -> dict[str, Callable[[], tuple[list[Tensor], float]]]:
        """Mode -> what answers all samples in batches of `size`, and returns (logits, samples x layers run)."""
        batches = self.batches(size)
        if size == 1:
            return {
                FULL: lambda: self.whole(batches),
                LOOP: lambda: self.waiting(batches),
                DYNAMIC: lambda: self.dynamic(batches),
            }
        return {
            FULL: lambda: self.whole(batches),
            WAITING: lambda: self.waiting(batches),
            DYNAMIC: lambda: self.dynamic(batches),
            STREAM: lambda: self.stream(batches, size),
        }


def measure(problem: Problem, sizes: Sequence[int], repetitions: int, advance: Callable[[], None] = lambda: None) -> list[Row]:
    """Every way at every batch size, in turn, `repetitions` times after one call that is not counted."""
    if problem.count < 1:
        raise ArgumentError("measure: wanted at least one sample, got none")
    ways = {(size, mode): run for size in sizes for mode, run in problem.ways(size).items()}
    first, seconds = interleaved(ways, repetitions, advance)
    reference = [logits.argmax(-1) for logits in first[sizes[0], FULL][0]]
    rows = []
    for (size, mode), (logits, work) in first.items():
        rates = Rates.of(problem.count, seconds[size, mode])
        same = [torch.equal(mine.argmax(-1), theirs) for mine, theirs in zip(logits, reference, strict=True)]
        rows.append(
            Row(
                task=problem.task,
                system="transformers" if mode == FULL else "loop" if mode in (LOOP, WAITING) else "dyndepth",
                mode=mode,
                batch=size,
                samples=problem.count,
                samples_per_s_median=rates.median,
                samples_per_s_p10=rates.p10,
                samples_per_s_p90=rates.p90,
                samples_x_layers=work,
                metric=problem.metric,
                quality=problem.quality(logits),
                agreement=sum(same) / len(same),
            )
        )
    return rows


def accuracy(labels: Tensor) -> Callable[[Sequence[Tensor]], float]:
    """Share of right answers; labels int64 [samples]."""
    return lambda logits: float((torch.stack([row.argmax(-1) for row in logits]) == labels).double().mean())


def run_and_write(
    problem: Problem, folder: Path, sizes: Sequence[int], repetitions: int, facts: dict[str, Any], title: str
) -> dict[str, Any]:
    """Measure, print the table, write `<task>.json` and `<task>.png`; returns what the JSON holds.

    `facts` say what the model is, what its exits were made of and on how many samples (plain JSON).
    """
    from dyndepth.demo.tasks.picture import draw

    console = Console()
    steps = (1 + repetitions) * sum(len(problem.ways(size)) for size in sizes)
    columns = (TextColumn("measuring, interleaved"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("measure", total=steps)
        rows = measure(problem, sizes, repetitions, lambda: progress.advance(bar))
    console.print(table(rows, title))
    console.print(
        "work: samples x layers run. agree: samples with the model's answer at full depth. The loop waits at every exit until "
        "all of its batch would leave; at batch 1 it is what the papers' code does."
    )
    found = {
        "task": problem.task,
        "facts": {**facts, "threads": torch.get_num_threads(), "repetitions": repetitions},
        "machine": info.collect(),
        "rows": [asdict(row) for row in rows],
    }
    with replacing(folder / f"{problem.task}.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    draw(folder / f"{problem.task}.png", rows, title)
    console.print(f"wrote {folder / problem.task}.json and {folder / problem.task}.png", highlight=False)
    return found


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows as a rich table of eighty columns."""
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("B", "system", "samples/s", "p10-p90", "work", rows[0].metric, "agree"):
        result.add_column(heading, justify="left" if heading == "system" else "right", no_wrap=True)
    for number, row in enumerate(rows):
        result.add_row(
            str(row.batch),
            f"{row.system}, {row.mode}" if row.system == "transformers" else row.mode,
            f"{row.samples_per_s_median:.0f}" if row.samples_per_s_median >= 100 else f"{row.samples_per_s_median:.1f}",
            f"{row.samples_per_s_p10:.0f}-{row.samples_per_s_p90:.0f}",
            f"{row.samples_x_layers:.1%}",
            f"{row.quality:.1%}",
            f"{row.agreement:.1%}",
            end_section=number + 1 < len(rows) and rows[number + 1].batch != row.batch,
        )
    return result
