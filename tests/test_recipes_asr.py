"""Early-exit ASR: who leaves by either criterion, the loss by enumeration of exits, rates of error by hand, real recordings."""

from __future__ import annotations

import copy
import math
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from test_encoders_ctc import by_dictionary
from tiny_speech import LAYERS, LENGTHS, SYMBOLS, alone, head_logits, inputs, model, states

import dyndepth
from dyndepth.encoders import CtcHead, SampleExits
from dyndepth.errors import ArgumentError
from dyndepth.recipes import asr
from dyndepth.training.encoder_trainer import EncoderConfig
from dyndepth.training.weighting import warm_cosine

#: Debian's pocketsphinx-testdata.
RECORDINGS = Path("/usr/share/pocketsphinx/test/data")
BEAM = 4


def opened(name: str = "conformer", criterion: str = "sentence_posterior", threshold: float = math.inf) -> SampleExits:
    found = asr.exits(model(name), every=1, norm=True, seed=7)
    for point in found:  # sure enough for posteriors between 0 and 1
        point.head.out.weight.data *= 8
    return asr.judged_by(found, criterion, threshold, beam=BEAM)


def posterior(logits: torch.Tensor) -> float:
    chances = [chance for _, chance in by_dictionary(logits, BEAM)]
    return chances[0] / sum(chances)


@pytest.mark.parametrize("name", ["wav2vec2", "conformer"])
def test_sentence_posterior_as_one_by_one(name: str) -> None:
    """A sample leaves at the first exit whose best text has the share asked for, by a search written with dictionaries."""
    batch = inputs()
    found = opened(name)
    told = []
    for row in range(len(LENGTHS)):
        hidden, top = states(model(name), alone(batch, row))
        told.append(([head_logits(point.head, hidden[point.leave - 1]) for point in found], top))
    scores = [[posterior(logits) for logits in said] for said, _ in told]
    ordered = sorted({score for row in scores for score in row})
    middle = len(ordered) // 2
    threshold = max(
        ((a + b) / 2 for a, b in zip(ordered[middle - 3 : middle + 3], ordered[middle - 2 : middle + 4], strict=True)),
        key=lambda t: min(abs(t - score) for score in ordered),
    )
    out = dyndepth.DynamicEncoder(model(name), opened(name, threshold=threshold))(**batch)
    for row, (said, top) in enumerate(told):
        at = next((n for n, score in enumerate(scores[row]) if score >= threshold), None)
        wanted = top if at is None else said[at]
        assert int(out.exit_layers[row]) == (LAYERS if at is None else at + 1)
        assert float((out.logits[row, : len(wanted)] - wanted).abs().max()) <= 3e-5 * float(wanted.abs().max())
    assert len(out.exit_layers.unique()) > 1


@pytest.mark.parametrize("criterion", asr.CRITERIA)
def test_files_keep_the_criterion(criterion: str, tmp_path: Path) -> None:
    found = opened(criterion=criterion, threshold=0.4 if criterion == "sentence_posterior" else -0.1)
    found.save_pretrained(tmp_path)
    again = SampleExits.from_pretrained(tmp_path)
    one, other = (dyndepth.DynamicEncoder(model("conformer"), e)(**inputs()) for e in (found, again))
    assert torch.equal(one.exit_layers, other.exit_layers)
    assert torch.equal(one.logits, other.logits)
    assert [point.criterion for point in again] == [point.criterion for point in found]


def test_loss_is_the_plain_sum() -> None:
    """All exits and the top weigh 1; samples are matched to their texts whatever their order."""
    batch, texts = inputs([95, 400, 233]), [[3], [1, 2, 2], [5, 6]]
    found = opened()
    total = 0.0
    for row, text in enumerate(texts):
        hidden, top = states(model("conformer"), alone(batch, row))
        for logits in [*(head_logits(point.head, hidden[point.leave - 1]) for point in found), top]:
            nll = torch.nn.functional.ctc_loss(
                torch.log_softmax(logits, -1)[:, None], torch.tensor([text]), torch.tensor([len(logits)]),
                torch.tensor([len(text)]), reduction="sum",
            )  # fmt: skip
            total += float(nll) / len(text) / 3
    everywhere = dyndepth.DynamicEncoder(model("conformer"), found).everywhere(**batch)
    assert float(asr.loss(everywhere, [torch.tensor(text) for text in texts])) == pytest.approx(total, rel=1e-4)
    with pytest.raises(ArgumentError, match="labels must hold 3 texts, got 1"):
        asr.loss(everywhere, [torch.tensor([1])])


def test_training_lowers_the_loss_at_every_exit() -> None:
    torch.manual_seed(0)
    network = type(model("wav2vec2"))(model("wav2vec2").config).eval()
    found = asr.exits(network, every=1)
    encoder = dyndepth.DynamicEncoder(network, found)
    batch, texts = inputs([300, 400, 233]), [torch.tensor([3, 4]), torch.tensor([1]), torch.tensor([5, 6, 5])]
    optimizer = torch.optim.Adam([*network.parameters(), *found.parameters()], lr=2e-3)

    def losses() -> list[float]:
        return [float(asr.loss([pair], texts)) for pair in encoder.everywhere(**batch)]

    before = losses()
    for _ in range(25):
        with torch.enable_grad():
            loss = asr.loss(encoder.everywhere(**batch), texts)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    assert all(now < 0.6 * then for now, then in zip(losses(), before, strict=True))


