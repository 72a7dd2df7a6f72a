"""Capture on a GPU: `torch.cuda.CUDAGraph`, memory shared by all graphs of a pool, conditional nodes where torch has them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyndepth.runtime.graph import GraphResult, When

#: What torch's graphs must be able to do: bodies that run if a bool on the device holds (CUDA 12.4 and later).
_CONDITIONAL = ("begin_capture_to_if_node", "end_capture_to_conditional_node")


class CudaCapture:
    """dyndepth.runtime.graph_pool.Capture by CUDA graphs.

    Graphs replay one after the other on one stream, and results stay allocated, so they can share the memory in between.

    Args:
        conditional: record conditions as conditional nodes. None: where a trial on this device gives the right answers.
    """

    def __init__(self, device: torch.device, conditional: bool | None = None) -> None:
        self.device = device
        self.conditional = no_conditions(_index(device)) is None if conditional is None else conditional
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[When | None], GraphResult]) -> tuple[GraphResult, Callable[[], None]]:
        with torch.cuda.device(self.device):
            # Kernels are compiled and libraries make their handles before anything is recorded. Both sides of a condition run:
            # whatever the wrong one writes for these rows, the replay that follows writes over.
            before = torch.cuda.current_stream()
            self.stream.wait_stream(before)
            with torch.cuda.stream(self.stream):
                run(_both if self.conditional else None)
            before.wait_stream(self.stream)
            graph: Any = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                result = run(functools.partial(_node, graph) if self.conditional else None)
        return result, graph.replay


def _both(_somebody: Tensor, body: Callable[[], None]) -> None:
    body()


def _node(graph: Any, condition: Tensor, body: Callable[[], None]) -> None:
    graph.begin_capture_to_if_node(condition.reshape(()))
    try:
        body()
    finally:
        graph.end_capture_to_conditional_node()


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def no_conditions(device: int) -> str | None:
    """Why graphs on a device record no conditions, or None. Tries it out once: products and fresh memory in the body."""
    absent = [name for name in _CONDITIONAL if not hasattr(torch.cuda.CUDAGraph, name)]
    if absent:
        return f"torch {torch.__version__} has no CUDAGraph.{absent[0]}"
    with torch.cuda.device(device):
        value, condition = torch.eye(16, device="cuda"), torch.ones(1, dtype=torch.bool, device="cuda")

        def twice() -> None:
            value.copy_(value @ (2 * torch.eye(16, device="cuda")))

        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                twice()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, stream=stream):
                _node(graph, condition, twice)
            found = []
            for holds in (True, False, True):
                condition.fill_(holds)
                graph.replay()
                found.append(float(value[3, 3]))
        except RuntimeError as error:
            return f"a trial failed: {str(error).splitlines()[0]}"
    return None if found == [4.0, 4.0, 8.0] else f"a trial found {found}, wanted [4.0, 4.0, 8.0]"
