"""The pass in graph style: fixed shapes, `live` on the device, no host read from the first layer to the last.

The same pass as forward.py, for a CUDA graph or a compiler: every buffer keeps its n rows, the counters that compact_rows
leaves on the device go straight into the next ops, and what only some rows do is done with a mask or with slot -1. Nothing in
it looks at a value on the host, so it can be captured once and replayed for any number of rows up to n and any exits taken
(tests trace it under fake tensors, where a host read is an error). Kernels do less where `live` is less; products that only a
module can run are run on all n rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.errors import ExitsError
from dyndepth.exits import Band
from dyndepth.exits.criteria import View
from dyndepth.ops import backfill_kv, project_qkv, ragged_attention, ragged_linear, store_kv
from dyndepth.ops.compact_rows import AWAY, LEAVING, RUN, compact_rows
from dyndepth.ops.exit_stats import ExitStats
from dyndepth.runtime.layer import Context, Layer
from dyndepth.runtime.pass_plan import Plan
from dyndepth.runtime.rows import Rows
from dyndepth.runtime.stack import GatedParts, gated_parts

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
    #: int32 [layers]: rows that ran each layer.
    work: Tensor


def why_not(plan: Plan) -> str | None:
    """Why a plan has no graph style, or None."""
    if plan.kv_policy not in GRAPH_POLICIES:
        return f"kv={plan.kv_policy!r} takes rows up that waited; graph style has {', '.join(GRAPH_POLICIES)}"
    if plan.blocks:
        return "a block head is one more layer for some of the rows"
    if any(band.criterion.carries for band in plan.bands.values()):
        return "a criterion counts over boundaries"
    return None


@torch.no_grad()
def forward_graph(plan: Plan, rows: Rows, context: Context, count: Tensor | None = None) -> GraphResult:
    """One pass over the buffers of `rows`.

    Args:
        count: int32 [1] on the device: only rows `[0, count)` are real, so that one capture serves smaller batches; the slots
            of the others must be -1. None: all are.

    Raises ExitsError where the plan has no graph style (see `why_not`).
    """
    reason = why_not(plan)
    if reason is not None:
        raise ExitsError(f"graph style: {reason}")
    return _GraphPass(plan, rows, context, count).run()


class _GraphPass:
    def __init__(self, plan: Plan, rows: Rows, context: Context, count: Tensor | None) -> None:
        self.plan, self.context = plan, context
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
        for number, layer in enumerate(model.layers):
            self._resume(number)
            if number in plan.bands:
                self._boundary(plan.bands[number])
            work.append(self.live)
            self._layer(layer, None if parts is None else parts[number])
        self._place("ready", model.finish(self.hidden), self.alive())
        return GraphResult(self.ready, self.exit_layer, self.layers_run, torch.cat(work))

    # -- boundaries -----------------------------------------------------------------------------------------------------

    def _resume(self, boundary: int) -> None:
        bands = [band for band in self.plan.bands.values() if band.resume == boundary]
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
        if not plan.open or plan.closed(band):
            return
        leaves, heads = self._judge(band)
        state = torch.where(self.alive(), torch.where(leaves, LEAVING, RUN), AWAY).to(torch.int8)
        for_good = band.resume == depth
        if for_good:
            heads = band.head_or_norm()(self.hidden, plan.model.finish) if heads is None else heads
            self._place("ready", heads, leaves)
            self._place("exit_layer", torch.full_like(self.row, band.leave), leaves)
        layers = self.layers_run[self.index.long()] - (band.resume - band.leave)
        self._place("layers_run", layers, leaves)
        self.buffers["resume"] = torch.where(leaves, -1 if for_good else band.resume, self.resume)
        if not for_good:
            self.buffers["left_at"] = torch.where(leaves, band.leave, self.left_at)
            if plan.history_wanted:
                self.buffers["taken"] = torch.where(leaves, self.taken | (1 << plan.numbers[band.leave]), self.taken)
        before = self.live
        self._partition(state)
        if plan.kv_policy == "predict" and band.kv is not None:
            # The leavers lie between the new live prefix and the old one; everybody else writes nowhere.
            gone = (self.row >= self.live) & (self.row < before)
            backfill_kv(
                self.hidden, band.kv.weight, self.pos, torch.where(gone, self.slots, -1), self.context.pages, band.leave,
                bias=band.kv.bias, cos=self.context.cos, sin=self.context.sin,
                variant=plan.propagation.variants(band.leave, band.resume),
            )  # fmt: skip

    def _judge(self, band: Band) -> tuple[Tensor, Tensor | None]:
        """bool [n] and the head-ready rows that judging had to make."""
        plan = self.plan
        heads: list[Tensor] = []

        def stats() -> ExitStats:
            if not heads:
                heads.append(band.head_or_norm()(self.hidden, plan.model.finish))
            return plan.stats(band, heads[0])

        view = View(
            hidden=self.hidden, seq=self.seq, step=self.step, previous=self.buffers.get("previous"), stats=stats,
            depth=plan.depth, leave=band.leave, layers=plan.model.depth,
            skipped=functools.partial(plan.skipped, self.taken) if plan.history_wanted else None,
        )  # fmt: skip
        leaves = plan.named(band, self.seq, band.criterion.leaves(view, band.thresholds(self.step)))
        if plan.previous_wanted:
            earlier = self.buffers.get("previous", torch.full_like(self.hidden, torch.nan))
            self.buffers["previous"] = torch.where(self.alive()[:, None], self.hidden, earlier)
        return leaves & self.may_leave & self.alive(), heads[0] if heads else None

    def _partition(self, state: Tensor) -> None:
        names = list(self.buffers)
        moved, _, counts = compact_rows(state, [self.buffers[name] for name in names])
        self.buffers = dict(zip(names, moved, strict=True))
        self.live = counts[:1]

    def _place(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Write rows where `mask` into a result in the caller's order."""
        result, index = self.__dict__[name], self.index.long()
        shape = (-1, *[1] * (values.dim() - 1))
        self.__dict__[name] = result.index_copy(0, index, torch.where(mask.view(shape), values.to(result.dtype), result[index]))

    # -- layers -----------------------------------------------------------------------------------------------------------

    def _layer(self, layer: Layer, parts: GatedParts | None) -> None:
        context, hidden = self.context, self.hidden
        pages = context.pages[layer.index]
        # Under propagation rows that left get the K,V of their residual; otherwise theirs are written by backfill_kv only.
        slots = self.slots if self.plan.kv_policy == "propagate" else torch.where(self.alive(), self.slots, -1)
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
                q_gain=plain.q_gain, k_gain=plain.k_gain, eps=plain.norm_eps, cos=cos, sin=sin, live=self.live,
            )  # fmt: skip
        attended = ragged_attention(
            q, pages, context.block_table, self.seq, self.pos, scale=layer.scale, live=self.live, softcap=layer.softcap,
            window=layer.window,
        ).flatten(1)  # fmt: skip
        if parts is None:
            attention = layer.out(attended)
        else:
            attention = ragged_linear(attended, parts.out, bias=parts.out_bias, live=self.live)
        if layer.after_attention is not None:
            attention = layer.after_attention(attention)
        if layer.parallel:
            stream = layer.feed_forward(hidden) + attention + hidden
        else:
            stream = hidden + attention
            if layer.after_attention_residual is not None:
                stream = layer.after_attention_residual(stream)
            stream = stream + (layer.feed_forward(stream) if parts is None else self._gated(layer, parts, stream))
            if layer.after_mlp_residual is not None:
                stream = layer.after_mlp_residual(stream)
        self.buffers["hidden"] = torch.where(self.alive()[:, None], stream, hidden)

    def _gated(self, layer: Layer, parts: GatedParts, stream: Tensor) -> Tensor:
        x = stream if layer.before_mlp is None else layer.before_mlp(stream)
        inner = ragged_linear(
            x, parts.up, bias=parts.up_bias, gate_weight=parts.gate, gate_bias=parts.gate_bias, activation=parts.activation,
            live=self.live,
        )  # fmt: skip
        x = ragged_linear(inner, parts.down, bias=parts.down_bias, live=self.live)
        return x if layer.after_mlp is None else layer.after_mlp(x)
