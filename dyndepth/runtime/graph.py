"""The pass in graph style: fixed shapes, `live` on the device, no host read from the first layer to the last.

The same pass as forward.py, for a CUDA graph or a compiler: every buffer keeps its n rows, the counters that compact_rows
leaves on the device go straight into the next ops, and what only some rows do is done with a mask or with slot -1. Nothing in
it looks at a value on the host, so it can be captured once and replayed for any number of rows up to n and any exits taken
(tests trace it under fake tensors, where a host read is an error). Kernels do less where `live` is less; products that only a
module can run are run on all n rows, unless whoever captures the pass can record conditions (`When`): then layers that nobody
is left for do not run at all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.errors import ExitsError
from dyndepth.exits import Band
from dyndepth.exits.criteria import PromptRouter, View
from dyndepth.exits.heads import read
from dyndepth.ops import backfill_kv, project_qkv, ragged_attention, ragged_linear, store_kv
from dyndepth.ops.compact_rows import AWAY, LEAVING, RUN, compact_rows
from dyndepth.ops.exit_stats import ExitStats
from dyndepth.runtime.block import Block
from dyndepth.runtime.layer import Context, Function, Layer
from dyndepth.runtime.pass_plan import Plan
from dyndepth.runtime.rows import Rows
from dyndepth.runtime.stack import GatedParts, gated_parts

#: Records a body that runs only where a bool [1] on the device holds. The body changes tensors made before it, in place; what
#: it makes itself nobody outside may read.
When = Callable[[Tensor, Callable[[], None]], None]
#: K,V policies with fixed shapes.
GRAPH_POLICIES = ("predict", "propagate", "none")


@dataclass(frozen=True)
class GraphResult:
    """What a pass made, all on the device, in the caller's row order. Rows at or past the count are unspecified."""

    #: Head-ready rows [n, ready].
    ready: Tensor
    #: int32 [n]: boundary where a row left for good, the number of layers if it reached the top.
    exit_layer: Tensor
    #: int32 [n]: layers that the row ran.
    layers_run: Tensor
    #: int64 [n]: bit i is set if the row took the i-th band of the exits.
    bands_taken: Tensor
    #: int32 [layers]: rows that ran each layer.
    work: Tensor
    #: int32 [block heads], by boundary: rows that ran the block. All that were judged, if one of them leaves: who leaves is no
    #: prefix before the partition.
    block_work: Tensor


def why_not(plan: Plan) -> str | None:
    """Why a plan has no graph style, or None."""
    if plan.kv_policy not in GRAPH_POLICIES:
        return f"kv={plan.kv_policy!r} takes rows up that waited; graph style has {', '.join(GRAPH_POLICIES)}"
    if any(isinstance(band.criterion, PromptRouter) for band in plan.bands.values()):
        return "a criterion is decided by prompts"
    if plan.observed:
        return "an observer is told of rows by name, which is the host's work"
    return None


@torch.no_grad()
def forward_graph(
    plan: Plan, rows: Rows, context: Context, count: Tensor | None = None, when: When | None = None
) -> GraphResult:
    """One pass over the buffers of `rows`, in the model's own dtype, autocast or not.

    Args:
        count: int32 [1] on the device: only rows `[0, count)` are real, so that one capture serves smaller batches; the slots
            of the others must be -1. None: all are.
        when: records layers above a boundary under the condition that somebody is live. None: they are recorded as they are,
            and kernels return early.

    Raises ExitsError where the plan has no graph style (see `why_not`).
    """
    reason = why_not(plan)
    if reason is not None:
        raise ExitsError(f"graph style: {reason}")
    with torch.autocast(rows.hidden.device.type, enabled=False):
        return _GraphPass(plan, rows, context, count, when).run()


