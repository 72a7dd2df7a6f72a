"""router_score: how likely the full model would emit the same token, judged from the residual alone."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndepth import check
from dyndepth.op import Op
from dyndepth.ops import _cpp, _triton
from dyndepth.ops._math import rms_normalise, wide


def router_score(
    hidden: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    previous: Tensor | None = None,
    cosine_weight: Tensor | None = None,
    extra: Tensor | None = None,
    extra_weight: Tensor | None = None,
    eps: float = 1e-6,
    silu: bool = True,
    live: Tensor | None = None,
) -> Tensor:
    """`sigmoid(weight2 . act(z) + bias2)`, the probability a router gives each row.

    `z = weight1 @ rms_norm(hidden) + cosine_weight * cos(hidden, previous) + extra_weight @ extra + bias1`.

    Args:
        hidden: float32, bfloat16 or float16 [n, d], contiguous residuals; the RMSNorm has no gain (fold it into weight1).
        weight1, bias1, weight2, bias2: float32 [m, d], [m], [m], [1], contiguous. Routers are small: they stay fp32.
        previous: same shape and dtype as `hidden`, the residuals at an earlier boundary; needed with `cosine_weight`.
        cosine_weight: float32 [m].
        extra, extra_weight: float32 [n, k] and [m, k], contiguous: further features, e.g. statistics of a shortlist head.
        silu: SiLU between the two layers; False leaves them linear (a logistic regression is m = 1, weight2 = [1]).
        live: int32 with one element: only rows `[0, live)` are computed. None means all.

    Returns float32 [n] in [0, 1]; rows at or past `live` are unspecified. The shape follows the routers of TIDE and
    FlexiDepth (norm, small MLP, sigmoid); the cosine is CALM's state saturation (0 beside a row of zeros). Not
    differentiable.
    """
    return op(hidden, weight1, bias1, weight2, bias2, previous, cosine_weight, extra, extra_weight, eps, silu, live)


def _check(
    hidden: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    previous: Tensor | None = None,
    cosine_weight: Tensor | None = None,
    extra: Tensor | None = None,
    extra_weight: Tensor | None = None,
    eps: float = 1e-6,
    silu: bool = True,
    live: Tensor | None = None,
) -> None:
    name, device = "router_score", hidden.device
    check.tensor(name, "hidden", hidden, [None, None], check.FLOATS, device, "n, d")
    check.contiguous(name, "hidden", hidden)
    if hidden.shape[1] == 0:
        check.fail(name, "hidden", "at least one channel wide", hidden)
    check.tensor(name, "weight1", weight1, [None, hidden.shape[1]], check.FLOAT32, device, "m, d")
    neurons = weight1.shape[0]
    for argument, value, size in (("bias1", bias1, neurons), ("weight2", weight2, neurons), ("bias2", bias2, 1)):
        check.tensor(name, argument, value, [size], check.FLOAT32, device)
    for argument, value in (("weight1", weight1), ("bias1", bias1), ("weight2", weight2)):
        check.contiguous(name, argument, value)
    if cosine_weight is not None:
        check.tensor(name, "cosine_weight", cosine_weight, [neurons], check.FLOAT32, device, "m")
        check.contiguous(name, "cosine_weight", cosine_weight)
        if previous is None:
            check.fail(name, "previous", "given with cosine_weight", None)
    if (extra is None) != (extra_weight is None):
        check.fail(
            name,
            "extra and extra_weight",
            "given together",
            f"extra {extra is not None}, extra_weight {extra_weight is not None}",
        )
    if extra is not None and extra_weight is not None:
        check.tensor(name, "extra", extra, [hidden.shape[0], None], check.FLOAT32, device, "n, k")
        check.tensor(name, "extra_weight", extra_weight, [neurons, extra.shape[1]], check.FLOAT32, device, "m, k")
        check.contiguous(name, "extra", extra)
        check.contiguous(name, "extra_weight", extra_weight)
    if previous is not None:
        check.tensor(name, "previous", previous, list(hidden.shape), (hidden.dtype,), device, "n, d")
        check.contiguous(name, "previous", previous)
    check.live(name, live, device)


def _reference(
    hidden: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    previous: Tensor | None = None,
    cosine_weight: Tensor | None = None,
    extra: Tensor | None = None,
    extra_weight: Tensor | None = None,
    eps: float = 1e-6,
    silu: bool = True,
    live: Tensor | None = None,
) -> Tensor:
    z = torch.nn.functional.linear(rms_normalise(hidden, eps), weight1, bias1)
    if cosine_weight is not None and previous is not None:
        cosine = torch.nn.functional.cosine_similarity(wide(hidden), wide(previous), dim=-1, eps=1e-20)
        z = z + cosine[:, None] * cosine_weight
    if extra is not None and extra_weight is not None:
        z = z + torch.nn.functional.linear(extra, extra_weight)
    if silu:
        z = torch.nn.functional.silu(z)
    return torch.sigmoid(z @ weight2 + bias2)


def _fake(hidden: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


op = Op(
    "router_score",
    "(Tensor hidden, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor? previous=None, "
    "Tensor? cosine_weight=None, Tensor? extra=None, Tensor? extra_weight=None, float eps=1e-6, bool silu=True, "
    "Tensor? live=None) -> Tensor",
    reference=_reference,
    fake=_fake,
    check=_check,
)

op.provider_in("triton", "dyndepth.kernels.router_score", missing=_triton.missing, declines=_triton.declines)


@op.provider("cpp", missing=_cpp.missing, declines=_cpp.declines)
def _cpp_provider(
    hidden: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    previous: Tensor | None = None,
    cosine_weight: Tensor | None = None,
    extra: Tensor | None = None,
    extra_weight: Tensor | None = None,
    eps: float = 1e-6,
    silu: bool = True,
    live: Tensor | None = None,
) -> Tensor:
    return torch.ops.dyndepth_cpp.router_score(
        hidden, weight1, bias1, weight2, bias2, previous, cosine_weight, extra, extra_weight, eps, silu, live
    )
