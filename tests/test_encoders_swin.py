"""Swin: blocks as layers, patches merged between stages by those that still run; transformers' own models are the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dyndepth.encoders import DynamicEncoder, LinearHead, ModelHead, SampleExit, SampleExits, SampleStream, facts_of
from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.exits import FixedDepth, Never, Saturation, TopProbability

transformers = pytest.importorskip("transformers")

DEPTHS = (2, 1, 4)


def swin(depths: tuple[int, ...] = DEPTHS, kind: str = "SwinForImageClassification", **changes: Any) -> Any:
    """An odd one: maps of 18, 9 and 5 patches, so that windows pad and shift, and merging meets an odd side."""
    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "image_size": 36, "patch_size": 2, "num_channels": 3, "embed_dim": 12, "depths": list(depths), "num_heads": [2, 3, 4],
        "window_size": 4, "num_labels": 5, "drop_path_rate": 0.0, "initializer_range": 0.2,
    }  # fmt: skip
    return getattr(transformers, kind)(transformers.SwinConfig(**settings | changes)).eval()


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 36, 36, generator=torch.Generator().manual_seed(n))


def exits_at(model: Any, leaves: tuple[int, ...] = (2, 3, 5), criterion: Any = None) -> SampleExits:
    facts = facts_of(model)
    torch.manual_seed(5)
    heads = [LinearHead(facts.width_at(leave), 5, pooling="mean") for leave in leaves]
    for head in heads:
        nn.init.normal_(head.out.weight)
    return SampleExits([SampleExit(a, h, criterion or FixedDepth()) for a, h in zip(leaves, heads, strict=True)], facts)


def close(mine: Tensor, wanted: Tensor, times: float = 4.0) -> None:
    """Both are fp32 sums in other orders."""
    bound = times * 1e-5 * float(wanted.abs().max())
    assert float((mine - wanted).abs().max()) <= bound


def test_full_depth_is_transformers_own() -> None:
    model = swin()
    x = images(5)
    out = DynamicEncoder(model, exits_at(model, criterion=Never()))(pixel_values=x)
    close(out.logits, model(pixel_values=x).logits)
    assert out.exit_layers.tolist() == [7] * 5
    assert out.work.layers == [5] * 7


def test_widths_by_boundary() -> None:
    facts = facts_of(swin())
    assert facts.widths == (12, 12, 24, 48, 48, 48, 48)
    assert facts.width == 48
    assert facts_of(swin((2, 2, 2), embed_dim=8, num_heads=[1, 2, 4])).widths == (8, 8, 16, 16, 32, 32)


@pytest.mark.parametrize("depth", [4, 5, 6])
def test_the_models_head_at_a_boundary_is_the_model_cut_off_there(depth: int) -> None:
    model = swin()
    small = swin((2, 1, depth - 3))
    small.load_state_dict({key: value for key, value in model.state_dict().items() if key in small.state_dict()})
    x = images(4)
    exits = SampleExits([SampleExit(depth, ModelHead(), FixedDepth())], facts_of(model))
    out = DynamicEncoder(model, exits)(pixel_values=x, depth=torch.full((4,), depth))
    close(out.logits, small(pixel_values=x).logits)
    assert out.work.layers == [4] * depth + [0] * (7 - depth)


def test_what_an_inner_exit_reads_is_the_blocks_own_output() -> None:
    """Before merging: hooks on transformers' blocks see what the heads of inner boundaries must average."""
    model = swin()
    x = images(3)
    seen: dict[int, Tensor] = {}
    blocks = [block for stage in model.swin.encoder.layers for block in stage.blocks]
    hooks = [
        block.register_forward_hook(lambda _, __, out, at=at: seen.update({at + 1: out[0]})) for at, block in enumerate(blocks)
    ]
    model(pixel_values=x)
    for hook in hooks:
        hook.remove()
    exits = exits_at(model)
    for point in exits:
        out = DynamicEncoder(model, exits)(pixel_values=x, depth=torch.full((3,), point.leave))
        head: Any = point.head
        close(out.logits, head.out(seen[point.leave].mean(1)))
    assert [seen[at].shape[1] for at in (2, 3, 5)] == [324, 81, 25]


def test_any_batch_gives_a_sample_the_same() -> None:
    model = swin()
    x = images(6)
    depth = torch.tensor([2, -1, 3, 5, 2, -1])
    encoder = DynamicEncoder(model, exits_at(model))
    out = encoder(pixel_values=x, depth=depth)
    assert out.exit_layers.tolist() == [2, 7, 3, 5, 2, 7]
    assert out.work.layers == [6, 6, 4, 3, 3, 2, 2]
    for at in range(6):
        alone = encoder(pixel_values=x[at : at + 1], depth=depth[at : at + 1])
        close(out.logits[at], alone.logits[0])
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    close(encoder(pixel_values=x[order], depth=depth[order]).logits, out.logits[order])


def test_streams_join_samples_of_one_stage() -> None:
    model = swin()
    x = images(9)
    exits = exits_at(model, criterion=TopProbability()).with_thresholds(0.7)
    encoder = DynamicEncoder(model, exits)
    whole = encoder(pixel_values=x)
    assert len(set(whole.exit_layers.tolist())) > 1
    answers = list(SampleStream(encoder, batch=4)([{"pixel_values": part} for part in x.split(2)]))
    assert [answer.exit_layer for answer in answers] == whole.exit_layers.tolist()
    close(torch.stack([answer.logits for answer in answers]), whole.logits)


def test_files_keep_widths(tmp_path: Path) -> None:
    model = swin()
    exits = exits_at(model)
    exits.save_pretrained(tmp_path)
    again = SampleExits.from_pretrained(tmp_path)
    assert again.model == exits.model
    x = images(2)
    depth = torch.tensor([2, 3])
    wanted = DynamicEncoder(model, exits)(pixel_values=x, depth=depth).logits
    assert torch.equal(DynamicEncoder(model, again)(pixel_values=x, depth=depth).logits, wanted)


def test_a_bare_swin_wants_a_final_head() -> None:
    model = swin(kind="SwinModel")
    final = LinearHead(48, 5, pooling="mean")
    exits = SampleExits([], facts_of(model, final), final=final)
    x = images(2)
    plain = model(pixel_values=x, output_hidden_states=True).hidden_states[-1]
    close(DynamicEncoder(model, exits)(pixel_values=x).logits, final.out(plain.mean(1)))


def test_errors() -> None:
    model = swin()
    facts = facts_of(model)
    with pytest.raises(ExitsError, match="exit at 3 must read 24 and answer 5 classes, got 48 and 5"):
        SampleExits([SampleExit(3, LinearHead(48, 5), FixedDepth())], facts)
    with pytest.raises(ExitsError, match="exit at 3 must have a head of its own: the model's reads 48, there are 24"):
        SampleExits([SampleExit(3, ModelHead(), FixedDepth())], facts)
    with pytest.raises(ExitsError, match="saturation compares the residuals after layers 2 and 3, whose widths differ"):
        exits_at(model, (2, 3), Saturation())
    encoder = DynamicEncoder(model, exits_at(model))
    with pytest.raises(ArgumentError, match=r"pixel_values must be \[n, 3, 36, 36\], got \[1, 3, 44, 36\]"):
        encoder(pixel_values=torch.zeros(1, 3, 44, 36))
    with pytest.raises(ArgumentError, match="SwinForImageClassification cannot run packed"):
        DynamicEncoder(model, exits_at(model), layout="packed")
