"""One cell: every system judged once, then timed in turn, every event written down at once."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compare.journal import Journal
from compare.system import Cell, System, end_ids

#: Involuntary context switches per second above which a block counts as preempted: a quiet machine has a few, another
#: busy process takes a core away every few milliseconds.
PREEMPTED = 50.0
Key = tuple[str, int, int]


@dataclass(frozen=True)
class Effort:
    repetitions: int
    #: No further repetition starts when it would end later than this many seconds after the cell's first; one always runs.
    seconds: float


@dataclass(frozen=True)
class Reference:
    """Full depth's text, and what it says at every position of it, the suppressed ends of sequence included."""

    text: Tensor  # int64 [batch, new tokens]
    said: Tensor  # int64 [batch, new tokens]
    ends: list[int]

    def teacher(self, answers: Tensor) -> float:
        """Share of tokens whose arg max is full depth's, up to and with the one that would end the answer."""
        rows = answers.shape[0]  # a system may have been asked about some rows only
        said = self._until_end(1)[:rows]
        return float((answers == self.said[:rows])[said].double().mean())

    def free(self, tokens: Tensor) -> float:
        """Share of positions with full depth's token, up to where full depth would end; 1 where it ends at once."""
        said = self._until_end(0)
        return float((tokens == self.text)[said].double().mean()) if bool(said.any()) else 1.0

    def _until_end(self, included: int) -> Tensor:
        ended = torch.isin(self.said, torch.tensor(self.ends, dtype=torch.int64)).long()
        return ended.cumsum(1) - included * ended == 0


def reference_of(full: System, cell: Cell) -> Reference:
    text = full.generate(cell, cell.new_tokens).tokens
    return Reference(text, full.generate(cell, cell.new_tokens, text).tokens, end_ids(cell.model))


def measure(
    journal: Journal, key: Key, cell: Cell, systems: list[System], full: System, effort: Effort, say: Callable[[str], None]
) -> None:
    """Judges and times what the journal does not know yet."""
    if all(_done(journal, key, system, effort) for system in systems):
        return
    begin = time.perf_counter()
    reference = reference_of(full, cell)
    for system in systems:
        if journal.of(key, system.name, "judged") or journal.of(key, system.name, "failed"):
            continue
        say(f"{_title(key)}: judging {system.name}")
        attempt(journal, key, system.name, functools.partial(_judge, journal, key, cell, system, reference))
    for repetition in range(effort.repetitions):
        round_begin = time.perf_counter()
        for system in systems:
            if journal.of(key, system.name, "failed") or len(journal.of(key, system.name, "block")) > repetition:
                continue
            say(f"{_title(key)}: repetition {repetition + 1}, {system.name}")
            attempt(journal, key, system.name, functools.partial(_block, journal, key, cell, system, reference, repetition))
        now = time.perf_counter()
        if now - begin + (now - round_begin) > effort.seconds:
            for system in systems:
                journal.add(key, system.name, "enough")
            return


def _done(journal: Journal, key: Key, system: System, effort: Effort) -> bool:
    if journal.of(key, system.name, "failed") or journal.of(key, system.name, "enough"):
        return True
    return len(journal.of(key, system.name, "block")) >= effort.repetitions


def attempt(journal: Journal, key: Key, name: str, run: Callable[[], None]) -> None:
    """One system's turn: whatever it raises is its reason, and the others go on."""
    if journal.died(key, name):
        journal.add(key, name, "failed", reason="the process died twice while this system ran (out of memory?)")
        return
    journal.add(key, name, "begun")
    try:
        run()
    except Exception as error:
        journal.add(key, name, "failed", reason=" ".join(f"{type(error).__name__}: {error}".split())[:2000])
    except BaseException:
        journal.add(key, name, "stopped")
        raise


def _judge(journal: Journal, key: Key, cell: Cell, system: System, reference: Reference) -> None:
    """Also the call that warms up: allocations, compilation, an engine that starts."""
    reason = system.missing() or system.refuses(cell)
    if reason is not None:
        journal.add(key, system.name, "failed", reason=reason)
        return
    out = system.generate(cell, cell.new_tokens, reference.text)
    _check(out.tokens, min(cell.batch, out.tokens.shape[0]), cell.new_tokens)  # a slow one may be asked about fewer rows
    journal.add(key, system.name, "judged", teacher=reference.teacher(out.tokens), share=out.share)


def _block(journal: Journal, key: Key, cell: Cell, system: System, reference: Reference, repetition: int) -> None:
    """A call for one new token, then the whole call: their difference is decoding."""
    facts: dict[str, Any] = {"repetition": repetition}
    for kind, new_tokens in (("first_token", 1), ("whole", cell.new_tokens)):
        switches, begin = system.switches(), time.perf_counter()
        out = system.generate(cell, new_tokens)
        seconds = time.perf_counter() - begin
        switched = system.switches() - switches
        _check(out.tokens, cell.batch, new_tokens)
        facts |= {
            f"{kind}_s": seconds, f"{kind}_switches": switched, f"{kind}_preempted": switched / seconds > PREEMPTED,
        }  # fmt: skip
    journal.add(key, system.name, "block", **facts, free=reference.free(out.tokens))


def _check(tokens: Tensor, rows: int, new_tokens: int) -> None:
    if tuple(tokens.shape) != (rows, new_tokens):
        raise ValueError(f"wanted tokens [{rows}, {new_tokens}], got {list(tokens.shape)}")


def _title(key: Key) -> str:
    return f"{key[0]}, batch {key[1]}, context {key[2]}"
