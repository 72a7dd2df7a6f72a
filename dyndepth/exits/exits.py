"""Exits: the bands of one model, kept in safetensors + JSON."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dyndepth.errors import ExitsError
from dyndepth.exits.band import Band
from dyndepth.exits.codec import band_from_json, band_to_json
from dyndepth.files import replacing

FORMAT, VERSION = "dyndepth-exits", 1
MANIFEST = "exits.json"


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What exits were made for. `fingerprint` samples weights (dyndepth.runtime.fingerprint); empty means unchecked."""

    model_type: str
    layers: int
    width: int
    vocab_size: int
    fingerprint: tuple[tuple[float, ...], ...] = ()


class Exits:
    """Bands in ascending order of `leave`, at most one per boundary, and the facts of the model they were made for.

    `record` is whatever the maker wants to remember (data hashes, measured agreement); it must be plain JSON.
    """

    def __init__(self, bands: Iterable[Band], model: ModelFacts, record: dict[str, Any] | None = None) -> None:
        self.bands = sorted(bands, key=lambda band: band.leave)
        self.model = model
        self.record = record or {}
        self._prepared: dict[tuple[torch.device, torch.dtype], Exits] = {}
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

    def prepared(self, device: torch.device, dtype: torch.dtype) -> Exits:
        """A copy whose maps have the model's dtype and device (routers stay fp32), made once per pair."""
        key = (device, dtype)
        if key not in self._prepared:
            bands = copy.deepcopy(self.bands)
            for band in bands:
                for part in (band.head, band.jump, band.kv):
                    if part is not None:
                        part.to(device=device, dtype=dtype)
                if band.router is not None:
                    band.router.to(device=device, dtype=torch.float32)
                if band.shortlist is not None:
                    band.shortlist.data = band.shortlist.data.to(device)
            self._prepared[key] = Exits(bands, self.model, self.record)
        return self._prepared[key]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `exits.json` and one safetensors file. An existing set is replaced in one step, or not at all."""
        folder = Path(folder)
        tensors = {
            f"{number}.{name}": value.detach().cpu().contiguous().clone()  # safetensors refuses shared memory
            for number, band in enumerate(self.bands)
            for name, value in band.state_dict().items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        # The manifest names the tensor file by content, so that renaming the manifest switches both at once.
        staged = folder / "exits.safetensors.staged"
        with replacing(staged) as temporary:
            save_file(tensors, temporary)
        digest = hashlib.sha256(staged.read_bytes()).hexdigest()
        data = folder / f"exits-{digest[:16]}.safetensors"
        staged.replace(data)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "model": dataclasses.asdict(self.model),
            "bands": [band_to_json(band) for band in self.bands],
            "record": self.record,
            "tensors": {"file": data.name, "sha256": digest},
        }
        with replacing(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n")
        for old in folder.glob("exits-*.safetensors"):
            if old != data:
                old.unlink()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Exits:
        """Read what `save_pretrained` wrote; ExitsError says what is wrong with it. Never runs code from the files."""
        manifest_path = Path(folder) / MANIFEST
        try:
            manifest = json.loads(manifest_path.read_text())
        except FileNotFoundError:
            raise ExitsError(f"exits: {manifest_path} does not exist") from None
        except (OSError, ValueError) as error:
            raise ExitsError(f"exits: {manifest_path} is damaged: {error}") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ExitsError(f"exits: {manifest_path} is not a {FORMAT} file")
        if manifest.get("version") != VERSION:
            raise ExitsError(f"exits: {manifest_path} has version {manifest.get('version')!r}, this dyndepth reads {VERSION}")
        tensors = _load_tensors(manifest_path, manifest)
        try:
            facts = dict(manifest["model"])
            facts["fingerprint"] = tuple(tuple(group) for group in facts["fingerprint"])
            model = ModelFacts(**facts)
            bands = [band_from_json(entry, _part(tensors, f"{number}.")) for number, entry in enumerate(manifest["bands"])]
            used = sum(len(band.state_dict()) for band in bands)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            if isinstance(error, ExitsError):
                raise
            raise ExitsError(f"exits: {manifest_path} is damaged: {type(error).__name__}: {error}") from error
        if used != len(tensors):
            raise ExitsError(f"exits: {manifest_path} describes {used} tensors, the file holds {len(tensors)}")
        return cls(bands, model, manifest.get("record") or {})


def _load_tensors(manifest_path: Path, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    try:
        # Only the name counts: a manifest cannot point outside its folder.
        path = manifest_path.parent / Path(manifest["tensors"]["file"]).name
        digest = manifest["tensors"]["sha256"]
        content = path.read_bytes()
    except (KeyError, TypeError, OSError) as error:
        raise ExitsError(f"exits: the tensors of {manifest_path} cannot be read: {error}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise ExitsError(f"exits: {path} is truncated or was changed (its SHA-256 is not the manifest's)")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ExitsError(f"exits: {path} is damaged: {error}") from error


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
