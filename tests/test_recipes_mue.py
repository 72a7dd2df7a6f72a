"""MuE: each stream and each token stops where it saturates, in any batch, as a loop over single samples has it."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import tiny_speech
import torch
import transformers as t
from torch import Tensor

from dyndepth.encoders import bind
from dyndepth.errors import ArgumentError, UnsupportedModelError
from dyndepth.recipes import mue

WIDTH, WORDS = 24, 40
LENGTHS = [7, 3, 5, 1, 7, 4]
IMAGE_LAYERS, TEXT_LAYERS, DECODER_LAYERS = 4, 5, 4
_TEXT = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "num_attention_heads": 3, "intermediate_size": 40, "max_position_embeddings": 30,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


@functools.cache
def _system(image_width: int = WIDTH) -> mue.MuE:
    torch.manual_seed(5)
    image = t.ViTModel(
        t.ViTConfig(
            hidden_size=image_width,
            num_hidden_layers=IMAGE_LAYERS,
            num_attention_heads=2,
            intermediate_size=40,
            image_size=12,
            patch_size=4,
        ),
        add_pooling_layer=False,
    )
    text = t.BertModel(t.BertConfig(**_TEXT, num_hidden_layers=TEXT_LAYERS), add_pooling_layer=False)
    config = t.BertConfig(
        **_TEXT, num_hidden_layers=DECODER_LAYERS, is_decoder=True, add_cross_attention=True, bos_token_id=1, eos_token_id=2
    )
    made = mue.MuE({"image": image, "text": text}, t.BertLMHeadModel(config)).eval()
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn_like(parameter) * (0.8 if "embeddings" in name else 0.3)
        elif "LayerNorm.weight" not in name and "layernorm" not in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    return made


def _inputs(rows: list[int] | None = None) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    pictures = torch.randn(len(LENGTHS), 3, 12, 12, generator=generator)
    ids = torch.randint(3, WORDS, (len(LENGTHS), 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()
    if rows is None:
        return {"image": {"pixel_values": pictures}, "text": {"input_ids": ids, "attention_mask": mask}}
    return {"image": {"pixel_values": pictures[rows]}, "text": {"input_ids": ids[rows], "attention_mask": mask[rows]}}


def _cosine(a: Tensor, b: Tensor) -> float:
    """Mean over tokens, in float64: [T, d] twice."""
    a, b = a.double(), b.double()
    return float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())


def _stream_alone(modules: Any, hidden: Tensor, threshold: float) -> tuple[Tensor, int, list[float]]:
    """One sample [1, T, d] through transformers' own layers, one after the other, until it saturates."""
    seen = []
    for at, module in enumerate(modules):
        before, hidden = hidden, module(hidden)
        hidden = hidden if isinstance(hidden, Tensor) else hidden[0]
        seen.append(_cosine(hidden[0], before[0]))
        if at + 1 < len(modules) and seen[-1] > threshold:
            return hidden, at + 1, seen
    return hidden, len(modules), seen


def _encoded_alone(
    system: mue.MuE, row: int, limits: dict[str, float]
) -> tuple[Tensor, dict[str, int], dict[str, list[float]]]:
    image, text = system.streams["image"], system.streams["text"]
    inputs, length = _inputs(), LENGTHS[row]
    pixels = image.embeddings(inputs["image"]["pixel_values"][row : row + 1])
    words = text.embeddings(inputs["text"]["input_ids"][row : row + 1, :length])
    a, image_layers, image_seen = _stream_alone(image.layers, pixels, limits["image"])
    b, text_layers, text_seen = _stream_alone(text.encoder.layer, words, limits["text"])
    a = image.layernorm(a)
    a = system.project["image"](a) if "image" in system.project else a
    return torch.cat([a, b], 1), {"image": image_layers, "text": text_layers}, {"image": image_seen, "text": text_seen}


def _decoded_alone(system: mue.MuE, read: Tensor, threshold: float, new: int) -> tuple[list[int], list[int]]:
    """One sequence; every layer is run anew over the inputs that it had at all positions, copied ones included."""
    layers, base = system.decoder.bert.encoder.layer, system.decoder.bert
    tokens, depths = [1], []
    inputs: list[list[Tensor]] = [[] for _ in layers]  # what each layer saw, [d] per position
    for at in range(new):
        hidden = base.embeddings(torch.tensor([[tokens[-1]]]), position_ids=torch.tensor([[at]]))[0, 0]
        depth = None
        for number, layer in enumerate(layers):
            inputs[number].append(hidden)
            if depth is not None:
                continue  # the residual is copied upward
            x = torch.stack(inputs[number])[None]
            causal = torch.full((at + 1, at + 1), -torch.inf).triu(1)[None, None]
            out = layer(x, causal, read)
            out = out if isinstance(out, Tensor) else out[0]
            cosine = _cosine(out[0, -1:], hidden[None])
            hidden = out[0, -1]
            if cosine > threshold and number + 1 < len(layers):
                depth = number + 1
        depths.append(len(layers) if depth is None else depth)
        tokens.append(int(system.decoder.cls(hidden[None, None])[0, 0].argmax()))
        if tokens[-1] == 2:
            break
    return tokens, depths


