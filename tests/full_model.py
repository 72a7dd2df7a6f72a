"""What transformers' own model computes over a text: the witness for exact K,V and for decisions made on its residuals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyndepth.runtime.session import Session


class FullModel:
    """Residuals by boundary [t, d], K,V by layer [t, kv_heads, head_dim] and logits [t, V] over one sequence (Llama names)."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        with torch.no_grad():
            out = model(input_ids=tokens[None], use_cache=True, output_hidden_states=True)
        self.model = model
        self.residuals = [state[0] for state in out.hidden_states]
        self.keys = [layer.keys[0].movedim(1, 0) for layer in out.past_key_values.layers]
        self.values = [layer.values[0].movedim(1, 0) for layer in out.past_key_values.layers]
        self.logits = out.logits[0]

    def exit_logits(self, leave: int) -> Tensor:
        """Logits [t, V] of the final norm and the LM head at a boundary; the last residual is normed already."""
        if leave == len(self.keys):
            return self.logits
        with torch.no_grad():
            return self.model.lm_head(self.model.model.norm(self.residuals[leave]))

    def said(self, leave: int) -> Tensor:
        """int64 [t]: the likeliest token but for the end, which tests of a fixed length forbid."""
        logits = self.exit_logits(leave).clone()
        if self.model.config.eos_token_id is not None:
            logits[:, self.model.config.eos_token_id] = -torch.inf
        return logits.argmax(-1)

    def check_pages(self, session: Session, sequence: int, layers_run: list[int]) -> None:
        """The pages of position i hold this model's K,V in layers [0, layers_run[i])."""
        for at, layers in enumerate(layers_run):
            slot = session.pages.slots([sequence], [at]).long()
            entry = session.pages.kv.flatten(2, 3)[:, :, slot[0]]
            for layer in range(layers):
                torch.testing.assert_close(entry[layer, 0], self.keys[layer][at], rtol=2e-4, atol=2e-5)
                torch.testing.assert_close(entry[layer, 1], self.values[layer][at], rtol=2e-4, atol=2e-5)


def text_of(out: Any, inputs: dict[str, Tensor], row: int) -> tuple[Tensor, int]:
    """The real tokens of a row, int64 [t], and the position of its last prompt token."""
    real = torch.cat([inputs["attention_mask"][row].bool(), out.exit_layers[row] >= 0])
    return out.sequences[row][real], int(inputs["attention_mask"][row].sum()) - 1
