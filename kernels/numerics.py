"""Device functions that more than one kernel needs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh in fp32 to about 1e-7 of its value, without a library call (the interpreter has none).

    Near zero 1 - exp(-2|x|) would cancel, so the series takes over; elsewhere exp sees non-positive numbers only.
    """
    e = tl.exp(-2.0 * tl.abs(x))
    far = 1.0 - 2.0 * e / (1.0 + e)
    s = x * x
    near = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
    return tl.where(s < 0.0625, near, tl.where(x < 0, -far, far))
