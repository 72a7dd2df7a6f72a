"""Families: how one kind of Hugging Face encoder embeds its input, runs a layer and answers.

A family calls the model's own modules (so LoRA, quantised linears and biases keep working) and says little more than where
they are. `register` adds one; `bind` finds the family of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dyndepth.encoders.attention import Packing, packed
from dyndepth.encoders.samples import Samples
from dyndepth.errors import ArgumentError, UnsupportedModelError


@dataclass(frozen=True)
class Embedded:
    """What the model's embedding makes of a batch."""

    #: [n, T, d], the residuals before the first layer.
    hidden: Tensor
    #: bool [n, T], tokens that are not padding; None for all.
    keep: Tensor | None = None


class EncoderFamily:
    """Base of the families. One instance serves one model.

    Subclasses give `embed`, `modules` and `finish`; `run` serves every layer that asks transformers' attention interface.
    """

    #: transformers' `model_type`s.
    model_types: ClassVar[tuple[str, ...]] = ()
    #: Names of the arguments of `embed`, the first one required.
    arguments: ClassVar[tuple[str, ...]] = ()
    #: Layers can run packed samples.
    packs: ClassVar[bool] = True
    #: Samples have equal lengths, so slabs hold no padding and are what the layers want: the layout "auto" takes them.
    uniform: ClassVar[bool] = False
    #: `finish` answers per token (CTC) instead of per sample.
    per_token: bool = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.base = model.base_model
        self.config = model.config
        self.modules = self.layer_modules()

    # What a family says.

    def layer_modules(self) -> Sequence[nn.Module]:
        """The layers, first to last; a module that serves several layers appears several times."""
        raise NotImplementedError

    def embed(self, **inputs: Tensor) -> Embedded:
        """Everything before the first layer."""
        raise NotImplementedError

    def finish(self, samples: Samples) -> Tensor:
        """The model's own final norm, pooler and classifier: logits [n, classes] ([tokens, classes] if `per_token`)."""
        raise NotImplementedError

    @property
    def classes(self) -> int | None:
        """Width of `finish`; None for a model without a head of its own."""
        raise NotImplementedError

    def normed(self, hidden: Tensor) -> Tensor:
        """What the model applies to residuals above its last layer, for those who read tokens and not classes."""
        return hidden

    # What follows from it.

    @property
    def depth(self) -> int:
        return len(self.modules)

    @property
    def width(self) -> int:
        return int(self.config.hidden_size)

    def width_at(self, boundary: int) -> int:
        """Width of the residuals at a boundary; families whose stages differ override it."""
        return self.width

    def inputs_at(self, boundary: int) -> dict[str, tuple[torch.dtype, tuple[int | None, ...]]]:
        """dtype and shape per sample of `Samples.inputs` at a boundary, None for an extent that the batch decides.

        Families whose layers leave something beside the residuals override it: split computing takes nothing else.
        """
        return {}

    def step(self, layer: int, samples: Samples) -> Samples:
        """The samples after layer `layer` (0-based); families whose layers change the number of tokens override it."""
        return replace(samples, hidden=self.run(layer, samples))

    def run(self, layer: int, samples: Samples) -> Tensor:
        """Residuals after layer `layer` (0-based), in the layout of `samples`."""
        module = self.modules[layer]
        if samples.packed:
            if torch.is_grad_enabled() and module.training and getattr(module, "gradient_checkpointing", False):
                raise ArgumentError(
                    'DynamicEncoder: layout must be "padded" with gradient checkpointing, got packed samples (a layer that is '
                    "run again in backward no longer knows where samples begin)"
                )
            with packed(self.config):
                packing = samples.fact("packing", lambda: Packing(samples.lengths))
                return plain(module(samples.hidden[None], None, packing=packing))[0]
        return plain(module(samples.hidden, self.mask(samples)))

    def mask(self, samples: Samples) -> Tensor | None:
        """Attention mask of the padded layout as the model's attention implementation wants it; None without padding."""
        if samples.shortest == samples.hidden.shape[1]:
            return None
        from transformers.masking_utils import create_bidirectional_mask

        keep = samples.keep()
        mask: Any = create_bidirectional_mask(config=self.config, inputs_embeds=samples.hidden, attention_mask=keep.long())
        return mask

    def given(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The arguments of `embed` among those of a call; ArgumentError names what is missing, unknown or of the wrong kind."""
        used = {name: value for name, value in inputs.items() if value is not None}
        unknown = sorted(set(used) - set(self.arguments))
        if unknown:
            raise ArgumentError(
                f"DynamicEncoder: {type(self.model).__name__} takes {', '.join(self.arguments)}, got {', '.join(unknown)}"
            )
        for name, value in used.items():
            if not isinstance(value, Tensor):
                raise ArgumentError(f"DynamicEncoder: {name} must be a tensor, got {type(value).__name__}")
        if not used or (self.arguments[0] not in used and "inputs_embeds" not in used):
            raise ArgumentError(f"DynamicEncoder: wanted {self.arguments[0]}, got {', '.join(used) or 'nothing'}")
        sizes = {name: value.shape[0] if value.dim() else 0 for name, value in used.items()}
        if len(set(sizes.values())) > 1:
            raise ArgumentError(f"DynamicEncoder: arguments must hold equally many samples, got {sizes}")
        if 0 in sizes.values():
            raise ArgumentError("DynamicEncoder: wanted at least one sample, got an empty batch")
        return used


def plain(result: Any) -> Tensor:
    """Layers return a tensor, or a tuple that begins with it."""
    return result if isinstance(result, Tensor) else result[0]


FAMILIES: dict[str, type[EncoderFamily]] = {}


def register(family: type[EncoderFamily]) -> type[EncoderFamily]:
    """Decorator: serve the `model_types` of this family."""
    for name in family.model_types:
        FAMILIES[name] = family
    return family


def bind(model: Any) -> EncoderFamily:
    """The family of a model; UnsupportedModelError if there is none."""
    # Registering is what importing them does.
    from dyndepth.encoders import image, speech, swin, text  # noqa: F401

    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"DynamicEncoder: model must be a transformers encoder of type {', '.join(sorted(FAMILIES))}, got "
            f"{type(model).__name__}" + (f" ({kind})" if kind else "")
        )
    return FAMILIES[kind](model)


def head_of(model: Any, known: Mapping[str, Callable[..., Any]], base: str) -> Callable[..., Any] | None:
    """The entry of `known` for this class of model; None for the bare encoder `base`."""
    name = type(model).__name__
    if name == base:
        return None
    if name not in known:
        raise UnsupportedModelError(f"DynamicEncoder: model must be one of {', '.join([base, *known])}, got {name}")
    return known[name]


def output_width(module: Any) -> int:
    """Classes of a classifier: a linear, or a module that ends in one."""
    last = [part for part in module.modules() if hasattr(part, "out_features")]
    return int(last[-1].out_features) if last else 0


def pack(embedded: Embedded, *, packed_layout: bool) -> Samples:
    """Samples at boundary 0, shortest first (equal lengths stand together); `ids` count the caller's order.

    Padding may stand anywhere in the input; what is kept of a sample becomes one run of tokens. Differentiable.
    """
    hidden, keep = embedded.hidden, embedded.keep
    n, longest = hidden.shape[:2]
    lengths = torch.full((n,), longest) if keep is None else keep.sum(1).cpu()
    if n and int(lengths.min()) == 0:
        empty = (lengths == 0).nonzero()[0].item()
        raise ArgumentError(f"DynamicEncoder: every sample must have at least one token, sample {empty} has none")
    uniform = bool((lengths == longest).all())
    ids = torch.arange(n) if uniform else torch.argsort(lengths, stable=True)
    at = ids.to(hidden.device)
    rows = hidden if uniform else hidden[at]
    if packed_layout:
        tokens = rows.flatten(0, 1) if uniform or keep is None else rows[keep[at]]
        return Samples(tokens, lengths[ids], ids)
    if not uniform:
        whole = Samples(rows[keep[at]] if keep is not None else rows.flatten(0, 1), lengths[ids], ids)
        rows = whole.padded()  # padding moves to the end
    return Samples(rows, lengths[ids], ids)
