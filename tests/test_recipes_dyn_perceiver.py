"""Dyn-Perceiver: exits 1 and 2 read latent codes alone, a shrinking batch answers as a whole one, thresholds meet fractions."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.recipes import dyn_perceiver as dp
from dyndepth.recipes.dyn_perceiver_model import Attention

CLASSES = 6


def model(seed: int = 3, **changes: Any) -> dp.DynPerceiver:
    """Small and odd, with weights and statistics as training leaves them."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "classes": CLASSES, "images": 2, "channels": (8, 12, 16, 24, 20), "latents": 16, "stem": 1, "strides": (1, 2, 1, 2),
        "blocks": (1, 1, 2, 1), "depths": (1, 1, 2, 1), "heads": (1, 2, 4, 8), "grid": 3,
    }  # fmt: skip
    made = dp.DynPerceiver(dp.PerceiverConfig(**settings | changes)).eval()
    for name, value in [*made.named_parameters(), *made.named_buffers()]:
        if name.endswith("running_var"):
            value.data.uniform_(0.5, 1.5)
        elif value.is_floating_point() and value.dim() < 2:
            value.data += 0.3 * torch.randn(value.shape)
    for head in (made.early, made.late, made.convolutional):
        head.weight.data *= 4
    return made


def images(n: int) -> Tensor:
    return torch.randn(n, 2, 9, 7, generator=torch.Generator().manual_seed(n))


def close(mine: Tensor, wanted: Tensor) -> None:
    assert mine.shape == wanted.shape
    assert float((mine - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


def test_the_first_two_exits_read_latent_codes_alone() -> None:
    """What the convolutions of stages 3 and 4 make of x changes exits 3 and 4; exit 1 sees neither, exit 2 not stage 4."""
    made = model()
    x = images(3)
    before = made(x).all()
    for stage, unchanged in ((3, (True, True, False, False)), (2, (True, False, False, False))):
        other = copy.deepcopy(made)
        for parameter in other.features[stage].parameters():
            parameter.data += 0.5
        assert [torch.equal(a, b) for a, b in zip(before, other(x).all(), strict=True)] == list(unchanged)
    z = torch.randn(2, 4, 16)
    close(made.exit(1, z), z.mean(1) @ made.early.weight.T + made.early.bias)
    late, first = torch.randn(2, 2, 24), made.exit(1, z)
    embedded = made.from_early(first)
    close(made.exit(2, late, first), made.late(torch.cat([late.mean(1), embedded], 1)))


def test_attention_written_out() -> None:
    torch.manual_seed(1)
    attention = Attention(8, 6, 2, inner=4, places=(5, 3))
    assert attention.bias is not None
    attention.bias.data.normal_()
    tokens, source = torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    q = attention.query(F.layer_norm(tokens, (8,)))
    k, v = (part(F.layer_norm(source, (6,))) for part in (attention.key, attention.value))
    parts = []
    for head in range(2):
        own = slice(2 * head, 2 * head + 2)
        scores = q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(2) + attention.bias[head]
        parts.append(scores.softmax(-1) @ v[..., own])
    seen = tokens + attention.project(torch.cat(parts, -1))
    _, first, _, second = attention.mlp
    close(attention(tokens, source), seen + second(F.gelu(first(F.layer_norm(seen, (8,))))))


@pytest.mark.parametrize("surest", [(0.3, 0.5, 0.6), (None, 0.4, None), (0.2, None, 0.5)])
def test_a_batch_that_shrinks_answers_as_a_whole_one(surest: tuple[float | None, ...]) -> None:
    """Thresholds between two scores, so that rounding in other batches cannot matter; None closes an exit."""
    made = model()
    x = images(40)
    ordered = np.sort(dp.scores_of(made, [x])[0], 0)[::-1]
    places = [None if share is None else round(40 * share) for share in surest]
    thresholds = [math.inf if at is None else ordered[at - 1 : at + 1, k].mean() for k, at in enumerate(places)] + [9.0]
    out = dp.infer(made, x, thresholds)
    whole = dp.DynamicPerceiver(made, thresholds, compact=False)(x)
    every = made(x).all()
    assert torch.equal(out.exits, whole.exits)
    for sample in range(40):  # the oracle: one by one, exit after exit
        sure = [float(logits[sample].softmax(-1).max()) >= t for logits, t in zip(every, thresholds, strict=True)][:3]
        assert int(out.exits[sample]) == (sure.index(True) + 1 if True in sure else 4)
        close(out.logits[sample], every[int(out.exits[sample]) - 1][sample])
    counts = [int((out.exits >= number).sum()) for number in range(1, 5)]
    assert len(set(out.exits.tolist())) > 1
    assert out.work == {
        "latent 1": 40, "features 1": 40, "latent 2": 40, "features 2": 40, "latent 3": 40, "features 3": counts[1],
        "latent 4": counts[1], "features 4": counts[2], "merged": counts[3],
    }  # fmt: skip


def test_any_batch_gives_a_sample_the_same() -> None:
    made = model()
    x = images(9)
    thresholds = (0.6, 0.6, 0.6, 0.0)
    out = dp.infer(made, x, thresholds)
    for at in range(9):
        alone = dp.infer(made, x[at : at + 1], thresholds)
        assert int(alone.exits[0]) == int(out.exits[at])
        close(alone.logits[0], out.logits[at])


def test_everybody_may_leave_at_once() -> None:
    out = dp.infer(model(), images(5), (0, 0, 0, 0))
    assert out.exits.tolist() == [1] * 5
    assert [out.work[part] for part in ("latent 3", "features 3", "latent 4", "merged")] == [5, 0, 0, 0]


@pytest.mark.parametrize("power", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0, 1.0), dp.FACTORS])
def test_thresholds_reach_the_fractions(power: float, factors: tuple[float, ...]) -> None:
    """On the samples that were scored, exactly floor(n q_k) leave at exit k."""
    made = model()
    x = images(120)
    scores, answers = dp.scores_of(made, x.split(50))
    assert scores.shape == answers.shape == (120, 4)
    weights = np.array([factor * power**k for k, factor in enumerate(factors)])
    shares = weights / weights.sum()
    # A threshold is the score of the last that leaves; in another batch that may come out an ulp lower.
    out = dp.infer(made, x, dp.geometric_thresholds(scores, power, factors) - 1e-6)
    counts = [int((out.exits == number + 1).sum()) for number in range(4)]
    assert counts[:3] == [math.floor(120 * share + 1e-9) for share in shares[:3]]


