"""What every way of decoding is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyndepth.runtime.bind import Model
from dyndepth.runtime.observe import Observer
from dyndepth.runtime.session import Session, Work
from dyndepth.runtime.stops import forbidden_words


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
    def forbidden(self) -> Tensor | None:
        """int64 [k], where nobody looks at logits: the words that the most likely token may not be, at some length at least."""
        config = self.config
        shown = self.keep and (config.output_scores or config.output_logits)
        return None if config.do_sample or shown else forbidden_words(self.processor)
