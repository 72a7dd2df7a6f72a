"""Timers around functions of the runtime, patched in from outside for the time of a block and taken out afterwards.

Time is exclusive: what a timed function spends in another timed one counts for that one only, so the times of all spans
below a span, and its own, add up to its duration to the nanosecond.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from dyndepth.runtime.climb import apart

#: The loop over tokens, and a pass of it up to the LM head: where steps begin.
LOOP, PASS = "loop", "pass"


@dataclass(frozen=True)
class Target:
    """A function to time: `owner` is `module` or `module:Class`, `part` what its time counts for."""

    owner: str
    name: str
    part: str
    #: What it calls counts for `part` too.
    opaque: bool = False
    #: Arguments to remember with every span, by parameter name; `a.b` remembers attribute b of a.
    facts: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.owner}.{self.name}"


_RUNTIME = "dyndepth.runtime"
#: Where a step begins and ends: all that a run needs that is timed as a whole.
MARKS = (
    Target(f"{_RUNTIME}.generate:_Loop", "run", LOOP),
    Target(f"{_RUNTIME}.generate:_Loop", "_pass", PASS),
)
#: The runtime in parts. Whatever none of them covers is Python and the rest.
TARGETS = (
    *MARKS,
    Target(f"{_RUNTIME}.session:Session", "rows", "embedding and rows", opaque=True),
    Target(f"{_RUNTIME}.stack:Stack", "run", "layers", opaque=True, facts=("begin", "end", "live")),
    Target(f"{_RUNTIME}.layer:Layer", "run", "layers", opaque=True, facts=("self.index", "live")),
    Target(f"{_RUNTIME}.forward:_Pass", "_boundary", "boundaries: rest"),
    Target(f"{_RUNTIME}.forward:_Pass", "_resume", "boundaries: rest"),
    Target(f"{_RUNTIME}.forward:_Pass", "_decide", "boundaries: judging", opaque=True),
    Target(f"{_RUNTIME}.forward:_Pass", "_head", "boundaries: exit head", opaque=True),
    Target(f"{_RUNTIME}.rows:Rows", "partition", "boundaries: compaction", opaque=True),
    Target(f"{_RUNTIME}.forward", "backfill_kv", "boundaries: back-fill", opaque=True),
    Target(f"{_RUNTIME}.propagate:Propagation", "store", "boundaries: back-fill", opaque=True),
    Target(f"{_RUNTIME}.forward:_Pass", "_result", "final norm and results", opaque=True),
    Target(f"{_RUNTIME}.bind:Model", "logits", "LM head", opaque=True),
    Target(f"{_RUNTIME}.bind:Model", "argmax", "LM head", opaque=True),
)


@dataclass(frozen=True)
class Span:
    """One call. Times in ns of `time.perf_counter_ns`; `own` is without the timed calls in it."""

    name: str
    part: str
    begin: int
    end: int
    own: int
    depth: int
    facts: tuple[int, ...]
    #: Involuntary context switches of the process when it began; 0 where nobody asked.
    switches: int

    @property
    def layers(self) -> tuple[int, int, int] | None:
        """(begin, end, live rows) of a span of layers; None for all others."""
        if self.part != "layers" or not self.facts:
            return None
        if len(self.facts) == 3:
            return self.facts[0], self.facts[1], self.facts[2]
        return self.facts[0], self.facts[0] + 1, self.facts[1]


@dataclass
class Recorder:
    """Spans in the order in which they ended. For one thread."""

    spans: list[Span] = field(default_factory=list)
    #: Targets that this version of the runtime does not have.
    missing: list[str] = field(default_factory=list)
    _open: list[_Frame] = field(default_factory=list)

    def timed(self, function: Callable[..., Any], target: Target) -> Callable[..., Any]:
        """The function with a timer around it."""
        names = list(inspect.signature(function).parameters)
        known = all(fact.partition(".")[0] in names for fact in target.facts)
        readers = [_reader(fact, names) for fact in target.facts] if known else []
        opened, name, part, opaque = self._open, target.name, target.part, target.opaque
        clock = time.perf_counter_ns
        marks = part in (LOOP, PASS)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if opened and opened[-1].opaque:
                return function(*args, **kwargs)
            facts = tuple(read(args, kwargs) for read in readers)
            switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if marks else 0
            frame = _Frame(opaque)
            opened.append(frame)
            begin = clock()
            try:
                return function(*args, **kwargs)
            finally:
                end = clock()
                opened.pop()
                if opened:
                    opened[-1].inner += end - begin
                self.spans.append(Span(name, part, begin, end, end - begin - frame.inner, len(opened), facts, switches))

        return run


@dataclass
class _Frame:
    opaque: bool
    #: ns in timed calls below.
    inner: int = 0


@contextlib.contextmanager
def timing(targets: Sequence[Target] = TARGETS) -> Iterator[Recorder]:
    """Times the targets until the block is left, by whatever way; then everything is as it was."""
    recorder = Recorder()
    with contextlib.ExitStack() as restore:
        if any(target not in MARKS for target in targets):
            restore.enter_context(apart())  # one call would stand for layers and judgements
        for target in targets:
            owner = _owner(target)
            # An owner's own dictionary: what a class inherits must not be set on it when it is restored.
            known = MappingProxyType({}) if owner is None else vars(owner)
            if target.name not in known:
                if target in MARKS:
                    raise RuntimeError(f"profile: the runtime has no {target.label}, where steps would begin")
                recorder.missing.append(target.label)
                continue
            original = known[target.name]
            restore.callback(setattr, owner, target.name, original)
            setattr(owner, target.name, recorder.timed(original, target))
        yield recorder


def _owner(target: Target) -> Any:
    module, _, name = target.owner.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        return None
    return getattr(found, name, None) if name else found


def _reader(fact: str, names: list[str]) -> Callable[[tuple[Any, ...], dict[str, Any]], int]:
    parameter, _, attribute = fact.partition(".")
    at = names.index(parameter)

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        value = args[at] if at < len(args) else kwargs[parameter]
        return int(getattr(value, attribute)) if attribute else int(value)

    return read
