"""When layers run through their modules instead of a stack, and that the reason is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

import dyndepth
from dyndepth.errors import ArgumentError
from dyndepth.ops import _cpp
from dyndepth.runtime.bind import bind
from dyndepth.runtime.climb import Climb
from dyndepth.runtime.session import Session
from dyndepth.runtime.stack import Stack

NO_PLAIN_QKV = "a projection of q, k, v is no plain linear"
NO_OWN_MLP = "the MLP is not transformers' own, or carries hooks"
NO_OWN_NORM = "a norm is not transformers' RMSNorm, or carries hooks"
#: Submodules of a layer and what is said when one of them is not what a stack takes it for.
PARTS = {
    ("llama", "self_attn.q_proj"): NO_PLAIN_QKV,
    ("llama", "self_attn.v_proj"): NO_PLAIN_QKV,
    ("llama", "self_attn.o_proj"): "the out projection is no plain linear",
    ("llama", "mlp.gate_proj"): "the gate projection is no plain linear",
    ("llama", "mlp.up_proj"): "the up projection is no plain linear",
    ("llama", "mlp.down_proj"): "the down projection is no plain linear",
    ("llama", "mlp"): NO_OWN_MLP,
    ("llama", "mlp.act_fn"): "activation",
    ("llama", "input_layernorm"): NO_OWN_NORM,
    ("llama", "post_attention_layernorm"): NO_OWN_NORM,
    ("gemma2", "pre_feedforward_layernorm"): NO_OWN_NORM,
    ("gemma2", "post_feedforward_layernorm"): NO_OWN_NORM,
    ("gemma2", "post_attention_layernorm"): NO_OWN_NORM,
    ("qwen3", "self_attn.q_norm"): NO_PLAIN_QKV,
    ("qwen3", "self_attn.k_norm"): NO_PLAIN_QKV,
    ("phi3", "self_attn.qkv_proj"): NO_PLAIN_QKV,
    ("phi3", "mlp.gate_up_proj"): "the fused gate and up projection is no plain linear",
    ("phi3", "mlp.activation_fn"): "activation",
}
TOKENS = torch.arange(3, 12)


def logits(causal_lm: Any) -> Tensor:
    """By a pass of a session, stack or not."""
    model = bind(causal_lm)
    session = Session(model, [len(TOKENS)])
    return model.logits(session.run([0] * len(TOKENS), list(range(len(TOKENS))), tokens=TOKENS).ready)


def reason(causal_lm: Any) -> str:
    stack = bind(causal_lm).stack
    return stack if isinstance(stack, str) else "none: there is a stack"


def assert_modules_run(causal_lm: Any, why: str) -> None:
    """The reason is told, and the pass does what transformers does."""
    assert why in reason(causal_lm)
    torch.testing.assert_close(logits(causal_lm), causal_lm(TOKENS[None]).logits[0], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("olmo2", NO_PLAIN_QKV),
        ("gpt2", NO_PLAIN_QKV),
        ("opt", "the MLP is not gated"),
        ("opt_post_norm", "residuals are added elsewhere than in Llama's layers"),
        ("gpt_neox", NO_PLAIN_QKV),
        ("gpt_neox_serial", NO_PLAIN_QKV),
    ],
)
def test_other_families(family: str, why: str) -> None:
    assert reason(tiny_models.shared(family)) == why


def test_every_other_family_has_a_stack() -> None:
    with_stack = [name for name in tiny_models.FAMILIES if isinstance(bind(tiny_models.shared(name)).stack, Stack)]
    assert with_stack == ["llama", "llama_bias", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]


# -- modules that are more than their weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", [False, True], ids=["after", "before"])
@pytest.mark.parametrize(("family", "path"), PARTS, ids=str)
def test_hooks_run(family: str, path: str, pre: bool) -> None:
    """On any submodule of any one layer."""
    causal_lm = tiny_models.tiny(family)
    plain = logits(causal_lm)
    module = causal_lm.model.layers[2].get_submodule(path)
    if pre:
        module.register_forward_pre_hook(lambda _, given: (given[0] * 0.5 + 0.1,))
    else:
        module.register_forward_hook(lambda _, __, found: found * 1.5)
    assert_modules_run(causal_lm, PARTS[family, path])
    assert not torch.allclose(logits(causal_lm), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "path"), PARTS, ids=str)
def test_forwards_of_their_own_run(family: str, path: str) -> None:
    """As accelerate and others patch them: on the instance."""
    causal_lm = tiny_models.tiny(family)
    module = causal_lm.model.layers[4].get_submodule(path)
    original = module.forward
    module.forward = lambda *given, **named: original(*given, **named) * 1.5
    assert_modules_run(causal_lm, PARTS[family, path])


class Wrapped(nn.Module):
    """What LoRA does to a module: it becomes an inner one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x.mean(-1, keepdim=True) + self.inner(x)


@pytest.mark.parametrize(("family", "path"), PARTS, ids=str)
def test_wrappers_run(family: str, path: str) -> None:
    causal_lm = tiny_models.tiny(family)
    layer = causal_lm.model.layers[1]
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, Wrapped(layer.get_submodule(path)).eval())
    assert_modules_run(causal_lm, "")
    assert isinstance(reason(causal_lm), str)
    assert "there is a stack" not in reason(causal_lm)


def test_a_norm_that_only_looks_like_one_runs() -> None:
    """A norm of the right name from elsewhere, with an attribute `weight`."""

    class MyRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(48)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight * 0.3

    causal_lm = tiny_models.tiny("llama")
    causal_lm.model.layers[5].input_layernorm = MyRMSNorm().eval()
    assert_modules_run(causal_lm, NO_OWN_NORM)


