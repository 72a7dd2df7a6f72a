"""A killed run goes on: the cache writer and the trainer, shot at random points, end with the bytes of an undisturbed run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import killed_run
import pytest
import torch

_SHOTS = 20
# A fork of a process that has everything imported and no threads yet: a shot costs the run, not the imports.
_START = multiprocessing.get_context("forkserver")
_START.set_forkserver_preload(
    ["dyndepth.training.run", "transformers", "accelerate", "killed_run", "tiny_models", "matplotlib.pyplot"]
)


def _start(folder: Path) -> Any:
    process = _START.Process(target=killed_run.run, args=(str(folder),))
    process.start()
    return process


@pytest.mark.timeout(600)
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    whole = _start(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    folder, chance, hit = tmp_path / "shot", random.Random(3), dict.fromkeys(("corpus", "cache", "training"), 0)
    shots, finished = 0, 0
    while shots < _SHOTS:
        process = _start(folder)
        # Some runs get nowhere, others a few shards or updates further, and then a moment into whatever comes next.
        wanted = _done(folder) + chance.randint(0, 5)
        while process.exitcode is None and _done(folder) < wanted:
            process.join(0.002)
        process.join(chance.uniform(0, 0.3) if wanted == 0 else chance.uniform(0, 0.05))
        if process.exitcode is None:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            where = "training" if (folder / "run").exists() else "cache" if (folder / "cache").exists() else "corpus"
            hit[where] += 1
            shots += where != "corpus"  # of the cache writer and the trainer
            continue
        assert process.exitcode == 0
        _compare(tmp_path / "whole", folder)  # it came through, so there is nothing left to shoot at: begin anew
        finished += 1
        folder = tmp_path / f"shot-{finished}"
    last = _start(folder)
    last.join()
    assert last.exitcode == 0
    _compare(tmp_path / "whole", folder)
    assert min(hit["cache"], hit["training"]) >= 3, f"the shots hit {hit}"


def _done(folder: Path) -> int:
    """Shards and log entries so far."""
    log = folder / "run" / "metrics.jsonl"
    with contextlib.suppress(FileNotFoundError):
        return len(list((folder / "cache").glob("shard-*"))) + log.read_text().count("\n")
    return len(list((folder / "cache").glob("shard-*")))


def _compare(whole: Path, other: Path) -> None:
    """Same corpus, cache, weights, exits and log; checkpoints are the library's and hold times."""
    names = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    compared = [name for name in names if "checkpoint-" not in str(name) and name.suffix not in (".png", ".pt")]
    assert len(compared) > 10
    theirs = [path.relative_to(other) for path in sorted(other.rglob("*")) if path.is_file()]
    assert [name for name in theirs if "checkpoint-" not in str(name)] == [n for n in names if "checkpoint-" not in str(n)]
    for name in compared:
        assert (other / name).read_bytes() == (whole / name).read_bytes(), name
    mine, wanted = (torch.load(folder / "run" / "best.pt", weights_only=True) for folder in (other, whole))
    assert mine["quality"] == wanted["quality"]
    for name, value in wanted["heads"].items():
        assert torch.equal(mine["heads"][name], value), name
