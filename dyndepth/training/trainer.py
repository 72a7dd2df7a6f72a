"""The training loop: heads on cached residuals, with checkpoints that resume bit by bit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndepth.closed_form.progress import Advance
from dyndepth.errors import TrainingError
from dyndepth.exits.heads import Head
from dyndepth.files import replacing, require, sweep
from dyndepth.runtime.bind import Model
from dyndepth.training.batches import Batches
from dyndepth.training.config import TrainConfig
from dyndepth.training.evaluate import Quality, evaluate, mixed
from dyndepth.training.losses import Readout
from dyndepth.training.objective import Objective
from dyndepth.training.skip import SkipStudent
from dyndepth.training.stack import frozen
from dyndepth.training.state import RunState
from dyndepth.training.student import Student
from dyndepth.training.weighting import WEIGHTS

METRICS, RUN, BEST = "metrics.jsonl", "run.json", "best.pt"


@dataclass
class _State(RunState):
    #: Rows judged so far.
    rows: int = 0


@dataclass(frozen=True)
class Trained:
    """Heads with the weights of the best look at the validation split."""

    heads: dict[int, Head]
    quality: dict[int, Quality]
    updates: int
    best_update: int
    rows: int
    rows_per_s: float


@dataclass
class Trainer:
    """One run in one folder: metrics, checkpoints, the best weights.

    Every update is a function of the settings, the data and the weights before it (order and sampled words come from seed and
    step), so a run that was killed and resumes ends with the weights it would have had.
    """

    model: Model
    student: Student | SkipStudent
    objective: Objective
    training: Batches
    validation: Batches
    config: TrainConfig
    folder: Path
    advance: Advance = lambda steps, text="": None
    #: A SummaryWriter, if the settings ask for one.
    board: Any = None

    @property
    def updates(self) -> int:
        per_update = self.training.judged_per_step * self.config.accumulate
        return max(1, math.ceil(self.config.tokens / per_update))

    def run(self) -> Trained:
        """Train, from the newest checkpoint if there is one."""
        check(self.model, self.config)
        from accelerate import Accelerator

        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        for staged in self.folder.glob(".checkpoint-*"):  # of a run that was killed while it wrote one
            shutil.rmtree(staged, ignore_errors=True)
        # Precision is `mixed`'s affair: accelerate's is one for the whole process and would outlive this run.
        accelerator = Accelerator(
            mixed_precision="no", cpu=self.model.device.type == "cpu", gradient_accumulation_steps=self.config.accumulate
        )
        if accelerator.device.type != self.model.device.type or accelerator.num_processes > 1:
            raise TrainingError(
                f"train: the model is on {self.model.device} in one process, accelerate runs on {accelerator.device} in "
                f"{accelerator.num_processes}"
            )
        self._claim()
        optimizer: Any = torch.optim.AdamW(self.student.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay)
        student: Any
        student, optimizer = accelerator.prepare(self.student, optimizer)
        state = _State()
        accelerator.register_for_checkpointing(state)
        newest = _checkpoints(self.folder)
        if newest:
            accelerator.load_state(str(newest[-1]))
        self._rewind(state.update)
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=state.update + 1)
        began, shown = time.perf_counter(), 0
        with torch.enable_grad(), frozen(self.model.causal_lm):
            if not newest:
                self._look(accelerator, student, state)
            self.advance(state.update)
            while state.update < self.updates and not self._tired(state):
                rows, loss = self._update(accelerator, student, optimizer, state)
                shown += rows
                self.advance(1, f"loss {loss:.3f}, {shown / (time.perf_counter() - began):.0f} rows/s")
                if state.update % self.config.evaluate_every == 0 or state.update == self.updates:
                    self._look(accelerator, student, state)
                if state.update % self.config.checkpoint_every == 0 or state.update == self.updates:
                    self._keep(accelerator, state)
        seconds = time.perf_counter() - began
        best = torch.load(self.folder / BEST, weights_only=True)
        self.student.load_state_dict(best["heads"])
        quality = {int(leave): Quality(**entry) for leave, entry in best["quality"].items()}
        heads: dict[int, Any] = {int(leave): head for leave, head in self.student.heads.items()}
        return Trained(
            heads, quality, state.update, state.best_update,
            round(self.training.judged_per_step * self.config.accumulate * state.update), shown / seconds if seconds else 0.0,
        )  # fmt: skip

    def _update(self, accelerator: Any, student: Any, optimizer: Any, state: _State) -> tuple[int, float]:
        """One step of the optimizer; returns the judged rows it saw and their weighted loss."""
        rate = self.config.rate(state.update, self.updates)
        for group in optimizer.param_groups:
            group["lr"] = rate
        exits = sorted(int(leave) for leave in self.student.heads)
        weights = dict(zip(exits, WEIGHTS[self.config.weighting](exits, self.model.depth), strict=True))
        steps = [state.update * self.config.accumulate + micro for micro in range(self.config.accumulate)]
        batches = [self.training.at(step) for step in steps]
        chosen = [self.student.rows(batch, step) for batch, step in zip(batches, steps, strict=True)]
        # Every token of the update counts alike, whichever batch it came in.
        rows = sum(int(which[0].sum()) for which in chosen)
        losses, norm = dict.fromkeys(exits, 0.0), 0.0
        for batch, which, step in zip(batches, chosen, steps, strict=True):
            with accelerator.accumulate(student):
                with mixed(self.objective.readout.weight):
                    ready = student(batch, *which)
                found, slopes = self.objective(ready, batch, which[0], step, rows)
                for leave, loss in found.items():
                    losses[leave] += float(loss)
                    self._finite(losses[leave], f"the loss of exit {leave}", state)
                # The gradient of this sum is what the losses' would be: their graph ends at the head-ready rows. accelerate
                # divides by the number of batches, which `rows` has done already.
                surrogate = torch.stack([weights[e] * (ready[e] * slopes[e]).sum() for e in exits]).sum()
                accelerator.backward(surrogate * self.config.accumulate)
                if accelerator.sync_gradients:
                    norm = float(accelerator.clip_grad_norm_(student.parameters(), self.config.clip or math.inf))
                    self._finite(norm, "the gradient", state)
                optimizer.step()
                optimizer.zero_grad()
        state.update += 1
        state.rows += rows
        self._log({"update": state.update, "loss": losses, "lr": rate, "gradient_norm": norm, "rows": rows})
        return rows, sum(weights[e] * losses[e] for e in exits)

    def _finite(self, value: float, name: str, state: _State) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"train: {name} is {value} at update {state.update}; nothing of this update was kept. Other settings (a "
                f"lower lr, a smaller clip) need another folder than {self.folder}"
            )

    def _look(self, accelerator: Any, student: Any, state: _State) -> None:
        """Measure the validation split, and keep the weights if they are the best so far."""
        quality = evaluate(self.student, self.objective.readout, self.validation, self.config.evaluate_rows)
        mean = sum(q.kl for q in quality.values()) / len(quality)
        self._log({"update": state.update, "validation": {e: dataclasses.asdict(q) for e, q in quality.items()}})
        state.waited += 1
        if mean < state.best:
            state.best, state.best_update, state.waited = mean, state.update, 0
            heads = {name: value.detach().cpu() for name, value in accelerator.unwrap_model(student).state_dict().items()}
            reached = {str(leave): dataclasses.asdict(found) for leave, found in quality.items()}
            with replacing(self.folder / BEST) as temporary:
                torch.save({"heads": heads, "quality": reached}, temporary)

    def _tired(self, state: _State) -> bool:
        return bool(self.config.patience) and state.waited >= self.config.patience

    def _keep(self, accelerator: Any, state: _State) -> None:
        """A checkpoint that is there in full or not at all; older ones go once it is."""
        staged, final = (self.folder / f"{prefix}checkpoint-{state.update:08d}" for prefix in (".", ""))
        shutil.rmtree(staged, ignore_errors=True)
        accelerator.save_state(str(staged))
        shutil.rmtree(final, ignore_errors=True)
        staged.rename(final)
        for folder in _checkpoints(self.folder):
            if folder != final:
                shutil.rmtree(folder, ignore_errors=True)

    def _claim(self) -> None:
        """Write what this run is, or refuse to go on with another run's checkpoints."""
        run = {"config": dataclasses.asdict(self.config), "data": self.training.cache.manifest["tokens_sha256"],
               "heads": _digest(self.student.state_dict()), "updates": self.updates}  # fmt: skip
        run = json.loads(json.dumps(run))
        path = self.folder / RUN
        if path.exists():
            old = json.loads(path.read_text())
            different = sorted(key for key in run if old.get(key) != run[key])
            if different:
                raise TrainingError(
                    f"train: {self.folder} holds another run (its {', '.join(different)} differ); choose another folder or "
                    "remove it"
                )
            return
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(run, indent=1) + "\n")

    def _log(self, entry: dict[str, Any]) -> None:
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self.board is not None:
            for name, value in _flat(entry):
                self.board.add_scalar(name, value, entry["update"])
            self.board.flush()

    def _rewind(self, update: int) -> None:
        """Forget what was logged after the checkpoint that is resumed from: it will be logged again."""
        kept = [entry for entry in metrics(self.folder) if entry["update"] <= update] if update else []
        with replacing(self.folder / METRICS) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))


def metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """Entries of a run's log; a last line that a kill cut short is left out."""
    if not (folder / METRICS).exists():
        return
    for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def check(model: Model, config: TrainConfig) -> None:
    """Raise what would stop a run later: asked before a corpus is collected and a teacher run."""
    require("accelerate", "training needs the package accelerate: pip install 'dyndepth[train]'")
    if config.tensorboard:
        require("tensorboard", "the setting tensorboard needs the package tensorboard: pip install tensorboard")
    if model.dtype not in (torch.float32, torch.bfloat16):
        raise TrainingError(f"train: wanted a model in float32 or bfloat16, got {model.dtype}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError("train: several processes are not supported; start it in one")
    readout_of(model)


def readout_of(model: Model) -> Readout:
    """The model's LM head for training; it must be a plain linear, because losses read parts of it."""
    plain = model.plain_head()
    if plain is None:
        raise TrainingError("train: the LM head is no plain linear layer (quantised, wrapped or hooked), which losses need")
    return Readout(plain[0], plain[1], model.logit_softcap)


def _flat(entry: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a log entry with the path that leads to each."""
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        elif key != "update":
            yield f"{prefix}{key}", value


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"))


def _digest(tensors: dict[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        whole.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return whole.hexdigest()
