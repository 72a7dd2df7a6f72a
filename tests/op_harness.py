"""What every op's test file does the same way: run a provider on a case, compare with the oracle, check the contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dyndepth import env, ops  # noqa: F401  (ops registers them)
from dyndepth.op import REGISTRY, backend
from dyndepth.testing import CASES, Case, assert_as_exact_as, assert_same
from dyndepth.testing.case import duplicate
from dyndepth.testing.cases import Arguments, widened

#: Names of the outputs, in order; `pages` is written in place.
OUTPUTS = {
    "accept_drafts": ["accepted", "token"],
    "exit_stats": ["argmax", "top1", "top2", "logsumexp", "entropy", "entropy_half"],
    "router_score": ["score"],
    "ragged_attention": ["out"],
    "store_kv": ["q"],
    "project_qkv": ["q"],
    "ragged_linear": ["out"],
    "backfill_kv": [],
}
#: Providers that can afford to look at values; on a device wrong indices are the caller's fault (that is, no error).
HOST_CHECKED = ["torch", "cpp"]
#: Triton's interpreter takes seconds for what a GPU does in microseconds.
INTERPRETED = env.triton_interpret()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
if INTERPRETED:
    import interpreted_bfloat16

    interpreted_bfloat16.install()


def cases(op: str) -> list[Any]:
    return [
        pytest.param(case, id=case.name)
        for case in CASES[op]
        if not (case.large or case.gpu) and not (INTERPRETED and case.bench)
    ]


def cases_in_dtypes(op: str) -> list[Any]:
    """(case, dtype): every case in every dtype; in the interpreter those it can afford."""
    wanted = interpreted(op) if INTERPRETED else [(case.values[0], dtype) for dtype in DTYPES for case in cases(op)]
    return [pytest.param(case, dtype, id=f"{case.name}-{dtype}") for case, dtype in wanted]


def interpreted(op: str) -> list[tuple[Case, torch.dtype]]:
    """What Triton's interpreter runs: no case that is worth timing, and those of very many programs not in float16."""
    affordable = [case for case in CASES[op] if not (case.large or case.gpu or case.bench)]
    return [(case, dtype) for dtype in DTYPES for case in affordable if not (case.many and dtype == torch.float16)]


def providers(op: str) -> list[str]:
    """Providers to compare with the reference. The cpp provider must be there: the build is part of what is tested."""
    return [name for name in REGISTRY[op].providers if name != "torch" and REGISTRY[op].providers[name].missing() is None]


def copied(arguments: Arguments) -> Arguments:
    def copy(value: Any) -> Any:
        if isinstance(value, list):
            return [copy(item) for item in value]
        return duplicate(value) if isinstance(value, Tensor) else value

    return {name: copy(value) for name, value in arguments.items()}


def outcome(op: str, arguments: Arguments, provider: str | None = None) -> dict[str, Tensor]:
    """Outputs by name, pages after the call among them; rows at or past `live` are cut off (they are unspecified).

    `provider` None calls the reference function itself, which also takes float64.
    """
    arguments = copied(arguments)
    if provider is None:
        returned = REGISTRY[op].reference(**arguments)
    else:
        with backend(provider):
            returned = REGISTRY[op](**arguments)
    values = [] if returned is None else list(returned) if isinstance(returned, tuple | list) else [returned]
    live = arguments.get("live")
    if live is not None:
        values = [value[: int(live)] for value in values]
    found = dict(zip(OUTPUTS[op], values, strict=True))
    if "pages" in arguments and op != "ragged_attention":
        found["pages"] = arguments["pages"]
    return found


def assert_only_live_rows_are_written(op: str, case: Case, provider: str) -> None:
    """Under the `poisoned` fixture, rows at or past `live` still hold the poison: nobody computed them."""
    arguments = case.build()
    live = int(arguments["live"])
    with backend(provider):
        returned = REGISTRY[op](**arguments)
    for name, value in zip(OUTPUTS[op], returned if isinstance(returned, tuple) else [returned], strict=True):
        assert len(value) > live
        if value.dtype.is_floating_point:
            assert bool(value[live:].isnan().all()), f"{op} {case.name} {provider}: {name} was computed past live"
            assert bool(torch.isfinite(value[:live]).all()), f"{op} {case.name} {provider}: {name}"


def check_against_oracle(op: str, case: Case, dtype: torch.dtype, provider: str) -> None:
    """Integers are exact; floats as exact as PyTorch's own arithmetic in the working dtype."""
    arguments = case.build(dtype)
    truth = outcome(op, widened(arguments))
    reference = outcome(op, arguments)
    actual = outcome(op, arguments, provider)
    for name, value in actual.items():
        if value.dtype.is_floating_point:
            assert_as_exact_as(value, reference[name], truth[name], what=f"{op} {case.name} {provider}: {name}")
        else:
            assert_same(value, reference[name], f"{op} {case.name} {provider}: {name}")


def check_exact(op: str, arguments: Arguments, found: Tensor, what: str) -> None:
    """An op's only output, of whatever size: of a few numbers PyTorch's own error says little, so they get a plain bound."""
    truth, reference = (REGISTRY[op].reference(**given) for given in (widened(arguments), arguments))
    if found.numel() >= 500:
        assert_as_exact_as(found, reference, truth, what=what)
    else:
        bound = 64 * torch.finfo(found.dtype).eps
        torch.testing.assert_close(found.double(), truth, rtol=bound, atol=bound, msg=lambda text: f"{what}: {text}")


def check_contract(op: str, arguments: Arguments) -> None:
    """Schema, fake and dispatch agree (opcheck), and the op survives torch.compile(fullgraph=True), sizes fixed or symbols."""
    assert arguments.get("live") is None, "rows past live are unspecified, so there is nothing to compare"
    overload = REGISTRY[op].overload
    torch.library.opcheck(overload, (), copied(arguments))

    def call(given: Arguments) -> Any:
        return overload(**given)

    eager_arguments = copied(arguments)
    eager = call(eager_arguments)
    for dynamic in (False, True):
        torch._dynamo.reset()  # every case is a new shape; the recompile limit is not what is tested
        compiled_arguments = copied(arguments)
        compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")(compiled_arguments)
        for a, b in zip(_flat(eager), _flat(compiled), strict=True):
            assert_same(b, a, f"{op} compiled, dynamic={dynamic}")
        if "pages" in arguments:
            assert_same(compiled_arguments["pages"], eager_arguments["pages"], f"{op} compiled, dynamic={dynamic}: pages")


def _flat(value: Any) -> list[Tensor]:
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _flat(item)] if isinstance(value, list | tuple) else []
