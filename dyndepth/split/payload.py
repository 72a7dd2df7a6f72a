"""Payloads: samples and answers as safetensors, and what a side accepts of the other's.

Samples travel packed, so padding never does: `hidden` [tokens, d] in the chosen precision, with `scale` fp32 [tokens] for
int8; `lengths` and `ids` int64 [n]; `boundary` int64 [1]; `depth` int64 [n] where the call asked for depths; what criteria and
layers carry as `carried.<name>` and `inputs.<name>`, [n, ...], in their own dtypes. Answers: `logits`, `lengths`, `ids`,
`exit_layers` int64 [n], and `work` int64 [L], samples x layers that ran there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dyndepth.encoders import Departure, Samples
from dyndepth.errors import ArgumentError, SplitError
from dyndepth.split.frames import HEADER, Limits

#: How residuals travel. fp32, bf16 and fp16 are casts; int8 is one symmetric scale per token, max |h| / 127.
WIRES = ("fp32", "bf16", "fp16", "int8")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
#: safetensors' names, in the order in which it sorts tensors (last first, then by name).
_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip

#: dtype and shape of every tensor of a payload.
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def frame_bytes(layout: Layout) -> int:
    """Bytes of the frame that carries tensors of these dtypes and shapes, without having them."""
    order = list(_NAMES)
    entries, offset = {}, 0
    for name in sorted(layout, key=lambda name: (-order.index(layout[name][0]), name)):
        dtype, shape = layout[name]
        end = offset + dtype.itemsize * int(torch.Size(shape).numel())
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    described = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return HEADER + 8 + (described + 7) // 8 * 8 + offset


def layout_of(samples: Samples, wire: str, *, depth: bool = False) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What `encode` sends of these samples."""
    n, tokens = samples.count, samples.total
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "hidden": (_DTYPES[_known(wire)], (tokens, samples.hidden.shape[-1])),
        "lengths": (torch.int64, (n,)),
        "ids": (torch.int64, (n,)),
        "boundary": (torch.int64, (1,)),
    }
    if wire == "int8":
        found["scale"] = (torch.float32, (tokens,))
    if depth:
        found["depth"] = (torch.int64, (n,))
    for kind, values in (("carried", samples.carried), ("inputs", samples.inputs)):
        found.update({f"{kind}.{name}": (value.dtype, tuple(value.shape)) for name, value in values.items()})
    return found


def _known(wire: str) -> str:
    if wire not in WIRES:
        raise ArgumentError(f"split: wire must be one of {', '.join(WIRES)}, got {wire!r}")
    return wire


def encode(samples: Samples, wire: str, depth: Tensor | None = None) -> bytes:
    """Samples as a payload; `depth` int64 [n] goes along. ArgumentError where the precision cannot hold a residual."""
    tokens = samples.tokens().detach()
    tensors = {"lengths": samples.lengths, "ids": samples.ids, "boundary": torch.tensor([samples.boundary])}
    if _known(wire) == "int8":
        tensors["hidden"], tensors["scale"] = quantised(tokens)
    else:
        tensors["hidden"] = tokens.to(_DTYPES[wire])
    checked = tensors["scale"] if wire == "int8" else tensors["hidden"]
    if not bool(torch.isfinite(checked).all()):
        largest = float(tokens.float().abs().max())
        raise ArgumentError(f"split: residuals after layer {samples.boundary} reach {largest:g}, {wire!r} cannot hold it")
    if depth is not None:
        tensors["depth"] = depth.long()
    for kind, values in (("carried", samples.carried), ("inputs", samples.inputs)):
        tensors.update({f"{kind}.{name}": value for name, value in values.items()})
    return saved(tensors)


def quantised(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [tokens, d], fp32 [tokens]): each row over max |row| / 127, rounded to nearest; rows of zeros have scale 0."""
    values = tokens.float()
    scale = values.abs().amax(1) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return (values * inverse[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def saved(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors in safetensors' format."""
    from safetensors.torch import save

    # Clones: safetensors refuses tensors that share memory, as slices of one buffer do.
    return save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})


