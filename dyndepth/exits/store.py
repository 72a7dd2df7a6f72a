"""The files of a set of exits: a JSON manifest and one safetensors file that it names by content. Never pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from dyndepth.errors import ExitsError
from dyndepth.files import replacing

MANIFEST = "exits.json"


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What exits were made for. `fingerprint` samples weights (dyndepth.runtime.fingerprint); empty means unchecked."""

    model_type: str
    layers: int
    width: int
    #: Width of the answers: tokens of a vocabulary, or classes.
    vocab_size: int
    fingerprint: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def from_json(cls, entry: Any) -> ModelFacts:
        facts = cls(**dict(entry))
        sizes = (facts.layers, facts.width, facts.vocab_size)
        if not isinstance(facts.model_type, str) or any(type(size) is not int or size < 1 for size in sizes):
            raise TypeError(f"model: wanted a type and positive sizes, got {facts.model_type!r}, {sizes}")
        fingerprint = tuple(tuple(float(value) for value in group) for group in facts.fingerprint)
        return dataclasses.replace(facts, fingerprint=fingerprint)


def write(folder: Path, manifest: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write a set into `folder`, replacing an older one in one step, or not at all."""
    old = _tensor_file(folder / MANIFEST)
    folder.mkdir(parents=True, exist_ok=True)
    # The manifest names the tensor file by content, so that renaming the manifest switches both at once.
    # safetensors refuses shared memory, hence the copies.
    content = save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    data = folder / f"exits-{digest[:16]}.safetensors"
    with replacing(data) as temporary:
        temporary.write_bytes(content)
    with replacing(folder / MANIFEST) as temporary:
        whole = {**manifest, "tensors": {"file": data.name, "sha256": digest}}
        temporary.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n")
    if old is not None and old != data:
        old.unlink(missing_ok=True)


def read(folder: Path, form: str, version: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Manifest and tensors of the set in `folder`; ExitsError says what is wrong with it."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise ExitsError(f"exits: {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ExitsError(f"exits: {path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != form:
        raise ExitsError(f"exits: {path} is not a {form} file")
    if manifest.get("version") != version:
        raise ExitsError(f"exits: {path} has version {manifest.get('version')!r}, this dyndepth reads {version}")
    return manifest, _load_tensors(path, manifest)


def _tensor_file(manifest: Path) -> Path | None:
    """The file that an older manifest names, if there is one that can be read."""
    try:
        name = json.loads(manifest.read_text())["tensors"]["file"]
        return manifest.parent / Path(name).name
    except (OSError, ValueError, KeyError, TypeError):
        return None


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


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
