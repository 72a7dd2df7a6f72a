"""Invariants 2, 3, 4 and 8 of the design (1 is tests/test_families.py): what dynamic depth may and may not change."""

from __future__ import annotations

import copy
from typing import Any

import oracle
import pytest
import tiny_exits
import tiny_models
import torch

import dyndepth
from dyndepth.exits import Always, Band, Exits, FixedDepth
from dyndepth.ops.exit_stats import stats_of_logits
from dyndepth.runtime.bind import bind
from dyndepth.runtime.propagate import Propagation
from dyndepth.runtime.score import score
from dyndepth.runtime.session import Session
from dyndepth.testing import assert_as_exact_as

ORACLE_FAMILIES = ["llama", "llama_bias", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2"]


def _generate(model: Any, inputs: dict[str, torch.Tensor], exits: Exits | None = None, **options: Any) -> Any:
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True} | options
    return model.generate(**inputs, custom_generate=dyndepth.generate, exits=exits, **settings)


def _without_layers(model: Any, begin: int, end: int) -> Any:
    """transformers' model with decoder layers [begin, end) taken out."""
    cut = copy.deepcopy(model)
    family = bind(cut).family
    decoder = bind(cut).decoder
    modules = list(getattr(decoder, family.layers))
    kept = modules[:begin] + modules[end:]
    setattr(decoder, family.layers, torch.nn.ModuleList(kept))
    for number, layer in enumerate(kept):
        getattr(layer, family.attention).layer_idx = number
    if getattr(cut.config, "layer_types", None):
        cut.config.layer_types = cut.config.layer_types[:begin] + cut.config.layer_types[end:]
    cut.config.num_hidden_layers = len(kept)
    return cut


# -- invariant 2: fixed exits and bands are smaller models ----------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["full", "dynamic"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_fixed_exit_is_the_truncated_model(family: str, prompt: str) -> None:
    model, inputs = tiny_models.shared(family), tiny_models.prompts(5)
    exits = tiny_exits.exits_of(model, Band(4, 6, FixedDepth()))
    ours = _generate(model, inputs, exits, depth=4, kv="none", prompt=prompt)
    theirs = _without_layers(model, 4, 6).generate(
        **inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    for step, (mine, reference) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        alive = ours.exit_layers[:, step] >= 0
        torch.testing.assert_close(mine[alive], reference[alive], rtol=2e-4, atol=2e-4)
    assert set(ours.exit_layers.unique().tolist()) <= {4, -1}
    assert ours.work.layers[4:] == [0, 0]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_fixed_band_is_the_model_with_those_layers_deleted(family: str) -> None:
    model, inputs = tiny_models.shared(family), tiny_models.prompts(5)
    exits = tiny_exits.exits_of(model, Band(2, 4, Always()))
    ours = _generate(model, inputs, exits, kv="none", prompt="dynamic")
    theirs = _without_layers(model, 2, 4).generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours.sequences, theirs)
    assert ours.work.layers[2:4] == [0, 0]
    assert ours.prompt_work.layers[2:4] == [0, 0]


def test_depths_differ_per_request() -> None:
    """Requests of three budgets in one batch: each equals the model truncated to its own depth."""
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(6)
    exits = tiny_exits.exits_of(model, Band(2, 6, FixedDepth()), Band(4, 6, FixedDepth()))
    depths = [2, 6, 4, 2, None, 4]
    ours = _generate(model, inputs, exits, depth=depths, kv="none").sequences
    for row, depth in enumerate(depths):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        expected = _without_layers(model, depth or 6, 6).generate(**alone, max_new_tokens=8, do_sample=False)
        assert torch.equal(ours[row : row + 1, : expected.shape[1]], expected), depth


