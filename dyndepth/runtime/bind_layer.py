"""Binding one decoder layer: its submodules by name, its projections as plain weights where they are plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dyndepth.errors import UnsupportedModelError
from dyndepth.runtime.family import Family
from dyndepth.runtime.layer import Layer, Projection
from dyndepth.runtime.norms import has_hooks, is_plain_linear, norm_facts


def attribute(root: Any, path: str) -> Any:
    """Follow a dotted path."""
    for name in path.split("."):
        root = getattr(root, name)
    return root


def optional(root: Any, path: str) -> Any:
    """Follow a dotted path, None when it is empty or leads nowhere."""
    try:
        return attribute(root, path) if path else None
    except AttributeError:
        return None


def number(config: Any, name: str) -> float:
    """A numeric config attribute; 0 when the family has none or it is None."""
    return float(getattr(config, name, None) or 0.0) if name else 0.0


def bind_layer(module: nn.Module, index: int, number_in_model: int, config: Any, family: Family) -> Layer:
    """Bind one decoder layer. `index` is its place in the pages (an exit block has one past the model's own layers)."""
    attention = attribute(module, family.attention)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(attention, family.head_dim)
    kinds = getattr(config, "layer_types", None)
    before_attention, before_mlp = optional(module, family.before_attention), optional(module, family.before_mlp)
    post_norm = bool(family.pre_norm_flag) and not getattr(config, family.pre_norm_flag)
    return Layer(
        index=index,
        module=module,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=float(attention.scaling),
        softcap=number(config, family.attention_softcap),
        window=_window(config, family, kinds[number_in_model] if kinds else None),
        variant=sorted(set(kinds)).index(kinds[number_in_model]) if kinds and family.rotary_by_layer_type else 0,
        before_attention=None if post_norm else before_attention,
        after_attention=optional(module, family.after_attention),
        after_attention_residual=before_attention if post_norm else None,
        before_mlp=None if post_norm else before_mlp,
        after_mlp=optional(module, family.after_mlp),
        after_mlp_residual=before_mlp if post_norm else None,
        parallel=bool(family.parallel_flag) and bool(getattr(config, family.parallel_flag)),
        plain=_plain(attention, family, heads, kv_heads, head_dim),
        project=_project(attention, family, heads, kv_heads, head_dim),
        out=attribute(attention, family.out),
        mlp=tuple(attribute(module, name) for name in family.mlp),
        input_norm=norm_facts(None if post_norm else before_attention, family.one_plus_gain),
    )


def _window(config: Any, family: Family, kind: str | None) -> int:
    window = getattr(config, "sliding_window", None)
    if kind not in (None, "full_attention", "sliding_attention"):
        raise UnsupportedModelError(f"{config.model_type}: layers of type {kind!r} are not supported")
    return int(window) if window and (family.window_everywhere or kind == "sliding_attention") else 0


def _plain(attention: nn.Module, family: Family, heads: int, kv_heads: int, head_dim: int) -> Projection | None:
    """Weights for project_qkv, or None when a projection or its norm is something only its module can run."""
    weights = kv = None
    modules = [attribute(attention, name) for name in family.qkv]
    if not all(is_plain_linear(module) for module in modules):
        return None
    if len(modules) == 3:
        weights, biases = [m.weight for m in modules], [m.bias for m in modules]
    elif family.fused == "blocks":
        kv = kv_heads * head_dim
        weights = list(modules[0].weight.split([heads * head_dim, kv, kv]))
        biases = [None] * 3 if modules[0].bias is None else list(modules[0].bias.split([heads * head_dim, kv, kv]))
    else:
        return None
    q_gain = k_gain = None
    eps = 1e-6
    if family.q_norm:
        q_norm, k_norm = (
            norm_facts(attribute(attention, name), family.one_plus_gain) for name in (family.q_norm, family.k_norm)
        )
        if family.qk_norm_over != "head" or q_norm is None or k_norm is None or q_norm.eps != k_norm.eps:
            return None
        if "rms" not in (q_norm.kind, k_norm.kind) or q_norm.gain is None or k_norm.gain is None:
            return None
        q_gain, k_gain, eps = q_norm.gain.contiguous(), k_norm.gain.contiguous(), q_norm.eps
    return Projection(
        (weights[0].detach(), weights[1].detach(), weights[2].detach()),
        (_detached(biases[0]), _detached(biases[1]), _detached(biases[2])),
        q_gain,
        k_gain,
        eps,
    )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _project(
    attention: nn.Module, family: Family, heads: int, kv_heads: int, head_dim: int
) -> Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]:
    """The projections as the modules themselves, for LoRA, quantised linears, hooks and layouts project_qkv lacks."""
    modules: list[Any] = [attribute(attention, name) for name in family.qkv]
    q_norm, k_norm = optional(attention, family.q_norm), optional(attention, family.k_norm)
    per_head = family.qk_norm_over == "head"

    def normed(x: Tensor, norm: nn.Module | None) -> Tensor:
        if norm is None:
            return x
        return norm(x) if per_head else norm(x.flatten(1)).unflatten(1, x.shape[1:])

    def split(x: Tensor, live: int) -> tuple[Tensor, Tensor, Tensor]:
        if len(modules) == 3:
            return (
                modules[0](x[:live]).unflatten(1, (heads, head_dim)),
                modules[1](x).unflatten(1, (kv_heads, head_dim)),
                modules[2](x).unflatten(1, (kv_heads, head_dim)),
            )
        y = modules[0](x)
        if family.fused == "heads":
            q, k, v = y.unflatten(1, (heads, 3, head_dim)).unbind(2)
            return q[:live], k, v
        q, k, v = y.unflatten(1, (heads + 2 * kv_heads, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
        return q[:live], k, v

    def project(x: Tensor, live: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split(x, live)
        return normed(q, q_norm), normed(k, k_norm), v

    return project


def foldable_kv(layer: Layer, family: Family) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None] | None:
    """fp32 (W_k, b_k, W_v, b_v) with the norm before attention folded in, so that backfill_kv can stack layers.

    None when something between the residual and K,V is not linear (a norm of K) or not known to be (a wrapped module):
    then propagation runs the modules layer by layer.
    """
    attention, norm = attribute(layer.module, family.attention), layer.input_norm
    if family.k_norm or norm is None:
        return None
    modules = [attribute(attention, name) for name in family.qkv]
    if any(has_hooks(module) for module in modules):
        return None
    kv, width = layer.kv_heads * layer.head_dim, layer.heads * layer.head_dim
    if len(modules) == 3:
        if not all(is_plain_linear(module) for module in modules):
            return None
        pairs = [(module.weight.float(), module.bias) for module in modules[1:]]
    else:
        weight, bias = _fused_weight(modules[0])
        if weight is None:
            return None
        if family.fused == "heads":
            blocks = weight.float().unflatten(0, (layer.heads, 3, layer.head_dim))
            biases = None if bias is None else bias.unflatten(0, (layer.heads, 3, layer.head_dim))
            pairs = [(blocks[:, part].flatten(0, 1), None if biases is None else biases[:, part].flatten()) for part in (1, 2)]
        else:
            parts = weight.float().split([width, kv, kv])
            bias_parts = (None,) * 3 if bias is None else bias.split([width, kv, kv])
            pairs = list(zip(parts[1:], bias_parts[1:], strict=True))
    folded = []
    for weight, bias in pairs:
        total = None if bias is None else bias.detach().float()
        if norm.bias is not None:
            shift = weight.detach() @ norm.bias
            total = shift if total is None else total + shift
        folded += [weight.detach() if norm.gain is None else weight.detach() * norm.gain, total]
    return folded[0], folded[1], folded[2], folded[3]


def _fused_weight(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """[out, in] weight of a fused projection: nn.Linear, or transformers' Conv1D, which keeps it transposed (GPT-2)."""
    if is_plain_linear(module):
        return module.weight, module.bias
    if type(module).__name__ == "Conv1D" and module.weight.is_floating_point():
        return module.weight.T, module.bias
    return None, None
