"""Routers that see what a row already skipped: in every kind of pass, in files, and where they are fitted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny_exits
import tiny_models
import torch

import dyndepth
from dyndepth.closed_form import fitting
from dyndepth.closed_form.history import below, see
from dyndepth.closed_form.measure import Sample
from dyndepth.closed_form.router import fit_router
from dyndepth.errors import ExitsError
from dyndepth.exits import Band, Exits, Router, RouterScore
from dyndepth.op import backend
from dyndepth.runtime.bind import bind
from dyndepth.runtime.score import score
from dyndepth.runtime.session import Session

STRONG = 3.0


def _told(band: Band, history: tuple[int, ...], weight: float = STRONG, *, stats: bool = False, linear: bool = False) -> Band:
    """The band, its router also looking at what was skipped: `weight` towards leaving for every band, from every neuron."""
    old = band.router
    assert old is not None
    router = Router(old.weight1.shape[1], 1 if linear else 3, silu=not linear, stats=stats, history=history)
    assert router.history_weight is not None
    if linear:
        router.weight1.data.copy_(old.weight1[:1])
        router.weight2.data.fill_(0.7)
        router.history_weight.data.fill_(weight)
    else:
        for name in ("weight1", "bias1", "weight2", "bias2"):
            getattr(router, name).data.copy_(getattr(old, name))
        router.history_weight.data.copy_(weight * old.weight2.sign()[:, None].expand(3, len(history)))
    if router.stats_weight is not None:
        router.stats_weight.data.copy_(torch.randn(router.stats_weight.shape, generator=torch.Generator().manual_seed(3)) * 0.2)
    return Band(
        band.leave, band.resume, RouterScore(router), threshold=0.5, head=band.head, jump=band.jump, kv=band.kv,
        shortlist=torch.arange(40) if stats else None,
    )  # fmt: skip


def _exits(model: Any, weight: float = STRONG, **options: Any) -> Exits:
    """Bands [1, 2), [2, 4), [3, 5) and exits at 4 and 5 that all know what lies below them."""
    spans = ((1, 2), (2, 4), (3, 5), (4, 6), (5, 6))
    bands = [tiny_exits.band(model, *span) for span in spans]
    history = [below(bands, band.leave) for band in bands]
    assert history == [(), (1,), (1,), (1, 2), (1, 2, 3)]
    return tiny_exits.exits_of(
        model,
        *(
            _told(band, known, weight, **(options if band.resume == 6 else {})) if known else band
            for band, known in zip(bands, history, strict=True)
        ),
    )


SEQUENCES = [torch.randint(3, tiny_models.VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)) for n in (17, 9, 12, 1)]
STARTS = [5, 0, 11, 0]


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_pass_equals_the_oracle(family: str, kv: str) -> None:
    """One token at a time, what was skipped kept in a plain set, against rows that move in a batch."""
    model = tiny_models.shared(family)
    exits = _exits(model)
    scored = score(model, SEQUENCES, exits, start=STARTS, kv=kv)
    taken: list[int] = []
    for tokens, start in zip(SEQUENCES, STARTS, strict=True):
        taken += oracle.Oracle(model, exits, kv, start).run(tokens).bands
    assert scored.bands_taken.tolist() == taken
    blind = score(model, SEQUENCES, _exits(model, 0.0), start=STARTS, kv=kv)
    assert blind.bands_taken.tolist() != taken, "what was skipped must matter for this to test anything"
    # Without a band below, nothing was skipped, and both say the same.
    first = torch.tensor([bits & 1 == 0 and other & 1 == 0 for bits, other in zip(taken, blind.bands_taken, strict=True)])
    assert bool(first.any())


@pytest.mark.parametrize("kv", ["predict", "propagate"])
def test_graph_style_says_the_same(kv: str) -> None:
    model = tiny_models.shared("llama")
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 14, (40,), generator=generator).tolist()
    prompts = [torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator) for length in lengths]
    tokens = torch.randint(3, tiny_models.VOCABULARY, (40,), generator=generator)
    found = {}
    for name, weight in (("told", STRONG), ("blind", 0.0)):
        for style in ("run", "run_graph"):
            session = Session(bind(model), [length + 4 for length in lengths], _exits(model, weight), kv=kv)
            session.prefill(prompts, session.work())
            with backend("torch"):
                result = getattr(session, style)(list(range(40)), lengths, tokens=tokens, step=[3] * 40)
            found[name, style] = result.layers_run.tolist()
    assert found["told", "run"] == found["told", "run_graph"]
    assert found["told", "run"] != found["blind", "run"]


@pytest.mark.parametrize("weight", [STRONG, -1.0])
def test_judging_in_one_call_shifts_the_threshold(weight: float) -> None:
    """A linear router with statistics is judged in one call of C++, which knows of no history: each row has its threshold."""
    model = tiny_models.shared("llama")
    exits = _exits(model, weight, stats=True, linear=True)
    with backend("torch"):
        wanted = score(model, SEQUENCES, exits, start=STARTS, kv="predict")
    session = Session(bind(model), [4], exits, kv="predict")
    assert session.plan.judge(session.plan.bands[4]) is not None, "the call must be taken for this to test anything"
    found = score(model, SEQUENCES, exits, start=STARTS, kv="predict")
    assert found.bands_taken.tolist() == wanted.bands_taken.tolist()
    blind = score(model, SEQUENCES, _exits(model, 0.0, stats=True, linear=True), start=STARTS, kv="predict")
    assert blind.bands_taken.tolist() != wanted.bands_taken.tolist()


def test_a_threshold_per_row_by_hand() -> None:
    """sigmoid(z + 2) >= 0.9 where sigmoid(z) >= sigmoid(logit(0.9) - 2); open and closed stay what they are."""
    router = Router(4, history=(1, 2))
    assert router.history_weight is not None
    router.history_weight.data[:] = torch.tensor([[4.0, -6.0]])
    router.weight2.data[:] = 0.5
    skipped = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    wanted = [1 / (1 + math.exp(-(math.log(9) - offset))) for offset in (0, 2, -1)]
    torch.testing.assert_close(router.shifted(0.9, skipped), torch.tensor(wanted))
    torch.testing.assert_close(router.shifted(torch.tensor([0.9, math.inf, -math.inf]), skipped)[1:],
                               torch.tensor([math.inf, -math.inf]))  # fmt: skip
    assert router.shifted(0.0, skipped).tolist() == [0.0] * 3
    assert router.shifted(1.0, skipped).tolist() == [1.0] * 3


def test_files(tmp_path: Path) -> None:
    model = tiny_models.shared("llama")
    exits = _exits(model, stats=True)
    exits.save_pretrained(tmp_path)
    again = Exits.from_pretrained(tmp_path)
    assert [band.criterion.history for band in again] == [(), (1,), (1,), (1, 2), (1, 2, 3)]
    one, other = (score(model, SEQUENCES, made, start=STARTS) for made in (exits, again))
    assert torch.equal(one.bands_taken, other.bands_taken)
    manifest = tmp_path / "exits.json"
    content = json.loads(manifest.read_text())
    for value in ("2", [1.5], [True]):
        content["bands"][4]["criterion"]["router"]["history"] = value
        manifest.write_text(json.dumps(content))
        with pytest.raises(ExitsError, match="history of a router must be a list of boundaries"):
            Exits.from_pretrained(tmp_path)
    with pytest.raises(ExitsError, match=r"band \[2, 4\): a router's history names boundaries in \[1, 2\), got \[1, 2\]"):
        Band(2, 4, RouterScore(Router(48, history=(1, 2))))


def test_files_from_before_there_was_a_history(tmp_path: Path) -> None:
    tiny_exits.mixed(tiny_models.shared("llama")).save_pretrained(tmp_path)
    manifest = tmp_path / "exits.json"
    content = json.loads(manifest.read_text())
    for band in content["bands"]:
        assert band["criterion"]["router"].pop("history") == []
    manifest.write_text(json.dumps(content))
    assert all(band.criterion.history == () for band in Exits.from_pretrained(tmp_path))


def test_rows_that_wait_keep_what_they_skipped() -> None:
    """Held at a boundary and taken up by a later pass, a row is judged there as if it had never stopped."""
    model = tiny_models.shared("llama")
    exits = _exits(model)
    tokens = torch.randint(3, tiny_models.VOCABULARY, (30,), generator=torch.Generator().manual_seed(1))
    arguments: dict[str, Any] = {"tokens": tokens, "step": [2] * 30}
    whole = Session(bind(model), [2] * 30, exits, kv="propagate").run(list(range(30)), [0] * 30, **arguments)
    session = Session(bind(model), [2] * 40, exits, kv="propagate")
    result = session.run(list(range(30)), [0] * 30, hold=frozenset({3}), **arguments)
    assert result.held is not None
    assert bool(result.held.any())
    # Fresh rows come along and take nobody's history; the parked ones come after them, by sequence here.
    fresh = list(range(30, 40))
    parked = session.left(result, list(range(30)), [0] * 30, [2] * 30)
    again = session.run(fresh, [0] * 10, tokens=tokens[:10], step=[2] * 10, parked=parked)
    waited = [int(seq) for seq in parked.seq]
    assert len(waited) == int(result.held.sum())
    together = result.bands_taken[waited] | again.bands_taken[10:]
    assert together.tolist() == whole.bands_taken[waited].tolist()
    assert len(set(together.tolist())) > 2
    assert again.bands_taken[:10].tolist() == whole.bands_taken[:10].tolist()


def test_what_see_saw_is_what_happened() -> None:
    """Rows, residuals, history and labels of labelling passes, against single rows followed by hand through the same pass."""
    model = tiny_models.shared("llama")
    bound = bind(model)
    bands = [tiny_exits.band(model, *span) for span in ((1, 2), (2, 4), (4, 6))]
    tokens = [torch.randint(3, tiny_models.VOCABULARY, (60,), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    sample = Sample.of(model, tokens, [4, 0, 9, 30])
    facts = tiny_exits.exits_of(model).model
    low, middle, top = see(bands, sample, facts, share=0.4, rounds=2)
    assert low.skipped.shape[1] == 0
    assert top.agrees is None
    assert low.agrees is not None
    assert middle.agrees is not None
    for seen, width in ((low, 0), (middle, 1), (top, 2)):
        assert bool(sample.judged[seen.rows].all())
        assert seen.skipped.shape == (len(seen.rows), width)
        assert seen.residual.shape == (len(seen.rows), bound.hidden_size)
    # At boundary 1 nothing can have happened yet: the residual is one layer of the full model.
    states = torch.cat([model(input_ids=t[None], output_hidden_states=True).hidden_states[1][0] for t in tokens])
    torch.testing.assert_close(low.residual, states[low.rows], rtol=1e-4, atol=1e-4)
    share = float(middle.skipped.mean())
    assert 0.25 < share < 0.55, "of those that take the second band, as many had taken the first as a lot would have it"
    # Who came by the exit with both skipped, one, or none: by lots that are drawn apart.
    both = float(top.skipped.prod(1).mean())
    assert 0.05 < both < 0.3
    repeated = see(bands, sample, facts, share=0.4, rounds=2)
    assert torch.equal(repeated[1].rows, middle.rows)
    assert torch.equal(repeated[1].agrees, middle.agrees)


def test_fitting_finds_what_skipping_costs() -> None:
    """Labels whose log-odds fall by 2 where a band was skipped: the router's history weight says so."""
    generator = torch.Generator().manual_seed(4)
    h = torch.randn(20_000, 6, generator=generator)
    skipped = (torch.rand(20_000, 2, generator=generator) < 0.4).float()
    agrees = torch.rand(20_000, generator=generator) < torch.sigmoid(1.5 - 2 * skipped[:, 0] + 0.5 * skipped[:, 1])
    held_out = torch.arange(20_000) % 5 == 0
    told, found = fit_router(h, agrees, held_out, skipped=skipped, history=(2, 5))
    blind, without = fit_router(h, agrees, held_out)
    assert told.history == (2, 5)
    assert told.history_weight is not None
    torch.testing.assert_close(told.history_weight[0], torch.tensor([-2.0, 0.5]), rtol=0, atol=0.15)
    assert found["log_loss"] < without["log_loss"] - 0.05
    assert blind.history_weight is None
    expected = torch.sigmoid(1.5 - 2 * skipped[:50, 0] + 0.5 * skipped[:50, 1])
    torch.testing.assert_close(told(h[:50], None, None, skipped[:50]), expected, rtol=0, atol=0.1)


def test_fit_tells_routers_of_the_bands_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever set is chosen, its routers know of each other: here both, the exit above the band."""
    model = tiny_models.shared("llama")
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, tiny_models.VOCABULARY, (24,), generator=generator) for _ in range(300)]
    options: dict[str, Any] = {"tokens": 5000, "own": 0.0, "agreement": 0.4, "progress": False}
    monkeypatch.setattr(fitting, "choose", lambda found, chances, agreement, most: list(range(len(found))))
    exits = dyndepth.fit(model, texts, candidates=[(2, 4), (4, 6)], **options)
    low, high = exits
    assert low.criterion.history == ()
    assert high.criterion.history == (2,)
    assert high.router is not None
    assert high.router.history_weight is not None
    assert float(high.router.history_weight.abs().max()) > 0
    assert high.shortlist is not None
    assert set(exits.record["bands"]["4-6"]["router"]) == set(exits.record["bands"]["2-4"]["router"])
    apart = dyndepth.fit(model, texts, candidates=[(2, 6), (4, 6)], **options)
    assert all(band.criterion.history == () for band in apart), "nobody comes back from an exit"
