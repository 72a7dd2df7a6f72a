"""dyndepth: dynamic-depth batched inference.

Every token of a batch leaves the network at its own depth, and the machine does exactly the work that is left.

    out = model.generate(**inputs, custom_generate=dyndepth.generate, exits=exits)   # one call
    dyndepth.convert(model, exits)                                                    # or in place; dyndepth.revert(model)

Importing dyndepth loads neither Triton nor CuPy nor transformers and creates no CUDA context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names are loaded on first use: the ops alone do not need transformers.
_LAZY = {
    "backend": "dyndepth.op",
    "Exits": "dyndepth.exits",
    "Band": "dyndepth.exits",
    "generate": "dyndepth.runtime.entry",
    "Engine": "dyndepth.engine",
    "Request": "dyndepth.engine",
    "convert": "dyndepth.runtime.convert",
    "revert": "dyndepth.runtime.convert",
    "fit": "dyndepth.closed_form",
    "calibrate": "dyndepth.calibration",
    "train": "dyndepth.training",
    "RaggedLinear": "dyndepth.modules",
    "DynamicEncoder": "dyndepth.encoders",
    "SampleExit": "dyndepth.encoders",
    "SampleExits": "dyndepth.encoders",
    "SampleStream": "dyndepth.encoders",
}
_MODULES = ("data", "demo", "encoders", "errors", "exits", "ops", "plan", "recipes", "split", "ssm", "training", "utilities")

if TYPE_CHECKING:
    from dyndepth import data, demo, encoders, errors, exits, ops, plan, split, ssm, training, utilities
    from dyndepth.calibration import calibrate
    from dyndepth.closed_form import fit
    from dyndepth.encoders import DynamicEncoder, SampleExit, SampleExits, SampleStream
    from dyndepth.engine import Engine, Request
    from dyndepth.exits import Band, Exits
    from dyndepth.modules import RaggedLinear
    from dyndepth.op import backend
    from dyndepth.runtime.convert import convert, revert
    from dyndepth.runtime.entry import generate
    from dyndepth.training import train

__all__ = [
    "Band", "DynamicEncoder", "Engine", "Exits", "RaggedLinear", "Request", "SampleExit", "SampleExits", "SampleStream",
    "__version__", "backend", "calibrate", "convert", "data", "demo", "encoders", "errors", "exits", "fit", "generate", "ops",
    "plan", "recipes", "revert", "split", "ssm", "train", "training", "utilities",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"dyndepth.{name}")
    raise AttributeError(f"module 'dyndepth' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_MODULES])
