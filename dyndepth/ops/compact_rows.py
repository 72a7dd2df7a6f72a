"""compact_rows: the stable three-way partition that keeps live rows a dense prefix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyndepth import check
from dyndepth.op import Op
from dyndepth.ops import _cpp, _cuda, _triton

RUN, LEAVING, AWAY = 0, 1, 2


def compact_rows(state: Tensor, payloads: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Partition rows into those that run on, those that leave now and those that are away, keeping their order.

    Args:
        state: int8 [n]; 0 runs on, 1 leaves now, 2 is away.
        payloads: tensors [n, ...] of any dtype that move with the rows; any strides. May be empty.

    Returns:
        The payloads permuted (new, contiguous), `order` int32 [n] with `new[i] == old[order[i]]`, and `counts` int32 [2] =
        (rows that run on, rows that leave now) on the same device: `new[:live]` runs, `new[live:live + left]` leaves now.

    Rows move bit for bit. n = 0 is fine. On the CPU a state outside 0..2 raises; elsewhere it counts as away.

    Example: state `[0, 2, 1, 0, 1]`, payload `[a, b, c, d, e]` -> `[a, d, c, e, b]`, order `[0, 3, 2, 4, 1]`, counts `[2, 2]`.
    """
    moved, order, counts = op(state, list(payloads))
    return moved, order, counts


def _check(state: Tensor, payloads: Sequence[Tensor]) -> None:
    if state.dim() != 1:
        check.fail("compact_rows", "state", "int8 [n]", state)
    if state.shape[0] >= 2**31:
        check.fail("compact_rows", "state", "shorter than 2^31 (order is int32)", state)
    rows, device = state.shape[0], state.device
    check.tensor("compact_rows", "state", state, [rows], check.INT8, device, "n")
    for number, payload in enumerate(payloads):
        if payload.dim() < 1 or payload.shape[0] != rows or payload.device != device:
            check.fail("compact_rows", f"payloads[{number}]", f"[{rows}, ...] on {device}", payload)


def _reference(state: Tensor, payloads: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    check.in_range("compact_rows", "state", state, RUN, AWAY + 1)
    state = torch.where((state == RUN) | (state == LEAVING), state, AWAY)
    order = torch.argsort(state, stable=True)
    counts = torch.stack([(state == RUN).sum(), (state == LEAVING).sum()]).to(torch.int32)
    return [payload.index_select(0, order) for payload in payloads], order.to(torch.int32), counts


def _fake(state: Tensor, payloads: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    moved = [payload.new_empty(payload.shape) for payload in payloads]
    return moved, state.new_empty(state.shape, dtype=torch.int32), state.new_empty(2, dtype=torch.int32)


op = Op(
    "compact_rows",
    "(Tensor state, Tensor[] payloads) -> (Tensor[], Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    check=_check,
)

op.provider_in("cuda", "dyndepth.cuda.compact_rows", missing=_cuda.missing, declines=_cuda.declines)
op.provider_in("triton", "dyndepth.kernels.compact_rows", missing=_triton.missing, declines=_triton.declines)


@op.provider("cpp", missing=_cpp.missing, declines=_cpp.declines)
def _cpp_provider(state: Tensor, payloads: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    return torch.ops.dyndepth_cpp.compact_rows(state, list(payloads))
