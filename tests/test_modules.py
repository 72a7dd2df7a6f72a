"""dyndepth.RaggedLinear in the place of nn.Linear: the same answers, the same state, and rows past `live` left alone."""

from __future__ import annotations

import copy
import importlib
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import dyndepth
from dyndepth.errors import ArgumentError
from dyndepth.op import REGISTRY, backend
from dyndepth.runtime.bind import bind
from dyndepth.runtime.stack import Stack
from dyndepth.testing import assert_as_exact_as, assert_same

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
with_and_without_bias = pytest.mark.parametrize("bias", [True, False])


def _pair(
    bias: bool = True, dtype: torch.dtype = torch.float32, width: int = 37, outputs: int = 23
) -> tuple[nn.Linear, dyndepth.RaggedLinear]:
    linear = nn.Linear(width, outputs, bias=bias, dtype=dtype)
    return linear, dyndepth.RaggedLinear.from_linear(linear)


def _counter(live: int) -> torch.Tensor:
    return torch.tensor([live], dtype=torch.int32)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of the op."""
    seen: list[int] = []
    module: Any = importlib.import_module("dyndepth.modules.ragged_linear")
    op = module.ragged_linear

    def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(len(x))
        return op(x, *args, **kwargs)

    monkeypatch.setattr(module, "ragged_linear", counted)
    return seen


# -- the answers of nn.Linear ------------------------------------------------------------------------------------------------


@each_dtype
@with_and_without_bias
@pytest.mark.parametrize("shape", [(), (0,), (1,), (9,), (2, 5), (3, 0, 2), (2, 1, 3)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...], bias: bool, dtype: torch.dtype, calls: list[int]) -> None:
    linear, ragged = _pair(bias, dtype)
    x, residual = torch.randn(*shape, 37, dtype=dtype), torch.randn(*shape, 23, dtype=dtype)
    truth = copy.deepcopy(linear).double()(x.double())
    found = ragged(x)
    assert found.shape == (*shape, 23)
    assert_as_exact_as(found, linear(x), truth)
    assert_as_exact_as(ragged(x, residual=residual), residual + linear(x), residual.double() + truth)
    assert calls == [torch.Size(shape).numel()] * 2


def test_strides_do_not_matter() -> None:
    linear, ragged = _pair()
    x, residual = torch.randn(37, 6).T, torch.randn(23, 6).T
    torch.testing.assert_close(ragged(x, residual=residual), residual + linear(x))
    wide = torch.randn(2, 4, 80)[:, ::2, 3:40]
    torch.testing.assert_close(ragged(wide), linear(wide))
    assert ragged(x).is_contiguous()


@pytest.mark.usefixtures("poisoned")
@each_dtype
@with_and_without_bias
@pytest.mark.parametrize("rows", [1, 2, 31, 33])
def test_live_rows(rows: int, bias: bool, dtype: torch.dtype) -> None:
    _, ragged = _pair(bias, dtype)
    x, residual = torch.randn(rows, 37, dtype=dtype), torch.randn(rows, 23, dtype=dtype)
    whole, added = ragged(x), ragged(x, residual=residual)
    for live in {0, 1, rows - 1, rows}:
        spoilt = torch.cat([x[:live], torch.full_like(x[live:], torch.nan)])
        for expected, rest in ((whole, None), (added, residual)):
            found = ragged(x, _counter(live), rest)
            assert_same(found[:live], expected[:live], f"live {live}")
            assert bool(found[live:].isnan().all()), "rows past live were computed"
            assert_same(ragged(spoilt, _counter(live), rest)[:live], expected[:live], "rows past live reach others")


def test_no_weight_is_read_when_nobody_is_live() -> None:
    """A weight that nobody may touch."""
    code = """
import ctypes, mmap, torch, dyndepth
from dyndepth.op import backend
memory = mmap.mmap(-1, 4 * mmap.PAGESIZE)
weight = torch.frombuffer(memory, dtype=torch.float32, count=1024).view(32, 32)
ragged = dyndepth.RaggedLinear(32, 32, bias=False)
ragged.weight = torch.nn.Parameter(weight, requires_grad=False)
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(base), ctypes.c_size_t(4 * mmap.PAGESIZE), 0) == 0
with torch.no_grad(), backend("cpp"):
    print(tuple(ragged(torch.ones(3, 32), torch.zeros(1, dtype=torch.int32)).shape))
    if %d:
        ragged(torch.ones(3, 32), torch.ones(1, dtype=torch.int32))
