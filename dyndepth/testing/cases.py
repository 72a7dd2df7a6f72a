"""One case list per op; it serves the tests and the benchmarks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dyndepth.testing.accept_cases import ACCEPT_DRAFTS
from dyndepth.testing.case import Arguments as Arguments
from dyndepth.testing.case import Case as Case
from dyndepth.testing.edges import EDGES
from dyndepth.testing.linear_cases import LARGE_LINEARS, linear
from dyndepth.testing.makers import Paged, attention, backfill, compact, project, router, stats, store


def widened(arguments: Arguments) -> Arguments:
    """The same arguments with every float tensor in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


_SMOL = {"heads": 9, "kv_heads": 3, "head_dim": 64}
_LLAMA = {"heads": 32, "kv_heads": 8, "head_dim": 128}


def _decode(rows: int, context: int, shape: dict[str, Any]) -> Paged:
    return Paged(rows=rows, sequences=rows, context=context, decode=True, **shape)


_CASES: dict[str, list[Case]] = {
    "accept_drafts": ACCEPT_DRAFTS,
    "compact_rows": [
        Case("empty", compact(0, 8)),
        Case("one", compact(1, 8)),
        Case("all_run", compact(33, 8, (1.0, 0.0, 0.0))),
        Case("all_leave", compact(33, 8, (0.0, 1.0, 0.0))),
        Case("all_away", compact(33, 8, (0.0, 0.0, 1.0))),
        Case("odd", compact(31, 7)),
        Case("warp", compact(32, 64)),
        Case("decode16", compact(16, 576), bench=True),
        Case("decode64", compact(64, 4096), bench=True),
        Case("block_edge", compact(1025, 24)),
        Case("prefill", compact(2048, 576), bench=True),
    ],
    "exit_stats": [
        Case("empty", stats(0, 16, 33)),
        Case("one", stats(1, 16, 33)),
        Case("odd", stats(5, 23, 1003)),
        Case("tiny_vocabulary", stats(3, 8, 2, norm=False)),
        Case("single_word", stats(3, 8, 1, norm=False)),
        Case("bias_softcap", stats(6, 24, 515, bias=True, softcap=30.0)),
        Case("shortlist", stats(6, 24, 515, bias=True, short=77)),
        Case("live", stats(9, 24, 515, live=4)),
        Case("rows33_live32", stats(33, 24, 130, live=32)),
        Case("rows65_live1", stats(65, 24, 130, live=1)),
        Case("none_live", stats(9, 24, 515, live=0)),
        Case("blocks", stats(3, 16, 20011, norm=False)),
        Case("smol16", stats(16, 576, 49152), bench=True),
        Case("smol32", stats(32, 576, 49152), bench=True, large=True),
        Case("smol16_short", stats(16, 576, 49152, short=4096), bench=True),
        Case("llama16", stats(16, 4096, 128256), bench=True, gpu=True),
        Case("llama64", stats(64, 4096, 128256), bench=True, gpu=True),
        Case("llama256", stats(256, 4096, 128256), bench=True, gpu=True),
    ],
    "router_score": [
        Case("empty", router(0, 16, 4)),
        Case("one", router(1, 16, 1, silu=False)),
        Case("odd", router(7, 37, 5)),
        Case("cosine", router(9, 64, 3, cosine=True)),
        Case("extra", router(9, 64, 3, extra=4)),
        Case("everything", router(9, 65, 6, cosine=True, extra=3, silu=False)),
        Case("eps", router(7, 37, 5, eps=2.0)),
        Case("live", router(9, 64, 3, extra=4, live=4)),
        Case("rows33_live32", router(33, 64, 3, live=32)),
        Case("smol16", router(16, 576, 32, extra=4), bench=True),
        Case("llama64", router(64, 4096, 64), bench=True),
    ],
    "ragged_attention": [
        Case("empty", attention(Paged(0, 4, 2, 16))),
        Case("one_key", attention(Paged(1, 4, 2, 16, context=0, sequences=1))),
        Case("gqa3", attention(Paged(7, 6, 2, 20))),
        Case("odd_pages", attention(Paged(9, 4, 4, 24, page_size=5))),
        Case("page_of_one", attention(Paged(5, 4, 1, 16, page_size=1, context=9))),
        Case("prefill", attention(Paged(70, 6, 2, 32, sequences=2, context=1))),
        Case("window", attention(Paged(12, 4, 2, 16, context=60), window=7)),
        Case("softcap", attention(Paged(12, 4, 2, 16), softcap=5.0)),
        Case("window_softcap", attention(Paged(30, 4, 2, 16, context=50), window=20, softcap=8.0)),
        Case("live", attention(Paged(12, 4, 2, 16), live=5)),
        Case("none_live", attention(Paged(12, 4, 2, 16), live=0)),
        Case("dim64_group4_page32", attention(Paged(5, 8, 2, 64, page_size=32, context=95), live=5)),
        Case("dim80_group8", attention(Paged(5, 8, 1, 80, context=47), live=4)),
        Case("dim96_group3_page1", attention(Paged(5, 3, 1, 96, page_size=1, context=3), live=1)),
        Case("dim128_group1_page32", attention(Paged(5, 2, 2, 128, page_size=32, context=64))),
        Case("head_dim_256", attention(Paged(4, 4, 1, 256))),
        Case("smol16_256", attention(_decode(16, 256, _SMOL)), bench=True),
        Case("smol16_1024", attention(_decode(16, 1024, _SMOL)), bench=True),
        Case("llama16_1024", attention(_decode(16, 1024, _LLAMA)), bench=True, large=True),
        Case("llama32_8192", attention(_decode(32, 8192, _LLAMA)), bench=True, gpu=True),
        Case("llama1_8192", attention(_decode(1, 8192, _LLAMA)), bench=True, gpu=True),
    ],
    "store_kv": [
        Case("empty", store(Paged(0, 4, 2, 16), 8)),
        Case("one", store(Paged(1, 4, 2, 16), 8)),
        Case("no_rotary", store(Paged(6, 4, 2, 16), 0)),
        Case("partial_rotary", store(Paged(6, 6, 2, 20), 5)),
        Case("fused", store(Paged(6, 6, 2, 20), 10, fused=True)),
        Case("fewer_queries", store(Paged(9, 6, 2, 20), 10, queries=4)),
        Case("no_queries", store(Paged(9, 6, 2, 20), 10, queries=0)),
        Case("padding", store(Paged(9, 6, 2, 20), 10, padding=True)),
        Case("live", store(Paged(9, 6, 2, 20), 10, live=4)),
        Case("dim80_group8_page32", store(Paged(33, 8, 1, 80, page_size=32, context=70), 40, padding=True, live=32)),
        Case("dim96_page1", store(Paged(5, 3, 1, 96, page_size=1, context=3), 48, live=1)),
        Case("smol16", store(_decode(16, 256, _SMOL), 32), bench=True),
        Case("smol512", store(Paged(512, 9, 3, 64), 32), bench=True),
        Case("llama32", store(_decode(32, 512, _LLAMA), 64), bench=True, gpu=True),
    ],
    "project_qkv": [
        Case("empty", project(Paged(0, 4, 2, 16), 24, 8)),
        Case("one", project(Paged(1, 4, 2, 16), 24, 8)),
        Case("odd", project(Paged(7, 6, 2, 20), 50, 5, bias=True)),
        Case("norm", project(Paged(7, 6, 2, 20), 50, 10, norm=True)),
        Case("eps", project(Paged(7, 6, 2, 20), 50, 10, norm=True, eps=0.5)),
        Case("live", project(Paged(9, 6, 2, 20), 50, 10, live=4)),
        Case("none_live", project(Paged(9, 6, 2, 20), 50, 10, bias=True, norm=True, live=0)),
        Case("no_rotary", project(Paged(9, 6, 2, 20), 50, 0)),
        Case("dim80_group8_page32", project(Paged(33, 8, 1, 80, page_size=32, context=70), 40, 40, norm=True, live=32)),
        Case("dim96_page1", project(Paged(5, 3, 1, 96, page_size=1, context=3), 24, 48, live=1)),
        Case("dim128_group4", project(Paged(17, 4, 1, 128), 33, 64, bias=True, live=17)),
        Case("smol16", project(_decode(16, 256, _SMOL), 576, 32), bench=True),
        Case("smol16_half_live", project(_decode(16, 256, _SMOL), 576, 32, live=8), bench=True),
        Case("llama1", project(_decode(1, 512, _LLAMA), 4096, 64), bench=True, gpu=True),
        Case("llama32", project(_decode(32, 512, _LLAMA), 4096, 64), bench=True, gpu=True),
        Case("llama32_none_live", project(_decode(32, 512, _LLAMA), 4096, 64, live=0), bench=True, gpu=True),
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
        Case("empty", backfill(Paged(0, 4, 2, 16), 24, 3, 8)),
        Case("one", backfill(Paged(1, 4, 2, 16), 24, 3, 8)),
        Case("one_layer", backfill(Paged(5, 4, 2, 16), 24, 1, 8, bias=False)),
        Case("layer_norm", backfill(Paged(7, 4, 2, 20), 50, 3, 5, norm=2)),
        Case("no_norm", backfill(Paged(7, 4, 2, 20), 50, 3, 0, norm=0)),
        Case("variants", backfill(Paged(7, 4, 2, 20), 50, 6, 10, variants=2)),
        Case("dim80_page32", backfill(Paged(33, 8, 1, 80, page_size=32, context=70), 40, 2, 40)),
        Case("dim128_page1", backfill(Paged(5, 4, 1, 128, page_size=1, context=3), 24, 2, 64)),
        Case("section", backfill(Paged(11, 4, 2, 20), 50, 3, 10, section=(4, 3))),
        Case("low_rank", backfill(Paged(7, 4, 2, 20), 50, 6, 10, variants=2, rank=13)),
        Case("low_rank_section", backfill(Paged(11, 4, 2, 20), 50, 3, 10, section=(4, 3), rank=7)),
        Case("low_rank_layer_norm", backfill(Paged(33, 4, 2, 20), 50, 3, 5, norm=2, rank=17)),
        Case("low_rank_no_norm", backfill(Paged(3, 4, 2, 20), 24, 1, 0, norm=0, bias=False, rank=1)),
        Case("empty_section", backfill(Paged(11, 4, 2, 20), 50, 3, 10, section=(4, 0))),
        Case("smol16_15", backfill(_decode(16, 256, _SMOL), 576, 15, 32), bench=True),
        Case("smol16_15_rank192", backfill(_decode(16, 256, _SMOL), 576, 15, 32, rank=192), bench=True),
        Case("smol1_15", backfill(_decode(1, 256, _SMOL), 576, 15, 32), bench=True),
        Case("llama8_16", backfill(_decode(8, 512, _LLAMA), 4096, 16, 64), bench=True, gpu=True),
        Case("llama32_16", backfill(_decode(32, 512, _LLAMA), 4096, 16, 64), bench=True, gpu=True),
    ],
}  # fmt: skip

CASES: dict[str, list[Case]] = {op: [*listed, *EDGES[op]] for op, listed in _CASES.items()}
