"""Invariant 6: lossless generation is the full model's, token for token when greedy, in distribution when sampled."""

from __future__ import annotations

from typing import Any

import joint
import pytest
import tiny_exits
import tiny_models
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import dyndepth
from dyndepth.errors import ArgumentError
from dyndepth.exits import Always, Exits, FixedDepth

WAYS = ["two", "always", "blocked", "shortlist"]


def _exits(model: Any, way: str = "two") -> Exits:
    if way == "always":
        return tiny_exits.exits_of(model, tiny_exits.band(model, 5, 6, Always(), head="norm"))
    if way == "shortlist":
        ids = torch.arange(3, tiny_models.VOCABULARY, 2)
        return tiny_exits.exits_of(model, tiny_exits.band(model, 4, 6, Always(), head="norm", shortlist=ids))
    bands = [tiny_exits.band(model, 2, 6), tiny_exits.band(model, 4, 6, head="mlp")]
    if way == "blocked":
        from dyndepth.runtime.bind import bind
        from dyndepth.runtime.block import block_head

        for band in bands:
            band.head = block_head(bind(model), band.leave, "next")
    return tiny_exits.exits_of(model, *bands)


def _plain(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    return model.generate(**inputs, **({"do_sample": False, "return_dict_in_generate": True} | options))


def _lossless(model: Any, inputs: dict[str, torch.Tensor], exits: Exits, **options: Any) -> Any:
    return _plain(model, inputs, custom_generate=dyndepth.generate, exits=exits, mode="lossless", **options)


def _first(inputs: dict[str, torch.Tensor], batch: int) -> dict[str, torch.Tensor]:
    return {name: value[:batch] for name, value in inputs.items()}


# -- greedy ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("way", ["two", "always"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_greedy_is_the_full_model(family: str, way: str, batch: int) -> None:
    model, inputs = tiny_models.shared(family), _first(tiny_models.prompts(5), batch)
    wanted = _plain(model, inputs, max_new_tokens=18)
    found = _lossless(model, inputs, _exits(model, way), max_new_tokens=18)
    assert torch.equal(found.sequences, wanted.sequences)
    assert found.work.rows == int((found.exit_layers >= 0).sum())
    if way == "always":
        assert int(found.drafted.sum()) >= 10


@pytest.mark.parametrize("drafts", [1, 2, 7, 50])
@pytest.mark.parametrize("way", WAYS)
def test_numbers_of_drafts_and_kinds_of_exits(way: str, drafts: int) -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(7, seed=8)
    wanted = _plain(model, inputs, max_new_tokens=21, output_logits=True)
    found = _lossless(model, inputs, _exits(model, way), max_new_tokens=21, output_logits=True, drafts=drafts)
    assert torch.equal(found.sequences, wanted.sequences)
    for step, (mine, theirs) in enumerate(zip(found.logits, wanted.logits, strict=True)):
        alive = found.exit_layers[:, step] >= 0
        torch.testing.assert_close(mine[alive], theirs[alive], rtol=5e-4, atol=5e-4)
    assert 0 < int(found.accepted.sum()) <= int(found.drafted.sum())
    assert int(found.accepted.sum()) == int(((found.exit_layers >= 0) & (found.exit_layers < 6)).sum())


@pytest.mark.parametrize("batch", [1, 6])
def test_sequences_end_inside_drafts(batch: int) -> None:
    """End tokens chosen from what the model says anyway, so that sequences end at different steps, drafted or not."""
    model, inputs = tiny_models.shared("llama"), _first(tiny_models.prompts(6), batch)
    said = _plain(model, inputs, max_new_tokens=20).sequences[:, 13:]
    ends = sorted({int(said[row, 3 + 2 * row]) for row in range(batch)})
    wanted = _plain(model, inputs, max_new_tokens=20, eos_token_id=ends)
    found = _lossless(model, inputs, _exits(model, "always"), max_new_tokens=20, eos_token_id=ends)
    assert torch.equal(found.sequences, wanted.sequences)
    assert wanted.sequences.shape[1] < 33 or batch > 1
    for row in range(batch):  # nothing is recorded after the end
        length = int((found.exit_layers[row] >= 0).sum())
        assert int(found.sequences[row, 13 + length - 1]) in ends or length == 20


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 9, "eos_token_id": list(range(0, 203, 3))},
        {"bad_words_ids": [[40], [43, 44]]},
        {"suppress_tokens": [33, 34, 37], "repetition_penalty": 1.2},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"max_length": 17},
    ],
    ids=str,
)
def test_processors_see_every_prefix(options: dict[str, Any]) -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(4)
    settings = {"max_new_tokens": 16, "output_scores": True} | options
    if "max_length" in options:
        settings.pop("max_new_tokens")
    wanted = _plain(model, inputs, **settings)
    for way in ("two", "always"):
        found = _lossless(model, inputs, _exits(model, way), **settings)
        assert torch.equal(found.sequences, wanted.sequences)
        for step, (mine, theirs) in enumerate(zip(found.scores, wanted.scores, strict=True)):
            alive = found.exit_layers[:, step] >= 0
            torch.testing.assert_close(mine[alive], theirs[alive], rtol=5e-4, atol=5e-4)


