"""Loading the C++ extension, and the two questions every cpp provider asks."""

from __future__ import annotations

import functools
from types import ModuleType

from torch import Tensor
from torch.autograd import forward_ad


@functools.cache
def extension() -> ModuleType | ImportError:
    """dyndepth._C, whose import registers torch.ops.dyndepth_cpp, or the error that kept it from loading."""
    try:
        from dyndepth import _C
    except ImportError as error:
        return error
    return _C


def missing() -> str | None:
    """Why no cpp provider can run on this machine, or None."""
    loaded = extension()
    return f"dyndepth._C does not load: {loaded}" if isinstance(loaded, ImportError) else None


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether cpp providers multiply bfloat16 as such here (AMX or AVX512_BF16), and do not widen it to float32 first."""
    loaded = extension()
    return not isinstance(loaded, ImportError) and bool(loaded.build_facts().get("multiplies_bfloat16"))


def drops_tangents() -> bool:
    """Within forward-mode differentiation: C++ would give values without their tangents, and nobody would notice."""
    return forward_ad._current_level >= 0


def declines(first: Tensor, *_args: object, **_kwargs: object) -> str | None:
    """cpp providers take tensors in main memory; every op's first argument is on the device of all the others."""
    return None if first.device.type == "cpu" else f"tensors are on {first.device}, cpp runs on the CPU"
