"""Speech encoders: every sample's answer is transformers' own for the sample alone, whatever stands beside or behind it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers as t
from tiny_speech import (
    CLASSES,
    EXITS,
    KINDS,
    LAYERS,
    LENGTHS,
    MODELS,
    SYMBOLS,
    WIDTH,
    alone,
    exits,
    frame_entropy,
    head_logits,
    inputs,
    model,
    shake,
    states,
)  # fmt: skip

import dyndepth
from dyndepth.encoders import (
    CtcHead,
    FrameEntropy,
    LinearHead,
    ModelHead,
    SampleExit,
    SampleExits,
    SampleStream,
    facts_of,
)
from dyndepth.errors import ArgumentError, ExitsError, UnsupportedModelError
from dyndepth.exits import Always

LAYOUTS = ("packed", "padded")
#: fp32 of four layers and a classifier whose sums cancel; relative to the largest logit.
BOUND = 2e-5


def near(found: torch.Tensor, wanted: torch.Tensor, bound: float = BOUND) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= bound * float(wanted.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_nobody_leaves(name: str, kind: str, layout: str) -> None:
    made, batch = model(name, kind), inputs()
    out = dyndepth.DynamicEncoder(made, SampleExits([], facts_of(made)), layout=layout)(**batch)
    for row in range(len(LENGTHS)):
        _, wanted = states(made, alone(batch, row))
        if kind == "ForCTC":
            assert int(out.frames[row]) == len(wanted)
            assert not bool(out.logits[row, len(wanted) :].any())
            near(out.logits[row, : len(wanted)], wanted)
        else:
            assert out.logits.shape == (len(LENGTHS), CLASSES)
            near(out.logits[row], wanted)


@pytest.mark.parametrize("name", ["wav2vec2", "conformer"])
def test_transformers_batches_leak(name: str) -> None:
    """Why answers are compared with samples alone: padded with zeros, transformers' own batch says something else."""
    batch = inputs(poison=0.0)
    with torch.no_grad():
        whole = model(name)(**batch).logits
    _, wanted = states(model(name), alone(batch, 2))
    assert float((whole[2, : len(wanted)] - wanted).abs().max()) > 1e-2 * float(wanted.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_model_head_is_the_truncated_model(name: str, layout: str) -> None:
    made, batch = model(name), inputs()
    found = SampleExits([SampleExit(2, ModelHead(), Always())], facts_of(made))
    out = dyndepth.DynamicEncoder(made, found, layout=layout)(**batch)
    config = type(made.config)(**made.config.to_dict() | {"num_hidden_layers": 2})
    cut = type(made)(config).eval()
    cut.load_state_dict(made.state_dict(), strict=False)
    for row in range(len(LENGTHS)):
        _, wanted = states(cut, alone(batch, row))
        near(out.logits[row, : len(wanted)], wanted)
    assert out.work.layers == [8, 8, 0, 0]


def _told(name: str, found: SampleExits, batch: dict[str, torch.Tensor], threshold: float) -> list[tuple[torch.Tensor, int]]:
    """(logits, boundary) of every sample alone: the first exit whose frame entropy is at most minus the threshold."""
    answers = []
    for row in range(len(batch["input_values"])):
        hidden, top = states(model(name), alone(batch, row))
        said = [(head_logits(point.head, hidden[point.leave - 1]), point.leave) for point in found]
        answers.append(next(((z, at) for z, at in said if frame_entropy(z) <= -threshold), (top, LAYERS)))
    return answers


def _middle(name: str, found: SampleExits, batch: dict[str, torch.Tensor]) -> float:
    """The threshold that spreads the samples over the most boundaries, in the widest gap of scores that does."""
    table = []
    for row in range(len(batch["input_values"])):
        hidden, _ = states(model(name), alone(batch, row))
        table.append([-frame_entropy(head_logits(point.head, hidden[point.leave - 1])) for point in found])

    def spread(threshold: float) -> int:
        return len({next((n for n, score in enumerate(said) if score >= threshold), -1) for said in table})

    ordered = sorted(score for said in table for score in said)
    gaps = [((a + b) / 2, b - a) for a, b in itertools.pairwise(ordered) if b - a > 1e-5]
    return max(gaps, key=lambda gap: (spread(gap[0]), gap[1]))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["wav2vec2", "wavlm_stable", "conformer"])
def test_frame_entropy_as_one_by_one(name: str, layout: str) -> None:
    """Padding is no part of the entropy, and a sample leaves where it would alone, in any company."""
    batch = inputs()
    threshold = _middle(name, exits(name), batch)
    found = exits(name, FrameEntropy(), threshold)
    answers = _told(name, found, batch, threshold)
    encoder = dyndepth.DynamicEncoder(model(name), found, layout=layout)
    assert len({at for _, at in answers}) > 1, "the threshold separates nobody"
    for rows in (range(8), [4], [6, 0], [7, 6, 5, 4, 3, 2, 1, 0]):
        out = encoder(**{key: value[list(rows)] for key, value in batch.items()})
        for place, row in enumerate(rows):
            wanted, at = answers[row]
            assert int(out.exit_layers[place]) == at
            near(out.logits[place, : len(wanted)], wanted)
    whole = dyndepth.DynamicEncoder(model(name), found, layout=layout, compact=False)(**batch)
    assert whole.exit_layers.tolist() == [at for _, at in answers]