def _limits(system: mue.MuE) -> dict[str, float]:
    """Per stream the median of what is seen, so that samples stop at several layers."""
    seen: dict[str, list[float]] = {"image": [], "text": []}
    for row in range(len(LENGTHS)):
        for name, values in _encoded_alone(system, row, dict.fromkeys(seen, math.inf))[2].items():
            seen[name] += values[:-1]
    found = {}
    for name, values in seen.items():
        ordered = sorted(values)
        middle = len(ordered) * 2 // 3
        found[name] = (ordered[middle - 1] + ordered[middle]) / 2
    return found


@torch.no_grad()
@pytest.mark.parametrize("image_width", [WIDTH, 18])
@pytest.mark.parametrize("rows", [list(range(6)), [3, 0], [5, 4, 1]])
def test_streams_stop_where_a_loop_over_samples_stops(rows: list[int], image_width: int) -> None:
    system = _system(image_width)
    limits = _limits(system)
    joined = system.encode(_inputs(rows), limits)
    seen = set()
    for place, row in enumerate(rows):
        wanted, layers, _ = _encoded_alone(system, row, limits)
        for name, layer in layers.items():
            assert int(joined.exit_layers[name][place]) == layer
            seen.add((name, layer))
        length = 10 + LENGTHS[row]
        assert int(joined.lengths[place]) == length == wanted.shape[1]
        assert joined.mask[place].tolist() == [1] * length + [0] * (joined.hidden.shape[1] - length)
        torch.testing.assert_close(joined.hidden[place, :length], wanted[0], rtol=1e-4, atol=1e-5)
        assert not bool(joined.hidden[place, length:].any())
    if len(rows) == 6:
        assert len({layer for name, layer in seen if name == "image"}) > 1, seen
        assert len({layer for name, layer in seen if name == "text"}) > 2, seen
        mixed = (
            joined.exit_layers["image"].argsort(stable=True).tolist()
            != joined.exit_layers["text"].argsort(stable=True).tolist()
        )
        assert mixed, "the streams must stop in orders of their own"
    for name, depth in (("image", IMAGE_LAYERS), ("text", TEXT_LAYERS)):
        ran = [sum(int(one) > layer for one in joined.exit_layers[name]) for layer in range(depth)]
        assert joined.work[name].layers == ran


@torch.no_grad()
def test_work_is_what_hooks_count() -> None:
    """Tokens that reach each text layer are those of samples that have not stopped."""
    system = _system()
    limits = _limits(system)
    counts: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
        for layer in system.streams["text"].encoder.layer
    ]
    joined = system.encode(_inputs(), limits)
    for hook in hooks:
        hook.remove()
    ran = joined.exit_layers["text"].tolist()
    assert counts == [
        sum(length for length, layers in zip(LENGTHS, ran, strict=True) if layers > at) for at in range(len(counts))
    ]
    assert counts[-1] < counts[0]


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.2, 0.35, 0.45, math.inf])
def test_decoding_is_the_loop_over_sequences(threshold: float) -> None:
    system = _system()
    limits = _limits(system)
    out = system.generate(_inputs(), limits, decoder_threshold=threshold, max_new_tokens=8)
    depths = []
    for row in range(len(LENGTHS)):
        read, _, _ = _encoded_alone(system, row, limits)
        tokens, ran = _decoded_alone(system, read, threshold, 8)
        found = out.sequences[row].tolist()
        assert found[: len(tokens)] == tokens
        assert set(found[len(tokens) :]) <= {2}
        assert out.layers_run[row, : len(ran)].tolist() == ran
        assert not bool(out.layers_run[row, len(ran) :].any())
        depths += ran
    assert out.work.run == sum(depths)
    assert out.work.rows == len(depths)
    if threshold < 1:
        assert len(set(depths)) > 1, depths


