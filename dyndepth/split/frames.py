"""Frames: what goes over a link. A header of 32 bytes with a checked length, then a payload in safetensors' format.

    bytes  0..8   magic b"dynsplit"
           8..10  version, 10..12 kind, 12..16 number of the request       (little endian, unsigned)
          16..24  bytes of the payload
          24..28  CRC-32 of the payload
          28..32  CRC-32 of bytes 0..28

The length is read, and held against the limit, before anything is allocated. The checksums find damage and frames cut short;
they are no protection against somebody who means harm, whom the checks of the payload (dyndepth/split/payload.py) are for.
Nothing is executed from the wire: safetensors holds numbers only.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

from dyndepth.errors import SplitError
from dyndepth.split.links import Link

MAGIC, VERSION = b"dynsplit", 1
_FIELDS = struct.Struct("<8sHHIQI")
_CHECK = struct.Struct("<I")
#: Bytes of a header.
HEADER = _FIELDS.size + _CHECK.size


class Kind(IntEnum):
    """What a frame carries."""

    HELLO = 1
    SAMPLES = 2
    ANSWERS = 3
    ERROR = 4
    BYE = 5


@dataclass(frozen=True)
class Limits:
    """What a side takes from the other: bytes of a payload, samples of a batch."""

    payload_bytes: int = 256 * 2**20
    samples: int = 65536


@dataclass(frozen=True)
class Frame:
    """One message."""

    kind: Kind
    #: Which request it belongs to.
    number: int
    payload: bytes = b""

    @property
    def size(self) -> int:
        """Bytes on the wire."""
        return HEADER + len(self.payload)


def header(frame: Frame) -> bytes:
    """The 32 bytes before the payload."""
    fields = _FIELDS.pack(MAGIC, VERSION, frame.kind, frame.number, len(frame.payload), zlib.crc32(frame.payload))
    return fields + _CHECK.pack(zlib.crc32(fields))


def parsed(data: bytes, limit: int) -> tuple[Kind, int, int, int]:
    """(kind, number, bytes of the payload, its checksum) of a header; SplitError says what is wrong with it."""
    if len(data) != HEADER:
        raise SplitError(f"frame: a header is {HEADER} bytes, got {len(data)}")
    magic, version, kind, number, length, checksum = _FIELDS.unpack(data[: _FIELDS.size])
    if magic != MAGIC:
        raise SplitError(f"frame: wanted {MAGIC!r} at the start, got {magic!r}: the other side does not speak this protocol")
    if _CHECK.unpack(data[_FIELDS.size :])[0] != zlib.crc32(data[: _FIELDS.size]):
        raise SplitError("frame: the header is damaged (checksum)")
    if version != VERSION:
        raise SplitError(f"frame: version must be {VERSION}, got {version}")
    if kind not in set(Kind):
        raise SplitError(f"frame: kind must be one of {', '.join(str(int(k)) for k in Kind)}, got {kind}")
    if length > limit:
        raise SplitError(f"frame: the payload may have {limit} bytes, the header announces {length}")
    return Kind(kind), number, length, checksum


def send(link: Link, frame: Frame, timeout: float) -> int:
    """Send one frame within `timeout` seconds; bytes sent."""
    link.write(header(frame), timeout)
    if frame.payload:
        link.write(frame.payload, timeout)
    return frame.size


def receive(link: Link, limits: Limits, timeout: float, *, idle: float | None = None) -> Frame:
    """The next frame: its header within `idle` seconds (`timeout` by default), its payload within `timeout`."""
    kind, number, length, checksum = parsed(link.read(HEADER, timeout if idle is None else idle), limits.payload_bytes)
    payload = link.read(length, timeout) if length else b""
    if zlib.crc32(payload) != checksum:
        raise SplitError(f"frame: the payload of {length} bytes is damaged or was cut short (checksum)")
    return Frame(kind, number, payload)
