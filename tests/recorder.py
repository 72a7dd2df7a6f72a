"""A CUDA graph for tests on the CPU: records calls with the tensors they were given, and runs the same calls again.

Like a graph it knows nothing of Python: what was decided while recording stays decided, and a replay reads and writes the
memory of the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dyndepth.runtime.graph import GraphResult, When


class Recorder(TorchDispatchMode):
    """dyndepth.runtime.graph_pool.Capture. `conditions`: record them, as conditional nodes; else bodies are never asked for."""

    def __init__(self, conditions: bool = False) -> None:
        super().__init__()
        self.conditions = conditions
        #: What is recorded now: calls, and (condition, calls of its body).
        self.calls: list[Any] = []
        #: Bodies that ran, and bodies that were passed over, in all replays.
        self.taken: list[int] = [0, 0]

    def __call__(self, run: Callable[[When | None], GraphResult]) -> tuple[GraphResult, Callable[[], None]]:
        self.calls = calls = []
        with self:
            result = run(self._when if self.conditions else None)
        return result, lambda: self._again(calls)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def _when(self, condition: Tensor, body: Callable[[], None]) -> None:
        outer, self.calls = self.calls, []
        body()
        outer.append((condition, self.calls))
        self.calls = outer

    def _again(self, calls: list[Any]) -> None:
        for call in calls:
            if len(call) == 2:
                holds = bool(call[0])
                self.taken[not holds] += 1
                if holds:
                    self._again(call[1])
                continue
            func, args, kwargs, out = call
            for old, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                if old is not new and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