def test_training_by_the_recipe_is_adam_on_the_loss() -> None:
    """`asr.train` against the loop written out: AdamW on `asr.loss`, its rates, its order of utterances."""
    texts = [torch.tensor([3, 4]), torch.tensor([1]), torch.tensor([5, 6, 5])]
    padded = torch.full((3, 3), -100)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
    batch = inputs([300, 400, 233])
    networks = [copy.deepcopy(model("conformer")) for _ in range(2)]
    for module in (part for network in networks for part in network.requires_grad_(True).modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = EncoderConfig(updates=4, batch=3, lr=2e-3, base_lr=1e-3, clip=0.0, warmup=0.0)
    done = asr.train(networks[0], asr.exits(networks[0], every=1), batch, padded, config=config)
    other = asr.exits(networks[1], every=1)
    encoder = dyndepth.DynamicEncoder(networks[1], other)
    groups = [{"params": networks[1].parameters(), "lr": 1e-3}, {"params": other.parameters(), "lr": 2e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    networks[1].train()
    for update in range(4):
        for group, rate in zip(optimizer.param_groups, (1e-3, 2e-3), strict=True):
            group["lr"] = rate * warm_cosine(1.0, 0.0, update, 4)
        optimizer.zero_grad()
        with torch.enable_grad():
            asr.loss(encoder.everywhere(**batch), texts).backward()
        optimizer.step()
    for mine, wanted in zip(done.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=2e-5)
    with pytest.raises(ArgumentError, match=r"labels must be int64 \[n, longest\], got torch.int64 \[3\]"):
        asr.train(networks[0], done, batch, torch.tensor([1, 2, 3]))


def test_decoding() -> None:
    vocabulary = ["", " ", *"abcdefghijklmno"]
    out = dyndepth.DynamicEncoder(model("conformer"), opened())(**inputs())
    paths = [logits[: int(n)].argmax(-1).tolist() for logits, n in zip(out.logits, out.frames, strict=True)]
    wanted = ["".join(vocabulary[s] for i, s in enumerate(p) if s and (i == 0 or p[i - 1] != s)) for p in paths]
    assert asr.decode(out, vocabulary) == wanted
    best = [by_dictionary(logits[: int(n)], 3)[0][0] for logits, n in zip(out.logits, out.frames, strict=True)]
    assert asr.decode(out, vocabulary, beam=3) == ["".join(vocabulary[s] for s in text) for text in best]
    assert len(vocabulary) == SYMBOLS


def test_error_rates_by_hand() -> None:
    assert asr.edits("kitten", "sitting") == 3
    assert asr.edits("", "abc") == 3
    assert asr.edits("abc", "") == 3
    rates = asr.error_rates(["a cat sat", "dog"], ["the cat sat", "a dog"])
    assert rates == {"wer": 2 / 5, "cer": (3 + 2) / (11 + 5)}
    with pytest.raises(ArgumentError, match="equally many texts, got 1, 2"):
        asr.error_rates(["a"], ["a", "b"])


def test_noam_peaks_after_its_warm_up() -> None:
    rates = [asr.noam(step, 256, 40) for step in range(1, 200)]
    assert rates.index(max(rates)) == 39
    assert max(rates) == pytest.approx(256**-0.5 * 40**-0.5)


def test_what_it_refuses() -> None:
    with pytest.raises(ArgumentError, match="criterion must be one of frame_entropy, sentence_posterior, got 'entropy'"):
        asr.exits(model("conformer"), criterion="entropy")
    assert [point.leave for point in asr.exits(model("conformer"))] == [2]
    assert isinstance(asr.exits(model("conformer")).exits[0].head, CtcHead)


def recordings() -> list[torch.Tensor]:
    """Real speech, 16 kHz: two books read aloud and spoken digits and commands."""
    found = []
    for path in [*sorted(RECORDINGS.rglob("*.wav")), RECORDINGS / "goforward.raw", RECORDINGS / "numbers.raw"]:
        if path.suffix == ".wav":
            with wave.open(str(path)) as file:
                if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (16000, 1, 2):
                    continue
                data = file.readframes(file.getnframes())
        else:
            data = path.read_bytes()
        found.append(torch.from_numpy(np.frombuffer(data, dtype="<i2").astype(np.float32) / 32768)[:24000])
    return found


@pytest.mark.skipif(not RECORDINGS.exists(), reason="real recordings: apt-get install pocketsphinx-testdata")
@pytest.mark.parametrize("name", ["wav2vec2", "wavlm", "conformer"])
def test_real_recordings(name: str) -> None:
    """Lengths, shapes and independence of company on real audio, up to 1.5 seconds each."""
    sounds = recordings()[3:8]
    assert len(sounds) == 5
    lengths = torch.tensor([len(sound) - 777 * number for number, sound in enumerate(sounds)])
    values = torch.nn.utils.rnn.pad_sequence([s[:n] for s, n in zip(sounds, lengths.tolist(), strict=True)], batch_first=True)
    mask = (torch.arange(values.shape[1]) < lengths[:, None]).long()
    network = model(name, layers=2)
    encoder = dyndepth.DynamicEncoder(network, asr.exits(network, every=1))
    out = encoder(input_values=values, attention_mask=mask)
    assert torch.equal(out.frames, network._get_feat_extract_output_lengths(lengths))
    for row, length in enumerate(lengths.tolist()):
        wanted = network(values[row : row + 1, :length]).logits[0]
        got = out.logits[row, : len(wanted)]
        assert float((got - wanted).abs().max()) <= 3e-5 * float(wanted.abs().max())
        assert not bool(out.logits[row, len(wanted) :].any())