"""
    done = [subprocess.run([sys.executable, "-c", code % more], capture_output=True, text=True, check=False) for more in (0, 1)]
    assert (done[0].returncode, done[0].stdout.strip()) == (0, "(3, 32)"), done[0].stderr
    assert done[1].returncode < 0, "the memory was not guarded"


# -- one set of parameters ---------------------------------------------------------------------------------------------------


@with_and_without_bias
def test_parameters_are_shared(bias: bool) -> None:
    linear, ragged = _pair(bias)
    assert ragged.weight is linear.weight
    assert ragged.bias is linear.bias
    assert isinstance(ragged, nn.Linear)
    assert (ragged.in_features, ragged.out_features) == (37, 23)
    assert [name for name, _ in ragged.named_parameters()] == [name for name, _ in linear.named_parameters()]
    linear.weight.fill_(0.5)
    x = torch.ones(2, 37)
    assert_same(ragged(x), torch.full((2, 23), 18.5) + (linear.bias if bias else 0))
    assert not dyndepth.RaggedLinear.from_linear(nn.Linear(2, 2).eval()).training
    assert dyndepth.RaggedLinear.from_linear(ragged).weight is linear.weight


def test_sharing_draws_no_random_number() -> None:
    linear = nn.Linear(4, 4)
    before = torch.get_rng_state()
    dyndepth.RaggedLinear.from_linear(linear)
    assert torch.equal(torch.get_rng_state(), before)


@with_and_without_bias
def test_state_goes_both_ways(bias: bool) -> None:
    linear, ragged = _pair(bias)
    assert list(ragged.state_dict()) == list(linear.state_dict())
    for name, value in linear.state_dict().items():
        assert_same(ragged.state_dict()[name], value, name)
    fresh, other = dyndepth.RaggedLinear(37, 23, bias=bias), nn.Linear(37, 23, bias=bias)
    file = io.BytesIO()
    torch.save(linear.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    other.load_state_dict(fresh.state_dict(), strict=True)
    for one in (fresh, other, copy.deepcopy(ragged)):
        assert_same(one.weight.data, linear.weight.data)
    x = torch.randn(3, 37)
    assert_same(fresh(x), ragged(x))


def test_in_the_place_of_a_model_s_own() -> None:
    """Two layers of a small network swapped: state and answers stay."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    expected, state = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    for at in (0, 2):
        model[at] = dyndepth.RaggedLinear.from_linear(model[at])  # type: ignore[arg-type]
    torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)


def test_generation_runs_swapped_layers_alike() -> None:
    """Every linear layer of a Llama: the same tokens, and its layers still run as spans of C++."""
    model = tiny_models.tiny("llama")
    options = {"custom_generate": dyndepth.generate, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**tiny_models.prompts(7), **options)
    for module in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, dyndepth.RaggedLinear.from_linear(child))
    assert type(model.model.layers[0].mlp.down_proj) is dyndepth.RaggedLinear
    assert isinstance(bind(model).stack, Stack)
    assert torch.equal(model.generate(**tiny_models.prompts(7), **options), expected)


# -- gradients, autocast, other dtypes -----------------------------------------------------------------------------------------


@with_and_without_bias
def test_gradients_are_those_of_linear(bias: bool, calls: list[int]) -> None:
    linear, ragged = _pair(bias)
    ours, residual = copy.deepcopy(ragged), torch.randn(5, 23)
    x = torch.randn(5, 37)
    with torch.enable_grad():
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours(mine, residual=residual).square().sum().backward()
        (residual + linear(theirs)).square().sum().backward()
    assert_same(mine.grad, theirs.grad)
    assert_same(ours.weight.grad, linear.weight.grad)
    assert not bias or torch.equal(ours.bias.grad, linear.bias.grad)
    assert calls == []
    with torch.enable_grad():
        ours.requires_grad_(False)
        assert not ours(x).requires_grad
        assert calls == [5], "nobody wants a gradient"
        assert ours(x, residual=residual.clone().requires_grad_()).requires_grad
    assert calls == [5]


