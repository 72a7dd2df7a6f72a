"""Arguments of accept_drafts; listed in dyndepth/testing/cases.py. Probabilities are float32 whatever dtype is asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dyndepth.testing.case import Arguments, Case

Make = Callable[[torch.dtype, torch.Generator], Arguments]


def greedy(rows: int, most: int, agreement: float = 0.7) -> Make:
    """A draft equals the target's choice with probability `agreement`; what does not count is -1."""

    def make(_dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        target = torch.randint(0, 50, (rows, most + 1), generator=generator)
        wrong = torch.rand(rows, most, generator=generator) >= agreement
        lengths = torch.randint(0, most + 1, (rows,), generator=generator)
        return {
            "drafts": _padded(target[:, :most] + wrong, lengths),
            "lengths": lengths.int(),
            "target": target,
            "draft_probs": None,
            "uniforms": None,
        }

    return make


def sampled(rows: int, most: int, vocabulary: int, *, certain: bool = False, apart: float = 1.0) -> Make:
    """Drafts drawn from q (`certain`: the likeliest of q, and no q is given); p lies `apart` from q."""

    def make(_dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        logits = torch.randn(rows, most + 1, vocabulary, generator=generator) * 2
        target = torch.softmax(logits + apart * torch.randn(logits.shape, generator=generator), -1)
        draft_probs = torch.softmax(logits[:, :most], -1).contiguous()
        if certain:
            drafts = draft_probs.argmax(-1)
        else:
            # Gumbel: multinomial refuses no rows at all and vocabularies past 2^24.
            drafts = (draft_probs / torch.empty_like(draft_probs).exponential_(generator=generator)).argmax(-1)
        lengths = torch.randint(0, most + 1, (rows,), generator=generator)
        return {
            "drafts": _padded(drafts, lengths),
            "lengths": lengths.int(),
            "target": target,
            "draft_probs": None if certain else draft_probs,
            "uniforms": torch.rand(rows, most + 1, generator=generator),
        }

    return make


def _padded(drafts: Tensor, lengths: Tensor) -> Tensor:
    return torch.where(torch.arange(drafts.shape[1]) < lengths[:, None], drafts, -1)


ACCEPT_DRAFTS = [
    Case("greedy_empty", greedy(0, 3)),
    Case("greedy_no_drafts", greedy(5, 0)),
    Case("greedy_one", greedy(1, 1)),
    Case("greedy_all_kept", greedy(9, 7, 1.0)),
    Case("greedy_none_kept", greedy(9, 7, 0.0)),
    Case("greedy_long", greedy(33, 70, 0.98)),
    Case("greedy_past_a_block", greedy(20, 1030, 0.999)),
    Case("greedy_many", greedy(70_000, 2)),
    Case("greedy16", greedy(16, 4), bench=True),
    Case("empty", sampled(0, 3, 11)),
    Case("no_drafts", sampled(5, 0, 11)),
    Case("no_certain_drafts", sampled(5, 0, 11, certain=True)),
    Case("one", sampled(1, 1, 11)),
    Case("odd", sampled(37, 5, 103)),
    Case("certain", sampled(37, 5, 103, certain=True)),
    Case("single_word", sampled(6, 3, 1)),
    Case("single_certain_word", sampled(6, 3, 1, certain=True)),
    Case("two_words", sampled(40, 3, 2, apart=3.0)),
    Case("nearly_equal", sampled(40, 3, 400, apart=1e-3)),
    Case("far_apart", sampled(40, 3, 400, apart=20.0)),
    Case("long", sampled(12, 70, 20, apart=0.1)),
    *(Case(f"words{size}", sampled(20, 3, size)) for size in (31, 32, 33, 1023, 1024, 1025, 4096, 20_011)),
    Case("certain_words20011", sampled(20, 3, 20_011, certain=True)),
    Case("smol16", sampled(16, 4, 49_152), bench=True),
    Case("smol16_certain", sampled(16, 4, 49_152, certain=True), bench=True),
    Case("llama64", sampled(64, 4, 128_256), bench=True, gpu=True),
]
