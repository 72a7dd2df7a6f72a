"""The command that predicts: plan."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from dyndepth.cli.common import app, dtype_of
from dyndepth.errors import ArgumentError

if TYPE_CHECKING:
    from dyndepth.plan import Advice, Exit, Machine, Option, Shape, Sizes

_Kind = TypeVar("_Kind", "Shape", "Sizes")
#: Rows of a batch: predictions keep a probability for each.
_MOST_ROWS = 4096


@app.command()
def plan(
    model: Annotated[str | None, typer.Option(help="Checkpoint: folder or hub name; or `demo`.", show_default="demo")] = None,
    config: Annotated[Path | None, typer.Option(help="A config.json instead of a checkpoint; no weights needed.")] = None,
    machine: Annotated[str, typer.Option(help="`here` (measured once), or a GPU's name such as h100-sxm.")] = "here",
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,4,16,32,64",
    context: Annotated[int, typer.Option(min=0, help="Tokens whose K,V every row reads.")] = 256,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    exits: Annotated[str | None, typer.Option(help="Exits folder, or `demo`; its record gives the rates.")] = None,
    rates: Annotated[
        str | None, typer.Option(help="BOUNDARY:SHARE,... of live rows that leave; or curve:REACH[:STEEPNESS].")
    ] = None,
    heads: Annotated[str, typer.Option(help="Who may judge: A full head, B router, C shortlist only.")] = "A,B",
    margin: Annotated[float, typer.Option(help="Gain below which the advice is `don't`.")] = 0.02,
    again: Annotated[bool, typer.Option(help="Measure this machine anew.")] = False,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Bytes, FLOPs and lower bounds of ops and passes instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Predict time per step with exits, and say which to use, or `don't` (docs/plan.md, docs/roofline.md)."""
    from dyndepth.plan import Machine, Shape, Sizes, advise, peak

    batches = _batches(batch)
    dtype_of(dtype)
    shape = _of_model(model, config, Shape)
    bands, source = _exits(shape, exits, rates, model in (None, "demo") and config is None)
    if roofline:
        from dyndepth.cli.roofline import say, write_json

        limits = Machine.measure(dtype, again=again) if machine == "here" else peak(machine, dtype)
        sizes = _of_model(model, config, Sizes)
        if as_json:
            write_json(limits, sizes, bands, batches, context)
        else:
            say(limits, sizes, bands, source, batches, context)
        return
    figures = Machine.measure(dtype, again=again) if machine == "here" else Machine.named(machine, dtype)
    judges = tuple(part.strip() for part in heads.split(","))
    found = [advise(figures, shape, bands, rows, context, heads=judges, margin=margin) for rows in batches]
    if as_json:
        sys.stdout.write(json.dumps(_facts(figures, shape, bands, source, found), indent=1) + "\n")
        return
    console = Console(highlight=False)
    _say_what(console, figures, shape, bands, source, context)
    console.print(_table(found))
    for advice in found:
        console.print(f"batch {advice.rows}: {'' if advice.choice else 'don’t. '}{advice.reason}", soft_wrap=True)
        for note in _notes(advice, judges, margin):
            console.print(f"  {note}", style="yellow", soft_wrap=True)


