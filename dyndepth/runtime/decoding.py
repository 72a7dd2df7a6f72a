"""What every way of decoding is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dyndepth.runtime.bind import Model
from dyndepth.runtime.observe import Observer
from dyndepth.runtime.session import Session, Work


@dataclass
class Decoding:
    """One generation: transformers' own parts, and ours."""

    model: Model
    session: Session
    config: Any
    processor: Any
    criteria: Any
    generator: torch.Generator | None
    streamer: Any
    work: Work
    observer: Observer | None

    @property
    def keep(self) -> bool:
        """The caller wants more than tokens."""
        return bool(self.config.return_dict_in_generate)

    @property
    def tokens_only(self) -> bool:
        """Nobody looks at logits: the most likely token is all that is wanted of them."""
        config = self.config
        shown = self.keep and (config.output_scores or config.output_logits)
        return not (config.do_sample or len(self.processor) or shown)
