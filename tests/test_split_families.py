"""Split computing of encoders that are not text: convolutional exit heads, widths that change with depth, answers per frame."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
import torch
import transformers as t

from dyndepth.encoders import CtcHead, DynamicEncoder, FrameEntropy, LinearHead, SampleExit, SampleExits, facts_of
from dyndepth.encoders.grid_heads import GlobalAggregationHead, LocalPerceptionHead
from dyndepth.exits import Patience, TopProbability
from dyndepth.exits.criteria import Criterion
from dyndepth.split import SplitEncoder, SplitServer, TcpLink

CLASSES = 3


def _vit() -> tuple[DynamicEncoder, dict[str, torch.Tensor]]:
    """LGViT's heads: they need all patches of the grid."""
    config = t.ViTConfig(
        hidden_size=24, num_hidden_layers=5, num_attention_heads=3, intermediate_size=40, image_size=16, patch_size=4,
        num_labels=CLASSES,
    )  # fmt: skip
    heads: list[Any] = [
        LocalPerceptionHead(24, CLASSES, grid=(4, 4)),
        LocalPerceptionHead(24, CLASSES, grid=(4, 4)),
        GlobalAggregationHead(24, CLASSES, grid=(4, 4), heads=2),
        GlobalAggregationHead(24, CLASSES, grid=(4, 4), heads=2),
    ]
    return _with_exits(t.ViTForImageClassification(config), heads, Patience(), 1.0), {"pixel_values": torch.randn(9, 3, 16, 16)}


def _swin() -> tuple[DynamicEncoder, dict[str, torch.Tensor]]:
    """Two stages of two blocks; the cut lies at the end of the first, whose width is half of the second's."""
    config = t.SwinConfig(
        image_size=16, patch_size=2, embed_dim=12, depths=[2, 3], num_heads=[2, 2], window_size=2, num_labels=CLASSES
    )
    heads = [LinearHead(width, CLASSES, pooling="mean") for width in (12, 12, 24, 24)]
    for head in heads:
        head.out.weight.data *= 3
    made = _with_exits(t.SwinForImageClassification(config), heads, TopProbability(), 1.0)
    return made, {"pixel_values": torch.randn(9, 3, 16, 16)}


def _speech() -> tuple[DynamicEncoder, dict[str, torch.Tensor]]:
    """Frames of different numbers, padded, with an answer for each."""
    config = t.Wav2Vec2Config(
        vocab_size=11, hidden_size=24, num_hidden_layers=5, num_attention_heads=3, intermediate_size=40, conv_dim=(16, 16),
        conv_stride=(5, 4), conv_kernel=(10, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, pad_token_id=0, feat_extract_norm="layer", do_stable_layer_norm=True,
    )  # fmt: skip
    heads = [CtcHead(24, 11) for _ in range(4)]
    made = _with_exits(t.Wav2Vec2ForCTC(config), heads, FrameEntropy(), -0.2)
    lengths = torch.tensor([400, 250, 400, 90, 320])
    mask = (torch.arange(400) < lengths[:, None]).long()
    return made, {"input_values": torch.randn(5, 400) * mask, "attention_mask": mask}


def _with_exits(model: Any, heads: list[Any], criterion: Criterion, threshold: float) -> DynamicEncoder:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn_like(parameter) * 0.3
    points = [SampleExit(at + 1, head, criterion, threshold) for at, head in enumerate(heads)]
    return DynamicEncoder(model.eval(), SampleExits(points, facts_of(model)).eval())


def _mixed(encoder: DynamicEncoder, inputs: dict[str, torch.Tensor], levels: tuple[float, float]) -> DynamicEncoder:
    """The threshold at which samples leave at the most different layers, some of them above the cut."""
    made = [DynamicEncoder(encoder.model, encoder.exits.with_thresholds(x)) for x in torch.linspace(*levels, 40).tolist()]
    depths = [one(**inputs).exit_layers for one in made]
    return max(zip(made, depths, strict=True), key=lambda pair: (bool((pair[1] > 2).any()), len(pair[1].unique())))[0]


@pytest.mark.parametrize("make", [_vit, _swin, _speech])
def test_split_answers_are_those_of_one_process(make: Any) -> None:
    torch.manual_seed(2)
    encoder, inputs = make()
    if make is not _vit:
        encoder = _mixed(encoder, inputs, (-0.23, -0.02) if make is _speech else (0.34, 0.95))
    whole = encoder(**inputs)
    here, there = socket.socketpair()
    server = threading.Thread(target=lambda: SplitServer(encoder, 2, TcpLink(there), timeout=20.0, idle=20.0).serve())
    server.start()
    with SplitEncoder(encoder, 2, TcpLink(here), wire="fp32", timeout=20.0) as split:
        out = split(**inputs)
    server.join(20)
    assert split.traffic.samples == int((whole.exit_layers > 2).sum()) > 0
    assert torch.equal(out.exit_layers, whole.exit_layers)
    assert torch.equal(out.logits, whole.logits)
    if make is _speech:
        assert torch.equal(out.frames, whole.frames)
