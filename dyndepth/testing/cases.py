"""One case list per op; it serves the tests and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.testing.accept_cases import ACCEPT_DRAFTS
from dyndepth.testing.case import Arguments as Arguments
from dyndepth.testing.case import Case as Case
from dyndepth.testing.linear_cases import LARGE_LINEARS, linear


def widened(arguments: Arguments) -> Arguments:
    """The same arguments with every float tensor in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def _counter(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int32)


# -- compact_rows -------------------------------------------------------------------------------------------------------


def _compact(rows: int, width: int, shares: tuple[float, float, float] = (0.5, 0.25, 0.25)) -> Callable[..., Arguments]:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        state = torch.multinomial(torch.tensor(shares), max(rows, 1), replacement=True, generator=generator)[:rows]
        payloads = [
            _normal(generator, dtype, rows, width),
            torch.arange(rows, dtype=torch.int32),
            torch.arange(rows, dtype=torch.int64) * 7,
            torch.arange(rows) % 2 == 0,
            _normal(generator, dtype, rows, 3, 5).transpose(1, 2),  # rows that are not dense
            _normal(generator, dtype, rows, width + 5)[:, 2 : 2 + width],  # dense rows that lie apart
        ]
        return {"state": state.to(torch.int8), "payloads": payloads}

    return make


# -- exit_stats ---------------------------------------------------------------------------------------------------------


def _stats(
    rows: int,
    width: int,
    vocabulary: int,
    *,
    norm: bool = True,
    bias: bool = False,
    short: int = 0,
    softcap: float = 0.0,
    live: int | None = None,
) -> Callable[..., Arguments]:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        return {
            "hidden": _normal(generator, dtype, rows, width),
            "head_weight": _normal(generator, dtype, vocabulary, width, scale=4 / width**0.5),
            "head_bias": _normal(generator, dtype, vocabulary) if bias else None,
            "norm_gain": torch.rand(width, generator=generator) + 0.5 if norm else None,
            "eps": 1e-5,
            "vocab_ids": torch.randperm(vocabulary, generator=generator)[:short] if short else None,
            "softcap": softcap,
            "live": None if live is None else _counter(live),
        }

    return make


# -- router_score -------------------------------------------------------------------------------------------------------


def _router(
    rows: int,
    width: int,
    neurons: int,
    *,
    cosine: bool = False,
    extra: int = 0,
    silu: bool = True,
    eps: float = 1e-6,
    live: int | None = None,
) -> Callable[..., Arguments]:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        fp32 = torch.float32
        return {
            "hidden": _normal(generator, dtype, rows, width, scale=3.0),
            "weight1": _normal(generator, fp32, neurons, width, scale=2 / width**0.5),
            "bias1": _normal(generator, fp32, neurons),
            "weight2": _normal(generator, fp32, neurons, scale=1 / neurons**0.5),
            "bias2": _normal(generator, fp32, 1),
            "previous": _normal(generator, dtype, rows, width) if cosine else None,
            "cosine_weight": _normal(generator, fp32, neurons) if cosine else None,
            "extra": _normal(generator, fp32, rows, extra) if extra else None,
            "extra_weight": _normal(generator, fp32, neurons, extra) if extra else None,
            "eps": eps,
            "silu": silu,
            "live": None if live is None else _counter(live),
        }

    return make


