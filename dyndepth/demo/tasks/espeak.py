"""Speech by espeak-ng: a word list read aloud in several voices."""

from __future__ import annotations

import functools
import io
import re
import shutil
import subprocess
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from dyndepth.errors import ArgumentError

#: Samples per second of everything here.
RATE = 16000
#: What learning hears, and what it never does: other speakers (espeak-ng's variants) of accents it may know.
VOICES = (
    "en-us+m1",
    "en-us+m2",
    "en-us+f2",
    "en-us+f3",
    "en-gb+m3",
    "en-gb+m4",
    "en-gb+f1",
    "en-gb+f4",
    "en-us+m8",
    "en-gb+m6",
)
HELD_OUT_VOICES = ("en-us+m7", "en-gb+f5", "en-gb+m5", "en-us+f1")
WORDS = tuple((Path(__file__).parent / "words.txt").read_text().split())
_LONGEST_S = 60


@dataclass(frozen=True)
class Utterance:
    text: str
    voice: str
    #: Words per minute, and espeak-ng's pitch, 0 to 99.
    speed: int
    pitch: int
    #: Signal to noise, dB: white noise is added by `spoken`.
    noise_db: float
    seed: int


def utterances(count: int, seed: int, *, held_out: bool = False, most_words: int = 4) -> list[Utterance]:
    """Phrases of one to `most_words` words of the list, drawn at random; `held_out` has other speakers and other phrases.

    Words of a phrase are drawn so that the first two sum to an even place in the list for learning and to an odd one for
    the held-out phrases: no pair of first words is in both.
    """
    rng = np.random.default_rng([seed, int(held_out)])
    voices = HELD_OUT_VOICES if held_out else VOICES
    found = []
    for number in range(count):
        at = rng.integers(len(WORDS), size=rng.integers(1, most_words + 1))
        if len(at) > 1 and (at[0] + at[1]) % 2 != int(held_out):
            at[1] ^= 1  # the list has an even number of words
        found.append(
            Utterance(
                " ".join(WORDS[i] for i in at), str(rng.choice(voices)), int(rng.integers(140, 200)),
                int(rng.integers(30, 70)), float(rng.uniform(3, 35)), number + 1_000_003 * seed,
            )
        )  # fmt: skip
    return found


def available() -> bool:
    return shutil.which("espeak-ng") is not None


def require() -> None:
    """ArgumentError says how to install espeak-ng where it is absent."""
    if not available():
        raise ArgumentError("the speech demo needs espeak-ng to speak: apt-get install espeak-ng (brew install espeak-ng)")


@functools.cache
def _voices() -> frozenset[str]:
    """Languages and variants that are installed: espeak-ng itself says nothing of an unknown one and takes another."""
    listed = [
        subprocess.run(["espeak-ng", f"--voices={kind}"], capture_output=True, timeout=_LONGEST_S, check=True).stdout.decode()
        for kind in ("en", "variant")
    ]
    return frozenset([*(line.split()[1] for line in listed[0].splitlines()[1:]), *re.findall(r"!v/(\S+)", listed[1])])


def clean(utterance: Utterance) -> NDArray[np.float32]:
    """fp32 [samples] at 16 kHz, without noise."""
    require()
    missing = [part for part in utterance.voice.split("+") if part not in _voices()]
    if missing:
        raise ArgumentError(f"espeak-ng has no voice {missing[0]!r}, wanted for {utterance.voice}")
    command = [
        "espeak-ng",
        "--stdout",
        "-v",
        utterance.voice,
        "-s",
        str(utterance.speed),
        "-p",
        str(utterance.pitch),
        "-b",
        "1",
    ]
    made = subprocess.run([*command, "--", utterance.text], capture_output=True, timeout=_LONGEST_S, check=False)
    if made.returncode != 0 or len(made.stdout) <= 44:
        said = made.stderr.decode(errors="replace").strip() or "nothing came out"
        raise ArgumentError(f"espeak-ng could not say {utterance.text!r} as {utterance.voice}: {said}")
    return read_wave(made.stdout)


def read_wave(data: bytes) -> NDArray[np.float32]:
    """fp32 [samples] at 16 kHz, in [-1, 1], of a WAV file with 16-bit samples in one channel."""
    # espeak-ng writes to a pipe and cannot say how long it will be: the header's length is a placeholder, the bytes count.
    with wave.open(io.BytesIO(data)) as file:
        if file.getsampwidth() != 2 or file.getnchannels() != 1:
            raise ArgumentError(f"wave: wanted 16-bit samples in one channel, got {file.getparams()}")
        rate, start = file.getframerate(), data.index(b"data") + 8
    body = data[start : start + (len(data) - start) // 2 * 2]
    sound = np.frombuffer(body, dtype="<i2").astype(np.float64) / 32768
    if rate != RATE:
        common = int(np.gcd(rate, RATE))
        sound = resample_poly(sound, RATE // common, rate // common)
    return sound.astype(np.float32)


def noisy(sound: NDArray[np.float32], utterance: Utterance) -> NDArray[np.float32]:
    """With white noise of the utterance's own seed, at its ratio to the sound's mean power."""
    rng = np.random.default_rng(utterance.seed)
    power = float(np.mean(np.square(sound))) + 1e-12
    noise = rng.standard_normal(len(sound)) * np.sqrt(power / 10 ** (utterance.noise_db / 10))
    return (sound + noise).astype(np.float32)
