"""One decoder layer, bound to the model's own submodules, run on the live prefix of the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dyndepth.ops import project_qkv, ragged_attention, store_kv
from dyndepth.runtime.norms import NormFacts

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Context:
    """What a layer needs besides its rows: the pages and where each row lives in them."""

    pages: Tensor  # [layers, 2, pages, page_size, kv_heads, head_dim]
    block_table: Tensor  # int32 [sequences, max_pages], cut to what this pass can reach
    cos: Tensor | None  # float32 [variants, positions, rotary]
    sin: Tensor | None


@dataclass(frozen=True)
class Projection:
    """Plain weights of q, k, v (views into a fused projection included), so that project_qkv can take all of it."""

    weights: tuple[Tensor, Tensor, Tensor]
    biases: tuple[Tensor | None, Tensor | None, Tensor | None]
    q_gain: Tensor | None
    k_gain: Tensor | None
    norm_eps: float


@dataclass(frozen=True)
class Layer:
    """A decoder layer as data and callables. `index` is its place in the pages; absent norms are None."""

    index: int
    module: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    window: int
    #: Which rotary table it uses.
    variant: int
    before_attention: Function | None
    after_attention: Function | None
    after_attention_residual: Function | None
    before_mlp: Function | None
    after_mlp: Function | None
    after_mlp_residual: Function | None
    parallel: bool
    #: Weights if the projections are plain linears, else None and `project` calls the modules.
    plain: Projection | None
    #: The modules: x [n, d], rows that need queries -> q [m, H, D], k, v [n, Hk, D] before rotation.
    project: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
    out: Function
    mlp: tuple[Function, ...]
    #: Facts of the norm before attention, None when unknown (then nothing can be folded into it).
    input_norm: NormFacts | None

    def tables(self, context: Context) -> tuple[Tensor | None, Tensor | None]:
        if context.cos is None or context.sin is None:
            return None, None
        return context.cos[self.variant], context.sin[self.variant]

    def keys_values(
        self, hidden: Tensor, live: int, pos: Tensor, slots: Tensor, context: Context, counter: Tensor | None = None
    ) -> Tensor:
        """Store K,V of all rows of `hidden`; return the rotated queries of the first `live`.

        `counter` is `live` as int32 [1] on the device, if the caller has it.
        """
        if counter is None and live < hidden.shape[0]:
            counter = torch.tensor([live], dtype=torch.int32, device=hidden.device)
        x = hidden if self.before_attention is None else self.before_attention(hidden)
        cos, sin = self.tables(context)
        pages = context.pages[self.index]
        if self.plain is None:
            q, k, v = self.project(x, live)
            return store_kv(q, k, v, pos, slots, pages, cos=cos, sin=sin)
        plain = self.plain
        return project_qkv(
            x.contiguous(), *plain.weights, pos, slots, pages,
            q_bias=plain.biases[0], k_bias=plain.biases[1], v_bias=plain.biases[2],
            q_gain=plain.q_gain, k_gain=plain.k_gain, eps=plain.norm_eps, cos=cos, sin=sin, live=counter,
        )[:live]  # fmt: skip

    def run(
        self,
        hidden: Tensor,
        live: int,
        carried: int,
        seq: Tensor,
        pos: Tensor,
        slots: Tensor,
        context: Context,
        counter: Tensor | None = None,
    ) -> None:
        """Rows `[0, live)` of `hidden` run the layer in place; rows `[live, carried)` only get their K,V (propagation)."""
        q = self.keys_values(hidden[:carried], live, pos[:carried], slots[:carried], context, counter)
        attended = ragged_attention(
            q, context.pages[self.index], context.block_table, seq[:live], pos[:live],
            scale=self.scale, softcap=self.softcap, window=self.window,
        )  # fmt: skip
        stream = hidden[:live]
        attention = self.out(attended.flatten(1))
        if self.after_attention is not None:
            attention = self.after_attention(attention)
        if self.parallel:
            stream.copy_(self.feed_forward(stream) + attention + stream)
            return
        torch.add(stream, attention, out=stream)
        if self.after_attention_residual is not None:
            stream.copy_(self.after_attention_residual(stream))
        torch.add(stream, self.feed_forward(stream), out=stream)
        if self.after_mlp_residual is not None:
            stream.copy_(self.after_mlp_residual(stream))

    def feed_forward(self, stream: Tensor) -> Tensor:
        x = stream if self.before_mlp is None else self.before_mlp(stream)
        for module in self.mlp:
            x = module(x)
        return x if self.after_mlp is None else self.after_mlp(x)
