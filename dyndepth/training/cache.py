"""The teacher cache: what the frozen model computes on a corpus, once, on disk; heads are trained from it without the model.

A folder holds `manifest.json` (what is cached, written first) and one safetensors file per shard of whole sequences, each
written under a temporary name and renamed: a shard is there in full or not at all, and building again goes on where a killed
run stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dyndepth.closed_form.trace import trace
from dyndepth.data import Piece, check_ids
from dyndepth.errors import ArgumentError, CacheError
from dyndepth.exits import ModelFacts
from dyndepth.files import replacing, sweep
from dyndepth.runtime.bind import Model
from dyndepth.runtime.fingerprint import facts_of
from dyndepth.runtime.score import HEAD_ROWS

FORMAT, VERSION = "dyndepth-teacher-cache", 1
MANIFEST = "manifest.json"
_SHARD_ROWS = 8192
#: Tokens that tell whether a model still computes what it did, and how far half precision may move that.
_PROBE_TOKENS, _PROBE_NOISE = 16, 0.05
#: Disk left free beside the cache: whatever else runs on the machine needs some.
_SPARE = 1 << 28


@dataclass(frozen=True)
class Shard:
    """Rows of whole sequences. Tensors are mapped from the file: reading a part reads that part of the disk."""

    tokens: Tensor  # int32 [rows]
    lengths: Tensor  # int32 [sequences]
    start: Tensor  # int32 [sequences], first position that generation would judge
    residual: dict[int, Tensor]  # per boundary [rows, d], the model's dtype
    ready: Tensor  # [rows, ready], head-ready rows of the full model
    answers: Tensor  # int32 [rows], the full model's arg max: where logits tie, the one that generation takes
    top_ids: Tensor  # int32 [rows, k], most likely first
    top_logits: Tensor  # float32 [rows, k]
    logsumexp: Tensor  # float32 [rows], over the whole vocabulary

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class TeacherCache:
    """An opened cache; `build` makes one, `open` reads one."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def boundaries(self) -> list[int]:
        return list(self.manifest["boundaries"])

    @property
    def rows(self) -> int:
        return int(self.manifest["rows"])

    @property
    def facts(self) -> ModelFacts:
        entry = self.manifest["model"]
        return ModelFacts(**{**entry, "fingerprint": tuple(map(tuple, entry["fingerprint"]))})

    def __len__(self) -> int:
        """Number of shards."""
        return len(self.manifest["shards"])

    def __iter__(self) -> Iterator[Shard]:
        return (self.shard(number) for number in range(len(self)))

    def shard(self, number: int) -> Shard:
        """Map one shard."""
        path = self.folder / _name(number)
        tensors = _read(path, self.manifest, number)
        residual = {e: tensors.pop(f"residual.{e}") for e in self.boundaries}
        return Shard(residual=residual, **tensors)

    @classmethod
    def open(cls, folder: str | Path) -> TeacherCache:
        """A finished cache; CacheError says what is missing or wrong."""
        folder = Path(folder)
        manifest = _manifest(folder)
        missing = [n for n in range(len(manifest["shards"])) if not (folder / _name(n)).exists()]
        if missing:
            raise CacheError(
                f"teacher cache: {folder} lacks {len(missing)} of {len(manifest['shards'])} shards; build it again"
            )
        return cls(folder, manifest)

    @classmethod
    def build(
        cls,
        model: Model,
        pieces: Sequence[Piece],
        boundaries: Sequence[int],
        folder: str | Path,
        *,
        top: int = 32,
        shard_rows: int = _SHARD_ROWS,
        say: Callable[[str], None] = lambda text: None,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> TeacherCache:
        """Run the model over the pieces and keep what training needs; what an earlier run finished is kept.

        Args:
            pieces: sequences, in the order they are stored.
            boundaries: exit points whose residuals are kept.
            top: teacher logits kept per row, beside the log-sum-exp over all.
            shard_rows: rows per file, at least (sequences stay whole).
            say, advance: told the size before the work starts, and rows as they are done.

        Raises:
            CacheError: the folder holds the cache of something else, or the disk cannot hold this one.
        """
        folder = Path(folder)
        manifest = _plan(model, pieces, boundaries, top, shard_rows)
        done = _finished(folder, manifest)
        size = sum(shard["bytes"] for n, shard in enumerate(manifest["shards"]) if n not in done)
        say(f"teacher cache: {manifest['rows']} rows, {size / 2**20:.0f} MiB to write to {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if size and size + _SPARE > free:
            raise CacheError(
                f"teacher cache: wanted {(size + _SPARE) / 2**20:.0f} MiB of disk in {folder}, got {free / 2**20:.0f} MiB; "
                "fewer tokens or boundaries make it smaller"
            )
        sweep(folder)
        with replacing(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1) + "\n")
        at = 0
        for number, shard in enumerate(manifest["shards"]):
            part = pieces[at : at + shard["sequences"]]
            at += shard["sequences"]
            if number not in done:
                tensors = _computed(model, part, manifest["boundaries"], manifest["top"], advance)
                with replacing(folder / _name(number)) as temporary:
                    save_file(tensors, temporary, metadata=_metadata(manifest, number))
            else:
                advance(shard["rows"])
        return cls(folder, manifest)


def _plan(model: Model, pieces: Sequence[Piece], boundaries: Sequence[int], top: int, shard_rows: int) -> dict[str, Any]:
    """The manifest: everything that decides what the shards hold."""
    wanted = sorted(set(boundaries))
    if not wanted or not all(1 <= e < model.depth for e in wanted):
        raise ArgumentError(f"teacher cache: boundaries must be in [1, {model.depth}), got {list(boundaries)}")
    if not pieces or any(piece.tokens.shape[0] < 2 for piece in pieces):
        raise ArgumentError(f"teacher cache: pieces must be sequences of at least two tokens, got {len(pieces)} pieces")
    if not 1 <= top <= model.vocab_size or shard_rows < 1:
        raise ArgumentError(
            f"teacher cache: wanted top in [1, {model.vocab_size}] and shard_rows >= 1, got {top} and {shard_rows}"
        )
    check_ids([piece.tokens for piece in pieces], model.vocab_size, "teacher cache: pieces")
    digest = hashlib.sha256()
    shards: list[dict[str, int]] = [{"sequences": 0, "rows": 0}]
    for piece in pieces:
        if shards[-1]["rows"] >= shard_rows:
            shards.append({"sequences": 0, "rows": 0})
        shards[-1]["sequences"] += 1
        shards[-1]["rows"] += piece.tokens.shape[0]
        digest.update(f"{piece.start}:".encode() + piece.tokens.numpy().tobytes())
    row = model.dtype.itemsize * (model.hidden_size * len(wanted) + model.ready_size) + 8 * top + 12
    for shard in shards:
        shard["bytes"] = shard["rows"] * row + shard["sequences"] * 8
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": json.loads(json.dumps(dataclasses.asdict(facts_of(model)))),
        "dtype": str(model.dtype).removeprefix("torch."),
        "boundaries": wanted,
        "top": top,
        "rows": sum(shard["rows"] for shard in shards),
        "tokens_sha256": digest.hexdigest(),
        "probe": _probe(model, pieces[0].tokens[:_PROBE_TOKENS]),
        "shards": shards,
    }


