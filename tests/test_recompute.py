"""Invariant 5: under `recompute` and `release` every K,V that a row reads is the full model's own, and no layer runs twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_exits
import tiny_models
import torch
from full_model import FullModel

import dyndepth
from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.exits import Exits, FixedDepth, TopProbability
from dyndepth.runtime.bind import bind
from dyndepth.runtime.parked import Parked
from dyndepth.runtime.score import score
from dyndepth.runtime.session import Session

EXACT = ["recompute", "release"]
#: Where residuals saturate the random router at boundary 2: a probability that about half of the rows reach there.
SATURATED = {"gemma2": 0.022, "gemma3": 1.0}


def _exits(model: Any, **options: Any) -> Exits:
    return tiny_exits.exits_of(
        model, tiny_exits.band(model, 2, 6, **options), tiny_exits.band(model, 4, 6, head="mlp", **options)
    )


def _generate(model: Any, inputs: dict[str, torch.Tensor], exits: Exits, **options: Any) -> Any:
    settings = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True, "output_logits": True} | options
    return model.generate(**inputs, custom_generate=dyndepth.generate, exits=exits, **settings)


# -- the pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", EXACT)
@pytest.mark.parametrize("family", ["llama", "llama_bias", "qwen3", "olmo2", "gpt_neox"])
def test_pages_hold_what_the_full_model_writes(family: str, kv: str) -> None:
    """Step by step: before a row runs layer j, all of its sequence are there, entry by entry (against transformers' cache)."""
    model = tiny_models.shared(family)
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator) for length in (21, 13)]
    full = [FullModel(model, sequence) for sequence in tokens]
    session = Session(bind(model), [len(sequence) for sequence in tokens], _exits(model), kv=kv, pending=4)
    parked = Parked.nothing(torch.empty(0, session.model.hidden_size))
    early, seen_deep, most = 0, 0, 0
    ran = np.zeros((2, 21), dtype=np.int64)
    for position in range(21):
        seq = [s for s in range(2) if position < len(tokens[s])]
        parked = parked.where(np.isin(parked.seq, seq))
        pos = [position] * len(seq)
        ids = torch.tensor([tokens[s][position] for s in seq])
        waiting = torch.from_numpy(parked.counts(2)[seq])
        result = session.run(seq, pos, tokens=ids, step=pos, parked=parked, may_leave=waiting < session.pending)
        rows = list(zip(seq + parked.seq.tolist(), pos + parked.pos.tolist(), strict=True))
        for (s, at), layers in zip(rows, result.layers_run.tolist(), strict=True):
            ran[s, at] += layers
        deepest = dict(zip(seq, result.exit_layer[: len(seq)].tolist(), strict=True))
        for s, depth in deepest.items():
            early += depth < 6
            seen_deep += depth == 6
            reached = ran[s, : position + 1]
            assert (reached >= depth).all(), "whoever a row can see ran as far as the row"
            full[s].check_pages(session, s, reached.tolist())
        parked = session.left(result, seq, pos, pos, parked) if kv == "recompute" else parked
        most = max(most, int(parked.counts(2).max(initial=0)))
    assert min(early, seen_deep) >= 8, "the random routers must let rows go and keep rows for this to test anything"
    if kv == "recompute":
        assert 2 <= most <= session.pending


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_recomputed_pages_are_the_same_bits_as_at_full_depth(family: str) -> None:
    """On the CPU a row's arithmetic does not depend on which rows run with it: deferring a row changes no bit of its K,V."""
    model = bind(tiny_models.shared(family))
    if isinstance(model.stack, str):
        pytest.skip(f"layers run through their modules here: {model.stack}")
    tokens = torch.randint(3, tiny_models.VOCABULARY, (20,), generator=torch.Generator().manual_seed(2))
    plain = Session(model, [20])
    lazy = Session(model, [20], _exits(tiny_models.shared(family)), kv="recompute", pending=20)
    parked: Parked | None = None
    early = 0
    for at in range(20):
        plain.run([0], [at], tokens=tokens[at : at + 1])
        result = lazy.run([0], [at], tokens=tokens[at : at + 1], step=[at], parked=parked, may_leave=torch.tensor([at < 19]))
        early += int(result.exit_layer[0] < 6)
        parked = lazy.left(result, [0], [at], [at], parked)
    assert parked is not None
    assert early >= 5
    assert not len(parked)
    slots = [session.pages.slots([0] * 20, list(range(20))).long() for session in (plain, lazy)]
    mine, theirs = (s.pages.kv.flatten(2, 3)[:6, :, at] for s, at in zip((lazy, plain), slots, strict=True))
    assert torch.equal(mine, theirs)