@torch.no_grad()
def test_without_thresholds_it_is_transformers_own() -> None:
    system = _system()
    inputs = _inputs()
    joined = system.encode(inputs)
    for name in ("image", "text"):
        state = system.streams[name](**inputs[name]).last_hidden_state
        for row, length in enumerate(LENGTHS):
            span = slice(0, 10) if name == "image" else slice(10, 10 + length)
            kept = state[row] if name == "image" else state[row, :length]
            torch.testing.assert_close(joined.hidden[row, span], kept, rtol=1e-4, atol=1e-5)
    out = system.generate(joined, max_new_tokens=6, end=-1)
    wanted = torch.ones(6, 1, dtype=torch.int64)
    for _ in range(6):
        logits = system.decoder(
            input_ids=wanted, encoder_hidden_states=joined.hidden, encoder_attention_mask=joined.mask, use_cache=False
        ).logits
        wanted = torch.cat([wanted, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out.sequences, wanted)
    assert out.work.fraction == 1


@torch.no_grad()
def test_a_given_beginning_runs_every_layer() -> None:
    system = _system()
    start = torch.tensor([[1, 9, 30]]).repeat(6, 1)
    out = system.generate(_inputs(), decoder_threshold=0.0, start=start, max_new_tokens=3, end=-1)
    assert torch.equal(out.sequences[:, :3], start)
    full = system.generate(_inputs(), start=start, max_new_tokens=1, end=-1)
    assert full.layers_run.tolist() == [[DECODER_LAYERS]] * 6
    assert set(out.layers_run.flatten().tolist()) <= {1, 2}


@torch.enable_grad()
def test_the_loss_is_the_sum_over_layers_and_reaches_every_part() -> None:
    system = _system(18)
    tokens = torch.randint(3, WORDS, (6, 5), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    logits = system(_inputs(), tokens)
    assert len(logits) == DECODER_LAYERS
    chosen = labels != -100
    by_hand = sum(-torch.log_softmax(part[chosen].double(), -1)[torch.arange(24), labels[chosen]].mean() for part in logits)
    value = mue.loss(logits, labels)
    assert float(value) == pytest.approx(float(by_hand), rel=1e-5)
    value.backward()
    reached = {
        name for name, parameter in system.named_parameters() if parameter.grad is not None and bool(parameter.grad.any())
    }
    for part in ("streams.image.layers.0", "streams.text.encoder.layer.4", "decoder.bert.encoder.layer.0", "project.image"):
        assert any(name.startswith(part) for name in reached), part
    system.zero_grad(set_to_none=True)
    with pytest.raises(ArgumentError, match="labels must be int64"):
        mue.loss(logits, labels[:, 1:])


@torch.enable_grad()
def test_training_is_adam_on_the_loss() -> None:
    """`mue.train` against the loop written out: two epochs of two batches, gradients cut to norm 1, the rate of a cosine."""
    drawn = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, WORDS, (3, 6), generator=drawn) for _ in range(2)]
    texts[1][0, 4:] = -100
    parts = [(_inputs([0, 1, 2]), texts[0]), (_inputs([3, 4, 5]), texts[1])]
    trained, by_hand = (copy.deepcopy(_system(18)) for _ in range(2))
    assert mue.train(trained, lambda _: parts, count=2, rate=1e-3, decay=0.02) is trained
    assert not any(part.training for part in trained.modules())
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-3, weight_decay=0.02)
    for rate in (1e-3, 0.5e-3):  # half a cosine's way after one epoch of two
        optimizer.param_groups[0]["lr"] = rate
        for given, text in parts:
            logits = by_hand(given, text[:, :-1].clamp_min(0))
            flat = [torch.nn.functional.cross_entropy(part.flatten(0, 1), text[:, 1:].flatten()) for part in logits]
            optimizer.zero_grad()
            torch.stack(flat).sum().backward()
            torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
            optimizer.step()
    for mine, wanted in zip(trained.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)


def _with_stream(model: Any) -> mue.MuE:
    return mue.MuE({"one": model}, _system().decoder).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2_stable", "hubert_stable", "wavlm_stable", "conformer"])
def test_audio_is_read_as_the_encoder_gives_it(name: str) -> None:
    """The encoder's norm above its layers included; of a batch, each sample as if it were alone."""
    base = tiny_speech.model(name).base_model
    encoder = type(base)(base.config).eval()
    encoder.load_state_dict(base.state_dict())
    system, batch = _with_stream(encoder), tiny_speech.inputs([400, 233, 95])
    joined = system.encode({"one": batch})
    tokens = torch.randint(3, WORDS, (3, 4), generator=torch.Generator().manual_seed(1))
    logits = system({"one": batch}, tokens)[-1]
    for row in range(3):
        wanted = encoder(tiny_speech.alone(batch, row)).last_hidden_state
        length = int(joined.lengths[row])
        assert length == wanted.shape[1]
        torch.testing.assert_close(joined.hidden[row, :length], wanted[0], rtol=1e-4, atol=1e-4)
        alone = system.decoder(input_ids=tokens[row : row + 1], encoder_hidden_states=wanted, use_cache=False).logits
        torch.testing.assert_close(logits[row], alone[0], rtol=1e-3, atol=1e-3)
    assert len(set(joined.lengths.tolist())) == 3
    stopped = system.encode({"one": batch}, {"one": -1.0})
    assert stopped.exit_layers["one"].tolist() == [1, 1, 1]


