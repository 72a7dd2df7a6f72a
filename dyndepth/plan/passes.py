"""The calls of one decode pass: which ops and modules run, how often, what each moves.

As the runtime makes them where layers run through their modules (dyndepth/runtime/layer.py), which is what a GPU does and what
a CUDA graph records. tests/test_roofline.py runs a model and finds these calls and no others. Left out, as small: bookkeeping
of rows (counters, states, comparisons of scores), casts, the choice of a token. A call is one op or one module's product, norm,
sum or activation; a provider may start more than one kernel for it, and one call of C++ stands for many on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyndepth.errors import ArgumentError, UnsupportedModelError
from dyndepth.plan import traffic
from dyndepth.plan.shape import read, windows_of
from dyndepth.plan.traffic import Traffic

#: Families whose layers are those of Llama: q, k, v, two RMSNorms, a gated MLP.
KINDS = ("llama", "mistral", "qwen2", "qwen3")
KV = ("predict", "propagate")
#: Bytes of a row that are no residual: sequence, position, slot, step and index (int32), and whether it may leave.
ROW_FACTS = 5 * 4 + 1

#: Sizes from the models' published config.json.
_KNOWN: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "layers": 30, "width": 576, "heads": 9, "kv_heads": 3, "head_dim": 64, "inner": 1536, "vocab": 49152,
    },
    "Llama-3-8B": {
        "layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "inner": 14336, "vocab": 128256,
    },
    "Qwen3-8B": {
        "layers": 36, "width": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "inner": 12288, "vocab": 151936,
        "qk_norm": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """A decoder of Llama's kind. `windows`: per layer the tokens it attends to, 0 for all; empty where none has a window."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()

    @property
    def query(self) -> int:
        """Numbers of q per token."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Numbers of k and v per token and layer."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def rotary(self) -> int:
        """Pairs of channels that are rotated."""
        return self.head_dim // 2

    @classmethod
    def known(cls, name: str) -> Sizes:
        """SmolLM2-135M, Llama-3-8B or Qwen3-8B, without any file."""
        if name not in _KNOWN:
            raise ArgumentError(f"plan: wanted one of {', '.join(_KNOWN)}, got {name!r}")
        return cls(name, **_KNOWN[name])

    @classmethod
    def demo(cls) -> Sizes:
        """The demo's model."""
        return cls.known("SmolLM2-135M")

    @classmethod
    def of(cls, model: Any, name: str = "") -> Sizes:
        """Of a transformers config, or a model that has one; UnsupportedModelError for layers that are not Llama's."""
        config = getattr(model, "config", model)
        kind = getattr(config, "model_type", None)
        if kind not in KINDS:
            raise UnsupportedModelError(f"plan: the roofline knows layers of {', '.join(KINDS)}, got model type {kind!r}")
        attention_bias = bool(getattr(config, "attention_bias", False))
        return cls(
            name=name or str(getattr(config, "name_or_path", "") or kind),
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            inner=config.intermediate_size,
            vocab=config.vocab_size,
            qkv_bias=kind == "qwen2" or attention_bias,  # Qwen 2 has them without saying so
            out_bias=attention_bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=kind == "qwen3",
            windows=windows_of(config, kind),
        )

    @classmethod
    def read(cls, path: str | Path) -> Sizes:
        """Of a config.json, or of the one in a folder."""
        return read(path, cls.of)


@dataclass(frozen=True)
class Leaving:
    """At boundary `leave`, so many of the rows leave for good through the final norm.

    Args:
        words: words of the LM head that judging reads (`exit_stats`); 0: a router judges residuals (`router_score`).
        neurons: of that router.
    """

    leave: int
    rows: int
    words: int = 0
    neurons: int = 1


@dataclass(frozen=True)
class Call:
    """`count` calls that move the same: an op of dyndepth.ops, `embedding`, `norm`, `product`, `add`, `activation`, `gate`."""

    op: str
    where: str
    traffic: Traffic
    count: int = 1


def calls(
    sizes: Sizes, rows: int, context: int, exits: Sequence[Leaving] = (), *, kv: str = "predict", item: int = 2,
    page_size: int = 16,
) -> list[Call]:  # fmt: skip
    """One decode pass over `rows` sequences whose newest token is number `context` (it sees so many, itself included).

    Args:
        exits: where rows leave; a boundary that nobody leaves at is judged all the same. Empty: full depth.
        kv: what gives rows that left their K,V: `predict` or `propagate`.
        item: bytes of a number of the model's dtype.
    """
    if rows < 1 or context < 1:
        raise ArgumentError(f"plan: wanted at least one row and a context of at least 1, got {rows}, {context}")
    if kv not in KV:
        raise ArgumentError(f"plan: kv must be one of {', '.join(KV)}, got {kv!r}")
    return list(_Pass(sizes, rows, context, by_boundary(sizes, rows, exits), kv, item, page_size).calls())


def total(found: Sequence[Call]) -> tuple[int, Traffic]:
    """(number of calls, what they move together)."""
    return sum(call.count for call in found), sum((call.traffic * call.count for call in found), Traffic(0))


