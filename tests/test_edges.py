"""What the cases of ops must bring to every kernel, computed from the cases that run under Triton's interpreter."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from kernel_cases import kernels, values

from dyndepth import ops  # noqa: F401  (registers the ops)
from dyndepth.op import REGISTRY
from dyndepth.testing import CASES

FEW, MANY = {1, 2, 31, 32, 33}, {1023, 1024, 1025}
LIVE = {"0", "1", "n-1", "n"}
HEADS = {"head_dim": {64, 80, 96, 128, 256}}
PAGES = {"page": {1, 16, 32}, **HEADS}
STORED = {**PAGES, "slot": {False, True}}
#: Which values every kernel of Triton's meets. CUDA's own run on the same cases (tests/test_cuda_hosts.py) and at 70 000 rows
#: (tests/test_cuda_on_cpu.py). Rows apart are for arguments that may lie so; nothing is launched for no rows.
REQUIRED: dict[str, dict[str, set[Any]]] = {
    "partition": {"rows": FEW | MANY, "live": LIVE, "lie": {"odd address"}},
    "move": {"rows": FEW | MANY, "live": LIVE, "lie": {"odd address", "apart"}},
    # From 129 rows on the library multiplies.
    "block_stats": {"rows": FEW, "live": LIVE, "lie": {"odd address"}, "words": {"blocks and a part"}},
    "logit_stats": {"rows": {129} | MANY, "live": LIVE, "words": {"blocks and a part"}},
    "fold": {"rows": FEW | MANY, "live": LIVE},
    "router_score": {"rows": FEW | MANY, "live": LIVE, "lie": {"odd address"}},
    "attend": {
        "rows": FEW | MANY, "live": LIVE, "lie": {"odd address"}, "group": {1, 3, 4, 8}, **PAGES,
        "pages with a tail": {0, 1, 2, 3}, "pages without": {1, 3},
    },
    # More rows fill the machine by themselves: nothing is split, nothing is combined.
    "combine": {"rows": FEW, "live": LIVE, **HEADS},
    "ragged_linear": {"rows": FEW | MANY, "live": LIVE, "lie": {"odd address"}},
    "store_kv": {"rows": FEW | MANY, "live": LIVE, "lie": {"odd address", "apart"}, **STORED},
    "project_qkv": {"rows": FEW | MANY, "live": LIVE, "lie": {"odd address", "apart"}, "group": {1, 3, 4, 8}, **STORED},
    "backfill_kv": {"rows": FEW | MANY, "live": LIVE, "lie": {"odd address"}, **STORED},
}  # fmt: skip
OPS = [name for name in sorted(REGISTRY) if "triton" in REGISTRY[name].providers]


def _met() -> dict[str, dict[str, set[Any]]]:
    """By kernel and kind of value, over all cases that the interpreter runs."""
    found: dict[str, dict[str, set[Any]]] = defaultdict(lambda: defaultdict(set))
    for op in OPS:
        for case in CASES[op]:
            if case.bench or case.large or case.gpu:
                continue
            given = case.build()
            for kernel in kernels(op, given):
                for kind, brought in values(op, given).items():
                    found[kernel][kind] |= brought
    return found


MET = _met()


@pytest.mark.parametrize("kernel", sorted(REQUIRED))
def test_every_kernel_meets_every_value(kernel: str) -> None:
    missing = {kind: wanted - MET[kernel][kind] for kind, wanted in REQUIRED[kernel].items() if not wanted <= MET[kernel][kind]}
    assert not missing, f"{kernel} runs on no case with {missing}"


def test_these_are_all_kernels() -> None:
    assert set(MET) == set(REQUIRED)


@pytest.mark.parametrize("op", OPS)
def test_there_is_a_case_without_rows(op: str) -> None:
    empty = [case for case in CASES[op] if case.name == "empty"]
    assert empty
    assert not (kernels(op, empty[0].build()) - {"partition"}), "no rows, no launch but of counters"


@pytest.mark.parametrize("op", sorted(CASES))
def test_names_are_of_one_case_each(op: str) -> None:
    names = [case.name for case in CASES[op]]
    assert len(names) == len(set(names))
