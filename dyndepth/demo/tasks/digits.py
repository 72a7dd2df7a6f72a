"""scikit-learn's bundled digits (1797 images of 8 x 8, of UCI's optical recognition set) and a small ViT trained on them."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndepth import env
from dyndepth.encoders import DynamicEncoder, LinearHead, SampleExit, SampleExits, facts_of
from dyndepth.errors import ArgumentError
from dyndepth.exits import TopProbability
from dyndepth.files import require

CLASSES = 10
#: Images to train on, to set thresholds with, and to report on; every image is in one of them.
SIZES = {"train": 997, "calibration": 400, "test": 400}
#: Part of the cache folder's name: raise it when what training makes changes.
_VERSION = 1
EXITS = (1, 2, 3, 5)
EPOCHS = 30


@dataclass(frozen=True)
class Split:
    """Some of the digits."""

    #: fp32 [n, 1, 8, 8] in [-1, 1].
    pixels: Tensor
    #: int64 [n].
    labels: Tensor
    #: int64 [n]: places in scikit-learn's array.
    numbers: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def digits(seed: int = 0) -> dict[str, Split]:
    """The splits by name (SIZES): a shuffle of the whole set, cut in three."""
    require("sklearn", "the image demo reads scikit-learn's digits: pip install 'dyndepth[demo]'")
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    pixels = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order.split(list(SIZES.values()))
    return {name: Split(pixels[at], labels[at], at) for name, at in zip(SIZES, parts, strict=True)}


def noisy(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """What training sees of images: a little noise. (Shifts by a pixel cut digits that fill all of 8 x 8.)"""
    return pixels + 0.1 * torch.randn(pixels.shape, generator=generator)


def vit(seed: int = 0, *, layers: int = 8, width: int = 64) -> Any:
    """An untrained ViT for the digits: patches of 2 x 2, so 16 tokens and the class token."""
    from transformers import ViTConfig, ViTForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make: Any = ViTConfig  # num_labels is an argument of the base class
        config = make(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=2 * width, image_size=8,
            patch_size=2, num_channels=1, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            initializer_range=0.1,  # about 1 / sqrt(width): the usual 0.02 learns this little data slowly
        )  # fmt: skip
        return ViTForImageClassification(config).eval()


def linear_exits(model: Any, leave: Sequence[int] = EXITS, seed: int = 0) -> SampleExits:
    """Closed exits with a norm and a linear each on the class token, judged by the largest probability."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = [LinearHead(model.config.hidden_size, CLASSES, norm=True) for _ in leave]
    points = [SampleExit(at, head, TopProbability()) for at, head in zip(leave, heads, strict=True)]
    return SampleExits(points, facts_of(model))


def fit(
    parameters: Sequence[Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    data: Split,
    *,
    epochs: int,
    rate: float = 1e-3,
    batch: int = 32,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """AdamW with a cosine over `loss(pixels, labels)`; the same numbers on every run of one machine and thread count."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    steps = epochs * math.ceil(len(data) / batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    with torch.enable_grad():
        for _ in range(epochs):
            for part in torch.randperm(len(data), generator=generator).split(batch):
                optimizer.zero_grad()
                loss(noisy(data.pixels[part], generator), data.labels[part]).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
            advance()


def jointly(found: Sequence[tuple[Any, Tensor]], labels: Tensor) -> Tensor:
    """`sum_i i CE_i / sum_i i` over exits and top, i the layers below (PABEE's weights)."""
    weights = [samples.boundary for samples, _ in found]
    losses = [torch.nn.functional.cross_entropy(logits, labels[samples.ids]) for samples, logits in found]
    return sum((w * loss for w, loss in zip(weights, losses, strict=True)), torch.zeros(())) / sum(weights)


def trained(epochs: int = EPOCHS, seed: int = 0, advance: Callable[[], None] = lambda: None) -> tuple[Any, SampleExits]:
    """The ViT and its closed exits, trained together."""
    data = digits()["train"]
    model = vit(seed)
    exits = linear_exits(model, seed=seed)
    encoder = DynamicEncoder(model, exits)
    fit(
        [*model.parameters(), *exits.parameters()],
        lambda pixels, labels: jointly(encoder.everywhere(pixel_values=pixels), labels),
        data,
        epochs=epochs,
        seed=seed,
        advance=advance,
    )
    record = {
        "method": "trained together with the ViT: sum i CE_i / sum i", "data": "scikit-learn digits", "images": len(data),
        "epochs": epochs, "seed": seed,
    }  # fmt: skip
    for parameter in [*model.parameters(), *exits.parameters()]:
        parameter.grad = None
        parameter.requires_grad_(False)
    return model, SampleExits(list(exits), facts_of(model), record=record).eval()


def load(epochs: int = EPOCHS, seed: int = 0, advance: Callable[[], None] = lambda: None) -> tuple[Any, SampleExits]:
    """As `trained`, once: later calls read `dyndepth.env.cache_folder()`."""
    from transformers import ViTForImageClassification
    from transformers.utils import logging

    folder = cached(epochs, seed)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        if not (folder / "model" / "config.json").exists():
            _keep(folder, *trained(epochs, seed, advance))
        loaded: Any = ViTForImageClassification.from_pretrained(folder / "model").eval()
        return loaded, SampleExits.from_pretrained(folder / "exits")
    except (OSError, ValueError) as error:
        raise ArgumentError(f"the trained model in {folder} is damaged ({error}); remove that folder") from error
    finally:
        if bars:
            logging.enable_progress_bar()


def cached(epochs: int = EPOCHS, seed: int = 0) -> Path:
    """Where `load` keeps what it trained."""
    return env.cache_folder() / f"digits-vit-{_VERSION}-{epochs}-{seed}"


def _keep(folder: Path, model: Any, exits: SampleExits) -> None:
    """All of it or nothing: a run that is killed leaves no half of a model."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        model.save_pretrained(staged / "model")
        exits.save_pretrained(staged / "exits")
        if not (folder / "model" / "config.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            staged.chmod(0o755)
            os.replace(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
