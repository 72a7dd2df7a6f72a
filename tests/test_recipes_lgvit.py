"""LGViT: heads and losses against plain PyTorch, stage 2 leaves the backbone alone, and the four rules in a batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dyndepth.encoders import (
    DynamicEncoder,
    GlobalAggregationHead,
    LocalPerceptionHead,
    PatientConfidence,
    SampleExits,
    Samples,
)
from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.recipes import lgvit

transformers = pytest.importorskip("transformers")

CLASSES, WIDTH, GRID = 5, 16, (3, 4)


def vit(kind: str = "ViT", **changes: Any) -> Any:
    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "hidden_size": WIDTH, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 24, "num_channels": 2,
        "image_size": (6, 8), "patch_size": 2, "num_labels": CLASSES, "initializer_range": 0.3, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**settings | changes)
    return getattr(transformers, f"{kind}ForImageClassification")(config).eval()


def images(n: int) -> Tensor:
    return torch.randn(n, 2, 6, 8, generator=torch.Generator().manual_seed(n))


def randomised(exits: SampleExits) -> SampleExits:
    """Weights and running statistics as training leaves them: none is 0 or 1."""
    generator = torch.Generator().manual_seed(7)
    for value in [*exits.parameters(), *exits.buffers()]:
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator) if bool((value >= 0).all()) else None
            value.data += 0.2 * torch.randn(value.shape, generator=generator) if noise is None else noise
    return exits


def epochs(labels_of: Any = None) -> Any:
    x, labels = images(12), torch.arange(12) % CLASSES

    def batches(number: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for part in torch.arange(12).split(6):
            yield {"pixel_values": x[part]}, labels[part]

    return batches


def samples(n: int, specials: int, packed: bool = False) -> Samples:
    tokens = specials + GRID[0] * GRID[1]
    hidden = torch.randn(n, tokens, WIDTH, generator=torch.Generator().manual_seed(11))
    return Samples(hidden.flatten(0, 1) if packed else hidden, torch.full((n,), tokens), torch.arange(n))


def close(mine: Tensor, wanted: Tensor) -> None:
    assert mine.shape == wanted.shape
    assert float((mine - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("specials", [0, 1, 2])
@pytest.mark.parametrize("depthwise", [True, False])
def test_local_perception_written_out(specials: int, depthwise: bool) -> None:
    """A batch norm in eval mode, a depth-wise convolution as a sum over neighbours, a 1 x 1 convolution as a product."""
    head = LocalPerceptionHead(WIDTH, CLASSES, grid=GRID, specials=specials, depthwise=depthwise).eval()
    for part in head.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            torch.nn.init.uniform_(part.weight, 0.5, 2)
            torch.nn.init.uniform_(part.bias, -1, 1)
    given = samples(3, specials)
    image = given.hidden[:, specials:].reshape(3, *GRID, WIDTH)

    def normed(x: Tensor, norm: Any) -> Tensor:
        return (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias

    def pointwise(x: Tensor, convolution: Any) -> Tensor:
        return x @ convolution.weight[:, :, 0, 0].T + convolution.bias

    steps: list[Any] = list(head.body)
    y = normed(F.gelu(pointwise(image, steps[0])), steps[2])
    if depthwise:
        wide = F.pad(y, (0, 0, 1, 1, 1, 1))
        around = sum(
            wide[:, dy : dy + GRID[0], dx : dx + GRID[1]] * steps[3].weight[:, 0, dy, dx] for dy in range(3) for dx in range(3)
        )
        y = normed(F.gelu(around + steps[3].bias), steps[5])
    y = image + normed(pointwise(y, steps[-2]), steps[-1])
    check_answers(head, given, y.mean((1, 2)), specials)


@pytest.mark.parametrize("specials", [0, 1, 2])
@pytest.mark.parametrize(("stride", "left"), [(1, 12), (2, 4), (3, 2)])
def test_global_aggregation_written_out(specials: int, stride: int, left: int) -> None:
    head = GlobalAggregationHead(WIDTH, CLASSES, grid=GRID, specials=specials, heads=4, stride=stride).eval()
    given = samples(3, specials)
    image = given.hidden[:, specials:].reshape(3, *GRID, WIDTH)
    chosen = torch.stack([image[:, y, x] for y in range(0, GRID[0], stride) for x in range(0, GRID[1], stride)], 1)
    assert chosen.shape[1] == left
    query, key, value = (chosen @ part.T for part in head.qkv.weight.split(WIDTH))
    heads = []
    for at in range(4):
        own = slice(4 * at, 4 * at + 4)
        scores = query[..., own] @ key[..., own].transpose(1, 2) / 2
        heads.append(scores.softmax(-1) @ value[..., own])
    check_answers(head, given, head.project(torch.cat(heads, -1)).mean(1), specials)


def check_answers(head: Any, given: Samples, pooled: Tensor, specials: int) -> None:
    """linear(g + CLS); with two special tokens the mean of two classifiers; without any linear(g)."""
    weights, bias = head.out.weight, head.out.bias
    if specials == 2:
        first, second = weights.split(WIDTH, 1)
        one = (pooled + given.hidden[:, 0]) @ first.T + bias
        wanted = (one + (pooled + given.hidden[:, 1]) @ second.T + bias) / 2
    else:
        wanted = (pooled + given.hidden[:, 0] if specials else pooled) @ weights.T + bias
    close(head(given, None), wanted)
    packed = Samples(given.hidden.flatten(0, 1), given.lengths, given.ids)
    close(head(packed, None), wanted)


def test_where_heads_go() -> None:
    """Of twelve layers 4 to 11: two with and two without the depth-wise convolution, strides 2, 2, 3, 3."""
    found = lgvit.exits(vit(num_hidden_layers=12))
    assert [point.leave for point in found] == list(range(4, 12))
    heads: list[Any] = [point.head for point in found]
    assert [head.kind for head in heads] == ["local_perception"] * 4 + ["global_aggregation"] * 4
    assert [head.depthwise for head in heads[:4]] == [True, True, False, False]
    assert [head.stride for head in heads[4:]] == [2, 2, 3, 3]
    assert {point.threshold for point in found} == {0.865}
    deit: Any = next(iter(lgvit.exits(vit("DeiT"), (3,)))).head
    assert (deit.specials, deit.grid, deit.out.in_features) == (2, GRID, 2 * WIDTH)
    assert lgvit.default_exits(24) == (4, 7, 10, 13, 16, 19, 22, 23)


def test_stage_2_leaves_the_backbone_and_the_final_head_untouched() -> None:
    model = vit()
    before = copy.deepcopy(model.state_dict())
    exits = lgvit.exits(model, (2, 4, 6))
    heads = copy.deepcopy(exits.state_dict())
    trained = lgvit.train(model, exits, epochs(), first=0, second=2, rate=1e-2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(not torch.equal(value, heads[key]) for key, value in trained.state_dict().items())
    assert not trained.training
    assert not model.training


def test_stage_1_trains_everything() -> None:
    model = vit()
    before = copy.deepcopy(model.state_dict())
    trained = lgvit.train(model, lgvit.exits(model, (2, 4)), epochs(), first=1, second=0, rate=1e-2)
    assert all(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    DynamicEncoder(model, trained)  # the facts are those of the trained model


def test_alternating_steps_train_the_top_alone() -> None:
    """Of the epoch's two steps the second has no exit in its loss: heads move once."""
    model = vit()
    exits = lgvit.exits(model, (2,))
    norm: Any = exits.exits[0].head.body[2]  # type: ignore[union-attr,index]
    lgvit.train(model, exits, epochs(), first=1, second=0, rate=1e-2)
    both = norm.weight.clone()
    other = vit()
    again = lgvit.exits(other, (2,))
    lgvit.train(other, again, epochs(), first=1, second=0, rate=1e-2, alternating=True)
    assert not torch.equal(again.exits[0].head.body[2].weight, both)  # type: ignore[union-attr,index]


