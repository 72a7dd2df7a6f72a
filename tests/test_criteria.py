"""Criteria by hand: scores, thresholds, CALM's decay, schedules."""

from __future__ import annotations

import math

import pytest
import tiny_models
import torch

from dyndepth.exits import (
    Always,
    Band,
    Decay,
    Entropy,
    FixedDepth,
    Margin,
    Never,
    Patience,
    Router,
    RouterScore,
    Saturation,
    Schedule,
    TopProbability,
)
from dyndepth.exits.criteria import View
from dyndepth.exits.router import stat_features
from dyndepth.ops.exit_stats import stats_of_logits

LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 5.0, 4.0]])
P0 = math.exp(2) / (math.exp(2) + 2)


def view(rows: int = 3, **changes: object) -> View:
    settings = {
        "hidden": torch.randn(rows, 4),
        "seq": torch.arange(rows, dtype=torch.int32),
        "step": torch.zeros(rows, dtype=torch.int32),
        "previous": None,
        "stats": lambda: stats_of_logits(LOGITS),
        "depth": None,
        "leave": 3,
        "layers": 6,
    }
    return View(**(settings | changes))  # type: ignore[arg-type]


def test_top_probability() -> None:
    assert TopProbability().score(view())[:2].tolist() == pytest.approx([P0, 1 / 3])


def test_margin() -> None:
    odds = [1.0, math.exp(5.0), math.exp(4.0)]
    expected = [P0 - (1 - P0) / 2, 0.0, (odds[1] - odds[2]) / sum(odds)]
    assert Margin().score(view()).tolist() == pytest.approx(expected, abs=1e-6)


def test_entropy_is_negative_so_that_higher_is_safer() -> None:
    q = (1 - P0) / 2
    assert Entropy().score(view())[:2].tolist() == pytest.approx([P0 * math.log(P0) + 2 * q * math.log(q), -math.log(3)])


def test_saturation_is_silent_at_the_first_boundary() -> None:
    for criterion in (Saturation(), RouterScore(Router(4, cosine=True))):
        assert not criterion.leaves(view(), torch.full((3,), -math.inf)).any()
    hidden = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    previous = torch.tensor([[4.0, 3.0], [0.0, 2.0]])
    assert Saturation().score(view(2, hidden=hidden, previous=previous)).tolist() == pytest.approx([24 / 25, 0.0])


def test_patience_counts_agreements_in_a_row() -> None:
    carried: dict[str, torch.Tensor] = {}
    found = []
    for best in ([0, 0, 1], [0, 1, 1], [0, 1, 2], [0, 1, 2]):
        logits = torch.nn.functional.one_hot(torch.tensor(best), 3).float()
        found.append(Patience().score(view(stats=lambda logits=logits: stats_of_logits(logits), carried=carried)).tolist())
    assert found == [[0, 0, 0], [1, 0, 1], [2, 1, 0], [3, 2, 1]]


def test_fixed_depth() -> None:
    depth = torch.tensor([3, 6, -1], dtype=torch.int32)
    assert FixedDepth().leaves(view(depth=depth), torch.zeros(3)).tolist() == [True, False, False]
    assert not FixedDepth().leaves(view(), torch.zeros(3)).any()


def test_schedule_falls_linearly() -> None:
    """From 6 to 2 over 8 steps: boundary 3 is reached at step 6."""
    criterion = Schedule(first=6, last=2, length=8)
    step = torch.tensor([0, 5, 6, 7, 8, 100], dtype=torch.int32)
    assert criterion.leaves(view(6, step=step), torch.zeros(6)).tolist() == [False, False, True, True, True, True]
    assert criterion.leaves(view(6, step=step, leave=5), torch.zeros(6)).tolist() == [False, True, True, True, True, True]


def test_always_and_never() -> None:
    assert Always().leaves(view(), torch.zeros(3)).all()
    assert not Never().leaves(view(), torch.zeros(3)).any()


