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
