"""accept_drafts, sampling: hundreds of thousands of texts are distributed as if the target model had been sampled alone."""

from __future__ import annotations

import op_harness
import pytest
import torch
from scipy import stats
from torch import Tensor

from dyndepth.op import backend
from dyndepth.ops import accept_drafts

EVERY = ["torch", *op_harness.providers("accept_drafts")]
ROWS, MOST, WORDS = 240_000, 2, 4


def _markov(generator: torch.Generator) -> Tensor:
    """Distributions of the next word after each word (and, last, at the start); some words cannot follow some."""
    weights = torch.rand(WORDS + 1, WORDS, generator=generator) + 0.1
    weights[1, 2] = weights[3, 0] = 0
    return weights / weights.sum(1, keepdim=True)


def _sequences(provider: str, certain: bool, generator: torch.Generator, *, honest: bool = True) -> tuple[Tensor, Tensor]:
    """Sequences of MOST + 1 words made by speculation, completed by the target model, and how often each is expected.

    With `honest` False the drafts come from another distribution than the op is told.
    """
    p, q = _markov(generator), _markov(generator)
    last = torch.full((ROWS,), WORDS)
    drafts, before = [], [last]
    for _ in range(MOST):
        drawn = torch.multinomial(q if honest else p, ROWS, replacement=True, generator=generator)
        last = q[last].argmax(1) if certain else drawn[last, torch.arange(ROWS)]
        drafts.append(last)
        before.append(last)
    context = torch.stack(before, 1)
    lengths = torch.randint(0, MOST + 1, (ROWS,), generator=generator)
    with backend(provider):
        accepted, token = accept_drafts(
            torch.stack(drafts, 1),
            lengths.int(),
            p[context],
            draft_probs=None if certain else q[context[:, :MOST]],
            uniforms=torch.rand(ROWS, MOST + 1, generator=generator),
        )
    assert bool((accepted <= lengths).all())
    assert bool((token >= 0).all())
    assert bool((token < WORDS).all())
    made = torch.cat([torch.stack(drafts, 1), torch.zeros(ROWS, 1, dtype=torch.int64)], 1)
    made[torch.arange(ROWS), accepted.long()] = token
    for place in range(1, MOST + 1):
        drawn = torch.multinomial(p, ROWS, replacement=True, generator=generator)[made[:, place - 1], torch.arange(ROWS)]
        made[:, place] = torch.where(place > accepted, drawn, made[:, place])
    observed = torch.bincount(made @ torch.tensor([WORDS**2, WORDS, 1]), minlength=WORDS**3)
    p = p.double()
    expected = ROWS * (p[WORDS, :WORDS, None, None] * p[:WORDS, :, None] * p[None, :WORDS, :]).flatten()
    return observed, expected


@pytest.mark.parametrize("provider", EVERY)
@pytest.mark.parametrize("certain", [False, True], ids=["drawn", "certain"])
def test_the_text_is_distributed_as_the_target_model_s(provider: str, certain: bool) -> None:
    """Chi-square over the joint distribution of three words, 240 000 texts: 0, 1 or 2 drafts, then the model alone."""
    for seed in (1, 2):
        observed, expected = _sequences(provider, certain, torch.Generator().manual_seed(seed))
        assert int(observed[expected == 0].sum()) == 0, "words that cannot follow"
        possible = expected > 0
        frequencies = expected[possible] * (ROWS / expected.sum())
        assert float(frequencies.min()) > 5
        assert stats.chisquare(observed[possible].numpy(), frequencies.numpy()).pvalue > 1e-3


def test_that_test_notices_drafts_from_elsewhere() -> None:
    observed, expected = _sequences("cpp", False, torch.Generator().manual_seed(1), honest=False)
    possible = expected > 0
    frequencies = expected[possible] * (observed[possible].sum() / expected.sum())
    assert stats.chisquare(observed[possible].numpy(), frequencies.numpy()).pvalue < 1e-12


@pytest.mark.parametrize("provider", EVERY)
@pytest.mark.parametrize("certain", [False, True], ids=["drawn", "certain"])
def test_tokens_are_distributed_as_p(provider: str, certain: bool) -> None:
    """One draft, 300 000 rows; two words that cannot come, the last one among them, and many that hardly ever do."""
    generator = torch.Generator().manual_seed(3)
    rows, words = 300_000, 40
    p, q = (torch.softmax(2 * torch.randn(words, generator=generator), 0) for _ in range(2))
    p[7] = p[39] = 0
    drafts = torch.multinomial(q, rows, replacement=True, generator=generator)[:, None]
    if certain:
        drafts = drafts.new_full((rows, 1), int(q.argmax()))
    with backend(provider):
        accepted, token = accept_drafts(
            drafts,
            torch.ones(rows, dtype=torch.int32),
            p.expand(rows, 2, words),
            draft_probs=None if certain else q.expand(rows, 1, words),
            uniforms=torch.rand(rows, 2, generator=generator),
        )
    first = torch.where(accepted == 1, drafts[:, 0], token)
    observed, bonus = (torch.bincount(value, minlength=words) for value in (first, token[accepted == 1]))
    for counted in (observed, bonus):
        assert int(counted[7]) == int(counted[39]) == 0
        likely = p.double() * counted.sum() > 5
        rest = p[~likely].double().sum()
        expected = torch.cat([p[likely].double(), rest[None]])
        grouped = torch.cat([counted[likely], counted[~likely].sum()[None]]).double()
        used = expected > 0
        assert stats.chisquare(grouped[used].numpy(), (expected / expected.sum() * grouped.sum())[used].numpy()).pvalue > 1e-3
    keeps = float(p[q.argmax()]) if certain else float(torch.minimum(p, q).sum())
    assert abs(float(accepted.double().mean()) - keeps) < 5 * (keeps * (1 - keeps) / rows) ** 0.5
