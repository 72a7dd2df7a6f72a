"""A pass whose arithmetic takes rows one at a time, so that no number depends on how many rows there are.

PyTorch's products choose their order of sums by the number of rows, and functions such as exp differ in their last bit between
a vector and its tail. Both passes under this mode leave no such excuse: what they make must be the same bits. Ops run their
reference for a row at a time; of PyTorch's own functions all that appear are listed, and any other is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from counting import named
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dyndepth.op import REGISTRY

#: Arguments of our ops that have a row per row.
OP_ROWS = {
    "project_qkv": ("x", "pos", "slots"),
    "store_kv": ("q", "k", "v", "pos", "slots"),
    "ragged_attention": ("q", "seq", "pos"),
    "ragged_linear": ("x", "residual"),
    "exit_stats": ("hidden",),
    "router_score": ("hidden", "previous", "extra"),
    "backfill_kv": ("residual", "pos", "slots"),
}
#: Those that must be told that all of their rows are live.
_WITH_LIVE = ("project_qkv", "store_kv", "ragged_attention", "exit_stats", "router_score", "ragged_linear")
#: Those whose keys and values are everybody's, whatever `live` is.
_EVERYBODY = ("project_qkv", "store_kv")
#: PyTorch's functions whose last bit may depend on the number of rows, and the argument that has the rows.
BY_ROW = {
    "mm": "self", "addmm": "mat1", "silu": "self", "gelu": "self", "tanh": "self", "sigmoid": "self", "rsqrt": "self",
    "exp": "self", "linalg_vector_norm": "self", "mean": "self", "sum": "self", "pow": "self", "native_layer_norm": "input",
}  # fmt: skip
#: Moves, comparisons, integers, and what IEEE 754 rounds one number at a time.
EXACT = {
    "add", "sub", "mul", "div", "neg", "abs", "maximum", "minimum", "where", "clone", "copy_", "cat", "index",
    "index_select", "index_copy", "gather", "slice", "select", "view", "reshape", "_unsafe_view", "unsqueeze", "squeeze",
    "expand", "permute", "transpose", "t", "split", "unbind", "_to_copy", "to", "alias", "detach", "lift_fresh", "empty",
    "empty_like", "zeros", "zeros_like", "new_zeros", "new_empty", "full", "full_like", "ones", "ones_like", "arange", "lt",
    "le", "gt", "ge", "eq", "ne", "bitwise_and", "bitwise_or", "bitwise_not", "logical_not", "logical_and", "any", "all",
    "_local_scalar_dense", "nonzero", "cumsum", "as_strided", "embedding", "masked_fill", "new_full", "scalar_tensor",
    "argmax", "isnan", "fill_", "__lshift__", "bitwise_left_shift", "__and__", "__or__", "clamp", "equal", "unfold",
    "flatten", "index_put_", "index_copy_", "masked_fill_", "bitwise_right_shift", "__rshift__", "zero_", "remainder",
    "floor_divide", "clamp_min", "clamp_min_",
}  # fmt: skip


class RowByRow(TorchDispatchMode):
    """Results of every call of a list made of single rows' results."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = named(func, args, kwargs or {})
        space, _, name = func._schema.name.partition("::")
        if space == "dyndepth" and name in OP_ROWS:
            return _op(name, given)
        if space == "dyndepth" or name in EXACT or not _floats(given):
            return func(*args, **(kwargs or {}))
        if name not in BY_ROW:
            raise AssertionError(f"row by row: {func} is not known to give every row its own bits")
        x = given.pop(BY_ROW[name])
        if name in ("mean", "sum", "linalg_vector_norm"):
            assert all(axis % x.dim() for axis in given["dim"]), f"{func} over rows"
        return _joined([func(**given, **{BY_ROW[name]: row}) for row in _rows(x)]) if len(x) else func(*args, **(kwargs or {}))


def _floats(given: dict[str, Any]) -> bool:
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in given.values())


def _rows(x: Tensor) -> list[Tensor]:
    """Every row in memory of its own: alignment is the same for all."""
    return [row.clone(memory_format=torch.contiguous_format) for row in x.split(1)]


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def _op(name: str, given: dict[str, Any]) -> Any:
    """The reference, a row at a time: of those below `live`, or of the section. What rows at or past `live` get is NaN or -1,
    and nothing of theirs is looked at, so that whoever hands on a wrong counter, or reads what is unspecified, shows."""
    reference, count = REGISTRY[name].reference, len(given[OP_ROWS[name][0]])
    rows = {key: given[key] for key in OP_ROWS[name] if given.get(key) is not None}
    assert {len(value) for value in rows.values()} == {count}, f"row by row: {name} with rows of some arguments alone"
    rest = {key: value for key, value in given.items() if key not in rows and key not in ("live", "section")}
    if name in _WITH_LIVE:
        rest["live"] = None
    if not count:
        return reference(**rest, **rows)
    live = count if given.get("live") is None else min(int(given["live"]), count)
    begin, end = 0, count if name in _EVERYBODY else live
    if given.get("section") is not None:
        begin, end = int(given["section"][0]), int(given["section"].sum())
    single = {key: _rows(value) for key, value in rows.items()}
    parts = [reference(**rest, **{key: value[at] for key, value in single.items()}) for at in range(begin, end)]
    if name == "backfill_kv":
        return None
    if not parts:  # nobody is live: the shapes of a row that is not looked at
        nobody = {key: torch.zeros_like(value[0]) for key, value in single.items()}
        parts = [reference(**rest, **nobody)]
    whole = _joined(parts)
    return _unspecified(whole, live, count) if isinstance(whole, Tensor) else tuple(_unspecified(x, live, count) for x in whole)


def _unspecified(found: Tensor, live: int, count: int) -> Tensor:
    """Rows `[0, live)` of what was found, and of `count` the others spoilt."""
    spoilt = torch.nan if found.is_floating_point() else -1
    return torch.cat([found[:live], found.new_full((count - live, *found.shape[1:]), spoilt)])
