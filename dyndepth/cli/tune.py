"""Launch choices: what `dyndepth info --launch` prints, and the command that searches for better ones on a GPU."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dyndepth.cli.common import app, dtype_of
from dyndepth.errors import ArgumentError, BackendError

#: Processors, bytes of shared memory a program can have, lanes: what launch choices ask of a device that is not here.
DEVICES = {
    "sm_80": (108, 166912, 32), "sm_86": (84, 101376, 32), "sm_89": (142, 101376, 32), "sm_90": (132, 232448, 32),
    "sm_100": (148, 232448, 32), "sm_120": (170, 101376, 32), "gfx942": (304, 65536, 64), "gfx950": (256, 163840, 64),
}  # fmt: skip


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="A known model (Llama-3-8B, Qwen3-8B, SmolLM2-135M), or a config.json.")],
    rows: Annotated[str, typer.Option(help="Rows of a pass; buckets are powers of two from 16.")] = "16,32,64,256",
    ops: Annotated[str | None, typer.Option(help="Only these, by commas.", show_default="all")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Time tile sizes of Triton's kernels on this GPU and keep the fastest in the cache folder, for launches from then on."""
    from dyndepth.tuning import OPS, gpu, problems

    names = OPS if ops is None else tuple(ops.split(","))
    if unknown := [name for name in names if name not in OPS]:
        raise ArgumentError(f"tune: ops are {', '.join(OPS)}, got {', '.join(unknown)}")
    wanted = [problem for problem in problems(_sizes(model), _rows(rows)) if problem.op in names]
    console = Console(highlight=False)
    for problem, found in gpu.tune(wanted, dtype_of(dtype)):
        said = "nothing could run" if found is None else f"{found.cost * 1e6:.1f} us, {found.tried} tried"
        before = "" if found is None or found.start is None else f" (rules {found.start * 1e6:.1f} us)"
        console.print(f"{problem.op} {problem.what}, {problem.rows} rows: {said}{before}", soft_wrap=True)


def choices(architecture: str, model: str, rows: str, as_json: bool) -> None:
    """Tile sizes, and where they come from, for every launch of a model that tables may choose for."""
    from dyndepth.tuning import problems

    if importlib.util.find_spec("triton") is None:
        raise BackendError("info --launch: Triton is not installed")
    if architecture not in DEVICES:
        raise ArgumentError(f"info: --launch knows {', '.join(DEVICES)}, got {architecture!r}")
    launch: Any = importlib.import_module("dyndepth.kernels.launch")
    device = launch.Device(*DEVICES[architecture], architecture)
    found = [
        {"op": problem.op, "what": problem.what, "rows": problem.rows, **dataclasses.asdict(tiles),
         "grid": problem.config(device).grid, "source": source}
        for problem in problems(_sizes(model), _rows(rows)) for tiles, source in [problem.chosen(device)]
    ]  # fmt: skip
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    table = Table(
        "op", "rows", "grid", "tile", "inner", "warps", "stages", "from", title=f"{model} on {architecture}, half precision"
    )
    for one in found:
        tile, grid = f"{one['block_rows']} x {one['block_columns']}", " x ".join(map(str, one["grid"]))
        sizes = (one["block_inner"], one["num_warps"], one["num_stages"])
        table.add_row(f"{one['op']}: {one['what']}", str(one["rows"]), grid, tile, *map(str, sizes), one["source"])
    Console().print(table)


def _sizes(model: str) -> Any:
    from dyndepth.plan import Sizes

    return Sizes.read(model) if Path(model).exists() else Sizes.known(model)


def _rows(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise ArgumentError(f"--rows: wanted positive numbers by commas, got {text!r}")
    return found