def _probe(model: Model, tokens: Tensor) -> list[float]:
    """What the model says of a few tokens: the start of the head-ready row of each."""
    ready = next(iter(trace(model, [tokens], (), ()))).ready
    return [float(f"{value:.6g}") for value in ready[:, :16].float().flatten().tolist()]


def _finished(folder: Path, manifest: dict[str, Any]) -> set[int]:
    """Shards of this very plan that are there; refuses a folder that holds something else."""
    if not (folder / MANIFEST).exists():
        if any(folder.glob("shard-*")):
            raise CacheError(f"teacher cache: {folder} holds shards without a manifest; choose another folder or remove it")
        return set()
    old = _manifest(folder)
    different = sorted(key for key in manifest if key != "probe" and old.get(key) != manifest[key])
    # What the model computes counts, too: adapters and quantised weights are wrapped, and no fingerprint looks inside them.
    seen, now = torch.tensor(old.get("probe", [])), torch.tensor(manifest["probe"])
    if seen.shape != now.shape or float((seen - now).pow(2).mean().sqrt()) > _PROBE_NOISE * float(now.pow(2).mean().sqrt()):
        different.append("outputs of the model")
    manifest["probe"] = old.get("probe", manifest["probe"])
    if different:
        raise CacheError(
            f"teacher cache: {folder} holds another cache (its {', '.join(different)} differ); choose another folder or "
            "remove it"
        )
    found = set()
    for number in range(len(manifest["shards"])):
        if (folder / _name(number)).exists():
            _read(folder / _name(number), manifest, number)
            found.add(number)
    return found


def _computed(
    model: Model, pieces: Sequence[Piece], boundaries: Sequence[int], top: int, advance: Callable[[int], None]
) -> dict[str, Tensor]:
    tokens = [piece.tokens for piece in pieces]
    parts: dict[str, list[Tensor]] = {}

    def keep(**values: Tensor) -> None:
        for name, value in values.items():
            parts.setdefault(name, []).append(value.cpu())

    for chunk in trace(model, tokens, boundaries, (), advance=advance):
        keep(ready=chunk.ready, **{f"residual.{e}": chunk.residual[e] for e in boundaries})
        for rows in chunk.ready.split(HEAD_ROWS):
            logits = model.logits(rows)
            best = logits.topk(top, dim=-1)
            keep(
                answers=model.argmax(rows).int(), top_ids=best.indices.int(), top_logits=best.values,
                logsumexp=logits.logsumexp(-1),
            )  # fmt: skip
    tensors = {name: torch.cat(values) for name, values in parts.items()}
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ArgumentError(f"teacher cache: the model's {name} are not finite; nothing can be learned from them")
    return tensors | {
        "tokens": torch.cat(tokens).int(),
        "lengths": torch.tensor([text.shape[0] for text in tokens], dtype=torch.int32),
        "start": torch.tensor([piece.start for piece in pieces], dtype=torch.int32),
    }


def _read(path: Path, manifest: dict[str, Any], number: int) -> dict[str, Tensor]:
    """Tensors of a shard, mapped; CacheError when the file is not what the manifest says."""
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != _metadata(manifest, number):
                raise CacheError(f"teacher cache: {path} belongs to another cache")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except (OSError, SafetensorError) as error:
        raise CacheError(f"teacher cache: {path} is damaged ({error}); remove it and build again") from error
    if tensors["tokens"].shape[0] != manifest["shards"][number]["rows"]:
        raise CacheError(f"teacher cache: {path} has {tensors['tokens'].shape[0]} rows, the manifest says otherwise")
    return tensors


def _metadata(manifest: dict[str, Any], number: int) -> dict[str, str]:
    whole = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return {"cache": f"{FORMAT} {whole} shard {number}"}  # one entry: several would be written in any order


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise CacheError(f"teacher cache: {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise CacheError(f"teacher cache: {path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise CacheError(f"teacher cache: {path} is not a {FORMAT} of version {VERSION}")
    if math.prod(len(manifest.get(key) or ()) for key in ("boundaries", "shards")) == 0:
        raise CacheError(f"teacher cache: {path} is damaged: no boundaries or shards")
    return manifest


def _name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"
