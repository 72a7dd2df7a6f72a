"""DynamicEncoder: the same exits and answers as one sample at a time through transformers, whatever the batch."""

from __future__ import annotations

import inspect
import math
import random
from typing import Any

import pytest
import torch
import transformers as t
from encoder_witness import middle, states, told, uniform
from tiny_encoders import CLASSES, EXITS, LAYERS, MODELS, TEXT, WIDTH, criteria, exits, heads, inputs, model

import dyndepth
from dyndepth.encoders import (
    CtcHead,
    LinearHead,
    ModelHead,
    RegressionPatience,
    SampleExit,
    SampleExits,
    facts_of,
)
from dyndepth.encoders.criteria import SampleView, draw, gate_features
from dyndepth.errors import ArgumentError, ExitsError, UnsupportedModelError
from dyndepth.exits import Always, Never, Patience, TopProbability
from dyndepth.ops.exit_stats import stats_of_logits

LAYOUTS = ("packed", "padded")
BOUND = {"rtol": 2e-5, "atol": 2e-5}


def _run(name: str, found: SampleExits, batch: dict[str, torch.Tensor], **options: Any) -> Any:
    call = {key: options.pop(key) for key in ("depth", "labels") if key in options}
    return dyndepth.DynamicEncoder(model(name), found, **options)(**batch, **call)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_nobody_leaves(name: str, layout: str) -> None:
    """Full depth is transformers' own answer, sample by sample and (but for padding's rounding) for the batch."""
    batch = inputs(name)
    out = _run(name, exits(name, "top_probability").closed(), batch, layout=layout)
    for row in range(8):
        torch.testing.assert_close(out.logits[row], states(model(name), batch, row)[1], **BOUND)
    assert out.exit_layers.tolist() == [LAYERS] * 8
    assert out.work.layers == [8] * LAYERS
    assert out.work.fraction == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_model_head_is_the_truncated_model(name: str, layout: str) -> None:
    """Everybody leaves at 3 through the model's own head: the model with its first three layers."""
    found = SampleExits([SampleExit(3, ModelHead(), Always())], facts_of(model(name)))
    batch = inputs(name)
    out = _run(name, found, batch, layout=layout)
    kind, config = MODELS[name]
    # The first of ALBERT's two groups serves its first three layers.
    short = type(config)(**{**config.to_dict(), "num_hidden_layers": 3, "n_layers": 3, "num_hidden_groups": 1})
    cut = kind(short).eval()
    cut.load_state_dict(model(name).state_dict(), strict=False)
    for row in range(8):
        torch.testing.assert_close(out.logits[row], states(cut, batch, row)[1], **BOUND)
    assert out.work.layers == [8, 8, 8, 0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", criteria())
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_same_as_one_by_one(name: str, kind: str, layout: str) -> None:
    """Every criterion decides as its formula does for one sample alone."""
    batch = inputs(name)
    depth = [1, -1, 3, 5, 2, 4, 1, 3]
    found = exits(name, kind)
    scored = found.exits[0].criterion.scored
    threshold = 0.0 if kind == "ponder_draw" else middle(model(name), found, kind, batch) if scored else math.inf
    found = found.with_thresholds(threshold)
    want, where = told(model(name), found, kind, batch, threshold, depth)
    options: dict[str, Any] = {"depth": torch.tensor(depth)} if kind == "fixed_depth" else {}
    out = _run(name, found, batch, layout=layout, **options)
    assert out.exit_layers.tolist() == where
    assert kind in ("never", "always") or len(set(where)) > 1, "the threshold separates nobody"
    torch.testing.assert_close(out.logits, want, **BOUND)
    assert out.work.layers == [sum(at > layer for at in where) for layer in range(LAYERS)]
    whole = _run(name, found, batch, layout=layout, compact=False, **options)
    assert whole.exit_layers.tolist() == where
    assert whole.work.run >= out.work.run
    torch.testing.assert_close(whole.logits, want, **BOUND)


@pytest.mark.parametrize("pooling", ["first", "mean", "max"])
@pytest.mark.parametrize("name", [*TEXT, "vit"])
def test_pooling_sees_no_padding(name: str, pooling: str) -> None:
    batch = inputs(name)
    found = exits(name, "margin", pooling=pooling)
    threshold = middle(model(name), found, "margin", batch)
    want, where = told(model(name), found, "margin", batch, threshold)
    for layout in LAYOUTS:
        out = _run(name, found.with_thresholds(threshold), batch, layout=layout)
        assert out.exit_layers.tolist() == where
        torch.testing.assert_close(out.logits, want, **BOUND)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", criteria())
def test_batches_do_not_matter(kind: str, layout: str) -> None:
    """A sample's exit and answer are the same alone, twice over, in any order and with any company."""
    batch, depth, numbers = inputs("bert"), torch.tensor([1, -1, 3, 5, 2, 4, 1, 3]), torch.arange(8)
    found = exits("bert", kind)
    if kind == "ponder_draw":
        found = found.with_thresholds(0.0)
    elif found.exits[0].criterion.scored:
        found = found.with_thresholds(middle(model("bert"), found, kind, batch))
    encoder = dyndepth.DynamicEncoder(model("bert"), found, layout=layout)

    def run(rows: list[int]) -> Any:
        part = {name: value[rows] for name, value in batch.items()}
        return encoder(**part, numbers=numbers[rows], depth=depth[rows] if kind == "fixed_depth" else None)

    whole = run(list(range(8)))
    draws = random.Random(kind)
    drawn = [draws.choices(range(8), k=count) for count in range(1, 12)]
    for rows in (*([row] for row in range(8)), [7, 0], [7, 6, 5, 4, 3, 2, 1, 0], *drawn):
        part = run(rows)
        assert part.exit_layers.tolist() == whole.exit_layers[rows].tolist()
        torch.testing.assert_close(part.logits, whole.logits[rows], **BOUND)


def test_draws_belong_to_samples() -> None:
    """PonderNet's draws follow the caller's number of the sample, are even, and do not repeat between exits."""
    found = exits("bert", "ponder_draw", 0.0)
    batch = inputs("bert")
    first = _run("bert", found, batch)
    assert _run("bert", found, batch).exit_layers.equal(first.exit_layers)
    for rows in ([3], [6, 1], [7, 6, 5, 4, 3, 2, 1, 0]):  # known by their numbers, they draw the same alone
        part = {name: value[rows] for name, value in batch.items()}
        encoder = dyndepth.DynamicEncoder(model("bert"), found)
        assert encoder(**part, numbers=torch.tensor(rows)).exit_layers.tolist() == first.exit_layers[rows].tolist()
    with pytest.raises(ArgumentError, match="numbers must be"):
        encoder(**part, numbers=torch.tensor([1]))
    values = draw(torch.arange(20000), 3, 0)
    assert float(values.min()) >= 0
    assert float(values.max()) < 1
    assert abs(float(values.mean()) - 0.5) < 0.01
    assert abs(float(values.var()) - 1 / 12) < 0.003
    other = draw(torch.arange(20000), 4, 0)
    assert abs(float(torch.corrcoef(torch.stack([values, other]))[0, 1])) < 0.03


def test_left_padding_and_holes() -> None:
    """Padding may stand anywhere; positions are the embedding's business, so only the mask moves here."""
    batch = inputs("bert", [4, 6, 2], left=True)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    right = inputs("bert", [4, 6, 2])
    for row, length in enumerate([4, 6, 2]):
        right["input_ids"][row, :length] = batch["input_ids"][row, 6 - length :]
    found = exits("bert", "top_probability").closed()
    for layout in LAYOUTS:
        out = _run("bert", found, {**batch, "position_ids": positions}, layout=layout)
        torch.testing.assert_close(out.logits, _run("bert", found, right).logits, **BOUND)


def test_everywhere_is_differentiable_and_alike() -> None:
    batch = inputs("distilbert")
    found = exits("distilbert", "top_probability")
    encoder = dyndepth.DynamicEncoder(model("distilbert"), found)
    with torch.enable_grad():
        told_everywhere = encoder.everywhere(**batch)
        total = sum(logits.sum() for _, logits in told_everywhere)
    assert len(told_everywhere) == len(EXITS) + 1
    for (samples, logits), point in zip(told_everywhere, [*found, None], strict=True):
        at = samples.ids
        if point is None:
            want = _run("distilbert", found.closed(), batch).logits
        else:
            only = SampleExits([SampleExit(point.leave, point.head, Always())], found.model)
            want = _run("distilbert", only, batch).logits
        torch.testing.assert_close(logits.detach(), want[at], **BOUND)
    total.backward()  # type: ignore[union-attr]
    assert model("distilbert").distilbert.embeddings.word_embeddings.weight.grad is not None
    model("distilbert").zero_grad()
    assert all(head.out.weight.grad is not None for head in (point.head for point in encoder.exits))  # type: ignore[attr-defined]


def test_a_model_without_a_head() -> None:
    """A sentence encoder: the exits bring the final head, here a mean over tokens."""
    base = model("bert").bert
    final = heads("mean")[0]
    facts = facts_of(base, final)
    points = [SampleExit(2, heads("mean")[1], Never())]
    batch = inputs("bert")
    out = dyndepth.DynamicEncoder(base, SampleExits(points, facts, final=final))(**batch)
    from encoder_witness import alone, answer

    for row in range(8):
        with torch.no_grad():
            hidden = base(**alone(batch, row)).last_hidden_state[0]
        torch.testing.assert_close(out.logits[row], answer(final, hidden), **BOUND)
    with pytest.raises(ExitsError, match="no head of its own"):
        facts_of(base)


def test_labels_give_transformers_loss() -> None:
    batch, labels = inputs("bert"), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    out = _run("bert", exits("bert", "never"), batch, labels=labels)
    with torch.no_grad():
        want = model("bert")(**batch, labels=labels)
    torch.testing.assert_close(out.loss, want.loss, **BOUND)
    with pytest.raises(ArgumentError, match="labels"):
        _run("bert", exits("bert", "never"), batch, labels=labels + 1)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_convert_and_revert(name: str) -> None:
    batch = inputs(name)
    found = exits(name, "margin", 0.3)
    want = _run(name, found, batch)
    plain = model(name)(**batch)
    keys = list(model(name).state_dict())
    try:
        assert dyndepth.convert(model(name), found) is model(name)
        with torch.no_grad():
            out = model(name)(*[batch[k] for k in list(batch)[:1]], **{k: batch[k] for k in list(batch)[1:]})
            assert isinstance(model(name)(**batch, return_dict=False), tuple)
        assert torch.equal(out.logits, want.logits)
        assert isinstance(out, type(plain))
        assert list(model(name).state_dict()) == keys
    finally:
        dyndepth.revert(model(name))
    assert torch.equal(model(name)(**batch).logits, plain.logits)


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit"])
def test_positions_are_the_models_own(name: str) -> None:
    """What a model takes by position, labels and embeddings included, a converted one takes in the same places."""
    batch, labels = inputs(name), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    order = list(inspect.signature(type(model(name)).forward).parameters)[1:]
    given = {**batch, "labels": labels}
    if name != "vit":
        given["inputs_embeds"] = model(name).get_input_embeddings()(given.pop("input_ids"))
    positional = [given.get(argument) for argument in order[: 1 + max(order.index(argument) for argument in given)]]
    with torch.no_grad():
        want = model(name)(*positional)
        try:
            dyndepth.convert(model(name), exits(name, "never"))
            out = model(name)(*positional)
            with pytest.raises(ArgumentError, match="by position"):
                model(name)(*positional, **{order[0]: positional[0]})
        finally:
            dyndepth.revert(model(name))
    torch.testing.assert_close(out.logits, want.logits, **BOUND)
    torch.testing.assert_close(out.loss, want.loss, **BOUND)


@pytest.mark.parametrize("name", TEXT)
def test_embeddings_instead_of_tokens(name: str) -> None:
    batch = inputs(name, [6, 6, 6])
    embeds = model(name).get_input_embeddings()(batch["input_ids"])
    out = _run(name, exits(name, "never"), {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]})
    with torch.no_grad():
        want = model(name)(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(out.logits, want, **BOUND)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Heads follow the model's dtype, judges stay fp32; answers are as near to fp32 as transformers' own."""
    batch = inputs("bert")
    found = exits("bert", "q_exit", 0.5)
    half = model("bert", dtype)
    out = dyndepth.DynamicEncoder(half, SampleExits(found, facts_of(half)).closed())(**batch)
    exact = model("bert")(**batch).logits
    error = (half(**batch).logits.float() - exact).abs().max()
    assert (out.logits.float() - exact).abs().max() <= 2 * error + 1e-3
    judged = dyndepth.DynamicEncoder(half, SampleExits(found, facts_of(half)))(**batch)
    assert judged.logits.dtype == dtype
    assert next(found.exits[0].judge.parameters()).dtype == torch.float32  # type: ignore[union-attr]


def test_two_modules_of_one_model() -> None:
    """Packed attention leaves the model as it was, also after an error inside a layer."""
    bert = model("bert")
    before = bert.config._attn_implementation
    encoder = dyndepth.DynamicEncoder(bert, exits("bert", "never"))
    handle = bert.bert.encoder.layer[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder(**inputs("bert"))
    handle.remove()
    assert bert.config._attn_implementation == before
    assert encoder(**inputs("bert")).logits.shape == (8, CLASSES)


def test_adapters_are_called() -> None:
    """The model's own modules run, so a change to one of them (LoRA, quantisation) counts."""
    bert = model("bert")
    calls = []
    handle = bert.bert.encoder.layer[2].attention.self.query.register_forward_hook(lambda *_: calls.append(1))
    for layout in LAYOUTS:
        dyndepth.DynamicEncoder(bert, exits("bert", "never"), layout=layout)(**inputs("bert"))
    handle.remove()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(0, 3, dtype=torch.int64), "attention_mask": torch.zeros(0, 3)}, "empty batch"),
        ({"attention_mask": torch.tensor([[1], [0]]), "input_ids": torch.ones(2, 1, dtype=torch.int64)}, "sample 1 has none"),
        ({"attention_mask": torch.ones(8, 3)}, "attention_mask must be"),
        ({"attention_mask": torch.ones(5, 9)}, "equally many samples"),
        ({"input_ids": None}, "wanted input_ids"),
        ({"pixel_values": torch.ones(8, 3)}, "got pixel_values"),
        ({"input_ids": [[1, 2]]}, "must be a tensor"),
    ],
)  # fmt: skip
def test_bad_batches(change: dict[str, Any], message: str) -> None:
    encoder = dyndepth.DynamicEncoder(model("bert"), exits("bert", "never"))
    with pytest.raises(ArgumentError, match=message):
        encoder(**{**inputs("bert"), **change})


