"""Theoretical occupancy: warps that a processor can hold of a kernel, of all it could, and what keeps more away.

The arithmetic of NVIDIA's cuda_occupancy.h (compute capability 8 and later) and of AMD's CDNA3 and CDNA4 guides: register
files, shared memory, blocks and warps per processor.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Processor:
    """What one streaming multiprocessor (compute unit) has."""

    warps: int
    blocks: int
    shared_bytes: int
    lanes: int = 32
    #: 32-bit registers per quarter (SIMD), and how many a warp takes at a time.
    registers: int = 16384
    register_unit: int = 256
    #: Shared memory per block that is not the program's, and the unit it is taken in.
    reserved_bytes: int = 1024
    shared_unit: int = 128


PROCESSORS = {
    "sm_80": Processor(64, 32, 164 << 10),
    "sm_86": Processor(48, 16, 100 << 10),
    "sm_89": Processor(48, 24, 100 << 10),
    "sm_90": Processor(64, 32, 228 << 10),
    "sm_100": Processor(64, 32, 228 << 10),
    "sm_120": Processor(48, 24, 100 << 10),
    # Waves of 64 lanes, eight a SIMD; 512 vector registers a lane and SIMD, accumulation registers included.
    "gfx942": Processor(32, 32, 64 << 10, 64, 64 * 512, 64 * 8, 0, 512),
    "gfx950": Processor(32, 32, 160 << 10, 64, 64 * 512, 64 * 8, 0, 1280),
}


def occupancy(target: str, warps: int, registers: int, shared_bytes: int) -> tuple[float, str]:
    """(share of the warps that fit, what limits it: warps, blocks, registers or shared) for blocks of so many warps.

    Args:
        registers: 32-bit ones of a thread. shared_bytes: of a block.
    """
    has = PROCESSORS[target]
    per_warp = _up(max(registers, 1) * has.lanes, has.register_unit)
    limits = {
        "warps": has.warps // warps,
        "blocks": has.blocks,
        "registers": has.registers // per_warp * 4 // warps,
        "shared": has.shared_bytes // max(1, _up(shared_bytes + has.reserved_bytes, has.shared_unit)),
    }
    limiter = min(limits, key=lambda name: limits[name])
    return min(1.0, limits[limiter] * warps / has.warps), limiter


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
