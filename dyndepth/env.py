"""The only file of Python that reads environment variables.

`DYNDEPTH_BACKEND`  providers to use, like the argument of `dyndepth.backend`: "torch", "cpp,torch", "exit_stats=torch".
`TRITON_INTERPRET`  Triton's own switch; set to 1, its kernels run on the CPU under an interpreter.
`DYNDEPTH_CACHE`    folder for converted demo weights and fitted exits; default `$XDG_CACHE_HOME/dyndepth`, `~/.cache/dyndepth`.
`DYNDEPTH_LAUNCH`   set to "rules", Triton kernels take tile sizes from rules alone, never from tables (docs/gpu.md).
`DYNDEPTH_SIMD`     6, 5, 4, 3 or 1: the most that C++ may use of the processor (csrc/common/simd.h reads it).
"""

import os
from pathlib import Path


def backend() -> str | None:
    """`DYNDEPTH_BACKEND`, or None when unset or empty."""
    return os.environ.get("DYNDEPTH_BACKEND") or None


def triton_interpret() -> bool:
    """Whether Triton kernels run under its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launch() -> str:
    """`DYNDEPTH_LAUNCH`: "rules", or "" for tables where there are any."""
    return os.environ.get("DYNDEPTH_LAUNCH", "")


def cache_folder() -> Path:
    """`DYNDEPTH_CACHE` with its defaults. The folder may not exist yet."""
    chosen = os.environ.get("DYNDEPTH_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dyndepth"
