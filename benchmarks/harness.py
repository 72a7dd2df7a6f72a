"""Timing one provider on one case, cold, after checking that its answer is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from dyndepth import ops  # noqa: F401  (registers the ops)
from dyndepth.op import REGISTRY, backend
from dyndepth.testing import CASES, Case
from dyndepth.testing.cases import Arguments

_ROUNDS = 30
#: Ops that know fewer dtypes than the others: probabilities are float32.
DTYPES = {"accept_drafts": [torch.float32]}
_Benchmark = TypeVar("_Benchmark", bound=Callable[..., None])


def cases(op: str) -> Callable[[_Benchmark], _Benchmark]:
    """Parametrisation over the case list that the tests use, dtypes and providers."""
    dtypes = DTYPES.get(op, [torch.float32, torch.bfloat16])
    names = [name for name in REGISTRY[op].providers if REGISTRY[op].providers[name].missing() is None]
    values = [
        pytest.param(case, dtype, provider, id=f"{case.name}-{str(dtype).removeprefix('torch.')}-{provider}")
        for case in CASES[op]
        if case.bench and not case.gpu
        for dtype in dtypes
        for provider in names
    ]
    return pytest.mark.parametrize(("case", "dtype", "provider"), values)


def size(*tensors: Tensor | None) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def run(
    benchmark: Any,
    op: str,
    case: Case,
    dtype: torch.dtype,
    provider: str,
    copy_roof: float,
    evict: Callable[[], Any],
    moved: Callable[[Arguments], int],
) -> None:
    """`moved` counts the fewest bytes the op must read and write."""
    arguments = case.build(dtype)
    refuse_wrong_answers(op, arguments, provider)
    name = str(dtype).removeprefix("torch.")
    benchmark.extra_info.update(
        op=op, case=case.name, dtype=name, provider=provider, bytes=moved(arguments), copy_roof=copy_roof
    )
    with backend(provider):
        benchmark.pedantic(lambda: REGISTRY[op](**arguments), setup=lambda: (evict(), None)[1], rounds=_ROUNDS, warmup_rounds=2)


def refuse_wrong_answers(op: str, arguments: Arguments, provider: str) -> None:
    """Raises unless the provider agrees with the reference on these arguments."""

    def answer(name: str) -> list[Tensor]:
        own = {key: value.clone() if key == "pages" else value for key, value in arguments.items()}
        with backend(name):
            found = REGISTRY[op](**own)
        flat = [] if found is None else list(found) if isinstance(found, tuple | list) else [found]
        flat = [t for item in flat for t in (item if isinstance(item, list) else [item])]
        live = arguments.get("live")
        flat = flat if live is None else [t[: int(live)] for t in flat]
        return [*flat, own["pages"]] if "pages" in own else flat

    for mine, reference in zip(answer(provider), answer("torch"), strict=True):
        if mine.dtype.is_floating_point:
            torch.testing.assert_close(mine, reference, rtol=2e-2, atol=2e-2)
        elif op == "exit_stats" and arguments["hidden"].dtype != torch.float32:
            # Half precision rounds near ties together: another order of adding may prefer the other word of a pair.
            assert float((mine == reference).float().mean()) > 0.7
        else:
            assert torch.equal(mine, reference)
