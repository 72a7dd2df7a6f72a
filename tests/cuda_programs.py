"""Programs of tests/cuda_on_cpu: built by g++, run as they are, spoilt on purpose, or called by a provider's own host code."""

from __future__ import annotations

import ctypes
import functools
import importlib
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from dyndepth.cuda import compiler
from dyndepth.op import REGISTRY, Provider, backend

HERE = Path(__file__).parent / "cuda_on_cpu"
BARRIER = "__syncthreads();"
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def source(op: str) -> str:
    return (HERE.parent.parent / "csrc" / "cuda" / f"{op}.cu").read_text()


def build(folder: Path, program: str, *flags: str) -> Path:
    target = folder / program
    always = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    command = ["g++", *always, *flags, "-o", str(target), str(HERE / f"{program}.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, timeout=300)


def mutated(folder: Path, op: str, text: str) -> Path:
    changed = folder / "mutant.cu"
    changed.write_text(text)
    return build(folder, op, "-O1", "-Wno-error", f'-DSOURCE="{changed}"')


def without_barrier(op: str, number: int) -> str:
    text = source(op)
    at = [match.start() for match in re.finditer(re.escape(BARRIER), text)][number]
    return text[:at] + text[at + len(BARRIER) :]


class Library:
    """Kernels of one op as CUDA's driver sees them: by name, with the addresses of their arguments."""

    def __init__(self, path: Path, seed: int = 1) -> None:
        self._by_name = ctypes.CDLL(str(path)).launch_by_name
        self._by_name.restype = ctypes.c_char_p
        self._seed = seed
        self.launched: list[tuple[str, int, int]] = []

    def launch(self, function: str, grid: int, block: int, arguments: tuple[Any, ...]) -> None:
        # CuPy's rules: a Python int is a pointer's worth of bytes, NumPy's scalars and structures are what they are.
        held = [np.asarray(value if isinstance(value, np.generic | np.ndarray) else np.uint64(value)) for value in arguments]
        addresses = (ctypes.c_void_p * len(held))(*[value.ctypes.data for value in held])
        self.launched.append((function, grid, block))
        failure = self._by_name(function.encode(), grid, block, self._seed, addresses)
        assert failure is None, failure.decode()


@functools.cache
def library(op: str, folder: Path) -> Path:
    return build(folder, op, "-O2", "-shared", "-fPIC", "-Wno-error")


@contextmanager
def cuda_provider(op: str, folder: Path) -> Iterator[Library]:
    """Inside, the op's provider `cuda` is forced and runs here: its host code as it is, its kernels by fibers."""
    kernels = Library(library(op, folder))

    def launch(name: str, function: str, device: int, grid: int, block: int, arguments: tuple[Any, ...]) -> None:
        assert (name, device in (-1, 0)) == (op, True)
        kernels.launch(function, grid, block, arguments)

    here = Provider("cuda", getattr(importlib.import_module(f"dyndepth.cuda.{op}"), op), lambda: None, lambda *_a, **_k: None)
    with (
        mock.patch.object(compiler, "launch", launch),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.dict(REGISTRY[op].providers, {"cuda": here}),
        backend(f"{op}=cuda"),
    ):
        yield kernels
