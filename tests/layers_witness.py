"""A second witness for decoder layers of the Llama kind: float64, dense masks, no pages, none of the runtime's loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dyndepth.runtime.bind import Model
from dyndepth.runtime.norms import norm_facts

_ACTIVATIONS = {
    "SiLUActivation": functional.silu,
    "SiLU": functional.silu,
    "GELUTanh": lambda x: functional.gelu(x, approximate="tanh"),
    "NewGELUActivation": lambda x: functional.gelu(x, approximate="tanh"),
    "GELUActivation": functional.gelu,
}


@dataclass
class Seen:
    """Residuals of all rows after the layers, and per layer [rows, kv_heads, head_dim]."""

    hidden: Tensor
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


def _normed(x: Tensor, module: Any, model: Model) -> Tensor:
    facts = norm_facts(module, model.family.one_plus_gain)
    assert facts is not None
    if facts.kind == "none":
        return x
    assert facts.gain is not None
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + facts.eps) * facts.gain.double()


def _linear(x: Tensor, module: Any) -> Tensor:
    return functional.linear(x, module.weight.double(), None if module.bias is None else module.bias.double())


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [rows, heads, head_dim]; cos, sin [rows, rotary], the first halves of the angles."""
    half = cos.shape[1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None].double(), sin[:, None].double()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def run(model: Model, hidden: Tensor, live: int, seq: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, span: range) -> Seen:
    """Rows `[0, live)` run the layers, the others only give their K,V; every position that is seen must be a row."""
    family, seen = model.family, Seen(hidden.double().clone())
    at = pos.long()
    for number in span:
        layer: Any = model.layers[number]
        attention, mlp = getattr(layer.module, family.attention), layer.mlp[0]
        x = _normed(seen.hidden, layer.before_attention, model)
        if len(family.qkv) == 3:
            heads = [_linear(x, getattr(attention, name)) for name in family.qkv]
        else:
            kv = layer.kv_heads * layer.head_dim
            heads = list(_linear(x, getattr(attention, family.qkv[0])).split([layer.heads * layer.head_dim, kv, kv], 1))
        q, k, v = (y.unflatten(1, (-1, layer.head_dim)) for y in heads)
        if family.q_norm:
            q, k = (_normed(y, getattr(attention, name), model) for y, name in ((q, family.q_norm), (k, family.k_norm)))
        q, k = (_turned(y, cos[layer.variant][at], sin[layer.variant][at]) for y in (q, k))
        seen.keys.append(k)
        seen.values.append(v)
        visible = (seq[:live, None] == seq) & (at[:live, None] >= at)
        if layer.window:
            visible &= at[:live, None] - at < layer.window
        group = layer.heads // layer.kv_heads
        scores = torch.einsum("qhd,khd->hqk", q[:live], k.repeat_interleave(group, 1)) * layer.scale
        if layer.softcap:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1)).flatten(1)
        stream = seen.hidden[:live]
        stream += _normed(_linear(attended, layer.out), layer.after_attention, model)
        x = _normed(stream, layer.before_mlp, model)
        if len(family.gated) == 3:
            gate, up = (_linear(x, getattr(mlp, name)) for name in family.gated[:2])
        else:
            gate, up = _linear(x, getattr(mlp, family.gated[0])).chunk(2, 1)
        opened = _ACTIVATIONS[type(getattr(mlp, family.activation)).__name__](gate)
        stream += _normed(_linear(opened * up, getattr(mlp, family.gated[-1])), layer.after_mlp, model)
    return seen