@pytest.mark.parametrize("name", ["wavlm", "conformer"])
def test_stream(name: str) -> None:
    batch = inputs()
    threshold = _middle(name, exits(name), batch)
    found = exits(name, FrameEntropy(), threshold)
    answers = _told(name, found, batch, threshold)
    stream = SampleStream(dyndepth.DynamicEncoder(model(name), found), batch=3)
    parts = [{key: value[at : at + 2] for key, value in batch.items()} for at in range(0, 8, 2)]
    for answer, (wanted, at) in zip(stream(parts), answers, strict=True):
        assert answer.exit_layer == at
        near(answer.logits, wanted)


def test_bare_model_with_a_final_head() -> None:
    made = t.WavLMModel(model("wavlm").config).eval()
    shake(made)
    for head in (CtcHead(WIDTH, SYMBOLS), LinearHead(WIDTH, CLASSES, pooling="mean")):
        out = dyndepth.DynamicEncoder(made, SampleExits([], facts_of(made, head), final=head))(**inputs())
        for row in range(len(LENGTHS)):
            with torch.no_grad():
                hidden = made(alone(inputs(), row)).last_hidden_state[0]
                wanted = head.out(hidden if head.per_token else hidden.mean(0))
            near(out.logits[row, : len(wanted)] if head.per_token else out.logits[row], wanted)
    with pytest.raises(ExitsError, match="has no head of its own"):
        facts_of(made)


def test_without_a_mask_all_values_are_audio() -> None:
    made, values = model("wav2vec2"), inputs(poison=0.0)["input_values"]
    out = dyndepth.DynamicEncoder(made, exits("wav2vec2"))(input_values=values)
    with torch.no_grad():
        wanted = made(values).logits
    near(out.logits, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(name: str) -> None:
    """Against fp32: at most three times what transformers loses for the samples alone, which rounds in other places."""
    made, batch = model(name), inputs()
    half = type(made)(made.config).eval()
    half.load_state_dict(made.state_dict())
    half = half.bfloat16()
    out = dyndepth.DynamicEncoder(half, SampleExits([], facts_of(half)))(**batch)
    ours, theirs, scale = 0.0, 0.0, 0.0
    for row in range(len(LENGTHS)):
        _, truth = states(made, alone(batch, row))
        _, reference = states(half, alone(batch, row).bfloat16())
        ours += float((out.logits[row, : len(truth)].float() - truth).square().sum())
        theirs += float((reference.float() - truth).square().sum())
        scale += float(truth.square().sum())
    assert out.logits.dtype == torch.bfloat16
    assert ours <= 9 * theirs
    assert theirs < 0.1 * scale


@pytest.mark.parametrize("name", ["wav2vec2", "wavlm", "conformer"])
def test_everywhere_trains_the_front_end(name: str) -> None:
    """Gradients of a batch are the sum of those of its samples alone, down to the first convolution."""
    batch = inputs([400, 90, 233])
    made = model(name)
    first = made.base_model.feature_extractor.conv_layers[0].conv.weight

    def gradient(part: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.enable_grad():
            found = dyndepth.DynamicEncoder(made, exits(name)).everywhere(**part)
            total = torch.stack([logits.square().sum() for _, logits in found]).sum()
        return torch.autograd.grad(total, first)[0]

    whole = gradient(batch)
    single = [gradient({"input_values": alone(batch, row)}) for row in range(3)]
    near(whole, torch.stack(single).sum(0), 2e-5)


def test_batch_norm_learns_from_frames_only() -> None:
    """In training the Conformer's statistics are those of the frames without padding."""
    found = []
    for extra in (0, 900):
        made = type(model("conformer"))(model("conformer").config).train()
        made.load_state_dict(model("conformer").state_dict())
        for module in made.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        batch = inputs()
        batch = {key: torch.nn.functional.pad(value, (0, extra)) for key, value in batch.items()}
        dyndepth.DynamicEncoder(made, exits("conformer")).everywhere(**batch)
        norm = made.base_model.encoder.layers[0].conv_module.batch_norm
        found.append(torch.cat([norm.running_mean, norm.running_var]))
    near(found[0], found[1])


def test_bad_input() -> None:
    encoder = dyndepth.DynamicEncoder(model("wav2vec2"), exits("wav2vec2"))
    batch = inputs()
    values, mask = batch["input_values"], batch["attention_mask"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"input_values": values[0]}, r"input_values must be \[n, samples\]"),
        ({"input_values": values, "attention_mask": mask[:, :5]}, "attention_mask must be"),
        ({"input_values": values, "attention_mask": mask.flip(1)}, "must be ones and then zeros"),
        ({"input_values": values, "attention_mask": torch.zeros_like(mask)}, "sample 0 has 0 values"),
        ({"input_values": values[:, :39]}, "sample 0 has 39 values"),
        ({"input_values": values[:0]}, "wanted at least one sample"),
        ({"input_ids": mask}, "takes input_values, attention_mask"),
    ]
    for given, said in cases:
        with pytest.raises(ArgumentError, match=said):
            encoder(**given)
    with pytest.raises(ArgumentError, match="hold NaN"):
        encoder(input_values=torch.full_like(values, torch.nan))
    for option in ({"add_adapter": True}, {"use_weighted_layer_sum": True}):
        config = type(model("wav2vec2").config)(**model("wav2vec2").config.to_dict() | option)
        kind = "ForCTC" if "add_adapter" in option else "ForSequenceClassification"
        with pytest.raises(UnsupportedModelError, match=next(iter(option))):
            facts_of(getattr(t, f"Wav2Vec2{kind}")(config))
    with pytest.raises(UnsupportedModelError, match="Wav2Vec2ForXVector"):
        facts_of(t.Wav2Vec2ForXVector(model("wav2vec2").config))
    assert EXITS[-1] < LAYERS
