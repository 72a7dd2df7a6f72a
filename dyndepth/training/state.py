"""Where a training run is: what its checkpoints hold beside weights and the optimizer."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass
class RunState:
    """Updates made, the best look at the validation split, and the looks since."""

    update: int = 0
    best: float = math.inf
    best_update: int = 0
    waited: int = 0

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
