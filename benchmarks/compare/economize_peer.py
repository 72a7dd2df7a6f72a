"""PyPI `economize`: early exit in PyTorch, installed without dependencies into a folder of its own.

Two modes of its CALM: as it comes (softmax confidence after every layer from the lowest exit on, its default threshold),
and with dyndepth's exits, whose decisions and heads are written as a technique of its own registry.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compare.generated import exit_points
from compare.naive import Naive
from compare.system import Cell, Output, System, counting, end_ids, suppressed
from dyndepth.exits import Band
from dyndepth.exits.criteria import View
from dyndepth.op import backend
from dyndepth.ops.exit_stats import stats_of_logits

VERSION = "0.3.2"


def install(folder: Path) -> None:
    """pip install into `folder`; its dependencies are ours."""
    if not (folder / "economize").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, f"economize=={VERSION}"], check=True)


class Economize(System):
    """`exits`: dyndepth's decisions and heads; else softmax confidence as it comes."""

    system = "economize"

    def __init__(self, folder: Path, exits: bool) -> None:
        self.folder, self.exits = folder, exits
        self._made_for: Cell | None = None
        self._model: Any = None
        self.mode = "CALM, dyndepth's exits" if exits else "CALM, softmax"
        self.note = (
            "work counts rows that its layers were given; K,V of skipped layers from their own projections; the first new "
            "token runs every layer"
        )

    def missing(self) -> str | None:
        return None if (self.folder / "economize").is_dir() else "not installed: run with --with-economize"

    def refuses(self, cell: Cell) -> str | None:
        if self.exits:
            return Naive(True).refuses(cell)  # the same view of exits
        return None if exit_points(cell.exits) else "there is no exit to start judging from"

    def generate(self, cell: Cell, new_tokens: int, forced: Tensor | None = None) -> Output:
        with torch.no_grad(), backend("torch"):
            wrapped = self._wrapped(cell)
            selector = Selector(end_ids(cell.model), forced)
            if forced is None:
                results = wrapped.decode_batch(cell.prompts, new_tokens, selector=selector)
                return Output(torch.stack([result.tokens for result in results]))
            with counting(cell.model, cell.width) as count:
                wrapped.decode_batch(cell.prompts, new_tokens, selector=selector)
        share = count.rows / (cell.batch * new_tokens * cell.layers)
        return Output(torch.stack(selector.said, dim=1), share)

    def _wrapped(self, cell: Cell) -> Any:
        """The model with the technique attached (it registers nothing on the model's modules), kept for the cell."""
        if self._made_for is not cell:
            economize = _imported(self.folder)
            config = _technique(economize)() if self.exits else _calm(economize, cell)
            self._model = economize.apply(cell.model, config)
            self._made_for = cell
            if self.exits:
                next(iter(self._model.techniques.values())).exits = _Exits(cell)
        return self._model


class Selector:
    """Greedy without end-of-sequence tokens; or the forced tokens, noting the arg max."""

    greedy = True

    def __init__(self, ends: list[int], forced: Tensor | None) -> None:
        self.ends, self.forced = ends, forced
        self.said: list[Tensor] = []

    def __call__(self, logits: Tensor, history: Tensor) -> int:
        return int(self.select_many(logits[None])[0])

    def select_many(self, logits: Tensor) -> Tensor:
        if self.forced is None:
            return suppressed(logits, self.ends).argmax(-1)
        self.said.append(logits.argmax(-1))
        return self.forced[:, len(self.said) - 1]


class _Exits:
    """dyndepth's bands as the technique asks for them: who leaves after a layer, and the state its head reads from then on."""

    def __init__(self, cell: Cell) -> None:
        self.bands = {band.leave: band for band in cell.exits.prepared(cell.model.device, cell.model.dtype)}
        self.layers = cell.layers
        self.norm: Any = cell.model.get_decoder().norm
        self.head: Any = cell.model.get_output_embeddings()
        words = {leave: band.shortlist for leave, band in self.bands.items()}
        self.words = {leave: None if ids is None else self.head.weight[ids] for leave, ids in words.items()}

    def leaves(self, band: Band, hidden: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """bool [n] of residuals [n, d], and states [n, d] whose final norm points where the head-ready rows point."""
        ready = band.head_or_norm()(hidden, self.norm)
        rows = torch.arange(hidden.shape[0], dtype=torch.int32)
        words = self.words[band.leave]
        view = View(
            hidden=hidden, seq=rows, step=step, previous=None,
            stats=lambda: stats_of_logits(self.head(ready) if words is None else nn.functional.linear(ready, words)),
            depth=None, leave=band.leave, layers=self.layers,
        )  # fmt: skip
        # Its readout is the model's own norm and head: RMSNorm of ready / gain is ready up to a factor per row.
        return band.criterion.leaves(view, band.thresholds(step)), ready / self.norm.weight


def _imported(folder: Path) -> Any:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # behind ours: only what we lack comes from there
    return importlib.import_module("economize")


def _calm(economize: Any, cell: Cell) -> Any:
    return importlib.import_module(f"{economize.__name__}.techniques.dynamic_depth").CalmConfig(
        min_layer=min(exit_points(cell.exits))
    )


_made: list[Any] = []


def _technique(economize: Any) -> Any:
    """The configuration class of CALM with dyndepth's exits, registered on first use."""
    if _made:
        return _made[0]
    import dataclasses

    calm = importlib.import_module(f"{economize.__name__}.techniques.dynamic_depth.calm")
    base = importlib.import_module(f"{economize.__name__}.techniques.dynamic_depth.base")

    @dataclasses.dataclass(frozen=True)
    class Config(calm.TechniqueConfig):  # type: ignore[name-defined]
        technique = "dyndepth_exits"

    class Policy(calm.CalmPolicy):  # type: ignore[name-defined]
        """CALM's bookkeeping, our decisions; at the top, rows that left show what their heads read."""

        def __init__(self, technique: Any) -> None:
            base.DepthPolicy.__init__(self, technique.adapter.num_layers, base.GENERATION_PHASES)
            self.technique = technique
            self.exited: Tensor | None = None

        def begin_pass(self, hidden: Tensor, ctx: Any) -> None:
            self.exited = torch.zeros(hidden.shape[:2], dtype=torch.bool)
            self.shown = torch.zeros_like(hidden)
            self.steps = self.generated_positions(hidden, ctx).int() + 1

        def transform(self, index: int, x: Tensor, out: Tensor, ran: Tensor | None, ctx: Any) -> Tensor | None:
            exits, exited = self.technique.exits, self.exited
            assert exited is not None
            band = exits.bands.get(index)
            if band is not None and not bool(exited.all()):
                live = base.valid_mask(out, ctx) & ~exited
                leaves, shown = exits.leaves(band, out[live], self.steps[live])
                going = live.clone()
                going[live] = leaves
                self.shown[going] = shown[leaves]
                self.exited = exited | going
            return torch.where(exited[..., None], self.shown, out) if index == exits.layers else None

    class Technique(base.DepthTechnique):  # type: ignore[name-defined]
        name = Config.technique
        config_class = Config
        order = 34

        def make_policy(self) -> Any:
            return Policy(self)

    calm.register_technique(Technique)
    _made.append(Config)
    return Config