# -- a second witness for everything rows can do ------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["predict", "propagate", "copy"])
@pytest.mark.parametrize("family", ORACLE_FAMILIES)
def test_equals_the_oracle(family: str, kv: str) -> None:
    """Bands, exits, jumps, heads, back-fill: rows of four sequences in one pass against one token at a time."""
    model = tiny_models.shared(family)
    exits = tiny_exits.mixed(model)
    sequences = [torch.randint(3, tiny_models.VOCABULARY, (length,)) for length in (17, 9, 12, 1)]
    starts = [5, 0, 11, 0]
    scored = score(model, sequences, exits, start=starts, kv=kv)
    logits = scored.logits()
    at = 0
    taken = []
    for tokens, start in zip(sequences, starts, strict=True):
        told = oracle.Oracle(model, exits, kv, start).run(tokens)
        rows = slice(at, at + len(tokens))
        assert scored.bands_taken[rows].tolist() == told.bands
        assert scored.layers_run[rows].tolist() == told.layers
        torch.testing.assert_close(logits[rows], torch.stack(told.logits), rtol=1e-3, atol=1e-3)
        taken += told.bands
        at += len(tokens)
    assert len(set(taken)) >= 4, "the random routers must use several bands for this to test anything"


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("criterion", ["TopProbability", "Margin", "Entropy", "Saturation", "Patience"])
def test_criteria_equal_the_oracle(criterion: str, kv: str) -> None:
    from dyndepth import exits as parts

    model = tiny_models.shared("llama")
    bands = [tiny_exits.band(model, leave, 6, getattr(parts, criterion)(), head="norm") for leave in (2, 3, 4, 5)]
    exits = tiny_exits.exits_of(model, *bands)
    tokens = torch.randint(3, tiny_models.VOCABULARY, (25,))
    mixed = 0
    for threshold in {"Entropy": (-1.0, -0.5, -0.1), "Patience": (1.0, 2.0)}.get(criterion, (0.5, 0.8, 0.95, 0.999)):
        at = exits.with_thresholds(threshold)
        scored = score(model, [tokens], at, start=[3], kv=kv)
        told = oracle.Oracle(model, at, kv, 3).run(tokens)
        assert scored.bands_taken.tolist() == told.bands
        torch.testing.assert_close(scored.logits(), torch.stack(told.logits), rtol=1e-3, atol=1e-3)
        mixed += 0 < sum(bits > 0 for bits in told.bands) < 22
    assert mixed, "at some threshold some rows, but not all, must leave"


@pytest.mark.parametrize("criterion", ["Patience", "Saturation"])
def test_state_survives_a_skipped_boundary(criterion: str) -> None:
    """A row judged below a band and above it is compared with itself, also if others were judged while it was away."""
    from dyndepth import exits as parts

    model = tiny_models.shared("llama")
    judged = [tiny_exits.band(model, leave, 6, getattr(parts, criterion)(), head="norm") for leave in (1, 3, 5)]
    tokens = torch.randint(3, tiny_models.VOCABULARY, (40,))
    kinds = set()
    for threshold in (1.0, 2.0) if criterion == "Patience" else (0.5, 0.8, 0.95):
        bands = [*judged, tiny_exits.band(model, 2, 4)]
        exits = tiny_exits.exits_of(model, *bands).with_thresholds([threshold, 0.5, threshold, threshold])
        scored, told = score(model, [tokens], exits), oracle.Oracle(model, exits, "predict", 0).run(tokens)
        assert scored.bands_taken.tolist() == told.bands
        kinds |= set(told.bands)
    assert {2, 8} & kinds
    assert 10 in kinds or criterion == "Patience", "some row skips [2, 4) and then leaves at 5"