def test_what_lies_past_live_reaches_no_gradient() -> None:
    _, ragged = _pair()
    x = torch.randn(6, 37)
    with torch.enable_grad():
        ragged(x[:4].clone()).square().sum().backward()
        expected = [parameter.grad.clone() for parameter in ragged.parameters()]
        ragged.zero_grad()
        x[4:] = torch.nan
        x.requires_grad_()
        ragged(x, _counter(4))[:4].square().sum().backward()
    for parameter, wanted in zip(ragged.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)
    assert bool((x.grad[4:] == 0).all())


def test_autocast_is_that_of_linear(calls: list[int]) -> None:
    """PyTorch's own product in autocast's dtype; a residual of float32 makes a sum of float32."""
    linear, ragged = _pair()
    x, residual = torch.randn(4, 37), torch.randn(4, 23)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, added = ragged(x, _counter(2)), ragged(x.to(torch.float16), residual=residual)
        expected, half = linear(x), linear(x.to(torch.float16))
    assert found.dtype == torch.bfloat16
    assert_same(found[:2], expected[:2])
    assert_same(added, residual + half)
    assert added.dtype == torch.float32
    with torch.autocast("cpu", enabled=False):
        assert ragged(x).dtype == torch.float32
    assert calls == [4]


def test_what_the_op_does_not_take_is_linear_s(calls: list[int]) -> None:
    linear = nn.Linear(5, 3).double()
    ragged = dyndepth.RaggedLinear.from_linear(linear)
    x = torch.randn(4, 5, dtype=torch.float64)
    assert_same(ragged(x, _counter(3))[:3], linear(x)[:3])
    turned = nn.Linear(5, 3)
    turned.weight = nn.Parameter(torch.randn(5, 3).T)
    assert_same(dyndepth.RaggedLinear.from_linear(turned)(x.float()), turned(x.float()))
    assert calls == []


def test_a_forced_provider_is_heard() -> None:
    linear, ragged = _pair()
    x = torch.randn(4, 37)
    with backend("torch"):
        assert_same(ragged(x), linear(x))
        assert_same(ragged(x, _counter(2)), linear(x))  # the reference computes all rows


# -- graphs --------------------------------------------------------------------------------------------------------------------


