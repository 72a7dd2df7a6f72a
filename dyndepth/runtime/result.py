"""What a pass produced."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Result:
    """What a pass produced, in the caller's row order."""

    #: Head-ready rows [n, ready].
    ready: Tensor
    #: int32 [n]: boundary where a row left for good, the number of layers if it reached the top.
    exit_layer: Tensor
    #: int32 [n]: layers that the row ran.
    layers_run: Tensor
    #: int64 [n]: bit i is set if the row took the i-th band of the exits.
    bands_taken: Tensor
    #: Rows that ran each layer.
    work: list[int]
    #: Rows that ran an exit block (one layer each), by boundary.
    block_work: dict[int, int]
    #: bool [n]: rows that were held at a boundary; their token is still to come. None where nothing is held.
    held: Tensor | None = None
    #: Residuals [n, d] that rows ended with, where a later pass may take them up (`recompute`, or rows are held).
    hidden: Tensor | None = None
    #: What rows carry from boundary to boundary, by name, where rows are held or observed.
    carried: dict[str, Tensor] = field(default_factory=dict)
    #: Residuals [n, d] that rows had at the boundary asked for (`keep`); None where nobody asked.
    kept: Tensor | None = None