def test_nan_is_an_error() -> None:
    """Logits that are NaN are an error at the exit that would have used them and at the top, never an answer."""
    broken = inputs("vit")
    broken["pixel_values"][3] = math.nan
    for found in (exits("vit", "never"), exits("vit", "always")):
        with pytest.raises(ArgumentError, match="NaN"):
            _run("vit", found, broken)


def test_bad_encoders() -> None:
    bert = model("bert")
    with pytest.raises(UnsupportedModelError, match="got Linear"):
        dyndepth.DynamicEncoder(torch.nn.Linear(2, 2), exits("bert", "never"))
    with pytest.raises(UnsupportedModelError, match="got BertForMaskedLM"):
        dyndepth.DynamicEncoder(t.BertForMaskedLM(MODELS["bert"][1]), exits("bert", "never"))
    with pytest.raises(ArgumentError, match="layout"):
        dyndepth.DynamicEncoder(bert, exits("bert", "never"), layout="wide")
    with pytest.raises(ArgumentError, match="SampleExits"):
        dyndepth.DynamicEncoder(bert, None)  # type: ignore[arg-type]
    with pytest.raises(ExitsError, match="another model: model_type"):
        dyndepth.DynamicEncoder(model("roberta"), exits("bert", "never"))
    other = MODELS["bert"][0](MODELS["bert"][1])
    with pytest.raises(ExitsError, match="weights differ"):
        dyndepth.DynamicEncoder(other.eval(), exits("bert", "never"))
    training = dyndepth.DynamicEncoder(bert, exits("bert", "never"))
    bert.train()
    with pytest.raises(ArgumentError, match="eval mode"):
        training(**inputs("bert"))
    bert.eval()
    fixed = dyndepth.DynamicEncoder(bert, exits("bert", "fixed_depth"))
    with pytest.raises(ArgumentError, match="depth must be int64"):
        fixed(**inputs("bert"), depth=torch.tensor([1]))
    with pytest.raises(ArgumentError, match=r"among \[-1, 1, 2, 3, 4, 5\].*got \[77\]"):
        fixed(**inputs("bert"), depth=torch.full((8,), 77))
    with pytest.raises(ArgumentError, match=r"among \[-1, 5\]"):  # nobody would look at it
        training(**inputs("bert"), depth=torch.full((8,), 2))


