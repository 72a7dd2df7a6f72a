"""Training encoders with exits: a plain accelerate loop around `DynamicEncoder.everywhere` and any loss of its results.

The base is trained too (`base_lr`) or frozen. A frozen base gives every sample the same residuals in every epoch, so where all
heads read one pooled vector per sample these vectors are computed once, and an update costs no more than the heads.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyndepth.encoders import DynamicEncoder, SampleExits, SampleHead, facts_of
from dyndepth.errors import ArgumentError, TrainingError
from dyndepth.files import replacing, require
from dyndepth.training.encoder_states import Everywhere, Inputs, PooledStates, chosen
from dyndepth.training.state import RunState
from dyndepth.training.weighting import warm_cosine

#: (results of `everywhere`, labels in the order of their samples) -> scalar. An object with `at_update(update)` is told where
#: training stands before each update, and one with `state_dict` has its state kept in checkpoints.
Loss = Callable[[Any, Tensor], Tensor]
#: What a loss reads, from an encoder and a batch; `DynamicEncoder.everywhere` by default.
Watch = Callable[[DynamicEncoder, Mapping[str, Tensor]], Any]

RUN = "run.json"


@dataclass(frozen=True)
class EncoderConfig:
    """Settings of a run. One update is one batch; AdamW, linear warm-up, a cosine to zero."""

    updates: int = 500
    #: Samples per update.
    batch: int = 32
    #: Rate of exits, their judges and the final head.
    lr: float = 1e-3
    #: Rate of the model below them; 0 freezes it.
    base_lr: float = 0.0
    weight_decay: float = 0.01
    #: Share of the updates in which the rate rises.
    warmup: float = 0.1
    #: Gradients are scaled down to this norm; 0 leaves them.
    clip: float = 1.0
    #: bf16 multiplies in bfloat16 (autocast); weights stay float32.
    precision: str = "fp32"
    seed: int = 0
    #: Updates between looks at the validation split.
    evaluate_every: int = 50
    #: Looks without a lower loss after which training ends; 0 never ends early.
    patience: int = 0
    #: Updates between checkpoints; 0 writes none.
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        def wanted(name: str, what: str, holds: bool) -> None:
            if not holds:
                raise ArgumentError(f"train_encoder: {name} must be {what}, got {getattr(self, name)!r}")

        for name in ("updates", "batch", "evaluate_every"):
            wanted(name, "a whole number from 1 up", type(getattr(self, name)) is int and getattr(self, name) >= 1)
        # Updates draw from generators seeded with seed * 2^32 + update, which torch takes below 2^64.
        wanted("seed", "a whole number in [0, 2^32)", type(self.seed) is int and 0 <= self.seed < 2**32)
        for name in ("patience", "checkpoint_every"):
            wanted(name, "a whole number from 0 up", type(getattr(self, name)) is int and getattr(self, name) >= 0)
        for name in ("lr", "base_lr", "weight_decay", "clip"):
            wanted(name, "a finite number from 0 up", math.isfinite(getattr(self, name)) and getattr(self, name) >= 0)
        wanted("warmup", "in [0, 1)", 0 <= self.warmup < 1)
        wanted("precision", "fp32 or bf16", self.precision in ("fp32", "bf16"))


@dataclass(frozen=True)
class TrainedEncoder:
    """Exits with the weights of the best look at the validation split (without one, the last weights)."""

    exits: SampleExits
    #: Loss of each update of this call.
    losses: list[float]
    #: Lowest validation loss and the update it was found at; NaN and the last update without a validation split.
    best: float
    best_update: int
    updates: int


def train_encoder(
    model: Any,
    exits: SampleExits,
    inputs: Inputs,
    labels: Tensor,
    loss: Loss,
    *,
    config: EncoderConfig | None = None,
    validation: tuple[Inputs, Tensor] | None = None,
    judge: Loss | None = None,
    watch: Watch | None = None,
    train_only: nn.Module | None = None,
    layout: str = "auto",
    folder: str | Path | None = None,
) -> TrainedEncoder:
    """Train exits (and, with `base_lr`, the model) in place.

    Args:
        model: a supported encoder in float32. With `base_lr` 0 it is frozen and in eval mode throughout.
        exits: made for it, in float32; their weights are changed in place.
        inputs: the encoder's arguments for all samples, [n, ...] each; batches lose padding that none of theirs needs. With a
            frozen model and linear heads, PooledStates of them will do.
        labels: [n, ...], whatever `loss` reads.
        loss: see `Loss`; dyndepth.training.encoder_losses has those of the recipes.
        validation: inputs and labels that nothing learns from; the weights with the lowest mean of `judge` there are kept.
        judge: loss for the validation split; `loss` if not given.
        watch: what losses read instead of `everywhere`; its batches come sorted by length, shortest first.
        train_only: of the exits' modules, the ones that learn; the others are frozen.
        folder: with `checkpoint_every`, where checkpoints go; a killed run that is started again resumes there.

    Every update is a function of the settings, the data and the weights before it; the caller's random numbers are neither
    read nor moved on. A folder is of one run: other settings, data, exits or losses are refused there. A loss or a gradient
    that is not finite is a TrainingError. Returns exits whose facts are those of the model as it is afterwards.
    """
    config = config or EncoderConfig()
    require("accelerate", "training needs the package accelerate: pip install 'dyndepth[train]'")
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise TrainingError("train_encoder: the model must be in float32 (precision='bf16' multiplies in bfloat16)")
    if config.checkpoint_every and folder is None:
        raise ArgumentError("train_encoder: checkpoint_every needs a folder")
    run = _Run(model, exits, inputs, labels, loss, config, validation, judge or loss, watch, train_only, layout, folder)
    with torch.enable_grad(), _own_draws(), run.prepared():
        return run.train()


@contextmanager
def _own_draws() -> Iterator[None]:
    """Afterwards the generators of torch, NumPy and Python are where they were; accelerate's checkpoints set all three."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 (what accelerate sets)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002


