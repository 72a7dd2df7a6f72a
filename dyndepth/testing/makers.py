"""How to make arguments of ops; dyndepth/testing/cases.py and edges.py list what is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndepth.testing.case import Arguments


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def _counter(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int32)


# -- compact_rows -------------------------------------------------------------------------------------------------------


def compact(
    rows: int, width: int, shares: tuple[float, float, float] = (0.5, 0.25, 0.25), *, run: int | None = None,
    most: int = 6,
) -> Callable[..., Arguments]:  # fmt: skip
    """Rows in the three states by these shares, or exactly `run` that run on; at most so many payloads."""

    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        state = torch.multinomial(torch.tensor(shares), max(rows, 1), replacement=True, generator=generator)[:rows]
        if run is not None:
            state = torch.where(torch.randperm(rows, generator=generator) < run, 0, 1 + state % 2)
        payloads = [
            _normal(generator, dtype, rows, width),
            torch.arange(rows, dtype=torch.int32),
            torch.arange(rows, dtype=torch.int64) * 7,
            torch.arange(rows) % 2 == 0,
            _normal(generator, dtype, rows, 3, 5).transpose(1, 2),  # rows that are not dense
            _normal(generator, dtype, rows, width + 5)[:, 2 : 2 + width],  # dense rows that lie apart
        ]
        return {"state": state.to(torch.int8), "payloads": payloads[:most]}

    return make


# -- exit_stats ---------------------------------------------------------------------------------------------------------


def stats(
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


def router(
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
    #: Pages for the context alone, not for as many tokens more as there are rows.
    tight: bool = False

    def layout(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, int]:
        """(seq, pos, block_table, pages); rows of a sequence are consecutive."""
        per_sequence = -(-(self.context + self.rows * (not self.tight)) // self.page_size)
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

    def slots(self, seq: Tensor, pos: Tensor, table: Tensor, padding: bool = False) -> Tensor:
        """int32 [rows]; `padding`: every third row has none, -1."""
        page = table[seq.long(), pos.long() // self.page_size]
        slots = (page * self.page_size + pos % self.page_size).int()
        if padding:
            slots[::3] = -1
        return slots

    def tables(self, generator: torch.Generator, rotary: int, *variants: int) -> tuple[Tensor, Tensor]:
        angles = torch.rand(*variants, self.context + self.rows + 1, rotary, generator=generator) * 6
        return angles.cos(), angles.sin()


def attention(p: Paged, *, softcap: float = 0.0, window: int = 0, live: int | None = None) -> Callable[..., Arguments]:
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


def store(
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
        slots = p.slots(seq, pos, table, padding)
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


def project(
    p: Paged,
    width: int,
    rotary: int,
    *,
    bias: bool = False,
    norm: bool = False,
    eps: float = 1e-6,
    padding: bool = False,
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
            "slots": p.slots(seq, pos, table, padding),
            "pages": _normal(generator, dtype, 2, pages, p.page_size, p.kv_heads, p.head_dim),
            "live": None if live is None else _counter(live),
        }

    return make


def backfill(
    p: Paged,
    width: int,
    layers: int,
    rotary: int,
    *,
    norm: int = 1,
    bias: bool = True,
    variants: int = 1,
    padding: bool = False,
    section: tuple[int, int] | None = None,
    rank: int = 0,
) -> Callable[..., Arguments]:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        seq, pos, table, pages = p.layout(generator)
        kv = p.kv_heads * p.head_dim
        cos, sin = p.tables(generator, rotary, variants) if rotary else (None, None)
        return {
            "residual": _normal(generator, dtype, p.rows, width, scale=3.0),
            "weight": _normal(generator, dtype, layers, 2, kv, rank or width, scale=(rank or width) ** -0.5),
            "bias": _normal(generator, dtype, layers, 2, kv) if bias else None,
            "norm": norm,
            "eps": 1e-5,
            "cos": cos,
            "sin": sin,
            "variant": torch.randint(variants, (layers,), generator=generator).int() if variants > 1 else None,
            "pos": pos,
            "slots": p.slots(seq, pos, table, padding),
            "pages": _normal(generator, dtype, layers + 2, 2, pages, p.page_size, p.kv_heads, p.head_dim),
            "first_layer": 1,
            "section": None if section is None else torch.tensor(section, dtype=torch.int32),
            "down": _normal(generator, dtype, rank, width, scale=width**-0.5) if rank else None,
        }

    return make
