"""Balcony's exit block: one more decoder layer at an exit, with its own K,V slot past the model's layers."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dyndepth.errors import ExitsError
from dyndepth.exits import Band, BlockHead
from dyndepth.exits.heads import StoredBlock, TranslatorHead, read
from dyndepth.runtime.bind import Model
from dyndepth.runtime.bind_layer import bind_layer, optional
from dyndepth.runtime.layer import Context, Layer
from dyndepth.runtime.rows import Rows

INITS = ("last", "next")


def block_head(model: Model, leave: int, init: str = "last") -> BlockHead:
    """A fresh block head at boundary `leave`: a copy of the `last` decoder layer (Balcony) or of the `next` one.

    Its norm is a copy of the input norm of the layer after the exit, as in Balcony's code; the final norm where there is no
    such layer or norm.
    """
    if init not in INITS:
        raise ExitsError(f"block_head: init must be one of {', '.join(INITS)}, got {init!r}")
    if not 1 <= leave < model.depth:
        raise ExitsError(f"block_head: leave must be in [1, {model.depth}), got {leave}")
    source = model.depth - 1 if init == "last" else leave
    return BlockHead(_frozen(model.layers[source].module), _frozen(_exit_norm(model, leave)), source)


#: The last block head built from each stored one, and the model it was built for.
_RESTORED: weakref.WeakKeyDictionary[StoredBlock, tuple[weakref.ref[nn.Module], BlockHead]] = weakref.WeakKeyDictionary()


def restored(stored: StoredBlock, model: Model, leave: int) -> BlockHead:
    """`restore` in the model's dtype and device, kept for the next call with the same model."""
    kept = _RESTORED.get(stored)
    if kept is not None and kept[0]() is model.causal_lm:
        weight = next(kept[1].parameters())
        if weight.dtype == model.dtype and weight.device == model.device:
            return kept[1]
    head = restore(stored, model, leave).to(device=model.device, dtype=model.dtype)
    _RESTORED[stored] = weakref.ref(model.causal_lm), head
    return head


def restore(stored: StoredBlock, model: Model, leave: int) -> BlockHead:
    """A block head from stored weights, its modules built from the model's own."""
    if not 0 <= stored.source < model.depth:
        raise ExitsError(f"exits: block head at boundary {leave} copies layer {stored.source}, the model has {model.depth}")
    fresh = block_head(model, leave)
    readout = None
    if "readout.up" in stored.tensors:
        down = stored.tensors.get("readout.down")
        readout = TranslatorHead(model.hidden_size, model.ready_size, None if down is None else down.shape[0])
    head = BlockHead(_frozen(model.layers[stored.source].module), fresh.norm, stored.source, readout)
    try:
        head.load_state_dict(stored.tensors)
    except RuntimeError as error:
        raise ExitsError(f"exits: block head at boundary {leave} does not fit this model: {error}") from error
    return head


def _exit_norm(model: Model, leave: int) -> nn.Module:
    norm = optional(model.layers[leave].module, model.family.before_attention)
    norm = norm if norm is not None else optional(model.decoder, model.family.final_norm)
    if norm is None:
        raise ExitsError(f"block_head: {model.model_type} has no norm to start the exit's norm from")
    return norm


def _frozen(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(module)
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    return copied.eval()


@dataclass(frozen=True)
class Block:
    """A block head bound to its K,V slot."""

    layer: Layer
    norm: nn.Module
    project_out: nn.Module | None
    readout: TranslatorHead | None = None

    def store(self, rows: Rows, context: Context, count: int) -> None:
        """K,V of the first `count` rows, whether they exit here or not: a later token that does reads them.

        Rows that are away contribute what they left with, as in propagation.
        """
        self.layer.keys_values(rows.hidden[:count], 0, rows.pos[:count], rows.slots[:count], context)

    def ready(self, hidden: Tensor, rows: Rows, begin: int, end: int, context: Context) -> Tensor:
        """Head-ready rows [begin, end) from their residuals `hidden`; their K,V must have been stored."""
        stream = hidden.clone()
        count = end - begin
        seq, pos, slots = rows.seq[begin:end], rows.pos[begin:end], rows.slots[begin:end]
        self.layer.run(stream, count, count, seq, pos, slots, context)
        return read(stream, self.finish, self.readout)

    def finish(self, stream: Tensor) -> Tensor:
        """The block's own norm and what follows the model's."""
        normed = self.norm(stream)
        return normed if self.project_out is None else self.project_out(normed)


def bind_block(band: Band, model: Model, index: int) -> Block:
    """Bind a band's block head to layer `index` of the pages."""
    head: Any = band.head
    layer = bind_layer(head.layer, index, head.source, model.config, model.family)
    return Block(layer, head.norm, optional(model.decoder, model.family.project_out), head.readout)