class _Run:
    def __init__(
        self, model: Any, exits: SampleExits, inputs: Inputs, labels: Tensor, loss: Loss, config: EncoderConfig,
        validation: tuple[Inputs, Tensor] | None, judge: Loss, watch: Watch | None, train_only: nn.Module | None,
        layout: str, folder: str | Path | None,
    ) -> None:  # fmt: skip
        self.model, self.exits, self.config, self.loss, self.judge = model, exits, config, loss, judge
        self.encoder = DynamicEncoder(model, exits, layout=layout)
        self.inputs, self.labels, self.validation, self.watch = inputs, labels, validation, watch
        self.train_only, self.folder = train_only, None if folder is None else Path(folder)
        kept = isinstance(inputs, PooledStates)
        named = {"states": inputs} if isinstance(inputs, PooledStates) else inputs
        sizes = {name: len(value) for name, value in [*named.items(), ("labels", labels)]}
        if len(set(sizes.values())) > 1 or not len(labels):
            raise ArgumentError(f"train_encoder: inputs and labels must hold equally many samples, at least one, got {sizes}")
        if validation is not None and isinstance(validation[0], PooledStates) != kept:
            raise ArgumentError("train_encoder: inputs and validation must both be kept states, or neither")
        if kept and (config.base_lr or watch is not None or not PooledStates.fits(self.encoder)):
            raise ArgumentError("train_encoder: kept states want a frozen model, linear heads and no watch")
        self.states: list[PooledStates] = []
        self.losses: list[float] = []

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Trained parts learn, the rest is frozen; modes and flags are put back at the end."""
        parts: list[nn.Module] = [self.model, self.exits]
        flags = [(p, p.requires_grad) for part in parts for p in part.parameters()]
        mode = self.model.training
        named = self.exits if self.train_only is None else self.train_only
        learning = {id(p) for p in named.parameters()}
        learning |= {id(p) for p in self.model.parameters()} if self.config.base_lr else set()
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in learning)
        self.model.train(bool(self.config.base_lr))
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            self.model.train(mode)

    def train(self) -> TrainedEncoder:
        from accelerate import Accelerator

        if not self.config.base_lr and self.watch is None and PooledStates.fits(self.encoder):
            data = [(self.inputs, self.labels), *([] if self.validation is None else [self.validation])]
            with self._mixed():
                self.states = [
                    given if isinstance(given, PooledStates) else PooledStates.collect(self.encoder, given) for given, _ in data
                ]
        base = {id(p) for p in self.model.parameters()}
        parameters = [p for part in (self.model, self.exits) for p in part.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if id(p) in base], "rate": self.config.base_lr},
            {"params": [p for p in parameters if id(p) not in base], "rate": self.config.lr},
        ]
        if not parameters:
            raise ArgumentError("train_encoder: nothing learns: base_lr is 0 and train_only names no weights")
        some = next(iter(self.model.parameters()))
        accelerator = Accelerator(mixed_precision="no", cpu=some.device.type == "cpu")
        optimizer: Any = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=self.config.weight_decay)
        kept = nn.ModuleList([self.model, self.exits] if self.config.base_lr else [self.exits])
        # On one device in one process `prepare` hands back the very modules; checkpoints want to know them.
        _, optimizer = accelerator.prepare(kept, optimizer)
        state = RunState()
        accelerator.register_for_checkpointing(state)
        if hasattr(self.loss, "state_dict"):
            accelerator.register_for_checkpointing(self.loss)
        best = self._resume(accelerator, state)
        # A checkpoint may be that of a run that ended early: it is over.
        while state.update < self.config.updates and not self._tired(state):
            self._update(accelerator, optimizer, parameters, state)
            if self.validation is not None and self._due(state, self.config.evaluate_every):
                found = self._look()
                state.waited += 1
                if found < state.best:
                    state.best, state.best_update, state.waited = found, state.update, 0
                    best = copy.deepcopy(kept.state_dict())
            if self.config.checkpoint_every and (self._due(state, self.config.checkpoint_every) or self._tired(state)):
                self._keep(accelerator, state, best)
        if best is not None:
            kept.load_state_dict(best)
        known = self.validation is not None and math.isfinite(state.best)
        facts = facts_of(self.model, self.exits.final)
        exits = SampleExits(self.exits, facts, final=self.exits.final, record=self.exits.record)
        where = state.best_update if known else state.update
        return TrainedEncoder(exits.eval(), self.losses, state.best if known else math.nan, where, state.update)

    def _tired(self, state: RunState) -> bool:
        return bool(self.config.patience) and state.waited >= self.config.patience

    def _due(self, state: RunState, every: int) -> bool:
        return state.update % every == 0 or state.update == self.config.updates

    def _update(self, accelerator: Any, optimizer: Any, parameters: Sequence[Tensor], state: RunState) -> None:
        share = warm_cosine(1.0, self.config.warmup, state.update, self.config.updates)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * share
        if hasattr(self.loss, "at_update"):
            self.loss.at_update(state.update)
        # Dropout draws anew every update, the same ones after a resume.
        torch.manual_seed((self.config.seed << 32) + state.update)
        with self._mixed():
            value = self._measure(0, self._rows(state.update), self.loss)
        self._finite(float(value.detach()), "the loss", state)
        accelerator.backward(value)
        norm = accelerator.clip_grad_norm_(parameters, self.config.clip or math.inf)
        self._finite(float(norm), "the gradient's norm", state)
        optimizer.step()
        optimizer.zero_grad()
        state.update += 1
        self.losses.append(float(value.detach()))

    def _mixed(self) -> torch.autocast:
        device = next(iter(self.model.parameters())).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _finite(self, value: float, name: str, state: RunState) -> None:
        if not math.isfinite(value):
            raise TrainingError(f"train_encoder: {name} is {value} at update {state.update}")

    def _rows(self, update: int) -> Tensor:
        """int64: the samples of an update. Every epoch is a permutation of its own."""
        count = len(self.labels)
        epoch, at = divmod(update, math.ceil(count / self.config.batch))
        generator = torch.Generator().manual_seed((self.config.seed << 20) + epoch)
        return torch.randperm(count, generator=generator)[at * self.config.batch : (at + 1) * self.config.batch]

    def _measure(self, split: int, rows: Tensor, loss: Loss) -> Tensor:
        inputs, labels = (self.inputs, self.labels) if split == 0 or self.validation is None else self.validation
        if self.states:
            return loss(self.states[split].everywhere(self.encoder, rows), labels[rows])
        assert not isinstance(inputs, PooledStates)
        batch, rows = chosen(inputs, rows)
        if self.watch is not None:
            return loss(self.watch(self.encoder, batch), labels[rows])
        found: Everywhere = self.encoder.everywhere(**batch)
        return loss(found, labels[rows][found[0][0].ids.to(labels.device)])

    @torch.no_grad()
    def _look(self) -> float:
        assert self.validation is not None
        count, training = len(self.validation[1]), self.model.training
        self.model.eval()
        total = 0.0
        for rows in torch.arange(count).split(self.config.batch):
            with self._mixed():
                total += len(rows) * float(self._measure(1, rows, self.judge))
        self.model.train(training)
        return total / count

    # Checkpoints.

    def _claim(self) -> dict[str, Any]:
        """What a folder's run is of. Weights are left out: a checkpoint brings its own."""
        points = [[e.leave, _named(e.head), e.criterion.kind, repr(e.threshold)] for e in self.exits]
        final = None if self.exits.final is None else _named(self.exits.final)
        data = [(self.inputs, self.labels), *([] if self.validation is None else [self.validation])]
        losses = {"loss": self.loss, "judge": self.judge, "watch": self.watch}
        return json.loads(
            json.dumps(
                {
                    "config": dataclasses.asdict(self.config),
                    "samples": len(self.labels),
                    "data": [_digest(inputs, labels) for inputs, labels in data],
                    "exits": [*points, final],
                    **{name: getattr(part, "__qualname__", type(part).__qualname__) for name, part in losses.items()},
                }
            )
        )

    def _resume(self, accelerator: Any, state: RunState) -> dict[str, Any] | None:
        """Load the newest checkpoint if there is one; returns the best weights so far."""
        if self.folder is None or not self.config.checkpoint_every:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / RUN
        claim = self._claim()
        if path.exists():
            old = json.loads(path.read_text())
            other = [name for name in claim if old.get(name) != claim[name]]
            if other:
                raise TrainingError(
                    f"train_encoder: {self.folder} holds another run, whose {', '.join(other)} differ; choose another folder "
                    "or remove it"
                )
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(claim) + "\n")
        found = sorted(self.folder.glob("checkpoint-*"))
        if not found:
            return None
        accelerator.load_state(str(found[-1]))
        best = found[-1] / "best.pt"
        return torch.load(best, weights_only=True) if best.exists() else None

    def _keep(self, accelerator: Any, state: RunState, best: dict[str, Any] | None) -> None:
        """A checkpoint that is there in full or not at all; older ones go once it is."""
        assert self.folder is not None
        staged, final = (self.folder / f"{prefix}checkpoint-{state.update:08d}" for prefix in (".", ""))
        shutil.rmtree(staged, ignore_errors=True)
        accelerator.save_state(str(staged))
        if best is not None:
            torch.save(best, staged / "best.pt")
        shutil.rmtree(final, ignore_errors=True)
        staged.rename(final)
        for folder in self.folder.glob("checkpoint-*"):
            if folder != final:
                shutil.rmtree(folder, ignore_errors=True)


def _named(head: SampleHead) -> list[Any]:
    return [head.kind, head.settings]


def _digest(inputs: Inputs, labels: Tensor) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    found = hashlib.sha256()
    parts = dict(enumerate(inputs.states)) if isinstance(inputs, PooledStates) else inputs
    for name, value in [*sorted(parts.items()), ("labels", labels)]:
        found.update(f"{name} {value.dtype} {list(value.shape)};".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
