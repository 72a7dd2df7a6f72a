"""Exits: the bands of one model, kept in safetensors + JSON."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dyndepth.errors import ExitsError
from dyndepth.exits import store
from dyndepth.exits.band import Band
from dyndepth.exits.codec import band_from_json, band_to_json
from dyndepth.exits.criteria import Never, RouterScore
from dyndepth.exits.heads import StoredBlock
from dyndepth.exits.store import ModelFacts

FORMAT, VERSION = "dyndepth-exits", 1


class Exits:
    """Bands in ascending order of `leave`, at most one per boundary, and the facts of the model they were made for.

    `record` is whatever the maker wants to remember (data hashes, measured agreement); it must be plain JSON.
    """

    def __init__(self, bands: Iterable[Band], model: ModelFacts, record: dict[str, Any] | None = None) -> None:
        self.bands = sorted(bands, key=lambda band: band.leave)
        self.model = model
        self.record = record or {}
        self._converted: dict[tuple[Any, ...], nn.Module] = {}
        for band in self.bands:
            band.validate(model.layers, model.vocab_size)
        if len(self.bands) > 62:
            raise ExitsError(f"exits: at most 62 bands, got {len(self.bands)}")
        for one, other in zip(self.bands, self.bands[1:], strict=False):
            if one.leave == other.leave:
                raise ExitsError(f"exits: two bands leave at boundary {one.leave}; a boundary has at most one")

    def __iter__(self) -> Iterator[Band]:
        return iter(self.bands)

    def __len__(self) -> int:
        return len(self.bands)

    def __repr__(self) -> str:
        return f"Exits({', '.join(f'[{b.leave}, {b.resume})' for b in self.bands)} of {self.model.layers} layers)"

    def with_thresholds(self, thresholds: float | Iterable[float]) -> Exits:
        """The same exits with other thresholds (one for all bands, or one per band); weights are shared."""
        values = [thresholds] * len(self) if isinstance(thresholds, int | float) else list(thresholds)
        if len(values) != len(self) or any(math.isnan(value) for value in values):
            raise ExitsError(f"with_thresholds: wanted {len(self)} numbers that are not NaN, got {values}")
        bands = []
        for band, value in zip(self.bands, values, strict=True):
            other = copy.copy(band)
            other.threshold = float(value)
            bands.append(other)
        return Exits(bands, self.model, self.record)

    def closed(self) -> Exits:
        """The same exits, but no row leaves."""
        closed = self.with_thresholds(math.inf)
        for band in closed:
            if not band.criterion.scored:  # a threshold does not stop these
                band.criterion = Never()
        return closed

    @property
    def certificate(self) -> dict[str, Any] | None:
        """What dyndepth.calibrate certified; None where there is nothing, or where thresholds were changed since."""
        found = self.record.get("certificate")
        if not isinstance(found, dict):
            return None
        try:
            same = [float(value) for value in found["thresholds"]] == [band.threshold for band in self]
        except (KeyError, TypeError, ValueError):
            return None
        return found if same else None

    def prepared(self, device: torch.device, dtype: torch.dtype) -> Exits:
        """These exits with maps in the model's dtype and device (routers in fp32): what they are now, edits included.

        Modules that fit already are shared; others are converted, and anew when a tensor of theirs was replaced or changed
        in place (through `.data` in place nobody can see: call `.to()` or make new exits).
        """
        bands = []
        kept: dict[tuple[Any, ...], nn.Module] = {}
        for band in self.bands:
            other = copy.copy(band)
            other._modules = dict(band._modules)
            other._parameters = dict(band._parameters)
            for name in ("head", "jump", "kv"):
                part = getattr(band, name)
                if part is not None and not isinstance(part, StoredBlock):  # the runtime restores those for its model
                    setattr(other, name, self._fitting(part, device, dtype, kept))
            if isinstance(band.criterion, RouterScore) and band.router is not None:
                router: Any = self._fitting(band.router, device, torch.float32, kept)
                other.router, other.criterion = router, type(band.criterion)(router)
            if band.shortlist is not None and band.shortlist.device != device:
                other.shortlist = nn.Parameter(band.shortlist.to(device), requires_grad=False)
            bands.append(other)
        self._converted = kept
        return Exits(bands, self.model, self.record)

    def _fitting(
        self, part: nn.Module, device: torch.device, dtype: torch.dtype, kept: dict[tuple[Any, ...], nn.Module]
    ) -> nn.Module:
        tensors = list(part.state_dict().values())
        if all(t.device == device and (t.dtype == dtype or not t.is_floating_point()) for t in tensors):
            return part
        now = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
        key = (id(part), device, dtype, now)
        if key not in kept:
            found = self._converted.get(key)
            kept[key] = copy.deepcopy(part).to(device=device, dtype=dtype) if found is None else found
        return kept[key]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `exits.json` and one safetensors file. An existing set is replaced in one step, or not at all."""
        tensors = {
            f"{number}.{name}": value for number, band in enumerate(self.bands) for name, value in band.state_dict().items()
        }
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "model": dataclasses.asdict(self.model),
            "bands": [band_to_json(band) for band in self.bands],
            "record": self.record,
        }
        store.write(Path(folder), manifest, tensors)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Exits:
        """Read what `save_pretrained` wrote; ExitsError says what is wrong with it. Never runs code from the files."""
        manifest, tensors = store.read(Path(folder), FORMAT, VERSION)
        path = Path(folder) / store.MANIFEST
        try:
            model = ModelFacts.from_json(manifest["model"])
            bands = [band_from_json(entry, store.part(tensors, f"{number}.")) for number, entry in enumerate(manifest["bands"])]
            used = sum(len(band.state_dict()) for band in bands)
            exits = cls(bands, model, dict(manifest.get("record") or {}))
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            if isinstance(error, ExitsError):
                raise
            raise ExitsError(f"exits: {path} is damaged: {type(error).__name__}: {error}") from error
        if used != len(tensors):
            raise ExitsError(f"exits: {path} describes {used} tensors, the file holds {len(tensors)}")
        return exits
