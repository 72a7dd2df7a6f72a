"""Whole prompts in one pass: what sessions without exits do instead of a pass for all but the last rows and one for these."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch

from dyndepth.runtime.bind import bind
from dyndepth.runtime.session import Session
from dyndepth.testing import assert_same

LENGTHS = [5, 1, 9]


def _session(family: str, chunk: int) -> Session:
    return Session(bind(tiny_models.shared(family)), [length + 2 for length in LENGTHS], chunk=chunk)


@pytest.mark.parametrize("chunk", [1, 4, 5, 15, 100])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_the_same_bits_and_the_same_account(family: str, chunk: int) -> None:
    """Chunks that end with a prompt, within one, and that hold them all."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    one, two = _session(family, chunk), _session(family, chunk)
    one_prompt, one_work, two_prompt, two_work = (session.work() for session in (one, one, two, two))
    ready = one.open(prompts, one_prompt, one_work)
    two.prefill([prompt[:-1] for prompt in prompts], two_prompt)
    last = torch.stack([prompt[-1] for prompt in prompts])
    result = two.run([0, 1, 2], [length - 1 for length in LENGTHS], tokens=last)
    two_work.add(result, len(LENGTHS))
    assert_same(ready, result.ready)
    assert (one_prompt, one_work) == (two_prompt, two_work)
    seq = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    pos = np.concatenate([np.arange(length) for length in LENGTHS])
    mine, theirs = (session.pages.kv.flatten(2, 3)[:, :, session.pages.slots(seq, pos).long()] for session in (one, two))
    assert_same(mine, theirs, "K,V")
