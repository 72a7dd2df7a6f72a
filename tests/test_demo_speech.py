"""The speech demo: what is said and what is held out, the front end by hand, the shipped weights on voices they never heard."""

from __future__ import annotations

import io
import json
import math
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from dyndepth.demo.tasks import espeak, run_task, speech_model
from dyndepth.encoders import DynamicEncoder
from dyndepth.errors import ArgumentError
from dyndepth.recipes import asr

speaks = pytest.mark.skipif(not espeak.available(), reason="speech: apt-get install espeak-ng")


def test_nothing_is_both_learned_and_held_out() -> None:
    learned = [espeak.utterances(4000, seed) for seed in (0, 5)]
    held = espeak.utterances(2000, 2, held_out=True)
    assert learned[0] == espeak.utterances(4000, 0)
    assert learned[0] != learned[1]
    assert not {u.voice for u in learned[0]} & {u.voice for u in held}

    def pairs(chosen: list[espeak.Utterance]) -> set[tuple[str, ...]]:
        return {tuple(u.text.split()[:2]) for u in chosen if " " in u.text}

    assert not pairs(learned[0] + learned[1]) & pairs(held)
    assert len(espeak.WORDS) == len(set(espeak.WORDS))
    assert {len(u.text.split()) for u in held} == {1, 2, 3, 4}
    assert set("".join(espeak.WORDS)) <= set(speech_model.VOCABULARY)


def test_waves_are_read_at_another_rate() -> None:
    """A tone of 1 kHz at 22050 values a second is the same tone at 16000, where the header does not know the length."""
    tone = (np.sin(2 * math.pi * 1000 * np.arange(22050) / 22050) * 12000).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(22050)
        writer.writeframes(tone.tobytes())
    data = bytearray(file.getvalue())
    data[40:44] = (0x7FFFF000).to_bytes(4, "little")
    found = espeak.read_wave(bytes(data))
    assert len(found) == 16000
    wanted = np.sin(2 * math.pi * 1000 * np.arange(16000) / 16000) * 12000 / 32768
    assert float(np.abs(found - wanted)[200:-200].max()) < 2e-3


def test_noise_has_its_ratio() -> None:
    utterance = espeak.Utterance("a", "v", 150, 50, 10.0, 3)
    sound = np.sin(np.arange(40000) / 7).astype(np.float32)
    noise = espeak.noisy(sound, utterance) - sound
    assert 10 * math.log10(float(np.mean(sound**2) / np.mean(noise**2))) == pytest.approx(10.0, abs=0.1)
    assert np.array_equal(espeak.noisy(sound, utterance), espeak.noisy(sound, utterance))


def test_the_front_end_by_hand() -> None:
    """One frame of three windows: a direct Fourier sum, triangles on the mel scale, logarithms."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(800 + 600 * 2 + 13).astype(np.float32)
    found = speech_model.LogMel()(torch.from_numpy(values)[None])[0].numpy()
    model = speech_model.build(layers=1)
    assert found.shape == (120, int(model._get_feat_extract_output_lengths(torch.tensor(len(values)))))
    assert found.shape[1] == 3
    hertz = [k * 16000 / 512 for k in range(257)]
    low, high = (2595 * math.log10(1 + f / 700) for f in (60.0, 8000.0))
    edges = [700 * (10 ** ((low + (high - low) * i / 41) / 2595) - 1) for i in range(42)]
    for window in (0, 2):
        start = 1 * 600 + window * 200
        piece = values[start : start + 400] * (0.5 - 0.5 * np.cos(2 * math.pi * np.arange(400) / 400))
        power = [abs(np.sum(piece * np.exp(-2j * math.pi * k * np.arange(400) / 512))) ** 2 for k in range(257)]
        for band in (0, 7, 39):
            a, b, c = edges[band : band + 3]
            energy = sum(p * max(0.0, min((f - a) / (b - a), (c - f) / (c - b))) for p, f in zip(power, hertz, strict=True))
            assert float(found[window * 40 + band, 1]) == pytest.approx(math.log(energy + 1e-5), abs=2e-4)


def test_without_espeak_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(espeak.shutil, "which", lambda _name: None)
    with pytest.raises(ArgumentError, match="apt-get install espeak-ng"):
        run_task("speech", tmp_path)


@speaks
def test_unknown_voices_are_refused() -> None:
    """espeak-ng would speak in another voice without a word."""
    for voice, missing in (("no-such-voice", "no-such-voice"), ("en-us+zz", "zz")):
        with pytest.raises(ArgumentError, match=f"espeak-ng has no voice '{missing}'"):
            espeak.clean(espeak.Utterance("a", voice, 150, 50, 10.0, 3))


@speaks
def test_shipped_weights_write_what_new_voices_say() -> None:
    """Full depth and every exit; alone and in a batch."""
    model, exits = speech_model.load()
    chosen = espeak.utterances(24, 9, held_out=True)
    sounds = [espeak.noisy(espeak.clean(u), u) for u in chosen]
    encoder = DynamicEncoder(model, exits.closed())
    out = encoder(**speech_model.batch(sounds))
    texts = asr.decode(out, speech_model.VOCABULARY)
    assert asr.error_rates(texts, [u.text for u in chosen])["cer"] < 0.3
    for at in (0, 11):
        own = encoder(**speech_model.batch([sounds[at]]))
        assert asr.decode(own, speech_model.VOCABULARY) == [texts[at]]


@speaks
def test_the_demo_end_to_end(tmp_path: Path) -> None:
    from dyndepth.demo.tasks import speech

    found = speech.run(tmp_path, batches=(1, 8), repetitions=1, calibration=64, test=16)
    written = json.loads((tmp_path / "speech.json").read_text())
    assert (tmp_path / "speech.png").stat().st_size > 1000
    assert [row["mode"] for row in written["rows"]] == [row["mode"] for row in found["rows"]]
    by_mode = {(row["batch"], row["mode"]): row for row in written["rows"]}
    assert by_mode[1, "dynamic"]["samples_x_layers"] == by_mode[8, "dynamic"]["samples_x_layers"]
    assert by_mode[1, "dynamic"]["quality"] == by_mode[8, "dynamic"]["quality"]
    assert by_mode[8, "waits for the slowest"]["samples_x_layers"] >= by_mode[8, "dynamic"]["samples_x_layers"]
