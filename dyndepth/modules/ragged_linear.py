"""RaggedLinear: an nn.Linear that can be told how many rows are live, and adds a residual."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from dyndepth import check
from dyndepth.ops import ragged_linear

_NAME = "RaggedLinear"


class RaggedLinear(nn.Linear):
    """`nn.Linear` for rows `[0, live)` of a buffer, with an optional residual: `ops.ragged_linear` as a module.

    Parameters, initialisation and state_dict are `nn.Linear`'s; `from_linear` takes over the parameters of one. Called with x
    alone it gives what `nn.Linear` gives, up to the order of adding.

    `forward(x, live=None, residual=None)`:
        x: [..., in_features], in the weight's dtype and on its device; with `live` it must be [n, in_features].
        live: int32 with one element, on the same device: only rows `[0, live)` are computed, those past it are unspecified, and
            no weight is read when it is 0. Nobody reads it on the host. None: all rows.
        residual: [..., out_features], dtype of x; added last.

    Returns [..., out_features] in the dtype of x. Wrong arguments raise `dyndepth.errors.ArgumentError`.

    `torch.nn.functional.linear` runs instead, over all rows, where the op does not apply:

    - gradients are recorded and x, a parameter or the residual wants one. Rows of x at or past `live` then count as zeros, so
      what lies there reaches no gradient of a parameter;
    - under `torch.autocast`, with the casts that `nn.Linear` gets: x and the residual may have any float dtype, and the sum of
      product and residual has the wider one;
    - parameters are float64 or not contiguous.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """A layer that shares the parameters of `linear` (no copy) and keeps its training flag.

        `linear` must be an `nn.Linear` itself: what a subclass, a quantised weight or a hook would do is not in its parameters.
        """
        where = f"{_NAME}.from_linear"
        if type(linear) not in (nn.Linear, cls):
            check.fail(where, "linear", "a torch.nn.Linear, not a subclass", type(linear).__name__)
        hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
        if any(hooks) or "forward" in vars(linear):
            check.fail(where, "linear", "without hooks or a forward of its own", "one that has them")
        for name, value in linear.named_parameters(recurse=False):
            if type(value) is not nn.Parameter:
                check.fail(where, f"linear.{name}", "a torch.nn.Parameter", type(value).__name__)
        made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        return made.train(linear.training)

    def forward(self, x: Tensor, live: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        return _forward(x, self.weight, self.bias, live, residual)


# One node in a graph of torch.fx.symbolic_trace, whose proxies have no shape to check.
@torch.fx.wrap
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, live: Tensor | None, residual: Tensor | None) -> Tensor:
    autocast = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
    _check(x, weight, live, residual, autocast)
    if autocast or not _op_applies(x, weight, bias, residual):
        if live is not None:
            kept = torch.arange(x.shape[0], device=x.device) < live
            x = torch.where(kept[:, None], x, torch.zeros((), dtype=x.dtype, device=x.device))
        y = nn.functional.linear(x, weight, bias)
        return y if residual is None else residual + y
    added = None if residual is None else _rows(residual)
    y = ragged_linear(_rows(x), weight, bias=bias, residual=added, live=live)
    return y.view(*x.shape[:-1], weight.shape[0])


def _op_applies(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    given = [value for value in (x, weight, bias, residual) if value is not None]
    if torch.is_grad_enabled() and any(value.requires_grad for value in given):
        return False
    return weight.dtype in check.FLOATS and weight.is_contiguous() and (bias is None or bias.is_contiguous())


def _rows(x: Tensor) -> Tensor:
    """[..., k] as contiguous rows [n, k]."""
    return (x[None] if x.dim() == 1 else x.flatten(0, -2)).contiguous()


def _check(x: Tensor, weight: Tensor, live: Tensor | None, residual: Tensor | None, autocast: bool) -> None:
    (outputs, width), device = weight.shape, weight.device
    kind = "float" if autocast else str(weight.dtype).removeprefix("torch.")

    def fits(value: Tensor) -> bool:
        return value.device == device and (value.is_floating_point() if autocast else value.dtype == weight.dtype)

    if not fits(x) or x.dim() == 0 or x.shape[-1] != width:
        check.fail(_NAME, "x", f"{kind} [..., {width}] on {device}", x)
    check.live(_NAME, live, device)
    if live is not None and x.dim() != 2:
        check.fail(_NAME, "x", f"[n, {width}] where live is given", x)
    if residual is not None and not (fits(residual) and residual.shape == (*x.shape[:-1], outputs)):
        check.fail(_NAME, "residual", f"{kind} {[*x.shape[:-1], outputs]} on {device}", residual)