def _batches(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if any(not part.isdecimal() or not 1 <= int(part) <= _MOST_ROWS for part in parts):
        raise ArgumentError(f"--batch: wanted numbers from 1 to {_MOST_ROWS} such as 1,16,64, got {text!r}")
    return [int(part) for part in parts]


def _of_model(model: str | None, config: Path | None, kind: type[_Kind]) -> _Kind:
    """Shape or Sizes of what the user named."""
    if config is not None:
        if model is not None:
            raise ArgumentError("plan: --model and --config exclude each other")
        return kind.read(config)
    if model in (None, "demo"):
        return kind.demo()
    assert model is not None
    if Path(model).expanduser().is_dir():
        return kind.read(model)
    if model.startswith((".", "/", "~")):
        raise ArgumentError(f"model: there is no folder {model}")
    from transformers import AutoConfig

    try:
        return kind.of(AutoConfig.from_pretrained(model), model)
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(f"model: {model} cannot be read: {' '.join(str(error).split())}") from error


def _exits(shape: Shape, exits: str | None, rates: str | None, of_demo: bool) -> tuple[tuple[Exit, ...], str]:
    """The exits to plan with, and in words where their rates come from."""
    from dyndepth.plan import curve, exits_of, parse_rates

    given = None
    if rates is not None and rates.startswith("curve:"):
        if exits is not None:
            raise ArgumentError("--rates: a curve brings its own exit points, so it cannot be given with --exits")
        try:
            numbers = [float(part) for part in rates.split(":")[1:]]
        except ValueError:
            numbers = []
        if not 1 <= len(numbers) <= 2:
            raise ArgumentError(f"--rates: wanted curve:REACH[:STEEPNESS] such as curve:0.5:4, got {rates!r}")
        shares = curve(shape.layers, numbers[0]) if len(numbers) == 1 else curve(shape.layers, numbers[0], numbers[1])
        return shares, f"assumed, {rates}"
    if rates is not None:
        given = parse_rates(rates, shape.layers)
        if exits is None:
            return given, "as given"
    if exits is None and not of_demo:
        return curve(shape.layers), "assumed: nothing was measured; give --exits or --rates"
    import dyndepth

    loaded = dyndepth.demo.load_exits() if exits in (None, "demo") else dyndepth.Exits.from_pretrained(str(exits))
    if loaded.model.layers != shape.layers:
        raise ArgumentError(f"--exits: made for a model of {loaded.model.layers} layers, this one has {shape.layers}")
    if given is not None:
        return exits_of(loaded, {one.leave: one.rate for one in given}), "as given"
    return exits_of(loaded), "equal at every band, from the rows x layers in the exits' record"


def _say_what(console: Console, machine: Machine, shape: Shape, exits: Sequence[Exit], source: str, context: int) -> None:
    console.print(
        f"{shape.name}: {shape.layers} layers of {shape.layer * machine.item / 1e6:.1f} MB, LM head "
        f"{shape.head / shape.layer:.1f} layers, K,V {shape.kv * machine.item} bytes a token and layer; context {context}",
        soft_wrap=True,
    )
    console.print(
        f"{machine.name}, {machine.dtype}: reads {machine.bandwidth / 1e9:.1f} GB/s, a product takes twice its time at one row "
        f"from {machine.crossover():.0f} rows ({machine.source})",
        soft_wrap=True,
    )
    listed = ", ".join(f"{one.leave}: {one.rate:.1%}" for one in exits)
    console.print(f"rows that leave, of those live there: {listed} ({source})", soft_wrap=True)


def _table(found: Sequence[Advice]) -> Table:
    from dyndepth.plan import HEADS

    table = Table("batch", "judge", "no exit", "all-out", "compaction", "re-batching", "advice", title="predicted ms per step")
    for advice in found:
        for heads in HEADS:
            first = heads == HEADS[0]
            cells = [_milliseconds(advice.best(policy, heads)) for policy in ("all-out", "compaction", "re-batching")]
            table.add_row(
                str(advice.rows) if first else "",
                heads,
                f"{advice.full.seconds * 1e3:.3g}" if first else "",
                *cells,
                (advice.choice.label if advice.choice else "don’t") if first else "",
                end_section=heads == HEADS[-1],
            )
    return table


def _milliseconds(option: Option | None) -> str:
    if option is None:
        return "-"
    passes = f" (k={option.passes})" if option.passes else ""
    return f"{option.seconds * 1e3:.3g}{passes}"


def _notes(advice: Advice, judges: Sequence[str], margin: float) -> list[str]:
    """What would gain, but is not advised."""
    notes = []
    got = advice.gain(advice.choice) if advice.choice else 0.0
    flush = advice.best("re-batching", judges)
    if flush is not None and advice.gain(flush) >= got + margin:
        notes.append(
            f"{flush.label} with {flush.passes} shallow passes to a deep one would gain {advice.gain(flush):.1%}; rows that "
            "go deep wait longer, and dyndepth.generate does not re-batch"
        )
    short = min((o for o in advice.options if o.heads == "C" and not o.passes), key=lambda o: o.seconds)
    if "C" not in judges and advice.gain(short) >= got + margin:
        notes.append(f"{short.label} would gain {advice.gain(short):.1%}, if rows that leave may emit shortlist words only")
    return notes


def _facts(machine: Machine, shape: Shape, exits: Sequence[Exit], source: str, found: Sequence[Advice]) -> dict[str, Any]:
    steps = []
    for advice in found:
        options = [{**dataclasses.asdict(option), "gain": advice.gain(option)} for option in advice.options]
        steps.append(
            {
                "batch": advice.rows,
                "context": advice.context,
                "full_s": advice.full.seconds,
                "options": options,
                "advice": None if advice.choice is None else dataclasses.asdict(advice.choice),
                "reason": advice.reason,
            }
        )
    return {
        "machine": machine.to_json(),
        "model": dataclasses.asdict(shape),
        "exits": [dataclasses.asdict(one) for one in exits],
        "rates": source,
        "steps": steps,
    }
