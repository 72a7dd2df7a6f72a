"""Facts of a model's norm modules, for folding their gains into maps and fusing them into kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.check import FLOATS
from dyndepth.modules import RaggedLinear
from dyndepth.ops import _cpp
from dyndepth.ops.ragged_linear import pays


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


#: Where transformers' RMSNorm classes round (csrc/common/rms_norm.h): Llama's gain times the rounded quotient, or Gemma's one
#: rounding of quotient times (1 + gain). A class that is not here (OLMo 2 rounds in a third way) runs as its module.
_STYLES = {
    **dict.fromkeys(("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm"), 0),
    **dict.fromkeys(("Gemma2RMSNorm", "Gemma3RMSNorm"), 1),
}


def rms_style(module: nn.Module | None) -> int | None:
    """How C++ must round to do what the module does; None if it is not known to."""
    known = _STYLES.get(type(module).__name__)
    own = type(module).__module__.startswith("transformers.models.")
    plain = module is not None and type(getattr(module, "weight", None)) in (Tensor, nn.Parameter) and not has_hooks(module)
    return known if own and plain else None


def final_rms(module: nn.Module | None, facts: NormFacts | None) -> tuple[Tensor, int, float] | None:
    """(gain, style, eps) of transformers' plain RMSNorm, as C++ takes it."""
    style = rms_style(module)
    if module is None or facts is None or style is None or _cpp.missing() is not None:
        return None
    weight: Any = module.weight  # a tensor: modules of a known style have no other
    gain = weight.detach()
    return (gain, style, facts.eps) if gain.is_contiguous() else None


def final_norm_function(module: nn.Module, facts: NormFacts | None) -> Callable[[Tensor], Tensor]:
    """The norm module, in one call of C++ where it is transformers' plain RMSNorm on the CPU in one dtype."""
    plain = final_rms(module, facts)
    if plain is None:
        return module
    gain, style, eps = plain

    def norm(x: Tensor) -> Tensor:
        if not pays(x, gain):
            return module(x)
        return torch.ops.dyndepth_cpp.rms_norm(x.contiguous(), gain, style, eps)

    return norm


def has_hooks(module: nn.Module) -> bool:
    """Something must run when the module is called: hooks, or a forward replaced on the instance (accelerate, peft)."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def is_plain_linear(module: nn.Module | None) -> bool:
    """A linear layer whose weight and bias say everything: nn.Linear itself or our own, in a float dtype, without hooks."""
    return (
        isinstance(module, nn.Linear)
        and type(module) in (nn.Linear, RaggedLinear)
        and not has_hooks(module)
        # Weights of a tensor subclass (torchao's quantised ones) know their own ways of being multiplied.
        and all(type(value) in (Tensor, nn.Parameter) for value in (module.weight, module.bias) if value is not None)
        and module.weight.dtype in FLOATS
    )