def test_idle_layers_are_filled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While nobody is live, propagation is one call per gap, not one per layer."""
    calls: list[tuple[int, int]] = []
    original = Propagation.store

    def counted(self: Any, hidden: Any, pos: Any, slots: Any, begin: int, end: int, context: Any) -> None:
        calls.append((begin, end))
        original(self, hidden, pos, slots, begin, end, context)

    monkeypatch.setattr(Propagation, "store", counted)
    model = tiny_models.shared("llama")
    exits = tiny_exits.exits_of(model, *(tiny_exits.band(model, *span, threshold=-1.0) for span in ((1, 3), (4, 6))))
    score(model, [torch.arange(3, 10)], exits, kv="propagate")
    assert calls == [(1, 3), (4, 6)]


def test_decoding_equals_scoring() -> None:
    """Rows decoded one pass at a time leave where they leave when the same tokens go up together."""
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(4)
    exits = tiny_exits.mixed(model)
    out = _generate(model, inputs, exits, max_new_tokens=10, min_new_tokens=10)
    width = inputs["input_ids"].shape[1]
    for row in range(4):
        first = int((inputs["attention_mask"][row] == 0).sum())
        tokens = out.sequences[row, first:]
        scored = score(model, [tokens], exits, start=[width - first - 1])
        judged = slice(width - first - 1, width - first + 9)
        assert scored.bands_taken[judged].tolist() == out.bands_taken[row].tolist()


# -- invariant 3: a row's answer does not depend on its neighbours ---------------------------------------------------------


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_batch_invariance(family: str, kv: str) -> None:
    """fp32: alone, in a batch, in another order: the same tokens and the same bands, exactly."""
    model, inputs = tiny_models.shared(family), tiny_models.prompts(7)
    exits = tiny_exits.mixed(model)
    together = _generate(model, inputs, exits, kv=kv)
    order = torch.randperm(7)
    shuffled = _generate(model, {name: value[order] for name, value in inputs.items()}, exits, kv=kv)
    assert torch.equal(shuffled.sequences, together.sequences[order])
    assert torch.equal(shuffled.bands_taken, together.bands_taken[order])
    for row in range(7):
        alone = _generate(model, {name: value[row : row + 1] for name, value in inputs.items()}, exits, kv=kv)
        steps = alone.bands_taken.shape[1]
        assert torch.equal(alone.sequences[0], together.sequences[row, : alone.sequences.shape[1]])
        assert torch.equal(alone.bands_taken[0], together.bands_taken[row, :steps])
    assert len(together.bands_taken.unique()) > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batch_invariance_in_half_precision_up_to_near_ties(dtype: torch.dtype) -> None:
    """Library products round differently at other row counts. Given the same tokens, decisions and answers differ only
    where a router sits at its threshold or two logits tie within rounding; such rows are counted and bounded."""
    model = tiny_models.tiny("llama", dtype)
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 2, 4), tiny_exits.band(model, 4, 6))
    sequences = list(torch.randint(3, tiny_models.VOCABULARY, (12, 20)))
    together = score(model, sequences, exits)
    alone = [score(model, [tokens], exits, chunk=7) for tokens in sequences]
    bands = torch.cat([scored.bands_taken for scored in alone])
    answers = torch.cat([scored.argmax() for scored in alone])
    assert float((bands != together.bands_taken).float().mean()) <= 0.05
    same = bands == together.bands_taken
    assert float((answers != together.argmax())[same].float().mean()) <= 0.05


# -- invariant 4: what back-fill writes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("everyone", [False, True], ids=["some leave", "all leave"])
@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("family", ORACLE_FAMILIES)
def test_page_entries(family: str, kv: str, everyone: bool) -> None:
    """Every K and V in the pages equals the oracle's: ride-along while rows are live, backfill_kv once nobody is."""
    model = tiny_models.shared(family)
    threshold = -1.0 if everyone else 0.5
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 1, 3), tiny_exits.band(model, 4, 6, threshold=threshold))
    tokens = torch.randint(3, tiny_models.VOCABULARY, (19,))
    session = Session(bind(model), [19], exits, kv=kv)
    session.run([0] * 19, list(range(19)), tokens=tokens)
    told = oracle.Oracle(model, exits, kv, 0).run(tokens)
    slots = session.pages.slots([0] * 19, list(range(19))).long()
    for number in range(tiny_models.LAYERS):
        keys, values = session.pages.kv[number].flatten(1, 2)[:, slots]
        torch.testing.assert_close(keys, told.keys[number], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values, told.values[number], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_folded_propagation_equals_the_modules(family: str) -> None:
    """One product with folded norms against the layers' own modules, one by one: error-relative."""
    pages = {}
    for dtype in (torch.float32, torch.float64):
        model = bind(tiny_models.tiny(family, dtype))
        hidden = torch.randn(9, model.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
        for fold in (True, False):
            if dtype == torch.float64 and fold:
                continue
            session = Session(model, [9])
            if dtype == torch.float64:  # the ops take no float64: their references do
                pages[dtype, fold] = _propagated_in_float64(model, hidden, session)
                continue
            seq, pos = [0] * 9, list(range(9))
            rows, context = session.rows(seq, pos, tokens=torch.ones(9, dtype=torch.long))
            Propagation(model, fold=fold).store(hidden, rows.pos, rows.slots, 1, 5, context)
            pages[dtype, fold] = session.pages.kv[1:5, :, :, :].flatten(2, 3)[:, :, rows.slots.long()]
    assert_as_exact_as(
        pages[torch.float32, True], pages[torch.float32, False], pages[torch.float64, False], what=family, factor=3
    )


def _propagated_in_float64(model: Any, hidden: torch.Tensor, session: Session) -> torch.Tensor:
    from dyndepth.ops._paged import rotate

    pos = torch.arange(9, dtype=torch.int32)
    found = []
    for layer in model.layers[1:5]:
        x = hidden if layer.before_attention is None else layer.before_attention(hidden)
        _, key, value = layer.project(x, 0)
        cos = sin = None
        if session.cos is not None:
            cos, sin = session.cos[layer.variant].double(), session.sin[layer.variant].double()
        found.append(torch.stack([rotate(key, cos, sin, pos), value]))
    return torch.stack(found)


@pytest.mark.parametrize(
    "family", ["llama", "llama_bias", "mistral", "qwen2", "gemma2", "phi3", "gpt2", "opt", "opt_post_norm", "gpt_neox"]
)
def test_families_that_fold(family: str) -> None:
    """Folding is not silently lost: these families have no norm on K, so propagation is one product."""
    assert Propagation(bind(tiny_models.shared(family)))._maps(1, 5) is not None


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "olmo2"])
def test_families_that_cannot_fold(family: str) -> None:
    assert Propagation(bind(tiny_models.shared(family)))._maps(1, 5) is None