def loaded(payload: bytes) -> dict[str, Tensor]:
    """What `saved` made; SplitError for anything else.

    Copies: in a payload tensors begin anywhere, and bits of a product can depend on where its operand begins (MKL's do).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return {name: value.clone() for name, value in load(payload).items()}
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise SplitError(f"payload: not a safetensors file: {type(error).__name__}: {error}") from error


def decode(
    payload: bytes,
    *,
    boundary: int,
    width: int,
    carried: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    inputs: Mapping[str, tuple[torch.dtype, tuple[int | None, ...]]],
    dtype: torch.dtype,
    packed: bool,
    limits: Limits,
) -> tuple[Samples, Tensor | None]:
    """(samples at `boundary` in this side's dtype and layout, depths asked for); SplitError says what does not fit.

    `carried` has the dtype and the shape per sample of everything that criteria below `boundary` leave, `inputs` those of what
    layers leave (`EncoderFamily.inputs_at`); nothing else is taken.
    """
    tensors = loaded(payload)
    ids = _counted(tensors, limits)
    n = len(ids)
    lengths = _taken(tensors, "lengths", torch.int64, (n,))
    if int(lengths.min()) < 1 or int(lengths.max()) > limits.payload_bytes:
        raise SplitError("payload: lengths must be at least 1 and below the limit of bytes")
    came = int(_taken(tensors, "boundary", torch.int64, (1,))[0])
    if came != boundary:
        raise SplitError(f"payload: samples must be at boundary {boundary}, got {came}")
    hidden = _residuals(tensors, int(lengths.sum()), width)
    depth = _taken(tensors, "depth", torch.int64, (n,)) if "depth" in tensors else None
    state = {name: _taken(tensors, f"carried.{name}", kind, (n, *shape)) for name, (kind, shape) in carried.items()}
    left = {name: _fitting(tensors, f"inputs.{name}", kind, (n, *shape)) for name, (kind, shape) in inputs.items()}
    _finished(tensors)
    samples = Samples(hidden.to(dtype), lengths, ids, boundary, state, left)
    if not packed:
        slab = n * int(lengths.max()) * width * dtype.itemsize  # one long sample among many short ones takes much room
        if slab > 8 * limits.payload_bytes:
            raise SplitError(f"payload: samples would take {slab} bytes padded, the limit is {8 * limits.payload_bytes}")
        samples.hidden = samples.padded()
    return samples, depth


def _residuals(tensors: dict[str, Tensor], tokens: int, width: int) -> Tensor:
    kind = tensors["hidden"].dtype if "hidden" in tensors else torch.float32
    if kind not in _DTYPES.values():
        raise SplitError(f"payload: hidden must be one of {', '.join(WIRES)}, got {kind}")
    hidden = _taken(tensors, "hidden", kind, (tokens, width))
    if kind == torch.int8:
        scale = _taken(tensors, "scale", torch.float32, (tokens,))
        hidden = hidden.float() * scale[:, None]
    if not bool(torch.isfinite(hidden).all()):
        raise SplitError("payload: hidden holds NaN or infinity")
    return hidden


def _counted(tensors: dict[str, Tensor], limits: Limits) -> Tensor:
    ids = tensors.pop("ids", torch.zeros(0))
    if ids.dtype != torch.int64 or ids.dim() != 1 or not 1 <= len(ids) <= limits.samples:
        raise SplitError(f"payload: ids must be int64 [1..{limits.samples}], got {_said(ids)}")
    if int(ids.min()) < 0 or int(ids.max()) >= limits.samples or len(ids.unique()) != len(ids):
        raise SplitError(f"payload: ids must be different numbers in [0, {limits.samples})")
    return ids


def _taken(tensors: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if name not in tensors:
        raise SplitError(f"payload: {name} is missing")
    value = tensors.pop(name)
    if value.dtype != dtype or tuple(value.shape) != shape:
        raise SplitError(f"payload: {name} must be {str(dtype).removeprefix('torch.')} {list(shape)}, got {_said(value)}")
    return value


def _fitting(tensors: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> Tensor:
    """As `_taken`, where None in `shape` is for any extent; floating point must be finite, as residuals must."""
    came = tuple(tensors[name].shape) if name in tensors else ()
    whole = tuple((came[at] if at < len(came) else 0) if extent is None else extent for at, extent in enumerate(shape))
    value = _taken(tensors, name, dtype, whole)
    if dtype.is_floating_point and not bool(torch.isfinite(value).all()):
        raise SplitError(f"payload: {name} holds NaN or infinity")
    return value


def _said(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _finished(tensors: Mapping[str, Any]) -> None:
    if tensors:
        raise SplitError(f"payload: nobody asked for {', '.join(sorted(tensors))}")


def encode_answers(departures: list[Departure], work: list[int]) -> bytes:
    """Answers as a payload."""
    layers = torch.cat([torch.full_like(departed.ids, departed.boundary) for departed in departures])
    return saved(
        {
            "logits": torch.cat([departed.answers for departed in departures]),
            "ids": torch.cat([departed.ids for departed in departures]),
            "lengths": torch.cat([departed.lengths for departed in departures]),
            "exit_layers": layers,
            "work": torch.tensor(work),
        }
    )


def decode_answers(
    payload: bytes, samples: Samples, *, depth: int, classes: int, per_token: bool, limits: Limits
) -> tuple[list[Departure], Tensor]:
    """(departures, samples x layers int64 [depth]) for the samples that were sent; SplitError says what does not fit."""
    tensors = loaded(payload)
    ids = _counted(tensors, limits)
    n = len(ids)
    if n != samples.count or not torch.equal(ids.sort().values, samples.ids.sort().values):
        raise SplitError(f"payload: answers must be of the {samples.count} samples that were sent, got {n} others")
    lengths = _taken(tensors, "lengths", torch.int64, (n,))
    found, wanted = lengths[ids.argsort()], samples.lengths[samples.ids.argsort()]
    # Encoders that merge tokens have fewer of them above; answers per token are of the tokens that were sent.
    fits = torch.equal(found, wanted) if per_token else bool(((found >= 1) & (found <= wanted)).all())
    if not fits:
        raise SplitError("payload: answers must have the lengths of the samples that were sent")
    layers = _taken(tensors, "exit_layers", torch.int64, (n,))
    if int(layers.min()) <= samples.boundary or int(layers.max()) > depth:
        raise SplitError(f"payload: exit_layers must be above {samples.boundary} and at most {depth}, got {layers.tolist()}")
    work = _taken(tensors, "work", torch.int64, (depth,))
    kind = tensors["logits"].dtype if "logits" in tensors else torch.float32
    logits = _taken(tensors, "logits", kind, (int(lengths.sum()) if per_token else n, classes))
    if not kind.is_floating_point or bool(torch.isnan(logits).any()):
        raise SplitError("payload: logits must be floating point without NaN")
    _finished(tensors)
    starts = lengths.cumsum(0) - lengths
    departures = []
    for layer in layers.unique().tolist():
        rows = (layers == layer).nonzero()[:, 0]
        at = rows
        if per_token:
            at = torch.cat([torch.arange(int(starts[row]), int(starts[row] + lengths[row])) for row in rows.tolist()])
        departures.append(Departure(ids[rows], logits[at], lengths[rows], layer))
    return departures, work
