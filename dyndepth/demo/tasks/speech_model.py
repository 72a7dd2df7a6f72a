"""The speech demo's model: a small Wav2Vec2-Conformer with CTC over letters, on log-mel frames."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dyndepth.demo.tasks.espeak import RATE
from dyndepth.encoders import SampleExits
from dyndepth.errors import ArgumentError

#: Symbols: the blank, the space and the letters.
VOCABULARY = ("", " ", *"abcdefghijklmnopqrstuvwxyz")
#: Weights that come with the package (benchmarks/train_speech_demo.py makes them).
WEIGHTS = Path(__file__).parent / "speech_weights"
LAYERS, WIDTH = 8, 80
#: 25 ms windows every 12.5 ms, three of them a frame: 27 frames a second.
WINDOW, HOP, STACK, MELS = 400, 200, 3, 40


class LogMel(nn.Module):
    """fp32 [n, samples] -> [n, STACK * MELS, frames]: logarithms of mel energies, STACK windows in a frame.

    The mel scale is 2595 log10(1 + f / 700) (O'Shaughnessy 1987), its bands triangles from 60 Hz to half the rate.
    """

    def __init__(self) -> None:
        super().__init__()
        bins = 512
        low, high = (2595 * math.log10(1 + f / 700) for f in (60.0, RATE / 2))
        mel = torch.linspace(low, high, MELS + 2)
        edges = 700 * (10 ** (mel / 2595) - 1)
        f = torch.linspace(0, RATE / 2, bins // 2 + 1)[:, None]
        rising, falling = (f - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - f) / (edges[2:] - edges[1:-1])
        self.bins = bins
        self.register_buffer("bands", torch.minimum(rising, falling).clamp_min(0), persistent=False)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        pieces = values.float().unfold(1, WINDOW, HOP)
        # Twice as fast as the square of the complex magnitude.
        power = torch.view_as_real(torch.fft.rfft(pieces * self.get_buffer("window"), self.bins)).square().sum(-1)
        logs = torch.log(power @ self.get_buffer("bands") + 1e-5)
        frames = logs.shape[1] // STACK
        return logs[:, : frames * STACK].unflatten(1, (frames, STACK)).flatten(2).transpose(1, 2).to(values.dtype)


def build(layers: int = LAYERS) -> Any:
    """The model with random weights, in eval mode."""
    from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForCTC

    options: dict[str, Any] = {
        "vocab_size": len(VOCABULARY), "hidden_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": 4,
        "intermediate_size": 2 * WIDTH, "hidden_act": "swish", "conv_depthwise_kernel_size": 15, "max_source_positions": 512,
        # The front end as one convolution would be: this is what lengths are computed from.
        "conv_dim": [STACK * MELS], "conv_kernel": [WINDOW + (STACK - 1) * HOP], "conv_stride": [STACK * HOP],
        "feat_extract_norm": "layer", "num_conv_pos_embeddings": 1, "num_conv_pos_embedding_groups": WIDTH,
        "mask_time_prob": 0.0, "layerdrop": 0.0, "pad_token_id": 0, "ctc_zero_infinity": True,
    }  # fmt: skip
    model: Any = Wav2Vec2ConformerForCTC(Wav2Vec2ConformerConfig(**options))
    model.wav2vec2_conformer.feature_extractor = LogMel()
    return model.eval()


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Weights as one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in model.state_dict().items()}
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")


def load(folder: Path = WEIGHTS) -> tuple[Any, SampleExits]:
    """(model in fp32, exits)."""
    path = folder / "model.safetensors"
    if not path.exists():
        raise ArgumentError(f"speech demo: wanted weights at {path}, found none")
    model = build()
    model.load_state_dict({name: v.float() if v.is_floating_point() else v for name, v in load_file(path).items()})
    return model, SampleExits.from_pretrained(folder)


def encoded(text: str) -> Tensor:
    """int64 [letters]: a text in symbols of VOCABULARY."""
    return torch.tensor([VOCABULARY.index(letter) for letter in text])


def batch(sounds: list[Any]) -> dict[str, Tensor]:
    """`input_values` and `attention_mask` [n, samples] of sounds of any lengths."""
    lengths = torch.tensor([len(sound) for sound in sounds])
    values = nn.utils.rnn.pad_sequence([torch.as_tensor(sound) for sound in sounds], batch_first=True)
    return {"input_values": values, "attention_mask": (torch.arange(values.shape[1]) < lengths[:, None]).long()}
