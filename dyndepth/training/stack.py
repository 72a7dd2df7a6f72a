"""Decoder layers on whole padded sequences, with gradients: the same submodules as the pass, attention by PyTorch.

The pass itself (dyndepth.runtime) writes pages in place and has no backward; training needs one, for exit blocks and for
maps whose effect shows layers later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dyndepth.ops._paged import rotate
from dyndepth.runtime.layer import Layer


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of `module` asks for a gradient inside; what asked before asks again afterwards."""
    asked = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def run_layer(
    layer: Layer,
    hidden: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    away: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
) -> Tensor:
    """The residuals after a decoder layer; sequences start at position 0 and are padded at the end.

    Causal attention keeps padding from reaching any row before it, so no mask of lengths is needed; what padding rows hold
    is unspecified.

    Args:
        hidden: [b, t, d].
        cos, sin: float32 [variants, positions, rotary], or None.
        away: bool [b, t], rows that skip this layer: others read `key`, `value` [b, t, kv_heads, head_dim] (key before
            rotation) of theirs, and their residual passes unchanged.
    """
    batch, length, _ = hidden.shape
    rows = hidden.flatten(0, 1)
    x = rows if layer.before_attention is None else layer.before_attention(rows)
    q, k, v = layer.project(x, rows.shape[0])
    if away is not None:
        assert key is not None
        assert value is not None
        skipped = away.flatten()[:, None, None]
        k = torch.where(skipped, key.flatten(0, 1).to(k.dtype), k)
        v = torch.where(skipped, value.flatten(0, 1).to(v.dtype), v)
    pos = torch.arange(length, device=hidden.device).repeat(batch)
    if cos is not None and sin is not None:
        q, k = (rotate(part, cos[layer.variant], sin[layer.variant], pos) for part in (q, k))
    attended = _attend(layer, *(part.unflatten(0, (batch, length)).transpose(1, 2) for part in (q, k, v)))
    attention = layer.out(attended.transpose(1, 2).flatten(2).flatten(0, 1))
    if layer.after_attention is not None:
        attention = layer.after_attention(attention)
    if layer.parallel:
        out = layer.feed_forward(rows) + attention + rows
    else:
        stream = rows + attention
        if layer.after_attention_residual is not None:
            stream = layer.after_attention_residual(stream)
        out = stream + layer.feed_forward(stream)
        if layer.after_mlp_residual is not None:
            out = layer.after_mlp_residual(out)
    if away is not None:
        out = torch.where(away.flatten()[:, None], rows, out)
    return out.unflatten(0, (batch, length))


def _attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[b, heads, t, head_dim] of q [b, heads, t, head_dim], k and v [b, kv_heads, t, head_dim]."""
    group = layer.heads // layer.kv_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if layer.softcap == 0 and layer.window == 0:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.scale)
    at = torch.arange(q.shape[2], device=q.device)
    visible = at[None, :] <= at[:, None]
    if layer.window > 0:
        visible = visible & (at[None, :] > at[:, None] - layer.window)
    if layer.softcap == 0:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=layer.scale)
    scores = layer.softcap * torch.tanh((q.float() @ k.float().mT) * layer.scale / layer.softcap)
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v.float()).to(q.dtype)
