"""The op pattern: registry, ranking, forcing, and one name in every folder."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dyndepth import ops
from dyndepth.errors import ArgumentError, BackendError
from dyndepth.op import RANK, REGISTRY, Op, Provider, backend, forced_providers

ROOT = Path(__file__).parent.parent
STATE = torch.tensor([1, 0], dtype=torch.int8)


def test_the_registry_is_the_public_list() -> None:
    assert sorted(REGISTRY) == sorted(name for name in ops.__all__ if name.islower())


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_one_name_in_every_folder(name: str) -> None:
    """The kernel, the contract, the test and the benchmark of an op are found by its name."""
    wanted = [f"dyndepth/ops/{name}.py", f"tests/test_{name}.py", f"benchmarks/bench_{name}.py"]
    providers = REGISTRY[name].providers
    wanted += [f"csrc/cpu/{name}.cpp"] if "cpp" in providers else []
    wanted += [f"kernels/{name}.py"] if "triton" in providers else []
    cuda = (f"csrc/cuda/{name}.cu", f"dyndepth/cuda/{name}.py", f"tests/cuda_on_cpu/{name}.cpp")
    wanted += cuda if "cuda" in providers else []
    assert [path for path in wanted if not (ROOT / path).exists()] == []
    assert list(providers)[-1] == "torch"
    assert [RANK.index(provider) for provider in providers] == sorted(RANK.index(provider) for provider in providers)


@pytest.mark.parametrize("folder", ["dyndepth", "kernels", "csrc", "benchmarks", "tests"])
def test_files_stay_small(folder: str) -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for pattern in ("*.py", "*.cpp", "*.h", "*.cu")
        for path in (ROOT / folder).rglob(pattern)
        if (lines := len(path.read_text().splitlines())) > 440
    }
    assert not long, "a file is a room with one purpose"


#: A package may import those of a smaller or equal number.
LAYERS = {
    **dict.fromkeys(("errors", "env", "files"), 0),
    **dict.fromkeys(("check", "op"), 1),
    **dict.fromkeys(("cuda", "ops"), 2),
    **dict.fromkeys(("testing", "exits", "modules", "plan", "utilities"), 3),
    **dict.fromkeys(("runtime", "encoders"), 4),
    **dict.fromkeys(("data", "engine", "split", "ssm", "tuning"), 5),
    "closed_form": 6,
    **dict.fromkeys(("calibration", "training"), 7),
    "recipes": 8,
    **dict.fromkeys(("demo", "info", "profiling", "report"), 9),
    "cli": 10,
}


def _imported(source: str) -> Iterator[str]:
    """Parts of dyndepth that a file imports, in any spelling, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "dyndepth" and rest:
                yield rest.split(".")[0]


def test_imports_are_found() -> None:
    source = "import dyndepth.cli\nfrom dyndepth import runtime, env\ndef f():\n    from dyndepth.demo.run import main\n"
    assert list(_imported(source)) == ["cli", "runtime", "env", "demo"]


def test_nothing_imports_upwards() -> None:
    wrong, seen = [], 0
    for path in (ROOT / "dyndepth").rglob("*.py"):
        own = path.relative_to(ROOT / "dyndepth").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for target in _imported(path.read_text()):
            seen += 1
            if LAYERS.get(target, 0 if target in ("_C", "_cuda_sources", "__version__") else 99) > LAYERS[own]:
                wrong.append(f"{path.name} imports {target}")
    assert not wrong
    assert seen > 100


