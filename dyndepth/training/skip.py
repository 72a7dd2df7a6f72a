"""The maps of a band as a student: rows skip it by lot, and the rows that see what was put in their place are judged."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dyndepth.errors import ArgumentError
from dyndepth.exits import Band
from dyndepth.exits.products import EPS
from dyndepth.ops._math import rms_normalise
from dyndepth.runtime.bind import Model
from dyndepth.training.batches import Batch
from dyndepth.training.stack import run_layer


class Maps(nn.Module):
    """What is trained of one band: its K,V maps and, if it resumes, its jump."""

    def __init__(self, band: Band) -> None:
        super().__init__()
        if band.kv is None:
            raise ArgumentError(f"train: band [{band.leave}, {band.resume}) has no K,V maps to start from; fit it first")
        self.leave, self.resume = band.leave, band.resume
        self.kv, self.jump = copy.deepcopy(band.kv), copy.deepcopy(band.jump)


class SkipStudent(nn.Module):
    """Frozen layers above a boundary, run on sequences of which a share of the rows skips the band.

    An early exit's rows are gone, so the others are judged: how far their output moves from the full model's is the harm done
    by the K,V put in the place of the exact. Rows of a band that resumes go on and are judged too. The two kinds have
    different rows to judge and are trained apart.

    Args:
        share: chance of a judged row to skip; every row draws anew at every step.
    """

    def __init__(self, model: Model, bands: Iterable[Band], share: float, seed: int) -> None:
        super().__init__()
        chosen = list(bands)
        if not 0 < share < 1:
            raise ArgumentError(f"train: share must be in (0, 1), got {share}")
        self.resumes = any(band.resume < model.depth for band in chosen)
        if not chosen or any((band.resume < model.depth) != self.resumes for band in chosen):
            raise ArgumentError("train: wanted bands that all end the network or all resume; train the two kinds apart")
        self.heads = nn.ModuleDict({str(band.leave): Maps(band) for band in chosen})
        self.to(device=model.device, dtype=torch.float32).requires_grad_(True)
        self.share, self.seed = share, seed
        self._model = [model]  # in a list, so that it does not become a submodule

    def rows(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """bool [rows] each: which rows are judged, and which skip the band at this step."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_039 + step) % (1 << 63))
        drawn = torch.rand(batch.judged.shape[0], generator=generator).to(batch.judged.device) < self.share
        away = batch.judged & drawn
        return (batch.judged if self.resumes else batch.judged & ~away), away

    def forward(self, batch: Batch, which: Tensor, away: Tensor) -> dict[int, Tensor]:
        """Per band, head-ready rows [count, ready] of the rows where `which` is true."""
        found = {}
        for leave, maps in self.heads.items():
            assert isinstance(maps, Maps)
            found[int(leave)] = self._ready(maps, batch, which, away)
        return found

    def _ready(self, maps: Maps, batch: Batch, which: Tensor, away: Tensor) -> Tensor:
        model = self._model[0]
        left = batch.padded(maps.leave)
        gone = nn.utils.rnn.pad_sequence(list(away.split(batch.lengths)), batch_first=True)
        cos, sin = model.rotary_tables(left.shape[1])
        x = rms_normalise(left, EPS).to(left.dtype)
        if maps.kv.down is not None:
            x = nn.functional.linear(x, maps.kv.down)
        hidden = left
        for at in range(maps.leave, model.depth):
            layer = model.layers[at]
            if at >= maps.resume:
                if at == maps.resume and maps.jump is not None:
                    hidden = torch.where(gone[..., None], maps.jump(left).to(left.dtype), hidden)
                hidden = run_layer(layer, hidden, cos, sin)
                continue
            weight, bias = maps.kv.weight[at - maps.leave], maps.kv.bias[at - maps.leave]
            key, value = (
                nn.functional.linear(x, weight[part], bias[part]).unflatten(-1, (layer.kv_heads, layer.head_dim))
                for part in (0, 1)
            )
            hidden = run_layer(layer, hidden, cos, sin, away=gone, key=key, value=value)
        return model.finish(batch.unpadded(hidden)[which])