@torch.no_grad()
def test_patches_that_merge_run_every_layer_or_are_refused() -> None:
    config = t.SwinConfig(
        image_size=16, patch_size=2, embed_dim=WIDTH // 2, depths=[2, 3], num_heads=[2, 2], window_size=2, initializer_range=0.3
    )
    model = t.SwinModel(config, add_pooling_layer=False).eval()
    system, pictures = _with_stream(model), {"one": {"pixel_values": torch.randn(3, 3, 16, 16)}}
    wanted = model(**pictures["one"]).last_hidden_state
    joined = system.encode(pictures)
    torch.testing.assert_close(joined.hidden, wanted, rtol=1e-4, atol=1e-5)
    assert joined.exit_layers["one"].tolist() == [5, 5, 5]
    tokens = torch.ones(3, 2, dtype=torch.int64)
    alike = system.decoder(input_ids=tokens, encoder_hidden_states=wanted, use_cache=False).logits
    torch.testing.assert_close(system(pictures, tokens)[-1], alike, rtol=1e-4, atol=1e-4)
    with pytest.raises(ArgumentError, match=r"must have one width at all layers, the width of one \(SwinModel\) changes"):
        system.encode(pictures, {"one": 0.9})


def test_layers_that_change_the_number_of_tokens_are_refused() -> None:
    class Halving(type(bind(_system().streams["image"]))):  # type: ignore[misc]
        def step(self, layer: int, samples: Any) -> Any:
            found = super().step(layer, samples)
            return replace(found, hidden=found.hidden[::2], lengths=found.lengths // 2) if layer == 1 else found

    family = Halving(_system().streams["image"])
    with pytest.raises(ArgumentError, match="must keep its tokens, layer 2 of ViTModel made 30 of 60"):
        mue.saturate(family, _inputs()["image"], 2.0)


def test_nan_is_said() -> None:
    system = copy.deepcopy(_system())
    system.decoder.cls.predictions.bias.data[3] = math.nan
    with pytest.raises(ArgumentError, match="logits of new token 1 hold NaN"):
        system.generate(_inputs(), max_new_tokens=3)


def test_what_mue_refuses() -> None:
    system, inputs = _system(), _inputs()
    with pytest.raises(ArgumentError, match=r"all streams must have equally many samples, got \{'image': 6, 'text': 2\}"):
        system.encode({**inputs, "text": _inputs([0, 1])["text"]})
    with pytest.raises(ArgumentError, match=r"all streams must have equally many samples"):
        system({**inputs, "text": _inputs([0, 1])["text"]}, torch.ones(6, 2, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="inputs must have streams image, text, text is missing"):
        system.encode({"image": inputs["image"]})
    with pytest.raises(ArgumentError, match="inputs must be of streams image, text, got sound"):
        system.encode({**inputs, "sound": {}})
    with pytest.raises(ArgumentError, match="thresholds must be of streams image, text, got tekst"):
        system.encode(inputs, {"tekst": 0.5})
    with pytest.raises(ArgumentError, match="thresholds must be numbers"):
        system.encode(inputs, {"text": math.nan})
    with pytest.raises(ArgumentError, match="wanted at least one sample, got an empty batch"):
        system.encode({**inputs, "image": {"pixel_values": torch.zeros(0, 3, 12, 12)}})
    with pytest.raises(ArgumentError, match="every sample must have at least one token"):
        system.encode({**inputs, "text": {**inputs["text"], "attention_mask": torch.zeros(6, 7, dtype=torch.int64)}})
    with pytest.raises(ArgumentError, match="decoder_threshold must be a number"):
        system.generate(inputs, decoder_threshold=math.nan)
    with pytest.raises(ArgumentError, match="wanted 1 to 30 tokens in all, got 1 and 30 new ones"):
        system.generate(inputs, max_new_tokens=30)
    with pytest.raises(ArgumentError, match="start must have 6 rows, one per sample, got 2"):
        system.generate(inputs, start=torch.ones(2, 1, dtype=torch.int64))
    with pytest.raises(UnsupportedModelError, match="decoder must be a BertLMHeadModel"):
        mue.MuE({"text": system.streams["text"]}, system.streams["text"])
    with pytest.raises(ArgumentError, match="at least one stream"):
        mue.MuE({}, system.decoder)
    system.streams["text"].train()
    with pytest.raises(ArgumentError, match="must be in eval mode"):
        system.encode(inputs)
    system.streams["text"].eval()