def test_nan_never_leaves() -> None:
    broken = view(stats=lambda: stats_of_logits(torch.full((3, 3), math.nan)))
    for criterion in (TopProbability(), Margin(), Entropy()):
        assert not criterion.leaves(broken, torch.full((3,), -math.inf)).any()


def test_router_sees_what_it_was_built_for() -> None:
    router = Router(4, stats=True)
    assert RouterScore(router).needs_logits
    assert not RouterScore(Router(4)).needs_logits
    assert RouterScore(Router(4, cosine=True)).needs_previous
    router.stats_weight.data[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    router.weight2.data[0] = 1.0
    assert RouterScore(router).score(view())[0].item() == pytest.approx(1 / (1 + math.exp(-P0)))


def test_stat_features() -> None:
    features = stat_features(stats_of_logits(LOGITS))
    q = (1 - P0) / 2
    entropy = -P0 * math.log(P0) - 2 * q * math.log(q)
    assert features[0].tolist() == pytest.approx([math.log(P0 / (1 - P0)), P0, P0 - q, entropy], rel=1e-5)
    sure = stat_features(stats_of_logits(torch.tensor([[100.0, 0.0]])))
    assert bool(torch.isfinite(sure).all())


def test_calm_decay() -> None:
    """0.9 threshold + 0.1 exp(-tau t / N), clipped to [0, 1]: strict at the start, the threshold's own share at the end."""
    band = Band(3, 6, TopProbability(), threshold=0.8, decay=Decay(tau=4.0, length=10))
    step = torch.tensor([0, 5, 10, 1000], dtype=torch.int32)
    expected = [0.72 + 0.1, 0.72 + 0.1 * math.exp(-2), 0.72 + 0.1 * math.exp(-4), 0.72]
    assert band.thresholds(step).tolist() == pytest.approx(expected)
    assert Band(3, 6, threshold=1.2, decay=Decay(4.0, 10)).thresholds(step).max() == 1.0
    assert Band(3, 6, threshold=math.inf, decay=Decay(4.0, 10)).thresholds(step).min() == math.inf


def test_decay_acts_on_the_step_of_generation() -> None:
    """A regression of published CALM code, whose decode loop never passed the position: later tokens must leave more easily."""
    import tiny_exits

    import dyndepth

    model = tiny_models.shared("llama")
    always_half = Router(48)  # scores 0.5 everywhere
    band = tiny_exits.band(model, 3, 6, RouterScore(always_half), threshold=0.5, decay=Decay(tau=1.0, length=4))
    out = model.generate(
        **tiny_models.prompts(2), custom_generate=dyndepth.generate, exits=tiny_exits.exits_of(model, band), max_new_tokens=12,
        min_new_tokens=12, do_sample=False, return_dict_in_generate=True,
    )  # fmt: skip
    # 0.45 + 0.1 exp(-t / 4) <= 0.5 from t = 4 ln 2 = 2.77 on.
    assert out.exit_layers.tolist() == [[6] * 3 + [3] * 9] * 2


def test_patience_compares_words_not_places_in_shortlists() -> None:
    """Two boundaries with differently ordered shortlists: the same words agree, so the order of the ids changes nothing."""
    import tiny_exits

    from dyndepth.runtime.score import score

    model = tiny_models.shared("llama")
    everyone = torch.arange(tiny_models.VOCABULARY)
    tokens = list(torch.randint(3, 90, (4, 8)))

    def taken(*orders: torch.Tensor) -> torch.Tensor:
        bands = [
            Band(leave, 6, Patience(), threshold=1, shortlist=order) for leave, order in zip((3, 4, 5), orders, strict=True)
        ]
        return score(model, tokens, tiny_exits.exits_of(model, *bands), kv="propagate").bands_taken

    plain = taken(everyone, everyone, everyone)
    assert 0 < int((plain > 0).sum()) < plain.shape[0]
    assert torch.equal(taken(everyone, everyone.flip(0), everyone.roll(17)), plain)