def test_import_is_free() -> None:
    """Importing dyndepth and its ops loads neither Triton, CuPy nor transformers, and creates no CUDA context."""
    code = (
        "import sys, dyndepth, dyndepth.ops, torch\n"
        "loaded = [m for m in ('triton', 'cupy', 'transformers', 'matplotlib', 'dyndepth.kernels') if m in sys.modules]\n"
        "assert not loaded, loaded\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_highest_ranked_provider_that_can() -> None:
    assert REGISTRY["compact_rows"].choose(STATE, []).name == "cpp"
    meta = torch.zeros(2, dtype=torch.int8, device="meta")
    assert REGISTRY["compact_rows"].choose(meta, []).name == "torch"


def test_forcing_by_context_manager() -> None:
    op = REGISTRY["compact_rows"]
    with backend("torch"):
        assert op.choose(STATE, []).name == "torch"
        with backend("cpp,torch"):
            assert op.choose(STATE, []).name == "cpp"
        assert op.choose(STATE, []).name == "torch"
    with backend("exit_stats=torch"):
        assert op.choose(STATE, []).name == "cpp"
        assert forced_providers("exit_stats") == ("torch",)
    assert forced_providers("exit_stats") is None


def test_forcing_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNDEPTH_BACKEND", "compact_rows=torch,cpp")
    assert REGISTRY["compact_rows"].choose(STATE, []).name == "torch"
    assert forced_providers("exit_stats") == ("cpp",)
    with backend("cpp"):
        assert REGISTRY["compact_rows"].choose(STATE, []).name == "cpp"


def test_a_forced_provider_that_cannot_run_says_why() -> None:
    with (
        backend("triton"),
        pytest.raises(BackendError, match=r"compact_rows: no usable provider among those forced \(triton: "),
    ):
        ops.compact_rows(STATE, [])
    meta = torch.zeros(2, dtype=torch.int8, device="meta")
    with backend("cpp"), pytest.raises(BackendError, match="cpp: tensors are on meta, cpp runs on the CPU"):
        REGISTRY["compact_rows"].choose(meta, [])


@pytest.mark.parametrize(
    ("choice", "message"),
    [("gpu", "providers are cuda, triton, cpp, torch"), ("sort=cpp", "ops are accept_drafts, backfill_kv")],
)
def test_unknown_names(choice: str, message: str) -> None:
    with pytest.raises(BackendError, match=message), backend(choice):
        pass


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("fast", "DYNDEPTH_BACKEND: providers are cuda, triton, cpp, torch, got 'fast'"),
        ("exit_stat=torch", "DYNDEPTH_BACKEND: ops are .*, got 'exit_stat'"),
        ("=torch", "DYNDEPTH_BACKEND: ops are .*, got ''"),
        ("cpp,", "DYNDEPTH_BACKEND: providers are .*, got '' in 'cpp,'"),
    ],
)
def test_unknown_names_in_the_environment(monkeypatch: pytest.MonkeyPatch, choice: str, message: str) -> None:
    """A typing error must not silently mean something else."""
    monkeypatch.setenv("DYNDEPTH_BACKEND", choice)
    with pytest.raises(BackendError, match=message):
        ops.compact_rows(STATE, [])


@pytest.mark.parametrize("provider", ["torch", "cpp"])
def test_autocast_and_autograd_change_nothing(provider: str) -> None:
    hidden, weights = torch.randn(3, 8), (torch.randn(2, 8), torch.randn(2), torch.randn(2), torch.randn(1))
    with backend(provider):
        plain = ops.router_score(hidden, *weights)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
            found = ops.router_score(hidden, *weights)
            hidden.requires_grad_()
            recorded = ops.router_score(hidden, *weights)
    assert torch.equal(found, plain)
    assert torch.equal(recorded, plain)
    with torch.enable_grad(), pytest.warns(UserWarning, match="autograd kernel was not registered"):
        recorded.sum().backward()
    assert hidden.grad is None or not bool(hidden.grad.any())


@pytest.mark.parametrize("provider", ["torch", "cpp"])
def test_writing_in_place_is_noticed(provider: str) -> None:
    """Autograd refuses to use a saved tensor that an op wrote to since."""
    pages = torch.zeros(2, 1, 1, 1, 2)
    version = pages._version
    row, zero = torch.ones(1, 1, 2), torch.zeros(1, dtype=torch.int32)
    with backend(provider):
        ops.store_kv(row, row, row, zero, zero, pages)
    assert pages._version > version
    with torch.inference_mode(), backend(provider):
        ops.store_kv(row, row, row, zero, zero, torch.zeros(2, 1, 1, 1, 2))  # has no version, and needs none


def test_checks_also_guard_the_dispatcher() -> None:
    """People call torch.ops.dyndepth too."""
    with pytest.raises(ArgumentError, match="compact_rows: state must be int8"):
        torch.ops.dyndepth.compact_rows(torch.zeros(2), [])


def _implementation(op: Op, provider: Provider) -> Callable[..., Any]:
    """A provider's own function, also if it is imported on first use."""
    if provider.module is None:
        return provider.run
    return getattr(importlib.import_module(provider.module), op.name)


def test_every_provider_shares_the_signature() -> None:
    import inspect

    for op in REGISTRY.values():
        wanted = [argument.name for argument in op.overload._schema.arguments]
        for function in (op.reference, op.check, *(_implementation(op, provider) for provider in op.providers.values())):
            parameters = list(inspect.signature(function).parameters.values())
            assert [p.name for p in parameters] == wanted, (op.name, function)
            for parameter, argument in zip(parameters, op.overload._schema.arguments, strict=True):
                if argument.has_default_value():
                    assert parameter.default == argument.default_value, (op.name, function, parameter.name)
