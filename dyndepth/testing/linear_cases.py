"""Arguments of ragged_linear; listed in dyndepth/testing/cases.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def linear(
    rows: int,
    width: int,
    outputs: int,
    *,
    gated: str = "",
    bias: bool = False,
    gate_bias: bool = False,
    residual: bool = False,
    live: int | None = None,
) -> Callable[[torch.dtype, torch.Generator], dict[str, Any]]:
    """`gated` names the activation of a gated product."""

    def make(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(dtype)

        scale = max(width, 1) ** -0.5
        return {
            "x": normal(rows, width),
            "weight": normal(outputs, width, scale=scale),
            "bias": normal(outputs) if bias else None,
            "gate_weight": normal(outputs, width, scale=2 * scale) if gated else None,
            "gate_bias": normal(outputs) if gate_bias else None,
            "activation": gated or "silu",
            "residual": normal(rows, outputs, scale=3.0) if residual else None,
            "live": None if live is None else torch.tensor([live], dtype=torch.int32),
        }

    return make


#: Sized for a GPU: Llama-3-8B (4096, 14336), Qwen3-8B (4096, 12288), Gemma-2-2B (2304, 9216).
LARGE_LINEARS = {
    **{f"llama{rows}": linear(rows, 4096, 14336) for rows in (1, 32)},
    **{f"llama{rows}_gated": linear(rows, 4096, 14336, gated="silu") for rows in (16, 512)},
    **{f"llama{rows}_residual": linear(rows, 14336, 4096, residual=True) for rows in (16, 512)},
    "llama64_half_live": linear(64, 4096, 4096, residual=True, live=32),
    "llama64_none_live": linear(64, 4096, 4096, residual=True, live=0),
    "qwen16_gated": linear(16, 4096, 12288, gated="silu"),
    "qwen16_residual": linear(16, 12288, 4096, residual=True),
    "gemma16_gated": linear(16, 2304, 9216, gated="gelu_tanh"),
}