# -- invariant 8: the reported work is the work ---------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_rows_x_layers_equal_what_hooks_count(family: str, kv: str) -> None:
    model, inputs = tiny_models.tiny(family), tiny_models.prompts(6)
    exits = tiny_exits.mixed(model)
    bound = bind(model)
    counted = [0] * bound.depth
    for number, layer in enumerate(bound.layers):
        first = layer.module.get_submodule(bound.family.mlp[0])
        first.register_forward_hook(
            lambda _, args, __, number=number: counted.__setitem__(number, counted[number] + args[0].shape[0])
        )
    out = _generate(model, inputs, exits, kv=kv)
    assert counted == [a + b for a, b in zip(out.work.layers, out.prompt_work.layers, strict=True)]
    assert out.work.run == int(out.layers_run[out.layers_run >= 0].sum())
    assert out.work.rows == int((out.exit_layers >= 0).sum())
    assert 0 < out.work.fraction < 1


def test_exit_stats_of_the_oracle_is_the_public_one() -> None:
    """The oracle judges with stats_of_logits; that it means the same as exit_stats is checked here, not assumed."""
    hidden, head = torch.randn(5, 8), torch.randn(60, 8)
    for one, other in zip(stats_of_logits(hidden @ head.T), dyndepth.ops.exit_stats(hidden, head), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)
