"""ragged_linear: a linear layer over the live prefix of a row buffer, with the epilogues of a decoder layer."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndepth import check
from dyndepth.op import Op, cpp_allowed
from dyndepth.ops import _cpp, _triton

#: Activations of a gated product: SiLU (SwiGLU), GELU by tanh and by erf (GeGLU). The order is csrc/cpu/products.h's.
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def ragged_linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    activation: str = "silu",
    residual: Tensor | None = None,
    live: Tensor | None = None,
) -> Tensor:
    """`x @ weight.T + bias` for rows `[0, live)`, gated and added to a residual if asked.

    Args:
        x: float32, bfloat16 or float16 [n, k], contiguous.
        weight: [m, k], bias: [m]; dtype of x, contiguous. The model's own tensors: nothing is packed or copied.
        gate_weight: like weight; the product becomes `activation(x @ gate_weight.T + gate_bias) * (x @ weight.T + bias)`
            (Shazeer 2020, "GLU Variants Improve Transformer"). gate_bias: like bias.
        activation: `silu`, `gelu_tanh` or `gelu`; used with gate_weight only.
        residual: [n, m], dtype of x, contiguous; added last.
        live: int32 with one element: only rows `[0, live)` are computed, and no weight is read when it is 0. None: all.

    Returns [n, m] in the dtype of x; rows at or past `live` are unspecified. Sums are fp32, rounded to the dtype after each
    step as separate modules would round. The cpp provider reads every weight once whatever n is, and adds the products of an
    output in the same order whatever the other rows are: a row gives the same bits alone and in any batch. (Subnormal bfloat16
    counts as 0 where the processor multiplies bfloat16, AMX or AVX512_BF16, as in PyTorch's own products there.) The triton
    provider's tiles depend on the row count: a row gives the same bits in any batch whose count rounds up to the same power of
    two from 16 to 1024. Not differentiable.
    """
    return op(x, weight, bias, gate_weight, gate_bias, activation, residual, live)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    activation: str = "silu",
    residual: Tensor | None = None,
    live: Tensor | None = None,
) -> None:
    name, device, floats = "ragged_linear", x.device, (x.dtype,)
    check.tensor(name, "x", x, [None, None], check.FLOATS, device, "n, k")
    check.contiguous(name, "x", x)
    check.tensor(name, "weight", weight, [None, x.shape[1]], floats, device, "m, k")
    outputs = weight.shape[0]
    if gate_weight is not None:
        check.tensor(name, "gate_weight", gate_weight, list(weight.shape), floats, device, "m, k")
        check.contiguous(name, "gate_weight", gate_weight)
    elif gate_bias is not None:
        check.fail(name, "gate_bias", "given with gate_weight only", gate_bias)
    if activation not in ACTIVATIONS:
        check.fail(name, "activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    for argument, value in (("bias", bias), ("gate_bias", gate_bias)):
        if value is not None:
            check.tensor(name, argument, value, [outputs], floats, device, "m")
            check.contiguous(name, argument, value)
    check.contiguous(name, "weight", weight)
    if residual is not None:
        check.tensor(name, "residual", residual, [x.shape[0], outputs], floats, device, "n, m")
        check.contiguous(name, "residual", residual)
    check.live(name, live, device)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    activation: str = "silu",
    residual: Tensor | None = None,
    live: Tensor | None = None,
) -> Tensor:
    functional = torch.nn.functional
    y = functional.linear(x, weight, bias)
    if gate_weight is not None:
        gate = functional.linear(x, gate_weight, gate_bias)
        if activation == "silu":
            gate = functional.silu(gate)
        else:
            gate = functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
        y = gate * y
    return y if residual is None else residual + y


def _fake(x: Tensor, weight: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def pays(x: Tensor, weight: Tensor) -> bool:
    """Where modules had better call the op than `linear`: plain rows on the CPU that nobody differentiates or autocasts."""
    if x.device.type != "cpu" or x.dim() != 2 or x.dtype != weight.dtype or x.dtype not in check.FLOATS:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not (x.is_contiguous() and weight.is_contiguous()):
        return False
    return _cpp.missing() is None and cpp_allowed("ragged_linear")


op = Op(
    "ragged_linear",
    "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? gate_weight=None, Tensor? gate_bias=None, "
    'str activation="silu", Tensor? residual=None, Tensor? live=None) -> Tensor',
    reference=_reference,
    fake=_fake,
    check=_check,
)

op.provider_in("triton", "dyndepth.kernels.ragged_linear", missing=_triton.missing, declines=_triton.declines)


@op.provider("cpp", missing=_cpp.missing, declines=_cpp.declines)
def _cpp_provider(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    activation: str = "silu",
    residual: Tensor | None = None,
    live: Tensor | None = None,
) -> Tensor:
    return torch.ops.dyndepth_cpp.ragged_linear(
        x, weight, bias, gate_weight, gate_bias, residual, ACTIVATIONS.index(activation), live
    )
