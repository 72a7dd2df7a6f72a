"""DeeBERT: the full model is plain fine-tuning's, whatever the off-ramps; entropy decides, sample by sample."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch

import dyndepth
from dyndepth.encoders import LinearHead, SampleExits
from dyndepth.errors import ArgumentError
from dyndepth.recipes import deebert
from dyndepth.training.encoder_losses import top_only
from dyndepth.training.encoder_trainer import EncoderConfig, train_encoder

FIRST = EncoderConfig(updates=60, lr=5e-3, base_lr=2e-3)


@functools.cache
def trained(head: bool = False) -> tuple[Any, SampleExits]:
    model, (inputs, labels) = tiny_text.bert(head=head), tiny_text.task(300)
    torch.manual_seed(0)
    exits = deebert.exits(model, None if head else tiny_text.CLASSES, entropy=0.5)
    second = EncoderConfig(updates=100, lr=1e-2)
    return model, deebert.train(model, exits, inputs, labels, first=FIRST, second=second)


@pytest.mark.parametrize("head", [False, True])
def test_the_second_stage_leaves_the_fine_tuned_model_alone(head: bool) -> None:
    """Bit for bit the model of the first stage, trained by the plain loss of its top."""
    model, exits = trained(head)
    plain, (inputs, labels) = tiny_text.bert(head=head), tiny_text.task(300)
    torch.manual_seed(0)
    own = deebert.exits(plain, None if head else tiny_text.CLASSES)
    top = torch.nn.ModuleList([] if own.final is None else [own.final])
    alone = train_encoder(plain, own, inputs, labels, top_only, config=FIRST, train_only=top)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    if exits.final is not None and alone.exits.final is not None:
        for mine, theirs in zip(exits.final.parameters(), alone.exits.final.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    for point, untouched in zip(exits, alone.exits, strict=True):
        assert not torch.equal(point.head.out.weight, untouched.head.out.weight)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("entropy", [0.0, 0.2, 0.6, 2.0])
def test_samples_leave_at_low_entropy(entropy: float) -> None:
    model, exits = trained()
    inputs, _ = tiny_text.task(40, 5)
    out = dyndepth.DynamicEncoder(model, exits.with_thresholds(-entropy))(**inputs)
    for row in range(40):
        states = tiny_text.states(model, tiny_text.alone(inputs, row))
        wanted, heads = 4, [*(point.head for point in exits), exits.final]
        for layer, head in enumerate(heads, 1):
            assert isinstance(head, LinearHead)
            assert head.dense is not None
            logits = head.out(torch.tanh(head.dense(states[layer - 1][0])))
            p = torch.softmax(logits.double(), -1)
            if -(p * p.log()).sum() <= entropy or layer == 4:
                wanted = layer
                break
        assert int(out.exit_layers[row]) == wanted
        torch.testing.assert_close(out.logits[row], logits, rtol=1e-4, atol=1e-4)
    if entropy == 2.0:  # above log 3: everyone
        assert set(out.exit_layers.tolist()) == {1}


def test_ramps_learn_and_save_layers(tmp_path: Path) -> None:
    model, exits = trained()
    inputs, labels = tiny_text.task(200, 9)
    full = dyndepth.DynamicEncoder(model, exits.closed())(**inputs)
    out = dyndepth.DynamicEncoder(model, exits)(**inputs)
    right = [float((each.logits.argmax(-1) == labels).float().mean()) for each in (full, out)]
    assert right[0] > 0.85
    assert right[1] > right[0] - 0.1
    assert out.work.fraction < 0.9
    exits.save_pretrained(tmp_path)
    assert torch.equal(dyndepth.DynamicEncoder(model, SampleExits.from_pretrained(tmp_path))(**inputs).logits, out.logits)


def test_errors() -> None:
    model = tiny_text.bert()
    exits = deebert.exits(model, 3)
    with pytest.raises(ArgumentError, match="entropy must be 0 or more, got -1"):
        deebert.exits(model, 3, entropy=-1)
    with pytest.raises(ArgumentError, match=r"second stage is on a frozen model, so base_lr must be 0, got 0\.1"):
        deebert.train(model, exits, *tiny_text.task(4), second=EncoderConfig(base_lr=0.1))
