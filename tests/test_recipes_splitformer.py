"""Splitformer: a batch of samples of odd and even lengths says what a plain loop over one sample's frames says."""

from __future__ import annotations

import copy
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from tiny_speech import LENGTHS, SYMBOLS, alone, frame_entropy, head_logits, inputs, model, shake

import dyndepth
from dyndepth.encoders import FrameEntropy, SampleExit, SampleStream
from dyndepth.errors import ArgumentError
from dyndepth.recipes import asr, splitformer
from dyndepth.split import SplitEncoder, SplitServer, TcpLink


def made(layers: int = 6, block: int = 2) -> Any:
    torch.manual_seed(4)
    config = model("conformer").config.to_dict() | {"num_hidden_layers": layers, "block_layers": block}
    config.pop("model_type")
    found = splitformer.SplitformerForCTC(splitformer.SplitformerConfig(**config)).eval()
    shake(found)
    return found


def plain(network: Any, values: torch.Tensor) -> list[torch.Tensor]:
    """Residuals [T, d] after every block of one sample, and its logits: transformers' layers, and the words of the paper."""
    base = network.wav2vec2_conformer
    places = base.encoder.embed_positions

    def layer(module: Any, h: torch.Tensor) -> torch.Tensor:
        out = module(h, attention_mask=None, relative_position_embeddings=places(h))
        return out if isinstance(out, torch.Tensor) else out[0]

    h = base.feature_projection(base.feature_extractor(values).transpose(1, 2))[0]
    size = network.config.block_layers
    blocks = [base.encoder.layers[at : at + size] for at in range(0, len(base.encoder.layers), size)]
    found = []
    for number, block in enumerate(blocks):
        start = h
        for module in block:
            h = layer(module, h)
        if number in (0, len(blocks) - 1):
            even = start if start.shape[1] % 2 == 0 else torch.cat([start, torch.zeros_like(start[:, :1])], 1)
            half = layer(network.parallel[0 if number == 0 else -1], even[:, ::2])
            twice = torch.stack([half, half], 2).flatten(1, 2)
            h = h + twice[:, : start.shape[1]]
        found.append(h[0])
    return [*found, network.lm_head(base.encoder.layer_norm(h))[0]]


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


def frames() -> list[int]:
    return model("conformer")._get_feat_extract_output_lengths(torch.tensor(LENGTHS)).tolist()


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(("layers", "block"), [(6, 2), (4, 1), (2, 2), (6, 3)])
def test_as_one_by_one(layers: int, block: int, layout: str) -> None:
    """Who leaves where by frame entropy, and every logit, for odd and even lengths side by side."""
    network, batch = made(layers, block), inputs()
    assert {length % 2 for length in frames()} == {0, 1}
    assert len(network.parallel) == (1 if layers == block else 2)
    found = splitformer.exits(network, seed=3)
    assert [point.leave for point in found] == list(range(block, layers, block))
    told = [plain(network, alone(batch, row)) for row in range(len(LENGTHS))]
    threshold = -float("inf")
    if len(found):
        first = [frame_entropy(head_logits(found.exits[0].head, said[0])) for said in told]
        low, high = sorted(first)[3:5]
        threshold = -(low + high) / 2
    opened = asr.judged_by(found, "frame_entropy", threshold)
    encoder = dyndepth.DynamicEncoder(network, opened, layout=layout)
    out = encoder(**batch)
    for row, said in enumerate(told):
        seen = [(head_logits(point.head, h), point.leave) for point, h in zip(found, said, strict=False)]
        wanted, at = next(((z, at) for z, at in seen if -frame_entropy(z) >= threshold), (said[-1], layers))
        assert int(out.exit_layers[row]) == at
        near(out.logits[row, : len(wanted)], wanted)
    if len(found):
        assert len(out.exit_layers.unique()) > 1
        answers = SampleStream(encoder, batch=3)([{k: v[at : at + 2] for k, v in batch.items()} for at in range(0, 8, 2)])
        assert [answer.exit_layer for answer in answers] == out.exit_layers.tolist()


def test_exits_inside_a_block() -> None:
    """Compaction takes the waiting half-rate frames along."""
    network, batch = made(), inputs()
    head = splitformer.exits(network).exits[0].head
    found = splitformer.exits(network)
    inside = type(found)([SampleExit(1, head, FrameEntropy(), -0.162), SampleExit(5, head, FrameEntropy(), -0.1)], found.model)
    out = dyndepth.DynamicEncoder(network, inside)(**batch)
    stay = [row for row in range(8) if int(out.exit_layers[row]) == 6]
    assert 0 < len(stay) < 8
    for row in stay:
        wanted = plain(network, alone(batch, row))[-1]
        near(out.logits[row, : len(wanted)], wanted)


