"""Facts of a model's norm modules, for folding their gains into maps and fusing them into kernels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dyndepth.check import FLOATS


@dataclass(frozen=True)
class NormFacts:
    """`gain * normalise(x) + bias`; `kind` is `rms`, `layer` or `none` (identity), as in ops.backfill_kv."""

    kind: str
    gain: Tensor | None
    bias: Tensor | None
    eps: float


def norm_facts(module: nn.Module | None, one_plus_gain: bool) -> NormFacts | None:
    """fp32 facts of an RMSNorm or LayerNorm module; None if it is something else or carries hooks that must run."""
    if module is None:
        return NormFacts("none", None, None, 0.0)
    if has_hooks(module) or any(type(value) not in (Tensor, nn.Parameter) for value in module.parameters()):
        return None
    if isinstance(module, nn.LayerNorm):
        gain = None if module.weight is None else module.weight.detach().float()
        bias = None if module.bias is None else module.bias.detach().float()
        return NormFacts("layer", gain, bias, module.eps)
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor) or eps is None:
        return None
    gain = weight.detach().float()
    return NormFacts("rms", 1 + gain if one_plus_gain else gain, None, float(eps))


def has_hooks(module: nn.Module) -> bool:
    """Something must run when the module is called: hooks, or a forward replaced on the instance (accelerate, peft)."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def is_plain_linear(module: nn.Module | None) -> bool:
    """A linear layer whose weight and bias say everything: nn.Linear itself, in a float dtype, without hooks."""
    return (
        type(module) is nn.Linear
        and not has_hooks(module)
        # Weights of a tensor subclass (torchao's quantised ones) know their own ways of being multiplied.
        and all(type(value) in (Tensor, nn.Parameter) for value in (module.weight, module.bias) if value is not None)
        and module.weight.dtype in FLOATS
    )