# -- paged K,V ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paged:
    """Rows spread over sequences with pages in shuffled order; some page slots are never written."""

    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int = 16
    sequences: int = 3
    context: int = 40
    #: Every row is the newest token of a sequence of its own, `context` long; else rows start anywhere below `context`.
    decode: bool = False

    def layout(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, int]:
        """(seq, pos, block_table, pages); rows of a sequence are consecutive."""
        per_sequence = -(-(self.context + self.rows) // self.page_size)
        pages = self.sequences * per_sequence + 2
        table = torch.full((self.sequences, per_sequence + 1), -1, dtype=torch.int32)
        table[:, :per_sequence] = (
            torch.randperm(pages, generator=generator)[: self.sequences * per_sequence].view(self.sequences, -1).int()
        )
        if self.decode:
            return torch.arange(self.rows).int(), torch.full((self.rows,), self.context - 1).int(), table, pages
        owner = torch.sort(torch.randint(self.sequences, (self.rows,), generator=generator)).values
        base = torch.randint(0, max(self.context, 1), (self.sequences,), generator=generator)
        place = torch.arange(self.rows) - torch.searchsorted(owner, owner)
        return owner.int(), (base[owner] + place).int(), table, pages

    def slots(self, seq: Tensor, pos: Tensor, table: Tensor) -> Tensor:
        page = table[seq.long(), pos.long() // self.page_size]
        return (page * self.page_size + pos % self.page_size).int()

    def tables(self, generator: torch.Generator, rotary: int, *variants: int) -> tuple[Tensor, Tensor]:
        angles = torch.rand(*variants, self.context + self.rows + 1, rotary, generator=generator) * 6
        return angles.cos(), angles.sin()


def _attention(p: Paged, *, softcap: float = 0.0, window: int = 0, live: int | None = None) -> Callable[..., Arguments]:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        seq, pos, table, pages = p.layout(generator)
        return {
            "q": _normal(generator, dtype, p.rows, p.heads, p.head_dim),
            "pages": _normal(generator, dtype, 2, pages, p.page_size, p.kv_heads, p.head_dim),
            "block_table": table,
            "seq": seq,
            "pos": pos,
            "live": None if live is None else _counter(live),
            "scale": p.head_dim**-0.5,
            "softcap": softcap,
            "window": window,
        }

    return make


def _store(
    p: Paged,
    rotary: int,
    *,
    queries: int | None = None,
    fused: bool = False,
    padding: bool = False,
    live: int | None = None,
) -> Callable[..., Arguments]:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        seq, pos, table, pages = p.layout(generator)
        slots = p.slots(seq, pos, table)
        if padding:
            slots[::3] = -1
        cos, sin = p.tables(generator, rotary) if rotary else (None, None)
        qkv = _normal(generator, dtype, p.rows, p.heads + 2 * p.kv_heads, p.head_dim)
        q, k, v = qkv.split([p.heads, p.kv_heads, p.kv_heads], dim=1)
        if not fused:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return {
            "q": q[:queries],
            "k": k,
            "v": v,
            "cos": cos,
            "sin": sin,
            "pos": pos,
            "slots": slots,
            "pages": _normal(generator, dtype, 2, pages, p.page_size, p.kv_heads, p.head_dim),
            "live": None if live is None else _counter(live),
        }

    return make


def _project(
    p: Paged,
    width: int,
    rotary: int,
    *,
    bias: bool = False,
    norm: bool = False,
    eps: float = 1e-6,
    live: int | None = None,
) -> Callable[..., Arguments]:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        seq, pos, table, pages = p.layout(generator)
        cos, sin = p.tables(generator, rotary) if rotary else (None, None)
        q_width, kv_width = p.heads * p.head_dim, p.kv_heads * p.head_dim
        scale = width**-0.5
        return {
            "x": _normal(generator, dtype, p.rows, width),
            "q_weight": _normal(generator, dtype, q_width, width, scale=scale),
            "k_weight": _normal(generator, dtype, kv_width, width, scale=scale),
            "v_weight": _normal(generator, dtype, kv_width, width, scale=scale),
            "q_bias": _normal(generator, dtype, q_width) if bias else None,
            "k_bias": _normal(generator, dtype, kv_width) if bias else None,
            "v_bias": _normal(generator, dtype, kv_width) if bias else None,
            "q_gain": torch.rand(p.head_dim, generator=generator) + 0.5 if norm else None,
            "k_gain": torch.rand(p.head_dim, generator=generator) + 0.5 if norm else None,
            "eps": eps,
            "cos": cos,
            "sin": sin,
            "pos": pos,
            "slots": p.slots(seq, pos, table),
            "pages": _normal(generator, dtype, 2, pages, p.page_size, p.kv_heads, p.head_dim),
            "live": None if live is None else _counter(live),
        }

    return make


def _backfill(
    p: Paged,
    width: int,
    layers: int,
    rotary: int,
    *,
    norm: int = 1,
    bias: bool = True,
    variants: int = 1,
    section: tuple[int, int] | None = None,
) -> Callable[..., Arguments]:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        seq, pos, table, pages = p.layout(generator)
        kv = p.kv_heads * p.head_dim
        cos, sin = p.tables(generator, rotary, variants) if rotary else (None, None)
        return {
            "residual": _normal(generator, dtype, p.rows, width, scale=3.0),
            "weight": _normal(generator, dtype, layers, 2, kv, width, scale=width**-0.5),
            "bias": _normal(generator, dtype, layers, 2, kv) if bias else None,
            "norm": norm,
            "eps": 1e-5,
            "cos": cos,
            "sin": sin,
            "variant": torch.randint(variants, (layers,), generator=generator).int() if variants > 1 else None,
            "pos": pos,
            "slots": p.slots(seq, pos, table),
            "pages": _normal(generator, dtype, layers + 2, 2, pages, p.page_size, p.kv_heads, p.head_dim),
            "first_layer": 1,
            "section": None if section is None else torch.tensor(section, dtype=torch.int32),
        }

    return make


_SMOL = {"heads": 9, "kv_heads": 3, "head_dim": 64}
_LLAMA = {"heads": 32, "kv_heads": 8, "head_dim": 128}


def _decode(rows: int, context: int, shape: dict[str, int]) -> Paged:
    return Paged(rows=rows, sequences=rows, context=context, decode=True, **shape)


CASES: dict[str, list[Case]] = {
    "accept_drafts": ACCEPT_DRAFTS,
    "compact_rows": [
        Case("empty", _compact(0, 8)),
        Case("one", _compact(1, 8)),
        Case("all_run", _compact(33, 8, (1.0, 0.0, 0.0))),
        Case("all_leave", _compact(33, 8, (0.0, 1.0, 0.0))),
        Case("all_away", _compact(33, 8, (0.0, 0.0, 1.0))),
        Case("odd", _compact(31, 7)),
        Case("warp", _compact(32, 64)),
        Case("decode16", _compact(16, 576), bench=True),
        Case("decode64", _compact(64, 4096), bench=True),
        Case("block_edge", _compact(1025, 24)),
        Case("prefill", _compact(2048, 576), bench=True),
    ],
    "exit_stats": [
        Case("empty", _stats(0, 16, 33)),
        Case("one", _stats(1, 16, 33)),
        Case("odd", _stats(5, 23, 1003)),
        Case("tiny_vocabulary", _stats(3, 8, 2, norm=False)),
        Case("single_word", _stats(3, 8, 1, norm=False)),
        Case("bias_softcap", _stats(6, 24, 515, bias=True, softcap=30.0)),
        Case("shortlist", _stats(6, 24, 515, bias=True, short=77)),
        Case("live", _stats(9, 24, 515, live=4)),
        Case("rows33_live32", _stats(33, 24, 130, live=32)),
        Case("rows65_live1", _stats(65, 24, 130, live=1)),
        Case("none_live", _stats(9, 24, 515, live=0)),
        Case("blocks", _stats(3, 16, 20011, norm=False)),
        Case("smol16", _stats(16, 576, 49152), bench=True),
        Case("smol32", _stats(32, 576, 49152), bench=True, large=True),
        Case("smol16_short", _stats(16, 576, 49152, short=4096), bench=True),
        Case("llama16", _stats(16, 4096, 128256), bench=True, gpu=True),
        Case("llama64", _stats(64, 4096, 128256), bench=True, gpu=True),
        Case("llama256", _stats(256, 4096, 128256), bench=True, gpu=True),
    ],
    "router_score": [
        Case("empty", _router(0, 16, 4)),
        Case("one", _router(1, 16, 1, silu=False)),
        Case("odd", _router(7, 37, 5)),
        Case("cosine", _router(9, 64, 3, cosine=True)),
        Case("extra", _router(9, 64, 3, extra=4)),
        Case("everything", _router(9, 65, 6, cosine=True, extra=3, silu=False)),
        Case("eps", _router(7, 37, 5, eps=2.0)),
        Case("live", _router(9, 64, 3, extra=4, live=4)),
        Case("rows33_live32", _router(33, 64, 3, live=32)),
        Case("smol16", _router(16, 576, 32, extra=4), bench=True),
        Case("llama64", _router(64, 4096, 64), bench=True),
    ],
    "ragged_attention": [
        Case("empty", _attention(Paged(0, 4, 2, 16))),
        Case("one_key", _attention(Paged(1, 4, 2, 16, context=0, sequences=1))),
        Case("gqa3", _attention(Paged(7, 6, 2, 20))),
        Case("odd_pages", _attention(Paged(9, 4, 4, 24, page_size=5))),
        Case("page_of_one", _attention(Paged(5, 4, 1, 16, page_size=1, context=9))),
        Case("prefill", _attention(Paged(70, 6, 2, 32, sequences=2, context=1))),
        Case("window", _attention(Paged(12, 4, 2, 16, context=60), window=7)),
        Case("softcap", _attention(Paged(12, 4, 2, 16), softcap=5.0)),
        Case("window_softcap", _attention(Paged(30, 4, 2, 16, context=50), window=20, softcap=8.0)),
        Case("live", _attention(Paged(12, 4, 2, 16), live=5)),
        Case("none_live", _attention(Paged(12, 4, 2, 16), live=0)),
        Case("dim64_group4_page32", _attention(Paged(5, 8, 2, 64, page_size=32, context=95), live=5)),
        Case("dim80_group8", _attention(Paged(5, 8, 1, 80, context=47), live=4)),
        Case("dim96_group3_page1", _attention(Paged(5, 3, 1, 96, page_size=1, context=3), live=1)),
        Case("dim128_group1_page32", _attention(Paged(5, 2, 2, 128, page_size=32, context=64))),
        Case("head_dim_256", _attention(Paged(4, 4, 1, 256))),
        Case("smol16_256", _attention(_decode(16, 256, _SMOL)), bench=True),
        Case("smol16_1024", _attention(_decode(16, 1024, _SMOL)), bench=True),
        Case("llama16_1024", _attention(_decode(16, 1024, _LLAMA)), bench=True, large=True),
        Case("llama32_8192", _attention(_decode(32, 8192, _LLAMA)), bench=True, gpu=True),
        Case("llama1_8192", _attention(_decode(1, 8192, _LLAMA)), bench=True, gpu=True),
    ],
    "store_kv": [
        Case("empty", _store(Paged(0, 4, 2, 16), 8)),
        Case("one", _store(Paged(1, 4, 2, 16), 8)),
        Case("no_rotary", _store(Paged(6, 4, 2, 16), 0)),
        Case("partial_rotary", _store(Paged(6, 6, 2, 20), 5)),
        Case("fused", _store(Paged(6, 6, 2, 20), 10, fused=True)),
        Case("fewer_queries", _store(Paged(9, 6, 2, 20), 10, queries=4)),
        Case("no_queries", _store(Paged(9, 6, 2, 20), 10, queries=0)),
        Case("padding", _store(Paged(9, 6, 2, 20), 10, padding=True)),
        Case("live", _store(Paged(9, 6, 2, 20), 10, live=4)),
        Case("dim80_group8_page32", _store(Paged(33, 8, 1, 80, page_size=32, context=70), 40, padding=True, live=32)),
        Case("dim96_page1", _store(Paged(5, 3, 1, 96, page_size=1, context=3), 48, live=1)),
        Case("smol16", _store(_decode(16, 256, _SMOL), 32), bench=True),
        Case("smol512", _store(Paged(512, 9, 3, 64), 32), bench=True),
        Case("llama32", _store(_decode(32, 512, _LLAMA), 64), bench=True, gpu=True),
    ],
    "project_qkv": [
        Case("empty", _project(Paged(0, 4, 2, 16), 24, 8)),
        Case("one", _project(Paged(1, 4, 2, 16), 24, 8)),
        Case("odd", _project(Paged(7, 6, 2, 20), 50, 5, bias=True)),
        Case("norm", _project(Paged(7, 6, 2, 20), 50, 10, norm=True)),
        Case("eps", _project(Paged(7, 6, 2, 20), 50, 10, norm=True, eps=0.5)),
        Case("live", _project(Paged(9, 6, 2, 20), 50, 10, live=4)),
        Case("none_live", _project(Paged(9, 6, 2, 20), 50, 10, bias=True, norm=True, live=0)),
        Case("no_rotary", _project(Paged(9, 6, 2, 20), 50, 0)),
        Case("dim80_group8_page32", _project(Paged(33, 8, 1, 80, page_size=32, context=70), 40, 40, norm=True, live=32)),
        Case("dim96_page1", _project(Paged(5, 3, 1, 96, page_size=1, context=3), 24, 48, live=1)),
        Case("dim128_group4", _project(Paged(17, 4, 1, 128), 33, 64, bias=True, live=17)),
        Case("smol16", _project(_decode(16, 256, _SMOL), 576, 32), bench=True),
        Case("smol16_half_live", _project(_decode(16, 256, _SMOL), 576, 32, live=8), bench=True),
        Case("llama1", _project(_decode(1, 512, _LLAMA), 4096, 64), bench=True, gpu=True),
        Case("llama32", _project(_decode(32, 512, _LLAMA), 4096, 64), bench=True, gpu=True),
        Case("llama32_none_live", _project(_decode(32, 512, _LLAMA), 4096, 64, live=0), bench=True, gpu=True),
    ],
    "ragged_linear": [
        Case("empty", linear(0, 24, 16)),
        Case("one", linear(1, 24, 16)),
        Case("odd", linear(7, 37, 23)),
        Case("no_channels", linear(3, 0, 5, bias=True)),
        *(Case(f"tiles{rows}", linear(rows, 64, 48)) for rows in (17, 33)),
        *(Case(f"gated_{name}", linear(9, 96, 37, gated=name)) for name in ("silu", "gelu_tanh", "gelu")),
        Case("bias", linear(5, 48, 20, bias=True)),
        Case("gate_bias", linear(5, 50, 16, gated="silu", gate_bias=True)),
        Case("residual", linear(18, 64, 37, residual=True)),
        Case("live", linear(21, 64, 40, live=4)),
        Case("none_live", linear(9, 50, 23, gated="silu", live=0)),
        Case("everything", linear(35, 64, 53, gated="gelu", bias=True, gate_bias=True, residual=True, live=33)),
        *(Case(f"smol{rows}", linear(rows, 576, 1536), bench=True) for rows in (1, 16, 512)),
        Case("smol16_gated", linear(16, 576, 1536, gated="silu"), bench=True),
        Case("smol16_residual", linear(16, 1536, 576, residual=True), bench=True),
        Case("head", linear(16, 576, 49152), bench=True, large=True),
        *(Case(name, make, bench=True, gpu=True) for name, make in LARGE_LINEARS.items()),
    ],
    "backfill_kv": [
        Case("empty", _backfill(Paged(0, 4, 2, 16), 24, 3, 8)),
        Case("one", _backfill(Paged(1, 4, 2, 16), 24, 3, 8)),
        Case("one_layer", _backfill(Paged(5, 4, 2, 16), 24, 1, 8, bias=False)),
        Case("layer_norm", _backfill(Paged(7, 4, 2, 20), 50, 3, 5, norm=2)),
        Case("no_norm", _backfill(Paged(7, 4, 2, 20), 50, 3, 0, norm=0)),
        Case("variants", _backfill(Paged(7, 4, 2, 20), 50, 6, 10, variants=2)),
        Case("dim80_page32", _backfill(Paged(33, 8, 1, 80, page_size=32, context=70), 40, 2, 40)),
        Case("dim128_page1", _backfill(Paged(5, 4, 1, 128, page_size=1, context=3), 24, 2, 64)),
        Case("section", _backfill(Paged(11, 4, 2, 20), 50, 3, 10, section=(4, 3))),
        Case("empty_section", _backfill(Paged(11, 4, 2, 20), 50, 3, 10, section=(4, 0))),
        Case("smol16_15", _backfill(_decode(16, 256, _SMOL), 576, 15, 32), bench=True),
        Case("smol1_15", _backfill(_decode(1, 256, _SMOL), 576, 15, 32), bench=True),
        Case("llama8_16", _backfill(_decode(8, 512, _LLAMA), 4096, 16, 64), bench=True, gpu=True),
        Case("llama32_16", _backfill(_decode(32, 512, _LLAMA), 4096, 16, 64), bench=True, gpu=True),
    ],
}  # fmt: skip
