"""What this installation can do here: versions, instruction sets, and which provider runs each op or why it cannot."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

import dyndepth
from dyndepth import ops  # noqa: F401  (registers the ops)
from dyndepth.op import RANK, REGISTRY, forced_providers
from dyndepth.ops._cpp import extension
from dyndepth.plan.measure import cpu_name

_PACKAGES = ("torch", "transformers", "safetensors", "triton", "cupy-cuda13x", "numpy")


def collect() -> dict[str, Any]:
    """Plain data, as `dyndepth info --json` prints it. Asks for no CUDA context unless torch sees a device."""
    loaded = extension()
    build = {"error": str(loaded)} if isinstance(loaded, ImportError) else dict(loaded.build_facts())
    return {
        "dyndepth": dyndepth.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "threads": torch.get_num_threads(),
        "cpu": {"name": cpu_name(), "capability": torch.backends.cpu.get_cpu_capability()},
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "extension": build,
        "ops": {name: _providers(name) for name in sorted(REGISTRY)},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _providers(name: str) -> dict[str, str]:
    """Per provider `ok`, the reason why it cannot run on this machine, or `none` if the op has no such provider."""
    op = REGISTRY[name]
    forced = forced_providers(name)
    table = {}
    for provider in RANK:
        if provider not in op.providers:
            table[provider] = "none"
            continue
        reason = op.providers[provider].missing()
        if reason is None and forced is not None and provider not in forced:
            reason = f"not among the forced providers ({', '.join(forced)})"
        table[provider] = reason or "ok"
    return table