def test_losses_written_out() -> None:
    model = vit()
    exits = randomised(lgvit.exits(model, (2, 3, 5, 6, 7))).eval()
    encoder = DynamicEncoder(model, exits)
    x, labels = images(4), torch.tensor([1, 0, 4, 2])
    found = encoder.everywhere(pixel_values=x)
    each = [F.cross_entropy(logits, labels) for _, logits in found]
    close(lgvit.joint_loss(found, labels), sum(each[1:], each[0]) / 6)
    depths = [2, 3, 5, 6, 7, 8]
    weighted = sum((d * loss for d, loss in zip(depths, each, strict=True)), torch.zeros(())) / sum(depths)
    close(lgvit.joint_loss(found, labels, weighting="depth"), weighted)

    got = lgvit.distilled(encoder, {"pixel_values": x}, labels)
    close(got.cross_entropy, sum(each[1:-1], each[0]))
    final = found[-1][1]
    kd = torch.zeros(())
    for _, logits in found[:-1]:
        p, q = (final / 2).softmax(-1), (logits / 2).softmax(-1)
        kd += 4 * (p * (p / q).log()).sum() / (4 * CLASSES)
    close(got.distillation, kd)
    heads: list[Any] = [point.head for point in exits]
    tokens = [head.refined(head.parts(samples)[1]) for head, (samples, _) in zip(heads, found, strict=False)]
    top = model.vit(pixel_values=x, output_hidden_states=True).hidden_states[-1][:, 1:]
    last = top.reshape(4, *GRID, WIDTH)
    teachers = {0: top, 2: top, 3: last[:, ::2, ::2].flatten(1, 2), 4: last[:, ::3, ::3].flatten(1, 2)}
    hetero = torch.zeros(())
    for at, teacher in teachers.items():
        p, q = teacher.softmax(-1), tokens[at].softmax(-1)
        hetero += (p * (p / q).log()).sum(-1).mean()
    close(got.hetero, hetero)
    grams = [torch.einsum("ntc,ntd->ncd", tokens[at], tokens[at]) / tokens[at].shape[1] for at in (3, 4)]
    homo = ((tokens[0] - tokens[2]) ** 2).mean() + ((tokens[1] - tokens[2]) ** 2).mean() + ((grams[0] - grams[1]) ** 2).mean()
    close(got.homo, homo)
    close(got.total, 0.7 * got.cross_entropy + 0.3 * kd + 0.01 * hetero + 0.01 * homo)


