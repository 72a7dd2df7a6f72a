"""store_kv on a GPU: host side of csrc/cuda/store_kv.cu."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dyndepth.cuda import compiler

_PIECE_BYTES = 16
_MOST_THREADS = 512
#: struct Heads and struct Arguments of the source, padding included.
_HEADS = np.dtype([("data", "u8"), ("row", "i8"), ("head", "i8")], align=True)
_ARGUMENTS = np.dtype(
    [
        *((name, _HEADS) for name in ("q", "k", "v")),
        *((name, "u8") for name in ("rotated", "pages", "cos", "sin", "pos", "slots", "live")),
        *((name, "i8") for name in ("q_rows", "plane")),
        *((name, "i4") for name in ("heads", "kv_heads", "head_dim", "rotary", "wide_turn", "wide_copy")),
    ],
    align=True,
)


def store_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    pos: Tensor,
    slots: Tensor,
    pages: Tensor,
    live: Tensor | None = None,
) -> Tensor:
    """Arguments as in dyndepth.ops.store_kv, already checked."""
    rotated = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = k.shape[0]
    if rows > 0:
        arguments = describe(q, k, v, cos, sin, pos, slots, pages, live, rotated)
        function = f"store_kv_{str(q.dtype).removeprefix('torch.')}"
        compiler.launch("store_kv", function, k.get_device(), rows, threads(arguments, q.element_size()), (arguments,))
    return rotated


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    pos: Tensor,
    slots: Tensor,
    pages: Tensor,
    live: Tensor | None,
    rotated: Tensor,
) -> np.ndarray:
    """struct Arguments: addresses, strides, sizes, and whether everything lies on boundaries of 16 bytes."""
    found = np.zeros((), dtype=_ARGUMENTS)
    for name, heads in (("q", q), ("k", k), ("v", v)):
        found[name] = heads.data_ptr(), heads.stride(0), heads.stride(1)
    pointers = {"rotated": rotated, "pages": pages, "cos": cos, "sin": sin, "pos": pos, "slots": slots, "live": live}
    for name, value in pointers.items():
        found[name] = 0 if value is None else value.data_ptr()
    rotary, head_dim = 0 if cos is None else cos.shape[1], k.shape[2]
    found["q_rows"], found["plane"] = q.shape[0], pages.stride(0)
    found["heads"], found["kv_heads"], found["head_dim"], found["rotary"] = q.shape[1], k.shape[1], head_dim, rotary
    item = q.element_size()

    def wide(sources: tuple[Tensor, ...], others: tuple[Tensor | None, ...], channels: int) -> bool:
        """A whole number of 16 bytes: every address, every stride, a head and `channels` of it."""
        numbers = [item * head_dim, item * channels]
        numbers += [number for each in sources for number in (each.data_ptr(), item * each.stride(0), item * each.stride(1))]
        numbers += [each.data_ptr() for each in others if each is not None]
        return all(number % _PIECE_BYTES == 0 for number in numbers)

    found["wide_turn"] = wide((q, k), (cos, sin, pages, rotated), rotary)
    found["wide_copy"] = wide((v,), (pages,), 0)
    return found


def threads(arguments: np.ndarray, item: int) -> int:
    """One per piece of a row, whole warps of them."""
    wide = _PIECE_BYTES // item
    head_dim, kv_heads = int(arguments["head_dim"]), int(arguments["kv_heads"])
    turned = (head_dim - int(arguments["rotary"])) // (wide if arguments["wide_turn"] else 1)
    copied = head_dim // (wide if arguments["wide_copy"] else 1)
    pieces = (int(arguments["heads"]) + kv_heads) * turned + kv_heads * copied
    return min(-(-pieces // 32) * 32, _MOST_THREADS)
