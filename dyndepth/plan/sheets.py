"""GPUs by name: figures of their makers' data sheets, and what of them a decode step gets."""

from __future__ import annotations

from dyndepth.errors import ArgumentError
from dyndepth.plan.machine import Machine

#: Dense half-precision TFLOP/s (sheets that print figures "with sparsity" halved), fp32 TFLOP/s without TF32, memory TB/s, and
#: whose sheet says so.
_SHEETS = {
    "a10": (125.0, 31.2, 0.600, "NVIDIA A10 data sheet"),
    "a100-40gb": (312.0, 19.5, 1.555, "NVIDIA A100 Tensor Core GPU data sheet, SXM"),
    "a100-80gb": (312.0, 19.5, 2.039, "NVIDIA A100 Tensor Core GPU data sheet, SXM"),
    "b200": (2250.0, 75.0, 7.7, "NVIDIA Blackwell (HGX B200) data sheet, per GPU"),
    "h100-pcie": (756.0, 51.0, 2.0, "NVIDIA H100 Tensor Core GPU data sheet, PCIe"),
    "h100-sxm": (989.0, 67.0, 3.35, "NVIDIA H100 Tensor Core GPU data sheet, SXM"),
    "h200": (989.0, 67.0, 4.8, "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
    "l4": (121.0, 30.3, 0.300, "NVIDIA L4 Tensor Core GPU data sheet"),
    "l40s": (362.0, 91.6, 0.864, "NVIDIA L40S data sheet"),
    "mi300x": (1307.4, 163.4, 5.3, "AMD Instinct MI300X data sheet"),
    "rtx-4090": (165.2, 82.6, 1.008, "NVIDIA Ada GPU architecture white paper, fp32 accumulation"),
}

#: Share of the sheet's bandwidth and FLOP/s that long reads and large products reach: an assumption, not a measurement.
REACHED_BANDWIDTH, REACHED_FLOPS = 0.9, 0.8
#: Seconds between two kernels of a captured graph: the baseline is a graphed one, since an eager one flatters early exit.
LAUNCH_S = 1e-6
#: Seconds that a boundary costs whose row count the host reads.
SYNC_S = 20e-6


def names() -> list[str]:
    """Names that `sheet` knows."""
    return sorted(_SHEETS)


def sheet(name: str, dtype: str = "bfloat16") -> Machine:
    """The machine of that name, with the shares above."""
    tera, memory, _ = _figures(name, dtype)
    return Machine(
        name=name,
        dtype=dtype,
        bandwidth=REACHED_BANDWIDTH * memory * 1e12,
        flops=REACHED_FLOPS * tera * 1e12,
        op_s=LAUNCH_S,
        sync_s=SYNC_S,
        source=(
            f"data sheet: {memory * 1000:.0f} GB/s, {tera:g} TFLOP/s dense; {REACHED_BANDWIDTH:.0%} and {REACHED_FLOPS:.0%} "
            f"of them, {LAUNCH_S * 1e6:g} us an op and {SYNC_S * 1e6:g} us a boundary assumed"
        ),
    )


def peak(name: str, dtype: str = "bfloat16") -> Machine:
    """The sheet's own figures, which nothing exceeds: for lower bounds. Ops and boundaries cost nothing beside their work."""
    tera, memory, whose = _figures(name, dtype)
    return Machine(name=name, dtype=dtype, bandwidth=memory * 1e12, flops=tera * 1e12, source=whose)


def _figures(name: str, dtype: str) -> tuple[float, float, str]:
    """(TFLOP/s of the dtype, TB/s, source)."""
    if name not in _SHEETS:
        raise ArgumentError(f"machine: wanted here or one of {', '.join(names())}, got {name!r}")
    half, single, memory, whose = _SHEETS[name]
    return single if dtype == "float32" else half, memory, whose