class _AfterTwo(StoppingCriteria):
    """Ends a sequence when its last two tokens were both above `line`; a criterion that needs the prefix."""

    def __init__(self, line: int) -> None:
        self.line = line

    def __call__(self, input_ids: torch.Tensor, scores: Any, **unused: Any) -> torch.Tensor:
        return (input_ids[:, -2:] > self.line).all(-1)


@pytest.mark.parametrize("eos", [None, 2])
def test_other_criteria_stop_sequences_one_by_one(eos: int | None) -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(5)
    settings: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": eos, "pad_token_id": 0}
    settings["stopping_criteria"] = StoppingCriteriaList([_AfterTwo(100)])
    wanted = _plain(model, inputs, **settings)
    found = _lossless(model, inputs, _exits(model, "always"), **settings)
    assert torch.equal(found.sequences, wanted.sequences)
    assert wanted.sequences.shape[1] < 13 + 24, "the criterion must stop something for this to test anything"


def test_prompts_as_embeddings_and_tokens_streamed() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(3)

    class Streamer:
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []
            self.over = 0

        def put(self, value: torch.Tensor) -> None:
            self.seen.append(value)

        def end(self) -> None:
            self.over += 1

    streamer = Streamer()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    asked = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    wanted = _plain(model, asked, max_new_tokens=15).sequences
    found = _lossless(model, asked, _exits(model), max_new_tokens=15, streamer=streamer).sequences
    assert torch.equal(found, wanted)
    assert torch.equal(torch.stack(streamer.seen[-15:], 1), wanted)
    assert streamer.over == 1


def test_a_request_may_name_the_exit_it_drafts_with() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(4)
    exits = tiny_exits.exits_of(
        model, tiny_exits.band(model, 2, 6, FixedDepth()), tiny_exits.band(model, 4, 6, FixedDepth(), head="norm")
    )
    wanted = _plain(model, inputs, max_new_tokens=16).sequences
    found = _lossless(model, inputs, exits, max_new_tokens=16, depth=[2, 4, 6, None], drafts=3)
    assert torch.equal(found.sequences, wanted)
    assert found.drafted.tolist()[2:] == [0, 0]
    assert min(found.drafted.tolist()[:2]) > 5
    assert set(found.exit_layers[0].tolist()) <= {2, 6, -1}
    assert set(found.exit_layers[1].tolist()) <= {4, 6, -1}


@pytest.mark.parametrize("way", ["two", "always"])
@pytest.mark.parametrize("batch", [1, 5])
def test_rows_x_layers_are_counted_and_no_row_runs_a_layer_twice(batch: int, way: str) -> None:
    model, inputs = tiny_models.tiny("llama"), _first(tiny_models.prompts(5), batch)
    ran: list[int] = [0] * 6
    for number, layer in enumerate(model.model.layers):

        def count(module: Any, args: Any, output: Any, number: int = number) -> None:
            ran[number] += output.shape[0]

        layer.mlp.down_proj.register_forward_hook(count)
    found = _lossless(model, inputs, _exits(model, way), max_new_tokens=16)
    prompt = int(inputs["attention_mask"].sum()) - batch
    assert [layers - prompt for layers in ran] == found.work.layers
    # Every final token's row ran every layer once; beyond that only rows of rejected drafts did, and no more than once each.
    rejected = int((found.drafted - found.accepted).sum())
    assert all(found.work.rows <= layers <= found.work.rows + rejected for layers in found.work.layers)


def test_sequences_draft_apart_only_while_enough_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what each drafts is what it drafts alone."""
    from dyndepth.runtime.session import Session

    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(5)
    holds: list[bool] = []
    run = Session.run

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("may_leave") is not False:
            holds.append(bool(kwargs["hold"]))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Session, "run", noting)
    shares = {}
    for way in ("two", "always"):
        holds.clear()
        found = _lossless(model, inputs, _exits(model, way), max_new_tokens=16, eos_token_id=None)
        shares[way] = sum(holds) / len(holds)
        for row in range(5):
            own = {name: value[row : row + 1] for name, value in inputs.items()}
            alone = _lossless(model, own, _exits(model, way), max_new_tokens=16, eos_token_id=None)
            assert (alone.drafted, alone.accepted) == (found.drafted[row], found.accepted[row])
    assert shares["two"] < 0.5 < shares["always"]


def test_pages_of_rejected_drafts_go_back() -> None:
    """No sequence may hold more pages than its final tokens need once drafts are verified, and all go back at the end."""
    from dyndepth.runtime import generate

    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(4)
    seen: list[Any] = []
    kept = generate.Session
    try:
        generate.Session = lambda *args, **kwargs: seen.append(kept(*args, **kwargs)) or seen[-1]  # type: ignore
        _lossless(model, inputs, _exits(model, "always"), max_new_tokens=20, page_size=1, drafts=6)
    finally:
        generate.Session = kept  # type: ignore[misc]
    (session,) = seen
    assert session.pages.free == session.pages.total
    assert all(session.pages.length(sequence) == 0 for sequence in range(4))


# -- sampling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warp", [{"temperature": 0.9}, {"temperature": 1.3, "top_k": 4}], ids=str)
@pytest.mark.parametrize("way", ["two", "always"])
def test_sampling_has_the_full_models_distribution(way: str, warp: dict[str, Any]) -> None:
    """Joint distribution of three tokens over 4 x 51,200 samples, against every continuation's exact probability."""
    model = tiny_models.tiny("llama", vocab_size=joint.SMALL)
    exits = _exits(model, way)
    prompt = torch.tensor([[3, 5, 4]])
    wanted = joint.joint(model, prompt, warp, 3)
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(6)
    batch, counts = 1024, torch.zeros(joint.SMALL**3, dtype=torch.int64)
    drafted = 0
    for _ in range(50):
        inputs = {"input_ids": prompt.expand(batch, -1), "attention_mask": torch.ones(batch, 3, dtype=torch.int64)}
        out = _lossless(
            model, inputs, exits, max_new_tokens=3, do_sample=True, eos_token_id=None, generator=generator, drafts=2,
            **({"top_k": 0} | warp),
        )  # fmt: skip
        made = out.sequences[:, 3:]
        counts += joint.counted(made)
        drafted += int(out.drafted.sum())
    assert drafted > 30_000
    joint.check(counts, wanted)


