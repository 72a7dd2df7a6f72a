"""Launches of a decoder's ops as problems: sizes and rows, what rules and tables choose for them, arguments to try them on."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dyndepth.plan.sizes import Sizes

#: Ops whose tile sizes tables may choose.
OPS = ("project_qkv", "backfill_kv", "ragged_attention", "ragged_linear", "exit_stats")
#: Tokens of context that attention is tried on, and of a page.
_CONTEXT, _PAGE = 1024, 16


@dataclass(frozen=True)
class Problem:
    """One op at one shape and one bucket of rows. `sizes` are the op's own: see `problems`."""

    op: str
    what: str
    rows: int
    sizes: tuple[int, ...]

    def config(self, device: Any, itemsize: int = 2) -> Any:
        """kernels.launch.LaunchConfig on a kernels.launch.Device."""
        launch: Any = importlib.import_module("dyndepth.kernels.launch")
        if self.op == "ragged_linear":
            outputs, width, weights = self.sizes
            return launch.ragged_linear(self.rows, outputs, width, weights > 1, device, itemsize)
        if self.op == "exit_stats":
            words, width = self.sizes
            return launch.exit_stats(self.rows, width, words, device, itemsize)
        if self.op == "ragged_attention":
            return launch.ragged_attention(self.rows, *self.sizes, _CONTEXT, device, itemsize)
        heads, head_dim, width, normed = self._projected()
        return launch.projection(self.rows, width, heads, head_dim // 2, normed, device, itemsize)

    def key(self, device: Any, itemsize: int = 2) -> Any:
        """kernels.tables.Key of the same."""
        launch: Any = importlib.import_module("dyndepth.kernels.launch")
        if self.op in ("project_qkv", "backfill_kv"):
            heads, head_dim, width, normed = self._projected()
            return launch.key_of("projection", device, itemsize, (heads, head_dim // 2, width, int(normed)), self.rows)
        return launch.key_of(self.op, device, itemsize, self.sizes, self.rows)

    def chosen(self, device: Any, itemsize: int = 2) -> tuple[Any, str]:
        """(tiles, where they come from) on a device."""
        tables: Any = importlib.import_module("dyndepth.kernels.tables")
        rule = tiles_of(self.config(replace(device, architecture=""), itemsize))
        return tables.lookup(self.key(device, itemsize), rule)

    def call(self, device: str, dtype: torch.dtype) -> Any:
        """The op's host function with random arguments on a device (`meta`: shapes alone), ready to be called."""
        host = getattr(importlib.import_module(f"dyndepth.kernels.{self.op}"), self.op)
        arguments = getattr(self, f"_{self.op}")(_Maker(device, dtype))
        return lambda: host(**arguments)

    def _projected(self) -> tuple[int, int, int, bool]:
        if self.op == "project_qkv":
            heads, kv_heads, head_dim, width, normed = self.sizes
            return heads + 2 * kv_heads, head_dim, width, bool(normed)
        layers, kv_heads, head_dim, width = self.sizes
        return 2 * layers * kv_heads, head_dim, width, False

    def _ragged_linear(self, make: _Maker) -> dict[str, Any]:
        outputs, width, weights = self.sizes
        weight = make.floats(outputs, width)
        gate = make.floats(outputs, width) if weights > 1 else None
        live = make.ints(1, value=self.rows)
        return {"x": make.floats(self.rows, width), "weight": weight, "gate_weight": gate, "live": live}

    def _exit_stats(self, make: _Maker) -> dict[str, Any]:
        words, width = self.sizes
        return {"hidden": make.floats(self.rows, width), "head_weight": make.floats(words, width),
                "live": make.ints(1, value=self.rows)}  # fmt: skip

    def _project_qkv(self, make: _Maker) -> dict[str, Any]:
        heads, kv_heads, head_dim, width, normed = self.sizes
        weights = {
            name: make.floats(count * head_dim, width) for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        }
        gain = make.table(head_dim) if normed else None
        return {
            "x": make.floats(self.rows, width), **{f"{name}_weight": weight for name, weight in weights.items()},
            **dict.fromkeys(("q_bias", "k_bias", "v_bias")), "q_gain": gain, "k_gain": gain, "eps": 1e-6,
            "cos": make.table(_PAGE, head_dim // 2), "sin": make.table(_PAGE, head_dim // 2), **make.places(self.rows),
            "pages": make.pages(self.rows, kv_heads, head_dim), "live": make.ints(1, value=self.rows),
        }  # fmt: skip

    def _backfill_kv(self, make: _Maker) -> dict[str, Any]:
        layers, kv_heads, head_dim, width = self.sizes
        pages = make.pages(self.rows, kv_heads, head_dim)
        return {
            "residual": make.floats(self.rows, width), "weight": make.floats(layers, 2, kv_heads * head_dim, width),
            "bias": make.floats(layers, 2, kv_heads * head_dim), "norm": 1, "eps": 1e-6,
            "cos": make.table(1, _PAGE, head_dim // 2), "sin": make.table(1, _PAGE, head_dim // 2), "variant": None,
            **make.places(self.rows), "pages": pages[None].expand(layers, *pages.shape).contiguous(), "first_layer": 0,
        }  # fmt: skip

    def _ragged_attention(self, make: _Maker) -> dict[str, Any]:
        kv_heads, group, head_dim = self.sizes
        columns = _CONTEXT // _PAGE
        table = torch.arange(self.rows * columns, dtype=torch.int32, device=make.device).view(self.rows, columns)
        return {
            "q": make.floats(self.rows, kv_heads * group, head_dim),
            "pages": make.pages(self.rows * _CONTEXT, kv_heads, head_dim),
            "block_table": table, "seq": torch.arange(self.rows, dtype=torch.int32, device=make.device),
            "pos": make.ints(self.rows, value=_CONTEXT - 1), "live": make.ints(1, value=self.rows), "scale": head_dim**-0.5,
        }  # fmt: skip


@dataclass(frozen=True)
class _Maker:
    device: str
    dtype: torch.dtype

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def table(self, *shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float32, device=self.device)

    def ints(self, count: int, value: int) -> Tensor:
        return torch.full((count,), value, dtype=torch.int32, device=self.device)

    def places(self, rows: int) -> dict[str, Tensor]:
        """Positions, and a slot of its own for every row."""
        return {"pos": self.ints(rows, 3), "slots": torch.arange(rows, dtype=torch.int32, device=self.device)}

    def pages(self, slots: int, kv_heads: int, head_dim: int) -> Tensor:
        return self.floats(2, -(-slots // _PAGE), _PAGE, kv_heads, head_dim)


def problems(sizes: Sizes, rows: Sequence[int]) -> list[Problem]:
    """Every launch of a decode pass of a model that tables may choose for, at every row count, `rows` rounded to buckets.

    Sizes: `ragged_linear` (outputs, width, weights), `exit_stats` (words, width), `project_qkv` (heads, kv_heads, head_dim,
    width, normed), `backfill_kv` (layers, kv_heads, head_dim, width) of the upper half, `ragged_attention` (kv_heads, heads
    per K,V head, head_dim).
    """
    s = sizes
    shapes = [
        ("project_qkv", "q, k, v", (s.heads, s.kv_heads, s.head_dim, s.width, int(s.qk_norm))),
        ("ragged_attention", "one layer", (s.kv_heads, s.heads // s.kv_heads, s.head_dim)),
        ("ragged_linear", "output projection", (s.width, s.query, 1)),
        ("ragged_linear", "gate and up", (s.inner, s.width, 2)),
        ("ragged_linear", "down projection", (s.width, s.inner, 1)),
        ("exit_stats", "whole vocabulary", (s.vocab, s.width)),
        ("backfill_kv", "upper half", (s.layers - s.layers // 2, s.kv_heads, s.head_dim, s.width)),
    ]
    buckets = list(dict.fromkeys(1 << max(4, count - 1).bit_length() if count > 16 else 16 for count in rows))
    return [Problem(op, what, count, shape) for op, what, shape in shapes for count in buckets]


def tiles_of(config: Any) -> Any:
    """The part of a LaunchConfig that tables hold."""
    tables: Any = importlib.import_module("dyndepth.kernels.tables")
    return tables.Tiles(config.block_rows, config.block_columns, config.block_inner, config.num_warps, config.num_stages)