def _targets(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


_READS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique")
OP = "dyndepth.ragged_linear.default"


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_traces_without_reading_live(mode: str) -> None:
    _, ragged = _pair()
    x, live, residual = torch.randn(6, 37), _counter(4), torch.randn(6, 23)
    parameters = dict(ragged.named_parameters())

    def call(state: dict[str, torch.Tensor], *given: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(ragged, state, given)

    graph = make_fx(call, tracing_mode=mode)(parameters, x, live, residual)
    assert OP in _targets(graph)
    assert not [target for target in _targets(graph) if any(word in target for word in _READS)]
    assert_same(graph(parameters, x, _counter(2), residual)[:2], ragged(x, _counter(2), residual)[:2])


def test_runs_under_fake_tensors() -> None:
    _, ragged = _pair(dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.randn(6, 37, dtype=torch.bfloat16))
        found = ragged(x, mode.from_tensor(_counter(4)), torch.empty(6, 23, dtype=torch.bfloat16))
    assert (tuple(found.shape), found.dtype) == ((6, 23), torch.bfloat16)
    meta = copy.deepcopy(ragged).to("meta")
    assert meta(torch.empty(2, 3, 37, dtype=torch.bfloat16, device="meta")).shape == (2, 3, 23)


def test_is_one_node_of_a_symbolic_trace() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _pair()[1]

        def forward(self, x: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
            return self.inner(x, live) + 1

    block = Block()
    graph = torch.fx.symbolic_trace(block)
    x = torch.randn(4, 37)
    assert_same(graph(x, _counter(4)), block(x, _counter(4)))


def test_exports_and_compiles_with_any_number_of_rows() -> None:
    _, ragged = _pair()
    rows = torch.export.Dim("rows", min=2, max=4096)
    given = (torch.randn(6, 37), _counter(4), torch.randn(6, 23))
    exported = torch.export.export(ragged, given, dynamic_shapes=({0: rows}, {}, {0: rows}))
    compiled = torch.compile(ragged, fullgraph=True, dynamic=True, backend="aot_eager")
    assert OP in _targets(exported.graph_module)
    for count, live in ((6, 4), (11, 0), (300, 299)):
        x, residual = torch.randn(count, 37), torch.randn(count, 23)
        expected = ragged(x, _counter(live), residual)[:live]
        for run in (exported.module(), compiled):
            assert_same(run(x, _counter(live), residual)[:live], expected, f"{count} rows, live {live}")


# -- errors --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(4, 6)}, r"RaggedLinear: x must be float32 \[..., 5\] on cpu, got float32 \[4, 6\]"),
        ({"x": torch.zeros(())}, r"RaggedLinear: x must be float32 \[..., 5\] on cpu, got float32 \[\]"),
        ({"x": torch.zeros(4, 5, dtype=torch.bfloat16)}, "RaggedLinear: x must be float32 .*, got bfloat16"),
        ({"x": torch.zeros(4, 5, device="meta")}, "RaggedLinear: x must be .* on cpu, got .* on meta"),
        (
            {"x": torch.zeros(1, 4, 5), "live": _counter(1)},
            r"RaggedLinear: x must be \[n, 5\] where live is given, got float32",
        ),
        ({"live": torch.zeros(1, dtype=torch.int64)}, "RaggedLinear: live must be int32 with 1 element on cpu, got int64"),
        (
            {"live": torch.zeros(2, dtype=torch.int32)},
            r"RaggedLinear: live must be int32 with 1 element on cpu, got int32 \[2\]",
        ),
        ({"residual": torch.zeros(3)}, r"RaggedLinear: residual must be float32 \[4, 3\] on cpu, got float32 \[3\]"),
        ({"residual": torch.zeros(4, 3).half()}, r"RaggedLinear: residual must be float32 \[4, 3\] on cpu, got float16"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        dyndepth.RaggedLinear(5, 3)(**{"x": torch.zeros(4, 5), **arguments})


def test_wrong_arguments_under_autocast() -> None:
    ragged = dyndepth.RaggedLinear(5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ArgumentError, match=r"RaggedLinear: x must be float \[..., 5\] on cpu, got int64"):
            ragged(torch.zeros(4, 5, dtype=torch.int64))
        with pytest.raises(ArgumentError, match=r"RaggedLinear: residual must be float \[4, 3\] on cpu, got float32 \[4, 4\]"):
            ragged(torch.zeros(4, 5), residual=torch.zeros(4, 4))


class _Own(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def _hooked() -> nn.Linear:
    linear = nn.Linear(2, 2)
    linear.register_forward_hook(lambda *_: None)
    return linear


def _replaced() -> nn.Linear:
    linear = nn.Linear(2, 2)
    linear.forward = lambda x: x  # type: ignore[method-assign]
    return linear


def _special() -> nn.Linear:
    class Quantised(torch.Tensor):
        pass

    linear = nn.Linear(2, 2)
    linear.weight = nn.Parameter(torch.zeros(2, 2).as_subclass(Quantised))
    return linear


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _Own(2, 2), "RaggedLinear.from_linear: linear must be a torch.nn.Linear, not a subclass, got _Own"),
        (lambda: nn.Conv1d(2, 2, 1), "RaggedLinear.from_linear: linear must be a torch.nn.Linear, not a subclass, got Conv1d"),
        (_hooked, "RaggedLinear.from_linear: linear must be without hooks or a forward of its own"),
        (_replaced, "RaggedLinear.from_linear: linear must be without hooks or a forward of its own"),
        (_special, "RaggedLinear.from_linear: linear.weight must be a torch.nn.Parameter, got Quantised"),
    ],
)
def test_what_more_than_parameters_multiplies_is_refused(make: Callable[[], nn.Linear], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        dyndepth.RaggedLinear.from_linear(make())


def test_the_name_is_loaded_on_first_use() -> None:
    code = (
        "import sys, dyndepth\nassert 'RaggedLinear' in dir(dyndepth)\nassert 'dyndepth.modules' not in sys.modules\n"
        "dyndepth.RaggedLinear(2, 2)\nassert not {'triton', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "ragged_linear" in REGISTRY