@pytest.mark.parametrize("rule", list(lgvit.RULES))
def test_rules_in_a_batch_are_those_of_a_loop_over_images(rule: str) -> None:
    """The oracle asks one image at a time, exit after exit, with its own counters."""
    model = vit()
    leaves = (1, 2, 3, 4, 5, 6, 7)
    threshold = {"confidence": 0.97, "entropy": -0.1, "patience": 2.0, "patient_confidence": 0.8}[rule]
    exits = randomised(lgvit.exits(model, leaves, rule=rule, threshold=threshold))
    encoder = DynamicEncoder(model, exits)
    x = images(24)
    out = encoder(pixel_values=x)
    everywhere = [logits for _, logits in encoder.everywhere(pixel_values=x)]
    for image in range(24):
        wanted, count, sure, last = 8, 0, 0, None
        for leave, logits in zip(leaves, everywhere, strict=False):
            p = logits[image].softmax(-1)
            count = count + 1 if last is not None and int(p.argmax()) == last else 0
            last = int(p.argmax())
            sure = sure + 1 if float(p.max()) >= threshold else 0
            leaving = {
                "confidence": float(p.max()) >= threshold, "entropy": float(-(p * p.log()).sum()) <= -threshold,
                "patience": count >= threshold, "patient_confidence": sure >= 2,
            }[rule]  # fmt: skip
            if leaving:
                wanted = leave
                break
        assert int(out.exit_layers[image]) == wanted
        assert int(out.logits[image].argmax()) == int(everywhere[min(wanted - 1, 7)][image].argmax())
    assert len(set(out.exit_layers.tolist())) > 2


def test_files_bring_back_heads_and_rule(tmp_path: Path) -> None:
    model = vit()
    exits = randomised(lgvit.exits(model, (2, 3, 5, 6), rule="patient_confidence"))
    exits.save_pretrained(tmp_path)
    again = SampleExits.from_pretrained(tmp_path)
    assert [point.criterion for point in again] == [PatientConfidence(patience=2)] * 4
    x = images(5)
    wanted, got = DynamicEncoder(model, exits)(pixel_values=x), DynamicEncoder(model, again)(pixel_values=x)
    assert torch.equal(wanted.logits, got.logits)
    assert torch.equal(wanted.exit_layers, got.exit_layers)


def test_errors() -> None:
    model = vit()
    exits = lgvit.exits(model, (2,))
    exits.train()
    with pytest.raises(ArgumentError, match="the exits must be in eval mode"):
        DynamicEncoder(model, exits)(pixel_values=images(1))
    with pytest.raises(ArgumentError, match="rule must be one of confidence, entropy, patience, patient_confidence, got 'x'"):
        lgvit.exits(model, rule="x")
    with pytest.raises(ArgumentError, match="weighting must be mean or depth"):
        lgvit.joint_loss([], torch.zeros(0), weighting="x")
    with pytest.raises(ExitsError, match="heads must divide 16 and stride be at least 1, got 3 and 2"):
        GlobalAggregationHead(WIDTH, CLASSES, grid=GRID, heads=3)
    with pytest.raises(ExitsError, match="patience must be at least 1, got 0"):
        PatientConfidence(patience=0)
    head = LocalPerceptionHead(WIDTH, CLASSES, grid=(2, 2)).eval()
    with pytest.raises(ArgumentError, match=r"must have 1 \+ 2 x 2 tokens, got 13"):
        head(samples(1, 1), None)  # type: ignore[arg-type]
    bert = transformers.BertConfig(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, intermediate_size=16, vocab_size=20, num_labels=3
    )
    with pytest.raises(ArgumentError, match="must be a ViT, DeiT or Swin, got BertForSequenceClassification"):
        lgvit.exits(transformers.BertForSequenceClassification(bert).eval())
