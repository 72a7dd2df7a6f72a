"""Binding: a Hugging Face causal LM seen through its family's spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.errors import UnsupportedModelError
from dyndepth.ops import ragged_linear
from dyndepth.ops.ragged_linear import pays
from dyndepth.runtime import families  # noqa: F401  (registers the family table)
from dyndepth.runtime.bind_layer import attribute, bind_layer, number, optional
from dyndepth.runtime.family import Family, family_of
from dyndepth.runtime.layer import Layer
from dyndepth.runtime.norms import NormFacts, final_norm_function, final_rms, is_plain_linear, norm_facts
from dyndepth.runtime.stack import Stack, stack_of

# Rotary kinds whose angles depend on the position alone. The others change all angles with the length of the longest
# sequence in the batch, so a row's answer would depend on its neighbours; below their original length they are ordinary.
_POSITIONAL_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


def most_likely(scores: Tensor) -> Tensor:
    """int64 [n], where every row of [n, V] is largest: the first of equals, a NaN before all."""
    # The same on the CPU, where torch's own argmax takes four times as long: longer than a small model's LM head.
    return scores.max(-1).indices if scores.device.type == "cpu" and scores.shape[-1] else scores.argmax(-1)


@dataclass(frozen=True)
class Model:
    """A causal LM taken apart: embedding, layers, final norm, head. Cheap to make; make it anew when modules changed."""

    causal_lm: nn.Module
    family: Family
    layers: list[Layer]
    hidden_size: int
    #: Width of a head-ready row (differs from hidden_size only where the family projects out, OPT-350m).
    ready_size: int
    vocab_size: int
    device: torch.device
    dtype: torch.dtype
    #: (token ids [n], positions [n]) -> residuals [n, d]
    embed: Callable[[Tensor, Tensor], Tensor]
    #: (token embeddings [n, d], positions [n]) -> residuals [n, d], for `inputs_embeds`
    embed_positions: Callable[[Tensor, Tensor], Tensor]
    #: residuals -> head-ready rows: the final norm and what follows it
    finish: Callable[[Tensor], Tensor]
    #: Facts of the final norm if it is all that `finish` does, else None.
    final_norm: NormFacts | None
    #: Gain, style and eps of the final norm, if it is all that `finish` does and C++ knows it.
    final_rms: tuple[Tensor, int, float] | None
    head: nn.Module
    logit_softcap: float
    #: The layers for one call of C++ between boundaries, or why they run through their modules.
    stack: Stack | str

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def decoder(self) -> Any:
        return attribute(self.causal_lm, self.family.decoder)

    @property
    def config(self) -> Any:
        return self.causal_lm.config

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    def logits(self, ready: Tensor) -> Tensor:
        """fp32 logits [n, V] of head-ready rows, rounded where the model's own forward rounds."""
        y = self._head_product(ready)
        if self.logit_softcap > 0:
            y = torch.tanh(y / self.logit_softcap) * self.logit_softcap
        return y.float()

    def argmax(self, ready: Tensor) -> Tensor:
        """int64 [n], the most likely token of head-ready rows."""
        # A cap that rounds makes equals of words that were not, and the first of them is taken.
        return most_likely(self.logits(ready) if self.logit_softcap > 0 else self._head_product(ready))

    def _head_product(self, ready: Tensor) -> Tensor:
        plain = self.plain_head()
        if plain is not None and pays(ready, plain[0]):
            return ragged_linear(ready, plain[0], bias=plain[1])
        with torch.autocast(ready.device.type, enabled=False):
            return self.head(ready)

    def plain_head(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of the LM head if it is a plain linear, else None."""
        if not is_plain_linear(self.head):
            return None
        head: Any = self.head
        return head.weight.detach(), None if head.bias is None else head.bias.detach()

    @property
    def positions_limit(self) -> int | None:
        """How many positions the model has learned; None for rotary ones."""
        if not self.family.positions:
            return None
        table = attribute(self.decoder, self.family.positions)
        return int(table.num_embeddings) - int(getattr(table, "offset", 0))

    def check_rotary_reach(self, positions: int) -> None:
        """Raise if sequences may get so long that the angles of the whole batch would change."""
        if not self.family.rotary:
            return
        ropes = getattr(self.config, "rope_parameters", None) or {}
        for rope in ropes.values() if self.family.rotary_by_layer_type else [ropes]:
            kind = (rope or {}).get("rope_type", "default")
            original = (rope or {}).get("original_max_position_embeddings") or self.config.max_position_embeddings
            if kind not in _POSITIONAL_ROPE and positions > original:
                raise UnsupportedModelError(
                    f"{self.model_type}: {kind} rotary angles change for the whole batch past {original} positions; "
                    f"sequences would reach {positions}. Shorten the prompts or max_new_tokens."
                )

    def rotary_tables(self, positions: int) -> tuple[Tensor | None, Tensor | None]:
        """cos, sin float32 [variants, positions, rotary] as the model's own rotary module gives them; None without one."""
        limit = self.positions_limit
        if limit is not None and positions > limit:
            raise UnsupportedModelError(
                f"{self.model_type}: sequences would reach {positions} positions, the model has learned {limit}"
            )
        if not self.family.rotary:
            return None, None
        rotary = attribute(self.decoder, self.family.rotary)
        at = torch.arange(positions, device=self.device)[None]
        probe = torch.empty(0, device=self.device, dtype=self.dtype)
        if self.family.rotary_by_layer_type:
            tables = [rotary(probe, at, kind) for kind in sorted(set(self.config.layer_types))]
        else:
            tables = [rotary(probe, at)]
        half = tables[0][0].shape[-1] // 2
        if any(not torch.equal(cos[..., :half], cos[..., half:]) for cos, _ in tables):
            raise UnsupportedModelError(f"{self.model_type}: rotary angles are not half-split")
        cos, sin = (torch.stack([table[part][0, :, :half].float() for table in tables]).contiguous() for part in (0, 1))
        return cos, sin


def bind(causal_lm: Any) -> Model:
    """Take a Hugging Face causal LM apart, or raise UnsupportedModelError with what is in the way."""
    config: Any = getattr(causal_lm, "config", None)
    if config is None or not hasattr(config, "model_type") or not hasattr(causal_lm, "get_output_embeddings"):
        raise UnsupportedModelError(f"wanted a transformers causal LM, got {type(causal_lm).__name__}")
    family = family_of(config.model_type)
    head: Any = causal_lm.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(f"wanted a causal LM with an LM head, got {type(causal_lm).__name__}")
    if any(module.training for module in causal_lm.modules()):
        raise UnsupportedModelError("the model is in training mode, where dropout would act; call model.eval() first")
    if len(set(getattr(causal_lm, "hf_device_map", {}).values())) > 1:
        raise UnsupportedModelError("the model is spread over several devices (hf_device_map); dyndepth runs on one")
    if any(parameter.is_meta for parameter in causal_lm.parameters()):
        raise UnsupportedModelError(
            "some parameters are on the meta device (accelerate's offload?); dyndepth needs their values"
        )
    for flag, feature in family.refuses:
        if getattr(config, flag, False):
            raise UnsupportedModelError(f"{config.model_type}: {feature} (config.{flag}) is not supported")

    decoder: Any = attribute(causal_lm, family.decoder)
    embed, project_in = attribute(decoder, family.embed), optional(decoder, family.project_in)
    final_norm, project_out = optional(decoder, family.final_norm), optional(decoder, family.project_out)
    final_facts = norm_facts(final_norm, family.one_plus_gain)
    finishing: list[Any] = [] if final_norm is None else [final_norm_function(final_norm, final_facts)]
    finishing += [] if project_out is None else [project_out]
    positions = optional(decoder, family.positions)
    modules = list(attribute(decoder, family.layers))
    _refuse_changed(causal_lm, decoder, positions, modules, family)

    def embed_positions(embedded: Tensor, pos: Tensor) -> Tensor:
        if project_in is not None:
            embedded = project_in(embedded)
        if positions is None:
            return embedded
        offset = int(getattr(positions, "offset", 0))
        return embedded + nn.functional.embedding(pos.long() + offset, positions.weight)

    def finish(hidden: Tensor) -> Tensor:
        for module in finishing:
            hidden = module(hidden)
        return hidden

    layers = [bind_layer(module, at, at, config, family) for at, module in enumerate(modules)]
    return Model(
        causal_lm=causal_lm,
        family=family,
        layers=layers,
        hidden_size=config.hidden_size,
        ready_size=getattr(project_out, "out_features", config.hidden_size),
        vocab_size=getattr(head, "out_features", config.vocab_size),
        device=causal_lm.device,
        dtype=causal_lm.dtype,
        embed=lambda tokens, pos: embed_positions(embed(tokens), pos),
        embed_positions=embed_positions,
        finish=finish,
        final_norm=final_facts if project_out is None else None,
        final_rms=final_rms(final_norm, final_facts) if project_out is None else None,
        head=head,
        logit_softcap=number(config, family.logit_softcap),
        stack=stack_of(layers, family),
    )


def _refuse_changed(causal_lm: Any, decoder: Any, positions: Any, layers: list[Any], family: Family) -> None:
    """Raise where a module that the pass replaces by its own loop would do something else than transformers' code.

    Leaf modules (projections, norms, MLPs, embedding, head) are called as they are, so hooks and wrappers there work.
    """
    replaced = [("model", causal_lm), ("decoder", decoder), ("positions", positions)]
    for at, layer in enumerate(layers):
        replaced += [(f"layer {at}", layer), (f"attention of layer {at}", attribute(layer, family.attention))]
    if torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks:
        raise UnsupportedModelError("global forward hooks are registered; dyndepth does not run every module they expect")
    for name, module in replaced:
        if module is None:
            continue
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers' own stay after the first output_hidden_states=True and record only when asked.
        if any(not (getattr(hook, "__module__", None) or "").startswith("transformers.") for hook in hooks):
            raise UnsupportedModelError(
                f"{name} has forward hooks, which dyndepth's own loop over layers would not run; hook its submodules instead"
            )
        if module is causal_lm:
            continue  # its forward is not used; `convert` and accelerate replace it
        own = type(module).forward.__module__.partition(".")[0]
        if "forward" in module.__dict__ or own not in ("transformers", "torch"):
            raise UnsupportedModelError(f"{name} has a forward of its own ({own}), which dyndepth's loop would not run")
