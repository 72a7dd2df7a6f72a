"""What Triton's kernels read and write, address by address in the interpreter, is what the planner says an op must move;
and no address is touched that is not the call's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import op_harness
import pytest
import torch
from counting import declared
from torch import Tensor

from dyndepth import env
from dyndepth.op import REGISTRY, backend
from dyndepth.testing.edges import Maker
from dyndepth.testing.linear_cases import linear
from dyndepth.testing.makers import Paged, attention, backfill, compact, project, router, stats, store

pytestmark = pytest.mark.skipif(not env.triton_interpret(), reason="runs under TRITON_INTERPRET=1 (make test-interpreted)")

#: Rows of one sequence at positions of their own, and rows of sequences of their own: nobody shares a table's row or a page.
_ONE, _OWN = Paged(9, 4, 2, 16, 4, 1, 1), Paged(6, 4, 2, 16, 4, 6, 11, decode=True)
LIVE = (None, 0, 1, 4)
CALLS: dict[str, list[Maker]] = {
    "exit_stats": [
        *(stats(9, 24, 515, bias=True, live=live) for live in LIVE),
        stats(9, 24, 515, norm=False, short=77, live=4),
        stats(70, 24, 515, live=65),
    ],
    "router_score": [*(router(9, 65, 6, cosine=True, extra=3, live=live) for live in LIVE), router(9, 65, 1)],
    "ragged_attention": [
        *(attention(_OWN, live=live) for live in LIVE),
        attention(_OWN, window=5, live=4),
        attention(Paged(2, 4, 2, 16, 32, 2, 290, decode=True, tight=True), live=1),
    ],
    "ragged_linear": [
        *(linear(9, 40, 23, gated="silu", bias=True, gate_bias=True, live=live) for live in LIVE),
        *(linear(70, 40, 23, bias=True, residual=True, live=live) for live in (0, 65)),
    ],
    "store_kv": [
        *(store(_ONE, 8, live=live) for live in LIVE),
        store(_ONE, 0),
        *(store(_ONE, 5, queries=3, padding=padding) for padding in (False, True)),
        store(_ONE, 8, padding=True, live=1),
    ],
    "project_qkv": [
        *(project(_ONE, 40, 8, bias=True, norm=True, live=live) for live in LIVE),
        project(_ONE, 40, 8, padding=True, live=4),
        project(_ONE, 40, 8, live=9),
    ],
    "backfill_kv": [
        *(backfill(_ONE, 40, 3, 8, section=section) for section in (None, (4, 0), (4, 1), (2, 5))),
        backfill(_ONE, 40, 3, 8, norm=0, bias=False),
        *(backfill(_ONE, 40, 3, 8, padding=True, section=section) for section in (None, (2, 5))),
    ],
    "compact_rows": [compact(9, 5, most=4), compact(33, 8, run=1, most=4)],
}


@contextlib.contextmanager
def _accesses() -> Iterator[list[np.ndarray[Any, Any]]]:
    """Addresses of bytes that kernels load or store."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen: list[np.ndarray[Any, Any]] = []

    def bytes_at(pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        at = np.unique(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)])
        seen.append((at[:, None] + np.arange(size, dtype=at.dtype)).ravel())

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        bytes_at(pointers, mask)
        return load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        bytes_at(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(InterpreterBuilder, "create_masked_load", masked_load)
        patched.setattr(InterpreterBuilder, "create_masked_store", masked_store)
        yield seen


def _within(addresses: np.ndarray[Any, Any], memory: list[Tensor]) -> int:
    """How many of the addresses lie in these tensors' memory; what is elsewhere is a kernel's scratch."""
    found = np.zeros(addresses.shape, dtype=bool)
    for each in memory:
        begin = each.untyped_storage().data_ptr()
        found |= (addresses >= begin) & (addresses < begin + each.untyped_storage().nbytes())
    return int(found.sum())


def test_above_the_handover_kernels_read_what_the_library_wrote_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """exit_stats of 129 rows: of arguments kernels read the counter and the ids that won, beside them live rows' logits, which
    the planner charges nobody for. The library writes those of all rows."""
    live, words, products, product = 5, 70, [], torch.nn.functional.linear
    arguments = op_harness.copied(stats(129, 8, 90, short=words, live=live)(torch.float32, torch.Generator().manual_seed(3)))

    def kept(*given: Any) -> Tensor:
        products.append(product(*given))
        return products[-1]

    monkeypatch.setattr(torch.nn.functional, "linear", kept)
    with backend("triton"), _accesses() as seen:
        out = REGISTRY["exit_stats"](**arguments)
    touched = np.unique(np.concatenate(seen))
    assert _within(touched, op_harness._flat(out)) == live * (8 + 5 * 4)
    assert _within(touched, op_harness._flat(list(arguments.values()))) == 4 + 8 * len(out[0][:live].unique())
    assert [tuple(each.shape) for each in products] == [(129, words)]
    assert _within(touched, products) == live * words * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "number"), [(op, at) for op, makers in CALLS.items() for at in range(len(makers))])
def test_bytes_touched_are_those_declared_triton(
    op: str, number: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every address counts once, read or written, of arguments and results: live rows alone, and no weight for nobody. Nothing
    else is touched but scratch that the call made."""
    arguments = op_harness.copied(CALLS[op][number](dtype, torch.Generator().manual_seed(3)))
    schema = REGISTRY[op].overload._schema.arguments
    defaults = {each.name: each.default_value if each.has_default_value() else None for each in schema}
    scratch = _made(monkeypatch)
    with backend("triton"), _accesses() as seen:
        out = REGISTRY[op](**arguments)
    memory = [*op_harness._flat(list(arguments.values())), *op_harness._flat(out)]
    touched = np.unique(np.concatenate(seen)) if seen else np.empty(0, dtype=np.uint64)
    assert _within(touched, memory) == declared(defaults | arguments, out, op)
    assert _within(touched, memory + scratch) == len(touched), "addresses that are nobody's"


def _made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Filled with every tensor that torch.empty makes from now on."""
    made: list[Tensor] = []

    def noted(function: Any) -> Any:
        def called(*args: Any, **options: Any) -> Tensor:
            made.append(function(*args, **options))
            return made[-1]

        return called

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, noted(getattr(torch, name)))
    return made