def by_boundary(sizes: Sizes, rows: int, exits: Sequence[Leaving]) -> dict[int, Leaving]:
    """In the order of boundaries; ArgumentError where no pass of `rows` rows can leave like that."""
    found = {each.leave: each for each in exits}
    if len(found) < len(exits) or any(not 1 <= leave < sizes.layers for leave in found):
        raise ArgumentError(
            f"plan: wanted different boundaries in [1, {sizes.layers}), got {sorted(each.leave for each in exits)}"
        )
    if any(each.rows < 0 for each in exits) or sum(each.rows for each in exits) > rows:
        raise ArgumentError(f"plan: {rows} rows cannot leave as {[each.rows for each in exits]}")
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class _Pass:
    sizes: Sizes
    rows: int
    context: int
    exits: dict[int, Leaving]
    kv: str
    item: int
    page_size: int

    def calls(self) -> Iterator[Call]:
        s, live, done = self.sizes, self.rows, 0
        yield Call("embedding", "bottom", traffic.embedding(self.rows, s.width, self.item))
        stops = [*self.exits, s.layers]
        for begin, end in zip([0, *stops], stops, strict=False):
            if begin in self.exits and live:
                one = self.exits[begin]
                yield from self._boundary(one, live)
                live -= one.rows
            if live:
                yield from self._layers(begin, end, live)
            elif self.kv == "propagate" and not done:
                done = end
                yield from self._propagate(begin)
        if live:
            yield self._norm("top", live)
        yield self._product("top", self.rows, s.vocab, s.width)

    def _layers(self, begin: int, end: int, live: int) -> Iterator[Call]:
        s, item = self.sizes, self.item
        carried = self.rows if self.kv == "propagate" else live
        where, count = f"layers {begin} to {end - 1}", end - begin
        yield self._norm(where, carried, count)
        yield self._project(where, carried, live, count)
        for window in dict.fromkeys(s.windows[begin:end] or (0,)):
            alike = s.windows[begin:end].count(window) if s.windows else count
            moved = traffic.ragged_attention(
                live, self.context, s.heads, s.kv_heads, s.head_dim, item, window=window, page_size=self.page_size
            )
            yield Call("ragged_attention", where, moved, alike)
        yield self._product(where, live, s.width, s.query, s.out_bias, count)
        yield self._norm(where, live, count)
        yield self._product(where, live, s.inner, s.width, s.mlp_bias, 2 * count)
        yield Call("activation", where, traffic.elementwise(live, s.inner, item, read=1), count)
        yield Call("gate", where, traffic.elementwise(live, s.inner, item, read=2), count)
        yield self._product(where, live, s.width, s.inner, s.mlp_bias, count)
        yield Call("add", where, traffic.elementwise(live, s.width, item, read=2), 2 * count)

    def _boundary(self, one: Leaving, live: int) -> Iterator[Call]:
        """Judging, moving, heads and, under `predict`, K,V of those that leave."""
        s, item, where = self.sizes, self.item, f"boundary {one.leave}"
        if one.words:
            yield self._norm(where, live)
            yield Call("exit_stats", where, traffic.exit_stats(live, one.words, s.width, item))
        else:
            yield Call("router_score", where, traffic.router_score(live, one.neurons, s.width, item))
        if not one.rows:
            return
        yield Call("compact_rows", where, traffic.compact_rows(self.rows, s.width * item + ROW_FACTS))
        if not one.words:
            yield self._norm(where, one.rows)
        if self.kv == "predict":
            moved = traffic.backfill_kv(one.rows, s.layers - one.leave, s.width, s.kv, s.rotary, item, bias=True)
            yield Call("backfill_kv", where, moved)

    def _propagate(self, begin: int) -> Iterator[Call]:
        """Nobody is left: K,V of all layers above for all rows, in one product unless K is normed."""
        s, where, count = self.sizes, f"layers {begin} to {self.sizes.layers - 1}", self.sizes.layers - begin
        if not s.qk_norm:
            moved = traffic.backfill_kv(self.rows, count, s.width, s.kv, s.rotary, self.item, bias=s.qkv_bias)
            yield Call("backfill_kv", where, moved)
            return
        yield self._norm(where, self.rows, count)
        yield self._project(where, self.rows, 0, count)

    def _project(self, where: str, rows: int, live: int, count: int) -> Call:
        s = self.sizes
        moved = traffic.project_qkv(
            rows, live, s.width, s.query, s.kv, s.rotary, self.item, bias=s.qkv_bias,
            gains=s.head_dim if s.qk_norm else 0, counter=live < rows,
        )  # fmt: skip
        return Call("project_qkv", where, moved, count)

    def _norm(self, where: str, rows: int, count: int = 1) -> Call:
        return Call("norm", where, traffic.elementwise(rows, self.sizes.width, self.item, read=1, gain=True), count)

    def _product(self, where: str, rows: int, outputs: int, columns: int, bias: bool = False, count: int = 1) -> Call:
        return Call("product", where, traffic.ragged_linear(rows, outputs, columns, self.item, biases=bias), count)
