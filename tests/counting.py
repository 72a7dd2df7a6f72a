"""A pass that counts: every call with the bytes that its tensors say it moves."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dyndepth.exits import Saturation, products
from dyndepth.op import backend
from dyndepth.ops._math import rms_normalise


def size(value: Any) -> int:
    """Bytes of a tensor, of tensors in a list, of nothing."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(size, value)) if isinstance(value, list | tuple) else 0


def named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by the names of the schema."""
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def declared(given: dict[str, Any], out: Any, op: str) -> int:
    """Bytes of a call by its tensors: all of each, but of pages, tables and unused weights what is used of them."""
    given, out = _live(dict(given), out, op)
    rest = 0
    pages, pos, slots = given.pop("pages", None), given.get("pos"), given.get("slots")
    turned = 0 if pos is None else len(pos)
    if op == "store_kv":  # rows without a slot: nobody asks for their keys and values
        stored = slots >= 0
        asks = torch.arange(len(slots)) < len(given["q"])
        turned = int((stored | asks).sum())
        given |= {"k": given["k"][stored], "v": given["v"][stored]}
    elif op == "backfill_kv" and slots is not None:
        turned = int((slots >= 0).sum())
    cos = given.pop("cos", None)
    given.pop("sin", None)
    if cos is not None:  # a row per token, of as many tables as there are
        tables = 1 if cos.dim() == 2 or given.get("variant") is None else len(given["variant"].unique())
        rest += 2 * tables * turned * cos.shape[-1] * cos.element_size()
    if op == "ragged_attention" and pages is not None:
        table, window, per_page = given.pop("block_table"), given.get("window", 0), pages.shape[2]
        for p in pos.tolist():
            seen = [at for at in range(p + 1) if not window or at > p - window]
            rest += 2 * len(seen) * pages[0, 0, 0].numel() * pages.element_size()
            rest += len({at // per_page for at in seen}) * table.element_size()
    elif op == "backfill_kv" and pages is not None:
        layers = given["weight"][..., 0].numel()
        rest += turned * layers * pages.element_size()
    elif pages is not None:
        rest += 2 * int((slots >= 0).sum()) * pages[0, 0, 0].numel() * pages.element_size()
    if given.get("vocab_ids") is not None:
        given["head_weight"] = given["head_weight"][given["vocab_ids"]]
        given["head_bias"] = None if given.get("head_bias") is None else given["head_bias"][given["vocab_ids"]]
    return rest + size(list(given.values())) + size(out)


#: Arguments of ops that have a row per row; of these those below `live`, or of a section, are looked at.
ROWS = {
    "ragged_attention": ("q", "seq", "pos"), "ragged_linear": ("x", "residual"), "exit_stats": ("hidden",),
    "router_score": ("hidden", "previous", "extra"), "backfill_kv": ("residual", "pos", "slots"),
}  # fmt: skip


def _live(given: dict[str, Any], out: Any, op: str) -> tuple[dict[str, Any], Any]:
    """What is looked at of a call whose counter is on the device: no weight if nobody is there who asks for it."""
    counter = given.get("section" if op == "backfill_kv" else "live")
    if counter is None:
        return given, out
    begin, count = counter.tolist() if op == "backfill_kv" else (0, int(counter))
    if out is not None:
        out = [each[:count] for each in out] if isinstance(out, list | tuple) else out[:count]
    if op == "store_kv":  # keys and values are everybody's
        return given | {"q": given["q"][:count]}, out
    if op == "project_qkv":
        return (given if count else given | {"q_weight": None, "q_bias": None, "q_gain": None}), out
    if count == 0:
        return {"live": counter}, out
    cut = {name: given[name][begin : begin + count] for name in ROWS[op] if given.get(name) is not None}
    return given | cut, out


#: Modules' work by the aten op that does it where everything runs through PyTorch.
MODULES = {
    "aten::embedding": "embedding", "aten::mm": "product", "aten::addmm": "product", "aten::silu": "activation",
    "aten::gelu": "activation", "aten::tanh": "activation", "aten::mul": "gate", "aten::add": "add", "aten::div": "scale",
}  # fmt: skip


#: What keeps buffers in shape where nothing may depend on who is live.
MOVES = {
    "aten::where": "select", "aten::index": "gather", "aten::index_copy": "scatter", "aten::clone": "copy",
    "aten::new_zeros": "fill", "aten::new_full": "fill",
}  # fmt: skip


class Counting(TorchDispatchMode):
    """Calls that reach the dispatcher, by (op, bytes of their tensors). What happens inside an op is the op's."""

    def __init__(self, moves: bool = False) -> None:
        super().__init__()
        self.modules = MODULES | (MOVES if moves else {})
        self.seen: Counter[tuple[str, int]] = Counter()
        #: Inside a norm: its parts are one call.
        self.quiet = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = named(func, args, kwargs)
        inputs = {name: value for name, value in given.items() if name != "out"}
        out = func(*args, **kwargs)
        name = func._schema.name
        if self.quiet:
            return out
        if name.startswith("dyndepth::"):
            op = name.removeprefix("dyndepth::")
            self.seen[op, declared(inputs, out, op)] += 1
        elif name == "aten::embedding":  # of the table, the rows asked for
            self.seen["embedding", 2 * size(out) + size(given["indices"])] += 1
        elif name in self.modules and out.is_floating_point() and out.dim() == 2:
            inputs |= {"self": None} if name in ("aten::new_zeros", "aten::new_full") else {}
            other = inputs.get("other")
            by_one = name == "aten::mul" and (not isinstance(other, Tensor) or other.dim() == 0)
            called = "scale" if by_one else self.modules[name]
            self.seen[called, size(list(inputs.values())) + size(out)] += 1
        return out


@contextlib.contextmanager
def counting(model: Any, moves: bool = False) -> Iterator[Counting]:
    """Everything in the block, with PyTorch's providers: layers run through modules. moves: what fixed shapes cost, too."""
    with pytest.MonkeyPatch.context() as patched, backend("torch"), Counting(moves) as mode:
        for norm in {type(module) for module in model.modules() if type(module).__name__.endswith("RMSNorm")}:
            patched.setattr(norm, "forward", _as_one("norm", norm.forward, mode, lambda self, x: [x, self.weight]))
        patched.setattr(products, "rms_normalise", _as_one("normalise", rms_normalise, mode, lambda x, eps: [x]))
        patched.setattr(Saturation, "score", _cosine(mode))
        yield mode


def _cosine(mode: Counting) -> Callable[..., Tensor]:
    silent = Saturation.score
    one = _as_one("cosine", Saturation.score, mode, lambda _, view: [view.hidden, view.previous])
    return lambda self, view: (silent if view.previous is None else one)(self, view)


def _as_one(
    name: str, function: Callable[..., Tensor], mode: Counting, reads: Callable[..., list[Tensor]]
) -> Callable[..., Tensor]:
    """One call of so many bytes, whatever it is made of."""

    def called(*given: Any) -> Tensor:
        before, mode.quiet = mode.quiet, True
        out = function(*given)
        mode.quiet = before
        if not before:
            mode.seen[name, size(reads(*given)) + size(out)] += 1
        return out

    return called