def test_forward_is_full_depth() -> None:
    network, batch = made(), inputs()
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    two = {name: value[:2] for name, value in batch.items()}
    out = network(**two, labels=labels)
    for row in range(2):
        wanted = plain(network, alone(batch, row))[-1]
        near(out.logits[row, : len(wanted)], wanted)
    by_torch = [
        torch.nn.functional.ctc_loss(
            torch.log_softmax(plain(network, alone(batch, row))[-1], -1)[:, None], text[None],
            torch.tensor([frames()[row]]), torch.tensor([len(text)]), reduction="sum",
        )
        for row, text in enumerate([torch.tensor([1, 2]), torch.tensor([3])])
    ]  # fmt: skip
    assert float(out.loss) == pytest.approx(float(sum(by_torch)), rel=1e-4)


def test_files(tmp_path: Path) -> None:
    network, batch = made(), inputs()
    network.save_pretrained(tmp_path)
    again = splitformer.SplitformerForCTC.from_pretrained(tmp_path).eval()
    assert again.config.block_layers == 2
    assert torch.equal(again(**batch).logits, network(**batch).logits)


def test_starts_as_the_conformer() -> None:
    conformer = model("conformer")
    network = splitformer.of(conformer, block_layers=2)
    batch = inputs()
    out = network(**batch)
    for row in range(8):
        wanted = conformer(alone(batch, row)).logits[0]
        near(out.logits[row, : len(wanted)], wanted)
    with torch.enable_grad():
        everywhere = dyndepth.DynamicEncoder(network, splitformer.exits(network)).everywhere(**batch)
        loss = asr.loss(everywhere, [torch.tensor([1])] * 8)
        loss.backward()
    for module in network.parallel:
        assert float(module.final_layer_norm.weight.grad.abs().max()) > 0, "training moves the half-rate layers"


def test_shares_nothing_with_the_conformer() -> None:
    conformer = copy.deepcopy(model("conformer"))
    before = {name: value.clone() for name, value in conformer.state_dict().items()}
    network = splitformer.of(conformer, block_layers=2)
    for value in network.parameters():
        value.data.add_(1)
    network.half()
    for name, value in conformer.state_dict().items():
        assert value.dtype == before[name].dtype, name
        assert torch.equal(value, before[name]), name
    inside = {id(part) for part in conformer.modules()}
    assert not any(id(part) in inside for part in network.modules())


@pytest.mark.parametrize(("cut", "left"), [(1, True), (2, False), (3, False), (5, True)])
def test_split_between_two_processes_takes_the_waiting_frames_along(cut: int, left: bool) -> None:
    """Within a block that has a half-rate layer, its frames travel; elsewhere nothing but residuals is taken."""
    network, batch = made(), inputs(poison=0.0)
    encoder = dyndepth.DynamicEncoder(network, splitformer.exits(network))
    samples, _ = encoder.advance(encoder.begin(**batch), cut)
    said = {
        name: (kind, tuple(value.shape[at + 1] if extent is None else extent for at, extent in enumerate(shape)))
        for (name, (kind, shape)), value in zip(encoder.family.inputs_at(cut).items(), samples.inputs.values(), strict=True)
    }
    assert said == {name: (value.dtype, tuple(value.shape[1:])) for name, value in samples.inputs.items()}
    assert bool(said) == left
    here, there = socket.socketpair()
    server = threading.Thread(target=lambda: SplitServer(encoder, cut, TcpLink(there), timeout=20.0, idle=20.0).serve())
    server.start()
    with SplitEncoder(encoder, cut, TcpLink(here), wire="fp32", timeout=20.0) as split:
        out = split(**batch)
    server.join(20)
    assert torch.equal(out.logits, encoder(**batch).logits)


def test_what_it_refuses() -> None:
    with pytest.raises(ArgumentError, match="must divide the 6 layers, got 4"):
        made(6, 4)
    with pytest.raises(ArgumentError, match="got Wav2Vec2ForCTC"):
        splitformer.of(model("wav2vec2"))
    with pytest.raises(ArgumentError, match=r"ends of blocks of 2 layers, got \[3\]"):
        splitformer.exits(made(), leave=[2, 3])
    assert made().config.vocab_size == SYMBOLS
    assert issubclass(splitformer.SplitformerForCTC, t.Wav2Vec2ConformerForCTC)
