"""Bands to and from JSON: structure here, weights in the tensors beside it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.errors import ExitsError
from dyndepth.exits.band import Band
from dyndepth.exits.criteria import CRITERIA, Criterion, Decay, RouterScore
from dyndepth.exits.heads import BlockHead, Head, MlpHead, NormHead, StoredBlock, TranslatorHead
from dyndepth.exits.maps import JUMPS, AdapterJump, Jump, JumpMap, KVMap, MlpJump
from dyndepth.exits.router import Router


def number_to_json(value: float) -> float | str:
    """JSON has no infinity; `float` reads both back."""
    return value if math.isfinite(value) else str(value)


def band_to_json(band: Band) -> dict[str, Any]:
    criterion: dict[str, Any] = {"kind": band.criterion.kind}
    criterion.update(
        {f.name: getattr(band.criterion, f.name) for f in dataclasses.fields(band.criterion) if f.name != "router"}
    )
    if band.router is not None:
        criterion["router"] = {
            "neurons": band.router.weight1.shape[0],
            "width": band.router.weight1.shape[1],
            "silu": band.router.silu,
            "cosine": band.router.cosine_weight is not None,
            "stats": band.router.stats_weight is not None,
            "history": list(band.router.history),
        }
    return {
        "leave": band.leave,
        "resume": band.resume,
        "criterion": criterion,
        "threshold": number_to_json(band.threshold),
        "decay": None if band.decay is None else dataclasses.asdict(band.decay),
        "head": None if band.head is None else _head_to_json(band.head),
        "shortlist": None if band.shortlist is None else band.shortlist.shape[0],
        "jump": None if band.jump is None else _jump_to_json(band.jump),
        "kv": None if band.kv is None else _kv_to_json(band.kv),
    }  # fmt: skip


def _jump_to_json(jump: Jump) -> dict[str, Any]:
    if isinstance(jump, MlpJump):
        inner, width = jump.up.shape
        return {"kind": jump.kind, "width": width, "inner": inner}
    if isinstance(jump, AdapterJump):
        layers, inner, width = jump.up.shape
        return {"kind": jump.kind, "width": width, "layers": layers, "inner": inner, "linear": jump.linear is not None}
    return {"width": jump.weight.shape[0]}  # as before there were other kinds: older versions read it


def _kv_to_json(kv: KVMap) -> dict[str, int]:
    layers, _, kv_width, _ = kv.weight.shape
    found = {"layers": layers, "kv_width": kv_width, "width": kv.width}
    return found if kv.rank is None else found | {"rank": kv.rank}  # without a rank as before: older versions read it


def _head_to_json(head: Any) -> dict[str, Any]:
    if isinstance(head, TranslatorHead):
        rank, width = (None, head.up.shape[1]) if head.down is None else head.down.shape
        return {"kind": head.kind, "rank": rank, "width": width, "ready": head.up.shape[0]}
    if isinstance(head, MlpHead):
        readout = None if head.readout is None else _head_to_json(head.readout)
        return {"kind": head.kind, "inner": head.up.shape[0], "width": head.up.shape[1], "readout": readout}
    if isinstance(head, BlockHead | StoredBlock):
        return {"kind": head.kind, "source": head.source}
    return {"kind": head.kind}


def band_from_json(entry: dict[str, Any], tensors: dict[str, Tensor]) -> Band:
    """Rebuild a band. Raises ExitsError, KeyError, TypeError or RuntimeError when entry and tensors do not fit."""
    criterion = _criterion(dict(entry["criterion"]))
    jump, kv = entry["jump"], entry["kv"]
    head = None if entry["head"] is None else _head(entry["head"], tensors)
    band = Band(
        entry["leave"],
        entry["resume"],
        criterion,
        threshold=float(entry["threshold"]),
        head=head,
        jump=None if jump is None else _jump(jump),
        kv=None if kv is None else KVMap(kv["layers"], kv["kv_width"], kv["width"], kv.get("rank")),
        decay=None if entry["decay"] is None else Decay(**entry["decay"]),
        shortlist=None if entry["shortlist"] is None else tensors["shortlist"],
    )
    if isinstance(head, StoredBlock):  # it holds its own tensors
        tensors = {name: value for name, value in tensors.items() if not name.startswith("head.")}
    # assign keeps the dtype of the file.
    band.load_state_dict({name: nn.Parameter(value, requires_grad=False) for name, value in tensors.items()}, assign=True)
    _check_finite(band)
    return band


def _criterion(entry: dict[str, Any]) -> Criterion:
    kind, router = entry.pop("kind"), entry.pop("router", None)
    if kind not in CRITERIA:
        raise ExitsError(f"exits: criterion must be one of {', '.join(CRITERIA)}, got {kind!r}")
    known = CRITERIA[kind]
    if issubclass(known, RouterScore):
        if router is None:
            raise ExitsError(f"exits: criterion {kind} without a router")
        options = {name: router[name] for name in ("silu", "cosine", "stats")}
        if any(type(value) is not bool for value in options.values()):
            raise ExitsError(f"exits: router options must be true or false, got {options}")
        history = router.get("history", [])  # files of older versions have none
        if not isinstance(history, list) or any(type(boundary) is not int for boundary in history):
            raise ExitsError(f"exits: history of a router must be a list of boundaries, got {history!r}")
        return known(Router(router["width"], router["neurons"], history=history, **options))
    return known(**entry)


def _jump(entry: dict[str, Any]) -> Jump:
    kind = entry.get("kind", JumpMap.kind)
    if kind == JumpMap.kind:
        return JumpMap(entry["width"])
    if kind == MlpJump.kind:
        return MlpJump(entry["width"], entry["inner"])
    if kind == AdapterJump.kind:
        return AdapterJump(entry["width"], entry["layers"], entry["inner"], entry["linear"])
    raise ExitsError(f"exits: jump must be one of {', '.join(JUMPS)}, got {kind!r}")


def _head(entry: dict[str, Any], tensors: dict[str, Tensor]) -> Head:
    kind = entry["kind"]
    if kind == NormHead.kind:
        return NormHead()
    if kind == TranslatorHead.kind:
        return _translator(entry)
    if kind == MlpHead.kind:
        readout = entry.get("readout")
        return MlpHead(entry["width"], entry["inner"], None if readout is None else _translator(readout))
    if kind == BlockHead.kind:
        if type(entry["source"]) is not int or entry["source"] < 0:
            raise ExitsError(f"exits: source of a block head must be the number of a layer, got {entry['source']!r}")
        stored = {name.removeprefix("head."): value for name, value in tensors.items() if name.startswith("head.")}
        return StoredBlock(stored, entry["source"])
    raise ExitsError(f"exits: head must be norm, translator, mlp or block, got {kind!r}")


def _translator(entry: dict[str, Any]) -> TranslatorHead:
    return TranslatorHead(entry["width"], entry["ready"], entry["rank"])


def _check_finite(band: Band) -> None:
    for name, value in band.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ExitsError(f"exits: band [{band.leave}, {band.resume}): {name} holds NaN or infinity")