def test_bad_exits() -> None:
    facts = facts_of(model("bert"))
    head = LinearHead(WIDTH, CLASSES)
    with pytest.raises(ExitsError, match="below the model's 5 layers"):
        SampleExits([SampleExit(5, head, Never())], facts)
    with pytest.raises(ExitsError, match="at most one exit"):
        SampleExits([SampleExit(2, head, Never()), SampleExit(2, head, Never())], facts)
    with pytest.raises(ExitsError, match="answer 3 classes"):
        SampleExits([SampleExit(2, LinearHead(WIDTH, 7), Never())], facts)
    with pytest.raises(ExitsError, match="must read 24"):
        SampleExits([SampleExit(2, LinearHead(8, CLASSES), Never())], facts)
    with pytest.raises(ExitsError, match="reads answers per sample"):
        SampleExit(2, CtcHead(WIDTH, CLASSES), Patience())
    with pytest.raises(ExitsError, match="at least 1"):
        SampleExit(0, head, Never())
    with pytest.raises(ExitsError, match="NaN"):
        SampleExit(1, head, TopProbability(), math.nan)
    with pytest.raises(ExitsError, match="wanted 1 numbers"):
        SampleExits([SampleExit(2, head, TopProbability())], facts).with_thresholds([1, 2])


def _view(found: Any, answers: torch.Tensor, carried: dict[str, torch.Tensor], ids: list[int] | None = None) -> SampleView:
    rows = len(answers)
    return SampleView(
        hidden=torch.zeros(rows, 2),
        seq=torch.tensor(ids or list(range(rows))),
        step=torch.zeros(rows, dtype=torch.int32),
        previous=None,
        stats=lambda: stats_of_logits(answers),
        depth=None,
        leave=3,
        layers=LAYERS,
        carried=carried,
        answers=lambda: answers,
        reduce=lambda values: values,
        lengths=torch.ones(rows, dtype=torch.int64),
        classes=answers.shape[1],
    )


def test_patience_starts_again() -> None:
    """An answer that moves sets the count back to nothing, however long it had stood still."""
    criterion, carried = RegressionPatience(tolerance=0.5), {}
    answers = torch.tensor([[0.0, 0.0], [0.1, 0.9], [0.2, 1.0], [0.9, 1.1], [1.0, 1.2]])
    said = [criterion.score(_view(criterion, answer[:, None], carried)).tolist() for answer in answers]
    assert said == [[0, 0], [1, 0], [2, 1], [0, 2], [1, 3]]


def test_draws_to_the_last_bit() -> None:
    ids = [0, 1, 2, 1000003, 2**40]
    for boundary, seed in ((1, 0), (3, 17), (30, 2**33)):
        assert draw(torch.tensor(ids), boundary, seed).tolist() == [uniform(i, boundary, seed) for i in ids]


def test_gate_features() -> None:
    """[max p, H(p), margin, H(p^2 / sum p^2)], by hand for p = (1/2, 1/4, 1/4): p^2 / sum p^2 = (2/3, 1/6, 1/6)."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    want = [0.5, 1.5 * math.log(2), 0.25, -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 6)]
    torch.testing.assert_close(gate_features(_view(None, logits, {}))[0], torch.tensor(want))
