"""accept_drafts: how much of a draft the target model would have said itself, and the token that follows."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndepth import check
from dyndepth.op import Op
from dyndepth.ops import _cpp, _cuda

#: A probability of 1 in units of mass. Whole numbers add up to the same sum in any order and never run backwards, so every
#: provider, whatever it computes in parallel, draws the same token; a float32 of 2^-37 or more converts without loss.
UNITS = 2.0**60


def accept_drafts(
    drafts: Tensor,
    lengths: Tensor,
    target: Tensor,
    *,
    draft_probs: Tensor | None = None,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Verification of speculative decoding, for a batch of drafts of different lengths.

    Args:
        drafts: int64 [b, k], proposed tokens; any strides.
        lengths: int32 [b] in 0..k: a row's first `lengths` drafts count, the others may hold anything, and so may
            distributions that belong to the others.
        target: what the target model says after the prefix, after draft 1, ..., after draft k. int64 [b, k + 1], its
            choices: greedy decoding. float32 [b, k + 1, V], its probabilities: sampling; dense in its last axis.
        draft_probs: float32 [b, k, V], the distributions that the drafts were drawn from, dense in its last axis; sampling
            only. None: the drafts were not drawn, they are certain (one-hot distributions).
        uniforms: float32 [b, k + 1] in [0, 1), independent; wanted with probabilities and only then. One decides about each
            draft, the last one (index k) draws the token.

    Returns:
        `accepted` int32 [b], how many leading drafts are kept, and `token` int64 [b], what follows them. The row's new text
        is `drafts[:accepted]`, `token`: one token more than was accepted.

    Greedy: drafts are kept up to the first with `drafts[i] != target[i]`, and `token = target[accepted]`.

    Sampling: draft d at i is kept if `uniforms[i] * q(d) < p(d)` (compared without rounding), p = target[i] and
    q = draft_probs[i] or 1, up to the first that is not. The token is drawn there, in ascending order of tokens, from the
    residual max(p - q, 0), in one-hot terms p without d; from p at `lengths` if all were kept. Then drafts and token are
    distributed exactly as if the target model had been sampled alone.

    The draw: a token's mass is its residual, the difference rounded to float32, counted in whole units of 2^-60 (rounded
    down; NaN counts 0 and more than 1 counts 1); the token is the first whose running sum exceeds `uniforms[k] * total`
    (computed in float64, rounded down). So all providers give the same bits, and no token without mass is ever drawn. Where
    rounding left no residual at all, p is drawn from; where p has no mass either (NaN, zeros), `token` is -1. Rows of p and
    q should sum to 1; past a sum of 8 the token is unspecified (of the vocabulary, or -1).

    b = 0, k = 0 and any V >= 1 are fine. Not differentiable. On the CPU lengths, uniforms and (where probabilities are
    asked about them) drafts out of range raise; elsewhere lengths and uniforms are clamped, such drafts are refused.

    Sources: Leviathan et al. 2023 (arXiv:2211.17192), algorithm 1; Chen et al. 2023 (arXiv:2302.01318), algorithm 2.

    Example: drafts `[[5, 8, 2]]`, lengths `[3]`, target `[[5, 8, 7, 1]]` -> accepted `[2]`, token `[7]`.
    """
    accepted, token = op(drafts, lengths, target, draft_probs, uniforms)
    return accepted, token


def _check(
    drafts: Tensor,
    lengths: Tensor,
    target: Tensor,
    draft_probs: Tensor | None = None,
    uniforms: Tensor | None = None,
) -> None:
    name, device = "accept_drafts", drafts.device
    check.tensor(name, "drafts", drafts, [None, None], check.INT64, device, "b, k")
    rows, most = drafts.shape
    check.tensor(name, "lengths", lengths, [rows], check.INT32, device, "b")
    if target.dtype == torch.int64:
        check.tensor(name, "target", target, [rows, most + 1], check.INT64, device, "b, k + 1")
        for argument, value in (("draft_probs", draft_probs), ("uniforms", uniforms)):
            if value is not None:
                check.fail(name, argument, "None where target is int64 (greedy)", value)
        return
    if target.dtype not in check.FLOAT32:
        wanted = f"int64 [{rows}, {most + 1}] (b, k + 1) or float32 [{rows}, {most + 1}, any] (b, k + 1, V) on {device}"
        check.fail(name, "target", wanted, target)
    check.tensor(name, "target", target, [rows, most + 1, None], check.FLOAT32, device, "b, k + 1, V")
    vocabulary = target.shape[2]
    if vocabulary == 0:
        check.fail(name, "target", "over at least one token", target)
    _check_dense(name, "target", target)
    if draft_probs is not None:
        check.tensor(name, "draft_probs", draft_probs, [rows, most, vocabulary], check.FLOAT32, device, "b, k, V")
        _check_dense(name, "draft_probs", draft_probs)
    if uniforms is None:
        check.fail(name, "uniforms", f"float32 [{rows}, {most + 1}] where target is float32 (sampling)", None)
    else:
        check.tensor(name, "uniforms", uniforms, [rows, most + 1], check.FLOAT32, device, "b, k + 1")