def test_tied_scores_stay_in_inference_as_in_calibration() -> None:
    """Heads so sure that most probabilities are 1 in float32: no threshold parts them, and none may let all of them leave."""
    made = model()
    for head in (made.early, made.late, made.convolutional):
        head.weight.data *= 300
    x = images(80)
    scores, _ = dp.scores_of(made, [x])
    assert (scores[:, :3] == 1).mean() > 0.5
    thresholds = dp.geometric_thresholds(scores, 1.0)
    wanted = (scores >= thresholds).argmax(1) + 1
    assert (wanted == 4).sum() > 40
    for compact in (True, False):
        out = dp.DynamicPerceiver(made, thresholds, compact=compact)(x)
        # A threshold that is one sample's score may come out an ulp lower in another batch.
        assert (out.exits.numpy() != wanted).sum() <= 3
        assert all(int((out.exits == number).sum()) <= 20 for number in (1, 2, 3))


@pytest.mark.parametrize("compact", [True, False])
def test_answers_that_are_not_numbers_are_refused(compact: bool) -> None:
    made, x = model(), images(4)
    x[1] = math.nan
    thresholds = (math.inf, math.inf, 2.0, 0.0)
    with pytest.raises(ArgumentError, match="DynamicPerceiver: logits must be numbers, got NaN at exit 1"):
        dp.DynamicPerceiver(made, thresholds, compact=compact)(x)
    with pytest.raises(ArgumentError, match=r"scores_of: logits must be numbers, got NaN at exit 1"):
        dp.scores_of(made, [x])
    made, x = model(), images(4)
    with torch.no_grad():
        made.convolutional.bias[0] = math.nan
    with pytest.raises(ArgumentError, match="got NaN at exit 3"):
        dp.DynamicPerceiver(made, thresholds, compact=compact)(x)
    # Nobody asks exit 3 about samples that have left.
    assert dp.DynamicPerceiver(made, (0.0, 0.0, 0.0, 0.0), compact=compact)(x).exits.tolist() == [1] * 4


