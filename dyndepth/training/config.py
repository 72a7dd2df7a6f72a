"""Settings of a training run: a frozen record, read from TOML and checked before anything is computed."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyndepth.errors import ArgumentError
from dyndepth.exits.heads import HEADS
from dyndepth.training.losses import LOSSES
from dyndepth.training.starts import INITS
from dyndepth.training.weighting import WEIGHTS, warm_cosine


@dataclass(frozen=True)
class TrainConfig:
    """What to train, from where, for how long.

    Rates follow Balcony (arXiv 2503.05005): 5e-4 with 1 % warm-up and a cosine to zero.
    """

    #: Boundaries of the exits; empty takes those at 5/6 and 11/12 of the depth.
    exits: tuple[int, ...] = ()
    head: str = "translator"
    #: Where heads start; "" takes the first of dyndepth.training.starts.INITS for the kind of head.
    init: str = ""
    #: Rank of translators and readouts; 0 keeps the whole matrix. Neurons of an mlp head; 0 takes the model's width.
    rank: int = 0
    inner: int = 0

    #: KL(full || exit) over sampled words, over the whole vocabulary, over the teacher's top words and one rest mass, the
    #: squared error of the final normed state, or (`ce`) cross-entropy with the text's own next token alone.
    loss: str = "sampled_kl"
    #: Words that are always sampled, the most frequent answers of the teacher; and words drawn anew every step.
    frequent: int = 4096
    random: int = 4096
    #: Share of cross-entropy with the text's own next token.
    ce_weight: float = 0.0
    #: How exits are weighed against each other (dyndepth.training.weighting.WEIGHTS).
    weighting: str = "equal"

    #: Tokens of the corpus; the share of them that the model writes itself where texts are given too; length and number of
    #: continuations decoded at once.
    corpus: int = 400_000
    own: float = 0.75
    new_tokens: int = 128
    decode: int = 64

    #: Rows of training text that are shown in all, repetitions counted; rows per step, and steps per update.
    tokens: int = 1_000_000
    batch: int = 4096
    accumulate: int = 1
    lr: float = 5e-4
    warmup: float = 0.01
    weight_decay: float = 0.0
    #: Gradients are scaled down to this norm; 0 leaves them.
    clip: float = 1.0
    seed: int = 0

    #: Updates between looks at the validation split, and between checkpoints.
    evaluate_every: int = 50
    checkpoint_every: int = 50
    #: Looks without a lower KL after which training ends; 0 never ends early.
    patience: int = 0
    #: Rows of the validation split that are looked at.
    evaluate_rows: int = 4096
    tensorboard: bool = False

    def __post_init__(self) -> None:
        def fail(name: str, wanted: str) -> None:
            raise ArgumentError(f"train: {name} must be {wanted}, got {getattr(self, name)!r}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and type(value) is not int:
                fail(field.name, "a whole number")
            if field.type == "float" and (type(value) not in (int, float) or not math.isfinite(value)):
                fail(field.name, "a finite number")
            if field.type == "bool" and type(value) is not bool:
                fail(field.name, "true or false")
            if field.type.startswith("tuple") and not isinstance(value, list | tuple):
                fail(field.name, "a list of boundaries")
            if field.type == "str" and not isinstance(value, str):
                fail(field.name, "a string")
        object.__setattr__(self, "exits", tuple(self.exits))
        if any(type(leave) is not int for leave in self.exits) or len(set(self.exits)) != len(self.exits):
            fail("exits", "different boundaries")
        for name, known in (("head", HEADS), ("loss", LOSSES), ("weighting", WEIGHTS)):
            if getattr(self, name) not in known:
                fail(name, f"one of {', '.join(known)}")
        if self.init and self.init not in INITS[self.head]:
            fail("init", f"one of {', '.join(INITS[self.head])} for a {self.head} head")
        for name in (
            "tokens",
            "batch",
            "accumulate",
            "evaluate_every",
            "checkpoint_every",
            "evaluate_rows",
            "corpus",
            "new_tokens",
            "decode",
        ):
            if getattr(self, name) < 1:
                fail(name, "at least 1")
        for name in ("rank", "inner", "ce_weight", "weight_decay", "clip", "patience", "seed"):
            if getattr(self, name) < 0:
                fail(name, "at least 0")
        if self.frequent < 2 or self.random < 1:
            fail("frequent" if self.frequent < 2 else "random", "at least 2" if self.frequent < 2 else "at least 1")
        if self.seed >= 1 << 40:
            fail("seed", "below 2**40")
        if self.lr <= 0:
            fail("lr", "above 0")
        if not 0 <= self.warmup < 1:
            fail("warmup", "in [0, 1)")
        if not 0 <= self.own <= 1:
            fail("own", "in [0, 1]")

    @classmethod
    def of(cls, settings: dict[str, Any]) -> TrainConfig:
        """From a dictionary; names it does not know are an error, not ignored."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ArgumentError(f"train: unknown settings {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**settings)

    @classmethod
    def read(cls, path: str | Path, **changes: Any) -> TrainConfig:
        """From a TOML file, `changes` on top."""
        try:
            settings = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArgumentError(f"train: {path} cannot be read: {error}") from error
        return cls.of({**settings, **changes})

    def starting(self) -> str:
        """The start of the heads, the default filled in."""
        return self.init or INITS[self.head][0]

    def at(self, layers: int) -> list[int]:
        """The exits, the default filled in."""
        chosen = sorted(self.exits) or sorted({max(1, min(layers - 1, round(layers * share))) for share in (5 / 6, 11 / 12)})
        if not all(1 <= leave < layers for leave in chosen):
            raise ArgumentError(f"train: exits must be in [1, {layers}), got {chosen}")
        return chosen

    def rate(self, update: int, updates: int) -> float:
        """Learning rate of an update (counted from 0)."""
        return warm_cosine(self.lr, self.warmup, update, updates)