# -- generation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_recompute_generates_what_release_does(family: str) -> None:
    """Two ways to the full model's K,V: later, when somebody needs them, and at once."""
    model, inputs = tiny_models.shared(family), tiny_models.prompts(6)
    exits = _exits(model)
    if family in SATURATED:
        low = tiny_exits.band(model, 2, 6, TopProbability(), threshold=SATURATED[family])
        exits = tiny_exits.exits_of(model, low, tiny_exits.band(model, 4, 6, head="mlp"))
    later, now = (_generate(model, inputs, exits, kv=kv, pending=99) for kv in EXACT)
    assert torch.equal(later.sequences, now.sequences)
    assert torch.equal(later.exit_layers, now.exit_layers)
    assert torch.equal(later.bands_taken, now.bands_taken)
    for mine, theirs in zip(later.logits, now.logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-4)
    assert {2, 4, 6} <= set(later.exit_layers.flatten().tolist())
    # What was run: a token runs as far as the deepest of those after it; `release` runs everything.
    for row in range(6):
        depths = later.exit_layers[row][later.exit_layers[row] >= 0]
        assert later.layers_run[row][: len(depths)].tolist() == depths.flip(0).cummax(0).values.flip(0).tolist()
    assert later.work.run == int(later.layers_run.clamp_min(0).sum())
    assert now.work.run == now.work.possible
    assert (later.kv, now.kv) == ("recompute", "release")


def test_decisions_are_made_on_the_full_models_residuals() -> None:
    """What a token's exit head says is what it says of the full model's residual there, whatever left before it."""
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(4)
    exits = _exits(model)
    out = _generate(model, inputs, exits, kv="recompute")
    bound = bind(model)
    bands = {band.leave: band for band in exits}
    early = 0
    for row in range(4):
        ids = out.sequences[row][torch.cat([inputs["attention_mask"][row].bool(), out.exit_layers[row] >= 0])]
        full = FullModel(model, ids)
        first = int(inputs["attention_mask"][row].sum()) - 1
        for step, depth in enumerate(d for d in out.exit_layers[row].tolist() if d >= 0):
            at = first + step
            if depth == 6:
                continue
            early += 1
            ready = bands[depth].head_or_norm()(full.residuals[depth][at : at + 1], bound.finish)
            torch.testing.assert_close(out.logits[step][row], bound.logits(ready)[0], rtol=1e-3, atol=1e-3)
    assert early >= 8


@pytest.mark.parametrize("pending", [1, 2, 3])
def test_a_bound_on_pending_tokens_makes_the_next_one_deep(pending: int) -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(5)
    exits = _exits(model, threshold=-1.0)  # everybody would leave at 2
    out = _generate(model, inputs, exits, kv="recompute", pending=pending, max_new_tokens=12)
    for row in out.exit_layers:
        depths = row[row >= 0].tolist()
        assert depths == [6 if at % (pending + 1) == pending else 2 for at in range(len(depths))]


