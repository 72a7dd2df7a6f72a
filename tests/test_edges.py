"""What the cases of ops must bring to every GPU kernel, computed from the cases that run without a GPU.

Triton's run under its interpreter, in each dtype; CUDA's own by fibers. A size counts where it is computed: rows that a counter
leaves out bring nothing (tests/kernel_cases.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import op_harness
import pytest
from kernel_cases import by_fibers, cuda_kernels, kernels, values

from dyndepth import ops  # noqa: F401  (registers the ops)
from dyndepth.op import REGISTRY
from dyndepth.testing import CASES

FEW, MANY = {1, 2, 31, 32, 33}, {1023, 1024, 1025}
EVERY = {"rows": FEW | MANY, "live": {"0", "1", "n-1", "n"}}
HEADS = {"head_dim": {64, 80, 96, 128, 256}}
PAGES = {"page": {1, 16, 32}, **HEADS}
STORED = {**PAGES, "slot": {False, True}}
#: Arguments that begin at odd addresses: all that a kernel is handed. The others have scratch, products of the library and a
#: counter. Rows apart are for arguments that may lie so.
KV = {"k", "v", "q", "cos", "sin", "pos", "slots", "pages", "live"}
QKV = {f"{one}_{what}" for one in "qkv" for what in ("weight", "bias")} | {"q_gain", "k_gain"}
REQUIRED: dict[str, dict[str, set[Any]]] = {
    "partition": {**EVERY, "odd": {"state"}},
    "move": {**EVERY, "odd": {"payloads"}, "apart": {"payloads"}},
    # From 129 rows on the library multiplies.
    "block_stats": {
        **EVERY, "rows": FEW, "words": {"blocks and a part"}, "with": {"head_bias", "norm_gain", "vocab_ids", "softcap"},
        "odd": {"hidden", "head_weight", "head_bias", "norm_gain", "vocab_ids", "live"},
    },
    "logit_stats": {
        **EVERY, "rows": {129} | MANY, "words": {"blocks and a part"}, "products": {1, 2},
        "with": {"head_bias", "norm_gain", "vocab_ids", "softcap"},
    },
    "fold": {**EVERY, "odd": {"vocab_ids", "live"}, "rounds": {1, 2}, "with": {"vocab_ids"}},
    "router_score": {
        **EVERY,
        "odd": {"hidden", "weight1", "bias1", "weight2", "bias2", "previous", "cosine_weight", "extra", "extra_weight", "live"},
    },
    "attend": {
        **EVERY, "odd": {"q", "pages", "block_table", "seq", "pos", "live"}, "group": {1, 3, 4, 8}, **PAGES,
        "pages with a tail": {0, 1, 2, 3}, "pages without": {1, 3}, "with": {"softcap", "window"},
    },
    # More rows fill the machine by themselves: nothing is split, nothing is combined.
    "combine": {
        **EVERY, "rows": FEW, **HEADS, "filled of splits": {(2, 2), (1, 5), (3, 5), (5, 5), (3, 3)},
        "with": {"softcap", "window"},
    },
    "ragged_linear": {**EVERY, "odd": {"x", "weight", "bias", "gate_weight", "gate_bias", "residual", "live"}},
    "store_kv": {**EVERY, "queries": FEW | MANY, "odd": KV, "apart": {"q", "k", "v"}, **STORED},
    "project_qkv": {
        **EVERY, "queries": FEW | MANY, "odd": {"x"} | QKV | KV - {"q", "k", "v"}, "group": {1, 3, 4, 8}, **STORED,
        "apart": {"q_weight", "k_weight", "v_weight"},
    },
    "backfill_kv": {
        **EVERY, **STORED, "odd": {"residual", "weight", "bias", "variant", "section", "down"} | KV - {"q", "k", "v", "live"},
    },
    # One launch up to 1024 rows, two above.
    "compact_rows_once": {**EVERY, "rows": FEW | {1023, 1024}, "odd": {"state", "payloads"}, "apart": {"payloads"}},
    "compact_rows_count": {"rows": {1025, 2048}, "odd": {"state"}},
    "compact_rows_move": {"rows": {1025, 2048}, "odd": {"state", "payloads"}, "apart": {"payloads"}},
    "accept_drafts_greedy": {"rows": FEW | MANY | {70_000}, "odd": {"drafts", "lengths", "target"}},
    # A block of 1024 threads per row, each a fiber.
    "accept_drafts_sampled": {"rows": FEW, "odd": {"drafts", "lengths", "target", "draft_probs", "uniforms"}},
    **{
        f"store_kv_{dtype}": {**EVERY, "queries": FEW | MANY, "odd": KV, "apart": {"q", "k", "v"}, **STORED}
        for dtype in ("float32", "bfloat16", "float16")
    },
}  # fmt: skip
OPS = [name for name in sorted(REGISTRY) if "triton" in REGISTRY[name].providers]
CUDA = [name for name in sorted(REGISTRY) if "cuda" in REGISTRY[name].providers]


#: What Triton's interpreter meets in float32 and bfloat16 alone: cases of more than a thousand rows, a program each.
NOT_IN_FLOAT16 = {"rows": MANY, "queries": MANY, "live": {"1"}}


def _runs() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(kernel, dtype, op, arguments) of everything that runs: by Triton's interpreter, then by fibers (in their own)."""
    for op in OPS:
        for case, dtype in op_harness.interpreted(op):
            given = case.build(dtype)
            yield from ((kernel, str(dtype).removeprefix("torch."), op, given) for kernel in kernels(op, given))
    for op in CUDA:
        for dtype in op_harness.DTYPES if op == "store_kv" else op_harness.DTYPES[:1]:
            for case in by_fibers(op):
                given = case.build(dtype)
                yield from ((kernel, "", op, given) for kernel in cuda_kernels(op, given))