# -- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "exact"}, "mode must be one of dynamic, lossless, rollback, got 'exact'"),
        ({"exits": None}, "mode='lossless' drafts with early exits, got exits=None"),
        ({"kv": "predict"}, "mode='lossless' works with kv='recompute' only, got kv='predict'"),
        ({"drafts": 0}, "drafts must be at least 1, got 0"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(2)
    settings = {"exits": _exits(model), "mode": "lossless", "max_new_tokens": 3} | options
    with pytest.raises(ArgumentError, match=message):
        model.generate(**inputs, custom_generate=dyndepth.generate, **settings)


# -- processors and criteria of all sorts ------------------------------------------------------------------------------------


def test_functions_of_the_request_are_asked_about_their_own_text() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(4)
    prompts = inputs["input_ids"].tolist()

    def allowed(request: int, ids: torch.Tensor) -> list[int]:
        assert ids[:13].tolist() == prompts[request]
        return [10 + request, 20 + request, 30 + (len(ids) * (request + 1)) % 50]

    settings: dict[str, Any] = {"max_new_tokens": 12, "prefix_allowed_tokens_fn": allowed, "repetition_penalty": 1.3}
    wanted = _plain(model, inputs, **settings).sequences
    assert torch.equal(_lossless(model, inputs, _exits(model, "always"), **settings).sequences, wanted)


class _ByRow(StoppingCriteria):
    """Row r stops after 2 + 3 r tokens."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **unused: Any) -> torch.Tensor:
        return torch.tensor([input_ids.shape[1] - 13 >= 2 + 3 * row for row in range(input_ids.shape[0])])


def test_criteria_that_count_rows() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(4)
    settings: dict[str, Any] = {"max_new_tokens": 15, "eos_token_id": 2, "stopping_criteria": StoppingCriteriaList([_ByRow()])}
    wanted = _plain(model, inputs, **settings).sequences
    found = _lossless(model, inputs, _exits(model, "always"), **settings)
    assert torch.equal(found.sequences, wanted)
    assert (found.exit_layers >= 0).sum(1).tolist() == [2, 5, 8, 11]


def test_processors_with_state_are_refused() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(2)
    with pytest.raises(ArgumentError, match="UnbatchedClassifierFreeGuidanceLogitsProcessor follows the rows of a batch"):
        _lossless(model, inputs, _exits(model), max_new_tokens=5, guidance_scale=2.0)


def test_a_shortlist_that_processors_forbid() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(3)
    ids = torch.arange(3, 40)
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 4, 6, Always(), head="norm", shortlist=ids))
    out = _lossless(model, inputs, exits, max_new_tokens=6, do_sample=True, suppress_tokens=ids.tolist())
    made = out.sequences[:, 13:]
    assert not bool(torch.isin(made, ids).any())
    assert int(out.accepted.sum()) == 0


def test_drafts_past_the_end_are_not_counted() -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(6)
    said = _plain(model, inputs, max_new_tokens=20).sequences[:, 13:]
    for end in sorted({int(token) for token in said[:, 4]}):
        found = _lossless(model, inputs, _exits(model, "always"), max_new_tokens=20, eos_token_id=end, drafts=8)
        drafted = (found.exit_layers >= 0) & (found.exit_layers < 6)
        assert found.accepted.tolist() == drafted.sum(1).tolist()


def test_a_converted_model_generates_losslessly() -> None:
    model, inputs = tiny_models.tiny("llama"), tiny_models.prompts(3)
    wanted = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    dyndepth.convert(model, _exits(model), kv="propagate")
    assert torch.equal(model.generate(**inputs, max_new_tokens=10, do_sample=False, mode="lossless"), wanted)