class _GraphPass:
    def __init__(self, plan: Plan, rows: Rows, context: Context, count: Tensor | None, when: When | None) -> None:
        self.plan, self.context, self.when = plan, context, when
        n, device = len(rows), rows.hidden.device
        self.row = torch.arange(n, dtype=torch.int32, device=device)
        self.live = torch.full((1,), n, dtype=torch.int32, device=device) if count is None else count.clone()
        #: What moves with the rows; `resume` is the boundary where an away row goes on, -1 for never (padding too), `left_at`
        #: the one where it left.
        self.buffers: dict[str, Tensor] = {
            "hidden": rows.hidden.clone(), "seq": rows.seq, "pos": rows.pos, "slots": rows.slots, "step": rows.step,
            "may_leave": rows.may_leave, "index": self.row.clone(),
            "resume": torch.full((n,), -1, dtype=torch.int32, device=device),
            "left_at": torch.full((n,), -1, dtype=torch.int32, device=device),
        }  # fmt: skip
        if plan.history_wanted:  # bits of the bands that a row skipped
            self.buffers["taken"] = torch.zeros(n, dtype=torch.int64, device=device)
        depth = plan.model.depth
        #: In the caller's order.
        self.ready = rows.hidden.new_zeros(n, plan.model.ready_size)
        self.exit_layer = torch.full((n,), depth, dtype=torch.int32, device=device)
        self.layers_run = torch.full((n,), depth, dtype=torch.int32, device=device)
        self.bands_taken = torch.zeros(n, dtype=torch.int64, device=device)
        #: Names of what criteria carry from boundary to boundary, among the buffers.
        self.carried: list[str] = []
        self.nobody = torch.zeros(1, dtype=torch.int32, device=device)
        self.block_work = dict.fromkeys(plan.blocks, self.nobody)

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["buffers"][name]
        except KeyError:
            raise AttributeError(name) from None

    def alive(self) -> Tensor:
        """bool [n]."""
        return self.row < self.live

    def run(self) -> GraphResult:
        plan, model = self.plan, self.plan.model
        parts = gated_parts(model.layers, model.family)
        work = []
        for begin, end in itertools.pairwise(plan.stops):
            self._resume(begin)
            if begin in plan.bands:
                self._boundary(plan.bands[begin])
            work += [self.live] * (end - begin)
            self._span(model.layers[begin:end], None if parts is None else parts[begin:end])
        self._place("ready", model.finish(self.hidden), self.alive())
        blocks = torch.cat([self.nobody[:0], *self.block_work.values()])
        return GraphResult(self.ready, self.exit_layer, self.layers_run, self.bands_taken, torch.cat(work), blocks)

    # -- boundaries -----------------------------------------------------------------------------------------------------

    def _resume(self, boundary: int) -> None:
        plan = self.plan
        bands = [band for band in plan.bands.values() if band.resume == boundary and plan.open and not plan.closed(band)]
        if not bands:
            return
        back = ~self.alive() & (self.resume == boundary)
        # Which band they took is where they left: of several that resume here, each has its own jump.
        state = torch.where(self.alive() | back, RUN, AWAY).to(torch.int8)
        for band in bands:
            if band.jump is not None:
                mine = back & (self.left_at == band.leave) if len(bands) > 1 else back
                self.buffers["hidden"] = torch.where(mine[:, None], band.jump(self.hidden), self.hidden)
        self._partition(state)

    def _boundary(self, band: Band) -> None:
        plan, depth = self.plan, self.plan.model.depth
        block = plan.blocks.get(band.leave)
        if block is not None:  # every row's K,V, whether it leaves here or not: a later token that does reads them
            block.layer.keys_values(self.hidden, 0, self.pos, self.slots, self.context, self.nobody)
        if not plan.open or plan.closed(band):
            return
        leaves, heads = self._judge(band, block)
        state = torch.where(self.alive(), torch.where(leaves, LEAVING, RUN), AWAY).to(torch.int8)
        for_good = band.resume == depth
        if for_good:
            heads = self._heads(band, block, torch.where(leaves.any(), self.live, 0)) if heads is None else heads
            self._place("ready", heads, leaves)
            self._place("exit_layer", torch.full_like(self.row, band.leave), leaves)
        index = self.index.long()
        self._place("layers_run", self.layers_run[index] - (band.resume - band.leave), leaves)
        self._place("bands_taken", self.bands_taken[index] | (1 << list(plan.bands).index(band.leave)), leaves)
        self.buffers["resume"] = torch.where(leaves, -1 if for_good else band.resume, self.resume)
        if not for_good:
            self.buffers["left_at"] = torch.where(leaves, band.leave, self.left_at)
            if plan.history_wanted:
                self.buffers["taken"] = torch.where(leaves, self.taken | (1 << plan.numbers[band.leave]), self.taken)
        counts = self._partition(state)
        if plan.kv_policy == "predict" and band.kv is not None:
            # The leavers lie right behind the live prefix, as the counts say.
            backfill_kv(
                self.hidden, band.kv.weight, self.pos, self.slots, self.context.pages, band.leave,
                bias=band.kv.bias, cos=self.context.cos, sin=self.context.sin,
                variant=plan.propagation.variants(band.leave, band.resume), section=counts, down=band.kv.down,
            )  # fmt: skip

    def _judge(self, band: Band, block: Block | None) -> tuple[Tensor, Tensor | None]:
        """bool [n] and the head-ready rows that judging had to make."""
        plan = self.plan
        heads: list[Tensor] = []

        def stats() -> ExitStats:
            if not heads:
                heads.append(self._heads(band, block, self.live))
            return plan.stats(band, heads[0], self.live)

        view = View(
            hidden=self.hidden, seq=self.seq, step=self.step, previous=self.buffers.get("previous"), stats=stats,
            depth=plan.depth, leave=band.leave, layers=plan.model.depth,
            carried={name: self.buffers[name] for name in self.carried}, live=self.live,
            skipped=functools.partial(plan.skipped, self.taken) if plan.history_wanted else None,
        )  # fmt: skip
        leaves = plan.named(band, self.seq, band.criterion.leaves(view, band.thresholds(self.step)))
        self.carried = list(view.carried)
        for name, value in view.carried.items():
            self._carry(name, value)
        if plan.previous_wanted:
            self._carry("previous", self.hidden)
        return leaves & self.may_leave & self.alive(), heads[0] if heads else None

    def _carry(self, name: str, value: Tensor) -> None:
        """State of the live rows travels with them; the others keep what they had, NaN or -1 at first."""
        earlier = self.buffers[name] if name in self.buffers else Rows.nothing(value, len(self.row))
        self.buffers[name] = torch.where(self.alive().view(-1, *[1] * (value.dim() - 1)), value, earlier)

    def _heads(self, band: Band, block: Block | None, live: Tensor) -> Tensor:
        """Head-ready rows [n, ready]; only the first `live` mean something."""
        finish = self.plan.model.finish
        if block is None:
            return band.head_or_norm()(self.hidden, finish)
        self.block_work[band.leave] = self.block_work[band.leave] + live
        # Everybody's K,V are there already: nowhere is where these go.
        stream = self._through(block.layer, None, self.hidden, torch.full_like(self.slots, -1), live)
        return read(stream, block.finish, block.readout)

    def _partition(self, state: Tensor) -> Tensor:
        """Moves every buffer; int32 [2], rows that run on and rows that leave now."""
        names = list(self.buffers)
        moved, _, counts = compact_rows(state, [self.buffers[name] for name in names])
        self.buffers = dict(zip(names, moved, strict=True))
        self.live = counts[:1]
        return counts

    def _place(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Write rows where `mask` into a result in the caller's order."""
        result, index = self.__dict__[name], self.index.long()
        shape = (-1, *[1] * (values.dim() - 1))
        self.__dict__[name] = result.index_copy(0, index, torch.where(mask.view(shape), values.to(result.dtype), result[index]))

    # -- layers -----------------------------------------------------------------------------------------------------------

    def _span(self, layers: Sequence[Layer], parts: Sequence[GatedParts] | None) -> None:
        """Consecutive layers with nothing in between."""
        if self.when is None or not layers or layers[0] is self.plan.model.layers[0]:
            self._layers(layers, parts)
            return
        kept, somebody = self.hidden, self.live > 0

        def run() -> None:
            self._layers(layers, parts)
            kept.copy_(self.hidden)

        self.when(somebody, run)
        self.buffers["hidden"] = kept
        if self.plan.kv_policy == "propagate":
            self.when(~somebody, lambda: self._propagate(layers))

    def _propagate(self, layers: Sequence[Layer]) -> None:
        """Nobody is left: the K,V of what rows left with, in layers that nobody runs."""
        for layer in layers:
            layer.keys_values(self.hidden, 0, self.pos, self.slots, self.context, self.nobody)

    def _layers(self, layers: Sequence[Layer], parts: Sequence[GatedParts] | None) -> None:
        for at, layer in enumerate(layers):
            # Under propagate rows that left get the K,V of their residual; otherwise theirs are written by backfill_kv only.
            slots = self.slots if self.plan.kv_policy == "propagate" else torch.where(self.alive(), self.slots, -1)
            stream = self._through(layer, None if parts is None else parts[at], self.hidden, slots, self.live)
            self.buffers["hidden"] = torch.where(self.alive()[:, None], stream, self.hidden)

    def _through(self, layer: Layer, parts: GatedParts | None, hidden: Tensor, slots: Tensor, live: Tensor) -> Tensor:
        """[n, d]: the first `live` rows after a layer. All rows with a slot write their K,V."""
        context = self.context
        pages = context.pages[layer.index]
        x = hidden if layer.before_attention is None else layer.before_attention(hidden)
        cos, sin = layer.tables(context)
        if layer.plain is None:
            q, k, v = layer.project(x, len(self.row))
            q = store_kv(q, k, v, self.pos, slots, pages, cos=cos, sin=sin)
        else:
            plain = layer.plain
            q = project_qkv(
                x.contiguous(), *plain.weights, self.pos, slots, pages,
                q_bias=plain.biases[0], k_bias=plain.biases[1], v_bias=plain.biases[2],
                q_gain=plain.q_gain, k_gain=plain.k_gain, eps=plain.norm_eps, cos=cos, sin=sin, live=live,
            )  # fmt: skip
        attended = ragged_attention(
            q, pages, context.block_table, self.seq, self.pos, scale=layer.scale, live=live, softcap=layer.softcap,
            window=layer.window,
        ).flatten(1)  # fmt: skip
        if parts is not None:
            return self._gated(layer, parts, hidden, attended, live)
        attention = layer.out(attended)
        if layer.after_attention is not None:
            attention = layer.after_attention(attention)
        if layer.parallel:
            return layer.feed_forward(hidden) + attention + hidden
        stream = hidden + attention
        if layer.after_attention_residual is not None:
            stream = layer.after_attention_residual(stream)
        stream = stream + layer.feed_forward(stream)
        return stream if layer.after_mlp_residual is None else layer.after_mlp_residual(stream)

    def _gated(self, layer: Layer, parts: GatedParts, hidden: Tensor, attended: Tensor, live: Tensor) -> Tensor:
        """What follows attention where its weights are plain: three products that read `live`, sums in their epilogues."""
        stream = _added(hidden, attended, parts.out, parts.out_bias, layer.after_attention, live)
        x = stream if layer.before_mlp is None else layer.before_mlp(stream)
        inner = ragged_linear(
            x, parts.up, bias=parts.up_bias, gate_weight=parts.gate, gate_bias=parts.gate_bias, activation=parts.activation,
            live=live,
        )  # fmt: skip
        return _added(stream, inner, parts.down, parts.down_bias, layer.after_mlp, live)


def _added(stream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Function | None, live: Tensor) -> Tensor:
    """stream + norm(x @ weight.T + bias); without a norm the sum is the product's epilogue."""
    if norm is None:
        return ragged_linear(x, weight, bias=bias, residual=stream, live=live)
    return stream + norm(ragged_linear(x, weight, bias=bias, live=live))
