"""Prompts that the model writes itself: what a user would ask it, in its own opinion."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyndepth.data.encode import encode
from dyndepth.data.own import end_tokens
from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.runtime.entry import generate

#: Stands for a user's message in the chat template; letters only, so that no template has a reason to change it.
_MESSAGE = "QXQmessageQXQ"
#: A message of fewer tokens asks nothing.
_SHORTEST = 4
#: Samples in a row without a new message after which more are not expected.
_PATIENCE = 512


def own_prompts(
    causal_lm: Any,
    tokenizer: Any,
    count: int,
    *,
    new_tokens: int = 64,
    batch: int = 128,
    temperature: float = 1.0,
    top_p: float = 0.95,
    seed: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Tensor]:
    """`count` different prompts, int64 [t] on the CPU: user's messages in the model's chat template, ready to be answered.

    Magpie (Xu et al. 2024, arXiv 2406.08464): a model that learnt to chat, given its template up to where a user's message
    starts, writes one. Kept are messages of at least four tokens that the model ended itself, with the token that follows a
    message in the template, within `new_tokens`. Sampled at full depth with `temperature` and `top_p`, without top-k;
    anything else is as in the model's generation config.

    The same arguments give the same prompts, and the first n of a larger count; torch's global random state is neither used
    nor changed. `advance` is told of new prompts.

    Raises ArgumentError without a chat template, or where it has nothing before or after a message; NotEnoughDataError
    after 512 samples in a row that brought nothing new.
    """
    for name, value, least in (("count", count, 1), ("new_tokens", new_tokens, _SHORTEST + 1), ("batch", batch, 1)):
        if value < least:
            raise ArgumentError(f"own_prompts: {name} must be at least {least}, got {value}")
    opening, closing = _frame(tokenizer)
    end = int(closing[0])
    ends = end_tokens(causal_lm) | {end}
    ids = opening.repeat(batch, 1).to(causal_lm.device)
    generator = torch.Generator(causal_lm.device)
    found: dict[tuple[int, ...], Tensor] = {}
    lost: Counter[str] = Counter()
    sampled = idle = 0
    while len(found) < count:
        generator.manual_seed(_seed_of(seed, sampled // batch))
        out = causal_lm.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), custom_generate=generate, generator=generator,
            max_new_tokens=new_tokens, do_sample=True, temperature=temperature, top_p=top_p, top_k=0, num_beams=1,
            num_return_sequences=1, eos_token_id=sorted(ends), pad_token_id=end, return_dict_in_generate=False,
        )  # fmt: skip
        before = len(found)
        for row in out[:, opening.shape[0] :].tolist():
            stop = next((place for place, token in enumerate(row) if token in ends), None)
            message = tuple(row[:stop])
            if stop is None or row[stop] != end:
                lost["open"] += 1
            elif len(message) < _SHORTEST:
                lost["short"] += 1
            elif message in found:
                lost["again"] += 1
            elif len(found) < count:
                found[message] = torch.cat([opening, torch.tensor(message), closing])
        advance(len(found) - before)
        sampled += batch
        idle = 0 if len(found) > before else idle + batch
        if idle >= _PATIENCE:
            raise NotEnoughDataError(
                f"own_prompts: wanted {count} prompts, got {len(found)}: of {sampled} sampled {lost['open']} did not end "
                f"within {new_tokens} tokens, {lost['short']} had fewer than {_SHORTEST}, {lost['again']} were there already, "
                f"and the last {idle} brought nothing new"
            )
    return list(found.values())


def _frame(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids of the chat template before a user's message, and after it up to where the answer starts."""
    if not getattr(tokenizer, "chat_template", None):
        raise ArgumentError("own_prompts: tokenizer must have a chat template, got none")
    messages = [{"role": "user", "content": _MESSAGE}]
    shown = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    opening, _, closing = shown.partition(_MESSAGE)
    # A word's token brings the blank before it: a blank that the template leaves there would be a token models never saw.
    parts = encode([opening.rstrip(" "), closing], tokenizer, "own_prompts: parts of the chat template")
    if _MESSAGE in closing or not all(part.shape[0] for part in parts):
        raise ArgumentError(
            f"own_prompts: the chat template must have text before and after a user's message, which it shows once; "
            f"of {_MESSAGE!r} it made {shown!r}"
        )
    return parts[0], parts[1]


def _seed_of(seed: int, turn: int) -> int:
    """Hashed: seed + turn would make one seed's second batch the next seed's first."""
    return int.from_bytes(hashlib.sha256(f"{seed} {turn}".encode()).digest()[:7])