def _check_dense(name: str, argument: str, value: Tensor) -> None:
    if value.stride(2) != 1 and value.shape[2] > 1 and value.numel() > 0:
        check.fail(name, argument, "dense in its last axis", f"strides {list(value.stride())}")


def _reference(
    drafts: Tensor,
    lengths: Tensor,
    target: Tensor,
    draft_probs: Tensor | None = None,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    most = drafts.shape[1]
    check.in_range("accept_drafts", "lengths", lengths, 0, most + 1)
    lengths = lengths.clamp(0, most).long()
    counts = torch.arange(most, device=drafts.device) < lengths[:, None]
    if uniforms is None:
        kept = counts & (drafts == target[:, :most])
        accepted = kept.long().cumprod(1).sum(1)
        return accepted.int(), target.gather(1, accepted[:, None])[:, 0]
    vocabulary = target.shape[2]
    _check_values(torch.where(counts, drafts, 0), vocabulary, uniforms)
    known = counts & (drafts >= 0) & (drafts < vocabulary)
    asked = torch.where(known, drafts, 0)[:, :, None]
    p_draft = target[:, :most].gather(2, asked)[:, :, 0].double()
    # A product of two float32 is exact in float64.
    scaled = uniforms[:, :most].double()
    if draft_probs is not None:
        scaled = scaled * draft_probs.gather(2, asked)[:, :, 0].double()
    accepted = (known & (scaled < p_draft)).long().cumprod(1).sum(1)
    p = _row(target, accepted)
    residual = p
    if most > 0:
        refused = accepted.clamp(max=most - 1)
        if draft_probs is not None:
            residual = p - _row(draft_probs, refused)
        else:
            at = refused[:, None]
            word = asked[:, :, 0].gather(1, at)
            residual = p.scatter(1, word, torch.where(known.gather(1, at), 0, p.gather(1, word)))
        residual = torch.where((accepted < lengths)[:, None], residual, p)
    return accepted.int(), _draw(residual, p, uniforms[:, most])


def _check_values(drafts: Tensor, vocabulary: int, uniforms: Tensor) -> None:
    check.in_range("accept_drafts", "drafts", drafts, 0, vocabulary, " below lengths")
    if uniforms.device.type != "cpu":
        return
    wrong = ~((uniforms >= 0) & (uniforms < 1)).flatten()
    if bool(wrong.any()):
        at = int(wrong.to(torch.int8).argmax())
        check.fail("accept_drafts", "uniforms", "in [0, 1)", f"{float(uniforms.flatten()[at]):g} at {at}")


def _row(distributions: Tensor, at: Tensor) -> Tensor:
    """[b, k, V] -> [b, V], one position of each row."""
    return distributions[torch.arange(len(at), device=at.device), at]


def _draw(residual: Tensor, p: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose running mass exceeds uniform * total; -1 where there is no mass."""
    mass = _units(residual)
    mass = torch.where(mass.sum(1, keepdim=True) == 0, _units(p), mass)
    running = mass.cumsum(1)
    total = running[:, -1]
    uniform = torch.where(uniform > 0, uniform, 0).clamp(max=1).double()
    threshold = torch.minimum((uniform * total.double()).long(), total - 1)
    token = (running <= threshold[:, None]).sum(1)
    return torch.where(total == 0, -1, token)


def _units(probability: Tensor) -> Tensor:
    """Mass in whole units; what is not a positive number has none."""
    return (torch.where(probability > 0, probability, 0).clamp(max=1) * UNITS).long()


def _fake(
    drafts: Tensor,
    lengths: Tensor,
    target: Tensor,
    draft_probs: Tensor | None = None,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows = drafts.shape[0]
    return drafts.new_empty(rows, dtype=torch.int32), drafts.new_empty(rows)


op = Op(
    "accept_drafts",
    "(Tensor drafts, Tensor lengths, Tensor target, Tensor? draft_probs=None, Tensor? uniforms=None) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    check=_check,
)

op.provider_in("cuda", "dyndepth.cuda.accept_drafts", missing=_cuda.missing, declines=_cuda.declines)


@op.provider("cpp", missing=_cpp.missing, declines=_cpp.declines)
def _cpp_provider(
    drafts: Tensor,
    lengths: Tensor,
    target: Tensor,
    draft_probs: Tensor | None = None,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.ops.dyndepth_cpp.accept_drafts(drafts, lengths, target, draft_probs, uniforms)
