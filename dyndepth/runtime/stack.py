"""Decoder layers of the Llama kind on the CPU as data for C++ (csrc/cpu/decoder_layers.cpp), many in one call.

The kernels read the modules' own weights where they lie: nothing is packed or copied (but the gains of q and k norms, which
are folded to fp32 when a model is bound). Products are summed in an order that does not depend on how many rows there are, so
a row's residual is the same bits alone and in any batch. Layers that are anything else than plain linears, RMS norms and a
gated MLP run through their modules (dyndepth/runtime/layer.py), which is also the reference this path is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.check import FLOATS
from dyndepth.op import cpp_allowed
from dyndepth.ops import _cpp
from dyndepth.ops.ragged_linear import ACTIVATIONS
from dyndepth.runtime.family import Family
from dyndepth.runtime.layer import Context, Layer
from dyndepth.runtime.norms import has_hooks, is_plain_linear, rms_style

#: Parts of a layer in the order of csrc/cpu/decoder.h.
PARTS = (
    "q", "k", "v", "out", "gate", "up", "down",
    "before_attention", "after_attention", "before_mlp", "after_mlp",
    "q_bias", "k_bias", "v_bias", "out_bias", "gate_bias", "up_bias", "down_bias", "q_gain", "k_gain",
)  # fmt: skip
_ACTIVATIONS = {
    "SiLUActivation": 0, "SiLU": 0, "GELUTanh": 1, "PytorchGELUTanh": 1, "GELUActivation": 2,
}  # fmt: skip
#: Ops that a stack does in one: forcing a provider other than cpp for one of them turns stacks off.
REPLACED = ("project_qkv", "store_kv", "ragged_attention", "ragged_linear")


class _NotPlainError(Exception):
    """Why a layer must run through its modules."""


@dataclass(frozen=True)
class Stack:
    """Consecutive layers as data for one call. `first` is the place of layer 0 in the pages."""

    first: int
    #: heads, inner width of the MLP, activation, norm style, bits of the PARTS that are there.
    shape: list[int]
    #: eps of the norms, eps of the norms of q and k, factor and soft cap of attention scores.
    numbers: list[float]
    windows: list[int]
    variants: list[int]
    #: Per layer, the parts that are there, in the order of PARTS.
    weights: list[list[Tensor]]

    @staticmethod
    def usable() -> bool:
        """Nobody forced another provider for an op that the stack replaces."""
        return cpp_allowed(*REPLACED)

    def run(
        self, begin: int, end: int, hidden: Tensor, live: int, seq: Tensor, pos: Tensor, slots: Tensor, context: Context
    ) -> None:
        """Layers [begin, end) in place: K,V of all rows of `hidden` are stored, rows `[0, live)` go on."""
        torch.ops.dyndepth_cpp.decoder_layers(
            hidden, context.pages, context.block_table, seq, pos, slots, context.cos, context.sin,
            [tensor for layer in self.weights[begin:end] for tensor in layer], self.shape, self.windows[begin:end],
            self.variants[begin:end], self.numbers, self.first + begin, live,
        )  # fmt: skip


def stack_of(layers: Sequence[Layer], family: Family) -> Stack | str:
    """The layers as a stack, or why they run through their modules."""
    absent = _cpp.missing()
    if absent is not None:
        return absent
    try:
        found = [_parts(layer, family) for layer in layers]
        if any(part.device.type != "cpu" for parts in found for part in parts.values()):
            return "weights are not in main memory"
        style, eps = _norms(layers)
        act = _activation(layers, family)
    except _NotPlainError as reason:
        return str(reason)
    first = layers[0]
    present = [name in found[0] for name in PARTS]
    if any([name in parts for name in PARTS] != present for parts in found):
        return "layers differ in the parts they have"
    if len({parts["q"].dtype for parts in found}) > 1:
        return "layers are of several dtypes"
    shapes = [{name: part.shape for name, part in parts.items()} for parts in found]
    if any(shape != shapes[0] for shape in shapes) or not _fits(first, shapes[0]):
        return "layers differ in their sizes, or their parts do not fit together"
    numbers = [eps, 0.0 if first.plain is None else first.plain.norm_eps, first.scale, first.softcap]
    if len({(layer.scale, layer.softcap, layer.heads, layer.plain and layer.plain.norm_eps) for layer in layers}) > 1:
        return "layers differ in the shape of attention"
    bits = sum(1 << at for at, there in enumerate(present) if there)
    return Stack(
        first=first.index,
        shape=[first.heads, found[0]["gate"].shape[0], act, style, bits],
        numbers=numbers,
        windows=[layer.window for layer in layers],
        variants=[layer.variant for layer in layers],
        weights=[[parts[name] for name in PARTS if name in parts] for parts in found],
    )


@dataclass(frozen=True)
class GatedParts:
    """What follows attention in a layer with a plain output projection and a plain gated MLP, as ops.ragged_linear takes it."""

    out: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    out_bias: Tensor | None
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str


def gated_parts(layers: Sequence[Layer], family: Family) -> list[GatedParts] | None:
    """Per layer, or None where one of them must run through its modules. On any device."""
    try:
        found = [_parts(layer, family) for layer in layers]
        activation = ACTIVATIONS[_activation(layers, family)]
    except _NotPlainError:
        return None
    names = [field.name for field in fields(GatedParts) if field.name != "activation"]
    return [GatedParts(**{name: parts.get(name) for name in names}, activation=activation) for parts in found]  # type: ignore[arg-type]


def _parts(layer: Layer, family: Family) -> dict[str, Tensor]:
    """The tensors of a layer by part."""
    plain = layer.plain
    if plain is None:
        raise _NotPlainError("a projection of q, k, v is no plain linear")
    if layer.parallel or layer.after_attention_residual is not None:
        raise _NotPlainError("residuals are added elsewhere than in Llama's layers")
    mlp: Any = layer.mlp[0]
    if not family.gated or len(layer.mlp) != 1:
        raise _NotPlainError("the MLP is not gated")
    if has_hooks(mlp) or not type(mlp).__module__.startswith("transformers."):
        raise _NotPlainError("the MLP is not transformers' own, or carries hooks")
    parts = dict(zip(("q", "k", "v"), plain.weights, strict=True))
    linears = {"out": layer.out, "down": getattr(mlp, family.gated[-1])}
    if len(family.gated) == 3:
        linears |= {"gate": getattr(mlp, family.gated[0]), "up": getattr(mlp, family.gated[1])}
    else:
        fused = getattr(mlp, family.gated[0])
        if not is_plain_linear(fused) or fused.bias is not None:
            raise _NotPlainError("the fused gate and up projection is no plain linear")
        parts["gate"], parts["up"] = fused.weight.detach().chunk(2)
    for name, module in linears.items():
        if not is_plain_linear(module):
            raise _NotPlainError(f"the {name} projection is no plain linear")
        parts[name] = module.weight.detach()
        if module.bias is not None:
            parts[f"{name}_bias"] = module.bias.detach()
    for name, norm in _norm_modules(layer).items():
        if type(getattr(norm, "weight", None)) not in (Tensor, nn.Parameter):
            raise _NotPlainError("a norm is not transformers' RMSNorm, or carries hooks")
        parts[name] = norm.weight.detach()
    parts |= {f"{name}_bias": bias for name, bias in zip("qkv", plain.biases, strict=True) if bias is not None}
    dtype = plain.weights[0].dtype
    if dtype not in FLOATS or any(part.dtype != dtype for part in parts.values()):
        raise _NotPlainError("weights are of several dtypes")
    if any(not part.is_contiguous() for part in parts.values()):
        raise _NotPlainError("weights do not lie row by row")
    if plain.q_gain is not None and plain.k_gain is not None:
        parts |= {"q_gain": plain.q_gain, "k_gain": plain.k_gain}
    return parts


def _fits(layer: Layer, shapes: dict[str, torch.Size]) -> bool:
    """The sizes that csrc/cpu/decoder.h takes for granted."""
    width, inner = shapes["out"][0], shapes["gate"][0]
    heads, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    outputs = {"q": heads, "k": kv, "v": kv, "out": width, "gate": inner, "up": inner, "down": width}
    inputs = {"out": heads, "down": inner}
    wanted = {name: (size, inputs.get(name, width)) for name, size in outputs.items()}
    wanted |= {f"{name}_bias": (size,) for name, size in outputs.items()}  # type: ignore[misc]
    wanted |= dict.fromkeys(("q_gain", "k_gain"), (layer.head_dim,))  # type: ignore[arg-type]
    return all(tuple(shape) == wanted.get(name, (width,)) for name, shape in shapes.items())


def _norm_modules(layer: Layer) -> dict[str, Any]:
    named: dict[str, Any] = {
        "before_attention": layer.before_attention, "after_attention": layer.after_attention,
        "before_mlp": layer.before_mlp, "after_mlp": layer.after_mlp,
    }  # fmt: skip
    return {name: norm for name, norm in named.items() if norm is not None}


def _norms(layers: Sequence[Layer]) -> tuple[int, float]:
    """Style (csrc/common/rms_norm.h) and eps that all norms share."""
    norms = [norm for layer in layers for norm in _norm_modules(layer).values()]
    styles = {rms_style(norm) for norm in norms} or {0}
    if None in styles or len(styles) > 1:
        raise _NotPlainError("a norm is not transformers' RMSNorm, or carries hooks")
    found = {float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))) for norm in norms} or {0.0}
    if len(found) > 1:
        raise _NotPlainError("norms differ in eps")
    return int(styles.pop() or 0), found.pop()


def _activation(layers: Sequence[Layer], family: Family) -> int:
    modules = [getattr(layer.mlp[0], family.activation) for layer in layers]
    if any(getattr(getattr(module, "act", None), "__func__", None) is not None for module in modules):
        raise _NotPlainError("the MLP's activation is written out in Python")  # GELU with use_gelu_python rounds at every step
    if any(has_hooks(module) for module in modules if isinstance(module, nn.Module)):
        raise _NotPlainError("the MLP's activation carries hooks")
    found = {type(module).__name__ for module in modules}
    if len(found) != 1 or not found <= set(_ACTIVATIONS):
        raise _NotPlainError(f"the MLP's activation is {', '.join(sorted(found))}")
    return _ACTIVATIONS[found.pop()]