def _met() -> tuple[dict[tuple[str, str], dict[str, set[Any]]], dict[str, set[str]]]:
    """Values by kernel, dtype and kind, and kernels by op."""
    found: dict[tuple[str, str], dict[str, set[Any]]] = defaultdict(lambda: defaultdict(set))
    of_op: dict[str, set[str]] = defaultdict(set)
    for kernel, dtype, op, given in _runs():
        of_op[op].add(kernel)
        for kind, brought in values(op, given).items():
            found[kernel, dtype][kind] |= brought
    return found, of_op


MET, OF_OP = _met()


@pytest.mark.parametrize(("kernel", "dtype"), sorted(MET))
def test_every_kernel_meets_every_value(kernel: str, dtype: str) -> None:
    spared = NOT_IN_FLOAT16 if dtype == "float16" else {}
    wanted = {kind: values - spared.get(kind, set()) for kind, values in REQUIRED[kernel].items()}
    met = MET[kernel, dtype]
    missing = {kind: values - met[kind] for kind, values in wanted.items() if not values <= met[kind]}
    assert not missing, f"{kernel} computes no case in {dtype or 'its dtype'} with {missing}"


def test_these_are_all_kernels() -> None:
    assert {kernel for kernel, _ in MET} == set(REQUIRED)
    by_triton = {kernel for kernel, dtype in MET if dtype}
    assert {(kernel, dtype) for kernel, dtype in MET if dtype} == {
        (kernel, dtype) for kernel in by_triton for dtype in ("float32", "bfloat16", "float16")
    }


@pytest.mark.parametrize("op", sorted(OF_OP))
def test_every_argument_is_wanted_at_an_odd_address(op: str) -> None:
    tensors = {each.name for each in REGISTRY[op].overload._schema.arguments if "Tensor" in str(each.type)}
    assert set().union(*(REQUIRED[kernel].get("odd", set()) for kernel in OF_OP[op])) >= tensors


@pytest.mark.parametrize("live", [0, 1])
@pytest.mark.parametrize("op", [op for op in OPS if op != "compact_rows"])
def test_rows_that_nobody_computes_bring_nothing(op: str, live: int) -> None:
    """A table that calls of no work would satisfy says nothing. Keys and values are everybody's."""
    given = next(case for case in CASES[op] if case.name == "shifted").build()
    name, counter = ("section", [3, live]) if op == "backfill_kv" else ("live", [live])
    brought = values(op, given | {name: given[name].new_tensor(counter)})
    everybody = op in ("store_kv", "project_qkv")
    assert ("rows" in brought) == everybody
    assert "queries" not in brought
    if live == 0 and not everybody:
        assert set(brought) == {"live"}
    if live == 1 and op == "ragged_attention":
        context = int(given["pos"][0]) + 1
        assert brought["pages with a tail"] | brought["pages without"] == {context // given["pages"].shape[2]}


@pytest.mark.parametrize("op", OPS)
def test_there_is_a_case_without_rows(op: str) -> None:
    empty = [case for case in CASES[op] if case.name == "empty"]
    assert empty
    assert not (kernels(op, empty[0].build()) - {"partition"}), "no rows, no launch but of counters"


@pytest.mark.parametrize("op", sorted(CASES))
def test_names_are_of_one_case_each(op: str) -> None:
    names = [case.name for case in CASES[op]]
    assert len(names) == len(set(names))