def test_calibration_leaves_the_model_as_it_is() -> None:
    made = model().train()
    before = copy.deepcopy(made.state_dict())
    for call in (lambda: dp.scores_of(made, [images(4)]), lambda: dp.costs(made, images(1))):
        with pytest.raises(ArgumentError, match=r"must be in eval mode, got training mode \(call model\.eval\(\)\)"):
            call()
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_the_loss_written_out() -> None:
    made = model()
    labels = torch.tensor([0, 3, 5, 1])
    with torch.enable_grad():
        found = made(images(4))
        got = dp.loss(found, labels, temperature=2.0)
        gradient = torch.autograd.grad(got, found.merged, retain_graph=True)[0]
    early, latent, features, merged = (logits.detach() for logits in found.all())
    ce = [-logits.log_softmax(-1)[torch.arange(4), labels].mean() for logits in (early, latent, features, merged)]
    p = (merged / 2).softmax(-1)
    kl = [(p * (p / (logits / 2).softmax(-1)).log()).sum(-1).mean() for logits in (early, latent, features)]
    close(got.detach(), ce[2] + ce[3] + 0.5 * (ce[0] + ce[1]) + 0.5 * 4 * (kl[0] + kl[1] + kl[2]))
    wanted = (merged.softmax(-1) - F.one_hot(labels, CLASSES)) / 4  # of its cross-entropy alone: exit 4 is the teacher
    close(gradient, wanted)


def test_training_learns_and_averages() -> None:
    torch.manual_seed(0)
    labels = torch.arange(24) % CLASSES
    x = F.one_hot(labels, CLASSES).float()[:, :, None, None].expand(-1, -1, 9, 7)[:, :2] + 0.1 * torch.randn(24, 2, 9, 7)
    x[:, :, :CLASSES] += F.one_hot(labels, CLASSES).float()[:, None, :, None]

    def epochs(number: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        yield {"pixel_values": x}, labels

    made = model()
    with torch.no_grad():
        before = float(dp.loss(made(x), labels))
    dp.train(made, epochs, count=15, rate=3e-3)
    assert not made.training
    with torch.no_grad():
        assert float(dp.loss(made(x), labels)) < before / 2
    still = model()
    weights = copy.deepcopy(still.state_dict())
    dp.train(still, epochs, count=2, ema=0.999)
    moved = [float((value - weights[key]).abs().max()) for key, value in still.named_parameters()]
    assert 0 < max(moved) < 2 * 2 * 1e-3 * 1e-2


def test_costs_add_up() -> None:
    made = model()
    found = dp.costs(made, images(1))
    parts, exits = found["parts"], found["exits"]
    assert exits == sorted(exits)
    assert exits[0] == sum(parts[name] for name in ("stem", "latent 1", "features 1", "latent 2", "features 2", "latent 3"))
    assert exits[3] == sum(parts.values())
    first = made.stem[0].weight  # type: ignore[union-attr]
    assert parts["stem"] == 2 * first.numel() * 9 * 7
    everybody = dp.infer(made, images(7), (math.inf,) * 4)
    assert dp.work_of(everybody, found) == pytest.approx(1)
    assert dp.work_of(dp.infer(made, images(7), (0,) * 4), found) == pytest.approx(exits[0] / exits[3])


def test_files(tmp_path: Path) -> None:
    made = model()
    made.save_pretrained(tmp_path)
    again = dp.DynPerceiver.from_pretrained(tmp_path)
    assert again.config == made.config
    x = images(2)
    assert torch.equal(again(x).merged, made(x).merged)
    (tmp_path / "exits.json").write_text((tmp_path / "exits.json").read_text().replace('"latents": 16', '"latents": 24'))
    with pytest.raises(ExitsError, match="is damaged"):
        dp.DynPerceiver.from_pretrained(tmp_path)


def test_errors() -> None:
    made = model()
    with pytest.raises(ArgumentError, match=r"pixels must be \[n, 2, height, width\] with n > 0, got \[0, 2, 9, 7\]"):
        made(torch.zeros(0, 2, 9, 7))
    with pytest.raises(ArgumentError, match="thresholds must be 4 numbers"):
        dp.DynamicPerceiver(made, [0.5])
    with pytest.raises(ArgumentError, match="must be in eval mode"):
        dp.infer(made.train(), images(1), (0,) * 4)
    with pytest.raises(ArgumentError, match="power must be positive, got 0"):
        dp.geometric_thresholds(np.ones((3, 4)), 0)
    with pytest.raises(ArgumentError, match="factors must be 4 numbers"):
        dp.geometric_thresholds(np.ones((3, 4)), 1, (1, 1))
    with pytest.raises(ArgumentError, match="latents must be a multiple of 8, got 12"):
        model(latents=12)
    with pytest.raises(ArgumentError, match="heads must divide channels"):
        model(heads=(3, 2, 4, 8))
    with pytest.raises(ArgumentError, match="strides must be 4 positive numbers"):
        model(strides=(1, 2))
    with pytest.raises(ArgumentError, match=r"ema must be in \[0, 1\), got 1"):
        dp.train(made, lambda _: [], count=1, ema=1)
