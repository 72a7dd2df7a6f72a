"""Decoder layers of the Llama kind on the CPU: everything between two boundaries in one call of C++ (csrc/cpu/decoder_layers).

The kernels read the modules' own weights where they lie: nothing is packed or copied, and a change of the weights is seen by
the next call. Products are summed in an order that does not depend on how many rows there are, so a row's residual is the
same bits alone and in any batch. Layers that are anything else than plain linears, RMS norms and a gated MLP run through
their modules (dyndepth/runtime/layer.py), which is also the reference this path is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.check import FLOATS
from dyndepth.op import forced_providers
from dyndepth.ops import _cpp
from dyndepth.runtime.family import Family
from dyndepth.runtime.layer import Context, Layer
from dyndepth.runtime.norms import has_hooks, is_plain_linear

#: Parts of a layer in the order of csrc/cpu/decoder_layers.cpp.
PARTS = (
    "q", "k", "v", "out", "gate", "up", "down",
    "before_attention", "after_attention", "before_mlp", "after_mlp",
    "q_bias", "k_bias", "v_bias", "out_bias", "gate_bias", "up_bias", "down_bias", "q_gain", "k_gain",
)  # fmt: skip
_ACTIVATIONS = {
    "SiLUActivation": 0, "SiLU": 0, "GELUTanh": 1, "PytorchGELUTanh": 1, "NewGELUActivation": 1, "GELUActivation": 2,
}  # fmt: skip
#: Ops that a stack does in one: forcing a provider other than cpp for one of them turns stacks off.
REPLACED = ("project_qkv", "store_kv", "ragged_attention")


class _NotPlain(Exception):
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
        return all((forced := forced_providers(op)) is None or forced[0] == "cpp" for op in REPLACED)

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
        style, eps = _norms(layers, family)
        act = _activation(layers, family)
    except _NotPlain as reason:
        return str(reason)
    first = layers[0]
    present = [name in found[0] for name in PARTS]
    if any([name in parts for name in PARTS] != present for parts in found):
        return "layers differ in the parts they have"
    numbers = [eps, 0.0 if first.plain is None else first.plain.norm_eps, first.scale, first.softcap]
    if any((layer.scale, layer.softcap, layer.heads) != (first.scale, first.softcap, first.heads) for layer in layers):
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


def _parts(layer: Layer, family: Family) -> dict[str, Tensor]:
    """The tensors of a layer by part."""
    plain = layer.plain
    if plain is None:
        raise _NotPlain("a projection of q, k, v is no plain linear")
    if layer.parallel or layer.after_attention_residual is not None:
        raise _NotPlain("residuals are added elsewhere than in Llama's layers")
    mlp: Any = layer.mlp[0]
    if not family.gated or len(layer.mlp) != 1:
        raise _NotPlain("the MLP is not gated")
    if has_hooks(mlp) or not type(mlp).__module__.startswith("transformers."):
        raise _NotPlain("the MLP is not transformers' own, or carries hooks")
    parts = dict(zip(("q", "k", "v"), plain.weights, strict=True))
    linears = {"out": layer.out, "down": getattr(mlp, family.gated[-1])}
    if len(family.gated) == 3:
        linears |= {"gate": getattr(mlp, family.gated[0]), "up": getattr(mlp, family.gated[1])}
    else:
        fused = getattr(mlp, family.gated[0])
        if not is_plain_linear(fused) or fused.bias is not None:
            raise _NotPlain("the fused gate and up projection is no plain linear")
        parts["gate"], parts["up"] = fused.weight.detach().chunk(2)
    for name, module in linears.items():
        if not is_plain_linear(module):
            raise _NotPlain(f"the {name} projection is no plain linear")
        parts[name] = module.weight.detach()
        if module.bias is not None:
            parts[f"{name}_bias"] = module.bias.detach()
    for name, norm in _norm_modules(layer).items():
        parts[name] = norm.weight.detach()
    parts |= {f"{name}_bias": bias for name, bias in zip("qkv", plain.biases, strict=True) if bias is not None}
    dtype = plain.weights[0].dtype
    if dtype not in FLOATS or any(part.dtype != dtype for part in parts.values()):
        raise _NotPlain("weights are of several dtypes")
    if any(part.device.type != "cpu" or not part.is_contiguous() for part in parts.values()):
        raise _NotPlain("weights are not in main memory, row by row")
    if plain.q_gain is not None and plain.k_gain is not None:
        parts |= {"q_gain": plain.q_gain, "k_gain": plain.k_gain}
    return parts


def _norm_modules(layer: Layer) -> dict[str, Any]:
    named: dict[str, Any] = {
        "before_attention": layer.before_attention, "after_attention": layer.after_attention,
        "before_mlp": layer.before_mlp, "after_mlp": layer.after_mlp,
    }  # fmt: skip
    return {name: norm for name, norm in named.items() if norm is not None}


def _norms(layers: Sequence[Layer], family: Family) -> tuple[int, float]:
    """Style (csrc/common/rms_norm.h) and eps that all norms share."""
    found = set()
    for layer in layers:
        for norm in _norm_modules(layer).values():
            own = type(norm).__name__.endswith("RMSNorm") and type(norm).__module__.startswith("transformers.models.")
            if not own or has_hooks(norm) or type(norm.weight) not in (Tensor, nn.Parameter):
                raise _NotPlain("a norm is not transformers' RMSNorm, or carries hooks")
            found.add(float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))))
    if len(found) > 1:
        raise _NotPlain("norms differ in eps")
    return int(family.one_plus_gain), found.pop() if found else 0.0


def _activation(layers: Sequence[Layer], family: Family) -> int:
    found = {type(getattr(layer.mlp[0], family.activation)).__name__ for layer in layers}
    if len(found) != 1 or not found <= set(_ACTIVATIONS):
        raise _NotPlain(f"the MLP's activation is {', '.join(sorted(found))}")
    return _ACTIVATIONS[found.pop()]
