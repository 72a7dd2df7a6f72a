"""Fixtures shared by all tests."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a hub

from collections.abc import Iterator
from typing import Any

import pytest
import torch

torch.set_grad_enabled(False)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1234)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh tensors are filled with NaN or the largest integer, in C++ too: whatever is promised must be written."""
    torch.use_deterministic_algorithms(True)
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filling
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are skipped visibly where torch sees no device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def climbs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, list[int], int]]:
    """(begin, end, boundaries judged, boundary reached) of every climb."""
    from dyndepth.runtime.climb import Climb

    seen: list[tuple[int, int, list[int], int]] = []
    original = Climb.run

    def watched(self: Climb, *given: Any) -> Any:
        climbed = original(self, *given)
        seen.append((self.begin, self.end, [stop.boundary for stop in self.stops], climbed.boundary))
        return climbed

    monkeypatch.setattr(Climb, "run", watched)
    return seen
