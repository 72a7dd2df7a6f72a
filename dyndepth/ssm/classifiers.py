"""Exit classifiers (DYNAMAX): is it safe to leave here? Linear, feed-forward, or a Mamba block that reads the sequence."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dyndepth.exits.router import Router
from dyndepth.ssm import mixer as mixing
from dyndepth.ssm.mixer import State

#: Of the norm before every classifier: that of ops.router_score.
EPS = 1e-6


def rms(x: Tensor) -> Tensor:
    """RMSNorm without a gain, fp32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


class Classifier(nn.Module):
    """Base. Called on residuals [..., d] of whole sequences it gives logits [...]; weights are fp32."""

    kind: ClassVar[str] = ""
    #: Remembers the sequence, so that `step` needs a state.
    remembers: ClassVar[bool] = False

    @property
    def settings(self) -> dict[str, Any]:
        """JSON arguments that make it again."""
        raise NotImplementedError

    def state(self, n: int) -> State | None:
        """For n sequences, before their first token."""
        return None

    def fill(self, hidden: Tensor, state: State | None, seq: Tensor) -> None:
        """Read the beginnings of sequences `seq` int64 [m], hidden [m, t, d]."""

    def step(self, x: Tensor, state: State | None, seq: Tensor) -> Tensor:
        """Logits fp32 [m] of one more token, x [m, d], of sequences `seq`."""
        return self(x)

    def update(self, x: Tensor, state: State | None, seq: Tensor) -> None:
        """Remember one more token without judging it."""

    def router(self) -> Router | None:
        """The same function as a router of dyndepth.exits; None for one that remembers."""
        return None


class LinearClassifier(Classifier):
    """CALM's: one linear of the normed residual."""

    kind = "linear"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 1)

    @property
    def settings(self) -> dict[str, Any]:
        return {"width": self.out.in_features}

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(rms(hidden))[..., 0]

    def router(self) -> Router:
        made = Router(self.out.in_features)
        made.weight1.data, made.weight2.data = self.out.weight.data.clone(), torch.ones(1)
        made.bias2.data = self.out.bias.data.clone()
        return made


class FfnClassifier(Classifier):
    """Two linears and SiLU, a transformer's feed-forward with one output."""

    kind = "ffn"

    def __init__(self, width: int, neurons: int = 64) -> None:
        super().__init__()
        self.inner = nn.Linear(width, neurons)
        self.out = nn.Linear(neurons, 1)

    @property
    def settings(self) -> dict[str, Any]:
        return {"width": self.inner.in_features, "neurons": self.inner.out_features}

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(torch.nn.functional.silu(self.inner(rms(hidden))))[..., 0]

    def router(self) -> Router:
        made = Router(self.inner.in_features, self.inner.out_features, silu=True)
        made.weight1.data, made.bias1.data = self.inner.weight.data.clone(), self.inner.bias.data.clone()
        made.weight2.data, made.bias2.data = self.out.weight.data[0].clone(), self.out.bias.data.clone()
        return made


class MambaClassifier(Classifier):
    """A Mamba mixer whose output projection has one output."""

    kind = "mamba"
    remembers = True

    def __init__(self, width: int, states: int = 8, expand: int = 1, kernel: int = 4) -> None:
        super().__init__()
        from transformers import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer

        self._settings = {"width": width, "states": states, "expand": expand, "kernel": kernel}
        self._config = MambaConfig(
            hidden_size=width, state_size=states, expand=expand, conv_kernel=kernel, num_hidden_layers=1, vocab_size=1
        )
        self.mixer: Any = MambaMixer(self._config, layer_idx=0)
        self.mixer.out_proj = nn.Linear(self.mixer.intermediate_size, 1)

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self._settings)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mixer(rms(hidden))[..., 0]

    def state(self, n: int) -> State:
        return State.zeros(self.mixer, n)

    def fill(self, hidden: Tensor, state: State | None, seq: Tensor) -> None:
        from transformers import DynamicCache

        assert state is not None
        cache: Any = DynamicCache(config=self._config)
        self.mixer(rms(hidden), cache_params=cache)
        state.take(cache.layers[0], seq)

    def step(self, x: Tensor, state: State | None, seq: Tensor) -> Tensor:
        assert state is not None
        return self.mixer.out_proj(mixing.step(self.mixer, rms(x), state, seq))[:, 0]

    def update(self, x: Tensor, state: State | None, seq: Tensor) -> None:
        assert state is not None
        mixing.update(self.mixer, rms(x), state, seq)


CLASSIFIERS: dict[str, type[Classifier]] = {made.kind: made for made in (LinearClassifier, FfnClassifier, MambaClassifier)}
