"""`make launch-table`: the checked-in tables of tile sizes, from compiling without a GPU. Nothing in them was measured.

Per architecture, model and bucket of rows the kernel is compiled as the rules choose it. Where that is at fault (stack or
spills, in a product no matrix instructions or loads under 16 bytes a lane, more shared memory than there is), neighbours are
compiled for as long as they are less so. Entries carry what the compiler said of them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from static_report import TARGETS, offline

from dyndepth.plan.sizes import Sizes
from dyndepth.tuning import OPS, Problem, problems, search

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
MODELS = ("SmolLM2-135M", "Llama-3-8B", "Qwen3-8B")
ROWS = (16, 32, 64, 256)
#: The kernel of an op that its tiles are of.
_KERNELS = {"ragged_attention": "attend", "exit_stats": "block_stats"}
tables: Any = importlib.import_module("dyndepth.kernels.tables")


def fault(op: str, target: str, found: dict[str, Any]) -> float:
    """How much is wrong with a kernel, 0 for nothing; in bytes, so that less is better."""
    wrong = float(found["spilled"]) + max(0, found["shared"] - TARGETS[target][2])
    if op == "ragged_linear":
        wrong += 1e6 * (found["matrix"] == 0) + 1e3 * max(0, 16 - (found["load"] or 0))
    return wrong


def entries(target: str, wanted: list[Problem]) -> dict[str, dict[str, Any]]:
    """Table entries of a target, by key."""
    made: dict[str, dict[str, Any]] = {}
    facts: dict[str, Any] = {}
    with offline(target, facts.__setitem__) as device:
        for problem in wanted:
            key = problem.key(device)
            if str(key) in made or (problem.op == "exit_stats" and problem.rows > 128):  # the library's there
                continue
            call = problem.call("meta", torch.bfloat16)
            known: dict[Any, dict[str, Any]] = {}

            def cost(
                tiles: Any, problem: Problem = problem, key: Any = key, call: Any = call, known: Any = known
            ) -> float | None:
                facts.clear()
                with tables.pinned(key, tiles):
                    try:
                        call()
                    except Exception as error:  # Triton has many for tiles that it cannot make
                        print(f"{target} {key} {tiles}: {str(error).splitlines()[0][:80]}")
                        return None
                known[tiles] = facts[_KERNELS.get(problem.op, problem.op)]
                return fault(problem.op, target, known[tiles])

            rule = problem.chosen(device)[0]
            first = cost(rule)
            found = None if first == 0 else search(problem.op, rule, cost, most=24)
            best = rule if found is None else found.tiles
            told = {
                name: known[best][name] for name in ("registers", "spilled", "shared", "occupancy", "limiter", "matrix", "load")
            }
            made[str(key)] = tables.entry(best, **told, rule=best == rule)
    return made


@contextlib.contextmanager
def without_tables() -> Iterator[None]:
    """Inside, rules alone choose: a table must not be made from itself."""
    before = os.environ.get("DYNDEPTH_LAUNCH")
    os.environ["DYNDEPTH_LAUNCH"] = "rules"
    try:
        yield
    finally:
        os.environ.pop("DYNDEPTH_LAUNCH")
        if before is not None:
            os.environ["DYNDEPTH_LAUNCH"] = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="*", default=list(ARCHITECTURES), choices=list(TARGETS))
    parser.add_argument("--ops", nargs="*", default=list(OPS), choices=OPS, help="entries to make anew; the others stay")
    wish = parser.parse_args()
    wanted = [problem for name in MODELS for problem in problems(Sizes.known(name), ROWS) if problem.op in wish.ops]
    for target in wish.targets:
        file: Path = tables.path(target, tables.STATIC)
        with without_tables():
            made = entries(target, wanted)
        tables.write(file, target, tables.STATIC, made)
        changed = [key for key, entry in made.items() if not entry["rule"]]
        print(f"{target}: {len(made)} entries; other than the rules: {', '.join(changed) or 'none'}")


if __name__ == "__main__":
    main()