def test_a_linear_that_is_more_than_one_runs() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    causal_lm = tiny_models.tiny("llama")
    causal_lm.model.layers[0].mlp.up_proj.__class__ = Scaled
    assert_modules_run(causal_lm, "the up projection is no plain linear")


# -- weights ------------------------------------------------------------------------------------------------------------------


class Quantised(Tensor):
    """A tensor that knows its own ways of being multiplied."""


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("self_attn.k_proj", NO_PLAIN_QKV),
        ("self_attn.o_proj", "the out projection is no plain linear"),
        ("mlp.down_proj", "the down projection is no plain linear"),
        ("input_layernorm", NO_OWN_NORM),
    ],
)
def test_quantised_weights_go_through_their_modules(path: str, why: str) -> None:
    causal_lm = tiny_models.tiny("llama")
    module = causal_lm.model.layers[3].get_submodule(path)
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Quantised), requires_grad=False)
    assert type(module.weight) is Quantised
    assert reason(causal_lm) == why


@pytest.mark.parametrize(
    "path", ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "input_layernorm"], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_weights_of_several_dtypes(path: str, dtype: torch.dtype) -> None:
    causal_lm = tiny_models.tiny("llama")
    causal_lm.model.layers[2].get_submodule(path).to(dtype)
    assert reason(causal_lm) != "none: there is a stack"


def test_a_model_in_another_dtype() -> None:
    assert reason(tiny_models.tiny("llama", torch.float64)) in (NO_PLAIN_QKV, "weights are of several dtypes")


def test_layers_of_two_dtypes() -> None:
    """No way of running them: an error, stack or not."""
    causal_lm = tiny_models.tiny("llama")
    causal_lm.model.layers[2].to(torch.bfloat16)
    with pytest.raises((ArgumentError, RuntimeError), match=r"dtype|scalar type|must be float32|must be bfloat16"):
        logits(causal_lm)


def test_weights_that_do_not_lie_row_by_row() -> None:
    causal_lm = tiny_models.tiny("llama")
    linear = causal_lm.model.layers[2].mlp.gate_proj
    linear.weight.data = linear.weight.data.T.contiguous().T
    assert_modules_run(causal_lm, "weights do not lie row by row")


def _no_bias(causal_lm: Any) -> None:
    causal_lm.model.layers[4].mlp.up_proj.bias = None


def _other_eps(causal_lm: Any) -> None:
    causal_lm.model.layers[4].post_attention_layernorm.variance_epsilon = 0.5


def _other_activation(causal_lm: Any) -> None:
    causal_lm.model.layers[4].mlp.act_fn = nn.GELU().eval()


def _narrower(causal_lm: Any) -> None:
    """An MLP with half of its neurons cut out: a stack that takes layer 0's width for all reads past the weights."""
    mlp = causal_lm.model.layers[4].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight, linear.bias = nn.Parameter(linear.weight[:36].clone()), nn.Parameter(linear.bias[:36].clone())
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :36].clone())


@pytest.mark.parametrize(
    ("change", "why"),
    [(_no_bias, "layers differ in the parts they have"), (_other_eps, "norms differ in eps"),
     (_other_activation, "the MLP's activation is"), (_narrower, "layers differ in")],
    ids=["bias", "eps", "activation", "width"],
)  # fmt: skip
def test_layers_that_differ(change: Callable[[Any], None], why: str) -> None:
    causal_lm = tiny_models.tiny("llama_bias")
    change(causal_lm)
    assert_modules_run(causal_lm, why)


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "quick_gelu", "mish", "relu2"])
def test_other_activations(activation: str) -> None:
    assert_modules_run(tiny_models.tiny("llama", hidden_act=activation), "the MLP's activation is ")


# -- forced and missing providers ---------------------------------------------------------------------------------------------


def _count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A 1 per call of C++ that runs layers: a climb, or a span of its own."""
    calls: list[int] = []

    def counting(owner: type) -> None:
        original = owner.run  # type: ignore[attr-defined]

        def counted(*given: Any) -> Any:
            calls.append(1)
            return original(*given)

        monkeypatch.setattr(owner, "run", counted)

    counting(Stack)
    counting(Climb)
    return calls


@pytest.mark.parametrize(
    ("choice", "stacks"),
    [
        ("torch", False),
        ("torch,cpp", False),
        ("ragged_attention=torch", False),
        ("project_qkv=torch", False),
        ("store_kv=torch", False),
        ("ragged_attention=cpp,ragged_attention=torch,torch", False),
        ("cpp", True),
        ("cpp,torch", True),
        ("exit_stats=torch", True),
    ],
)
def test_forced_providers(choice: str, stacks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, expected = _count(monkeypatch), logits(tiny_models.shared("llama"))
    assert calls == [1]
    with dyndepth.backend(choice):
        found = logits(tiny_models.shared("llama"))
    assert len(calls) == 1 + stacks
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    calls.clear()
    monkeypatch.setenv("DYNDEPTH_BACKEND", choice)
    logits(tiny_models.shared("llama"))
    assert len(calls) == stacks


def test_an_extension_that_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    import dyndepth.runtime.stack as module

    monkeypatch.setattr(module._cpp, "missing", lambda: "not built")
    assert _cpp is module._cpp
    assert reason(tiny_models.shared("llama")) == "not built"
