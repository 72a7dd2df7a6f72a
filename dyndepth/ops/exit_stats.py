"""exit_stats: every confidence statistic of an exit head in one pass over the vocabulary, the logits never stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dyndepth import check
from dyndepth.op import Op
from dyndepth.ops import _cpp, _triton
from dyndepth.ops._math import rms_normalise, wide


class ExitStats(NamedTuple):
    """What exit_stats returns, one entry per row; rows at or past `live` are unspecified."""

    #: int64, the most likely token; the lowest position wins a tie.
    argmax: Tensor
    #: fp32, largest logit.
    top1: Tensor
    #: fp32, second largest logit (equal to top1 in a tie, -inf for a vocabulary of one).
    top2: Tensor
    #: fp32, log-sum-exp of the logits: `exp(top1 - logsumexp)` is the top-1 probability.
    logsumexp: Tensor
    #: fp32, entropy of the softmax in nats.
    entropy: Tensor
    #: fp32, entropy at temperature 1/2 in nats: H(p^2 / sum p^2), a feature of JEI-DNN's gate.
    entropy_half: Tensor


def exit_stats(
    hidden: Tensor,
    head_weight: Tensor,
    *,
    head_bias: Tensor | None = None,
    norm_gain: Tensor | None = None,
    eps: float = 1e-6,
    vocab_ids: Tensor | None = None,
    softcap: float = 0.0,
    live: Tensor | None = None,
) -> ExitStats:
    """Statistics of `softmax(softcap(head(norm(hidden))))` per row.

    Args:
        hidden: float32, bfloat16 or float16 [n, d], contiguous: residuals if `norm_gain` is given, head-ready otherwise.
        head_weight: same dtype [V, d], contiguous.
        head_bias: same dtype [V], contiguous.
        norm_gain: float32 [d], contiguous; the RMSNorm `hidden / rms(hidden) * norm_gain` (eps inside the root) comes first.
        vocab_ids: int64 [v], the rows of `head_weight` to use (a shortlist); `argmax` is in ids of the full vocabulary.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2); 0 for none.
        live: int32 with one element on the same device: only rows `[0, live)` are computed. None means all.

    Products are rounded to the dtype of `hidden`, as an LM head rounds them; everything after is fp32. Logits of -inf have
    probability 0; a row with a logit of NaN or +inf has NaN statistics and an unspecified argmax. Not differentiable.
    Sources: confidence measures of CALM (Schuster et al. 2022, sec. 3.1), EE-LLM, FREE; entropies as sums over the running
    maximum.
    """
    return ExitStats(*op(hidden, head_weight, head_bias, norm_gain, eps, vocab_ids, softcap, live))


def _check(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    norm_gain: Tensor | None = None,
    eps: float = 1e-6,
    vocab_ids: Tensor | None = None,
    softcap: float = 0.0,
    live: Tensor | None = None,
) -> None:
    name, device = "exit_stats", hidden.device
    check.tensor(name, "hidden", hidden, [None, None], check.FLOATS, device, "n, d")
    width, vocabulary = hidden.shape[1], head_weight.shape[0] if head_weight.dim() else 0
    check.contiguous(name, "hidden", hidden)
    check.tensor(name, "head_weight", head_weight, [None, width], (hidden.dtype,), device, "V, d")
    check.contiguous(name, "head_weight", head_weight)
    if vocabulary == 0:
        check.fail(name, "head_weight", "at least one row", head_weight)
    if head_bias is not None:
        check.tensor(name, "head_bias", head_bias, [vocabulary], (hidden.dtype,), device, "V")
        check.contiguous(name, "head_bias", head_bias)
    if norm_gain is not None:
        check.tensor(name, "norm_gain", norm_gain, [width], check.FLOAT32, device, "d")
        check.contiguous(name, "norm_gain", norm_gain)
    if vocab_ids is not None:
        check.tensor(name, "vocab_ids", vocab_ids, [None], check.INT64, device, "v")
        check.contiguous(name, "vocab_ids", vocab_ids)
        if vocab_ids.shape[0] == 0:
            check.fail(name, "vocab_ids", "at least one id", vocab_ids)
    if not softcap >= 0:
        check.fail(name, "softcap", "at least 0 (0 for none)", softcap)
    check.live(name, live, device)


def _reference(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    norm_gain: Tensor | None = None,
    eps: float = 1e-6,
    vocab_ids: Tensor | None = None,
    softcap: float = 0.0,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if norm_gain is not None:
        hidden = rms_normalise(hidden, eps, norm_gain).to(hidden.dtype)
    if vocab_ids is not None:
        check.in_range("exit_stats", "vocab_ids", vocab_ids, 0, head_weight.shape[0])
        head_weight = head_weight.index_select(0, vocab_ids)
        head_bias = None if head_bias is None else head_bias.index_select(0, vocab_ids)
    logits = wide(torch.nn.functional.linear(hidden, head_weight, head_bias))
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    argmax, top1, top2, logsumexp, entropy, entropy_half = stats_of_logits(logits)
    return argmax if vocab_ids is None else vocab_ids[argmax], top1, top2, logsumexp, entropy, entropy_half


def stats_of_logits(logits: Tensor) -> ExitStats:
    """The same statistics from logits [n, V] that exist already (an LM head that only its own module can run)."""
    logits = wide(logits)
    top = logits.topk(min(2, logits.shape[1]), dim=-1).values
    top2 = top[:, 1] if logits.shape[1] > 1 else torch.full_like(top[:, 0], -torch.inf)
    broken = torch.where((logits.isnan() | (logits == torch.inf)).any(-1), torch.nan, 0.0)
    return ExitStats(
        logits.argmax(-1),
        top[:, 0] + broken,
        top2 + broken,
        torch.logsumexp(logits, -1) + broken,
        _entropy(logits) + broken,
        _entropy(2 * logits) + broken,
    )


def _entropy(logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits, -1)
    # p log p -> 0 as p -> 0, also where log p is -inf.
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(torch.float32).min)).sum(-1)


def _fake(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    norm_gain: Tensor | None = None,
    eps: float = 1e-6,
    vocab_ids: Tensor | None = None,
    softcap: float = 0.0,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = hidden.shape[0]
    one, two, three, four, five = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(5))
    return hidden.new_empty(rows, dtype=torch.int64), one, two, three, four, five


op = Op(
    "exit_stats",
    "(Tensor hidden, Tensor head_weight, Tensor? head_bias=None, Tensor? norm_gain=None, float eps=1e-6, "
    "Tensor? vocab_ids=None, float softcap=0.0, Tensor? live=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    check=_check,
)

op.provider_in("triton", "dyndepth.kernels.exit_stats", missing=_triton.missing, declines=_triton.declines)


@op.provider("cpp", missing=_cpp.missing, declines=_cpp.declines)
def _cpp_provider(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    norm_gain: Tensor | None = None,
    eps: float = 1e-6,
    vocab_ids: Tensor | None = None,
    softcap: float = 0.0,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.dyndepth_cpp.exit_stats(hidden, head_weight, head_bias, norm_gain, eps, vocab_ids, softcap, live)