def test_no_layer_runs_twice() -> None:
    """Rows x layers counted by hooks on the layers' own modules."""
    model, inputs = tiny_models.tiny("llama"), tiny_models.prompts(5)
    counts = [0] * 6
    for number, layer in enumerate(model.model.layers):

        def count(module: Any, args: Any, output: Any, number: int = number) -> None:
            counts[number] += output.shape[0]

        layer.mlp.down_proj.register_forward_hook(count)
    out = _generate(model, inputs, _exits(model), kv="recompute")
    prompt = int(inputs["attention_mask"].sum()) - 5
    assert [count - prompt for count in counts] == out.work.layers
    assert 0 < out.work.layers[5] < out.work.layers[0] == out.work.rows


@pytest.mark.parametrize("pending", [2, 99])
@pytest.mark.parametrize("kv", EXACT)
def test_scoring_is_what_generation_does(kv: str, pending: int) -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(5)
    exits = _exits(model)
    out = _generate(model, inputs, exits, kv=kv, pending=pending)
    rows = [torch.cat([inputs["attention_mask"][r].bool(), out.exit_layers[r] >= 0]) for r in range(5)]
    sequences = [out.sequences[r][keep][:-1] for r, keep in enumerate(rows)]  # the last token was not run
    starts = [int(inputs["attention_mask"][r].sum()) - 1 for r in range(5)]
    scored = score(model, sequences, exits, start=starts, kv=kv, pending=pending)
    told = scored.exit_layer[scored.judged].tolist(), scored.layers_run[scored.judged].tolist()
    depths = [[d for d in row if d >= 0] for row in out.exit_layers.tolist()]
    runs = [[d for d in row if d >= 0] for row in out.layers_run.tolist()]
    assert told == tuple([d for row in rows for d in row] for rows in (depths, runs))
    assert scored.work == out.work
    chosen = torch.cat([out.sequences[r, 13:][out.exit_layers[r] >= 0] for r in range(5)])
    assert torch.equal(scored.argmax()[scored.judged], chosen)


def test_depth_by_request_and_full_depth_requests() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(4)
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 2, 6, FixedDepth()), tiny_exits.band(model, 4, 6, FixedDepth()))
    out = _generate(model, inputs, exits, kv="recompute", depth=[2, 6, 4, None], pending=3)
    release = _generate(model, inputs, exits, kv="release", depth=[2, 6, 4, None])
    for row, named in ((0, 2), (2, 4)):  # nothing of theirs ever goes deeper, so the bound on what waits is not for them
        assert set(out.exit_layers[row].tolist()) - {-1} == {named}
    assert set(out.exit_layers[1].tolist()) - {-1} == {6} == set(out.exit_layers[3].tolist()) - {-1}
    assert torch.equal(out.sequences[[1, 3]], release.sequences[[1, 3]])


@pytest.mark.parametrize("kv", EXACT)
def test_exit_blocks_see_the_full_models_residuals(kv: str) -> None:
    from dyndepth.runtime.block import block_head

    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(5)
    bands = [tiny_exits.band(model, 2, 6), tiny_exits.band(model, 4, 6)]
    for band in bands:
        band.head = block_head(bind(model), band.leave, "next")
    exits = tiny_exits.exits_of(model, *bands)
    mine, theirs = _generate(model, inputs, exits, kv=kv), _generate(model, inputs, exits, kv="release")
    assert torch.equal(mine.sequences, theirs.sequences)
    assert torch.equal(mine.exit_layers, theirs.exit_layers)
    assert {2, 4, 6} <= set(mine.exit_layers.flatten().tolist())


# -- refusals ---------------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(3)
    skipping = tiny_exits.exits_of(model, tiny_exits.band(model, 2, 4))
    for kv in EXACT:
        with pytest.raises(ExitsError, match=rf"kv='{kv}' keeps every residual .* band \[2, 4\) resumes"):
            _generate(model, inputs, skipping, kv=kv)
    with pytest.raises(ArgumentError, match="pending must be at least 1, got 0"):
        _generate(model, inputs, _exits(model), kv="recompute", pending=0)
    with pytest.raises(ArgumentError, match="prompt must be 'full' with kv='recompute'"):
        _generate(model, inputs, _exits(model), kv="recompute", prompt="dynamic")
