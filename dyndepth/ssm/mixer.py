"""One token through a Mamba mixer for some rows of a batch: the states of all others stay as they are, bit for bit.

    u, z = W_in x                        conv state <- last k of (conv state, u);   u <- act(conv(conv state))
    dt, B, C = W_x u                     dt <- softplus(W_dt dt + b)
    h <- exp(dt A) h + dt B u            y = (h C + D u) * silu(z);                 out = W_out y

(Gu and Dao 2023, algorithm 2, one step.) Updating the state needs neither z nor C nor W_out: `update` leaves them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class State:
    """What one mixer remembers of every sequence."""

    #: [n, inner, k]: the last k inputs of the convolution.
    conv: Tensor
    #: fp32 [n, inner, states].
    ssm: Tensor

    @classmethod
    def zeros(cls, mixer: Any, n: int) -> State:
        weight = mixer.conv1d.weight
        return cls(
            weight.new_zeros(n, mixer.intermediate_size, mixer.conv_kernel_size),
            torch.zeros(n, mixer.intermediate_size, mixer.ssm_state_size, device=weight.device),
        )

    def take(self, cache_layer: Any, rows: Tensor) -> None:
        """Rows of a transformers cache layer after a prefill."""
        self.conv[rows] = cache_layer.conv_states[0].to(self.conv.dtype)
        self.ssm[rows] = cache_layer.recurrent_states[0].float()


def step(mixer: Any, x: Tensor, state: State, seq: Tensor) -> Tensor:
    """The mixer's output [m, inner] before its output projection for x [m, d]; states of rows `seq` int64 [m] move on."""
    u, z = mixer.in_proj(x).chunk(2, dim=-1)
    u, h, c = _moved(mixer, u, state, seq)
    y = torch.matmul(h.to(c.dtype), c[..., None])[..., 0] + u * mixer.D
    return (y * torch.nn.functional.silu(z)).to(x.dtype)


def update(mixer: Any, x: Tensor, state: State, seq: Tensor) -> None:
    """Only the states of rows `seq` move on, as after x [m, d]."""
    # Half of the input projection; the other half would be the gate.
    inner, bias = mixer.intermediate_size, mixer.in_proj.bias
    u = torch.nn.functional.linear(x, mixer.in_proj.weight[:inner], None if bias is None else bias[:inner])
    _moved(mixer, u, state, seq)


def _moved(mixer: Any, u: Tensor, state: State, seq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(u after the convolution [m, inner], new SSM state [m, inner, states], C [m, states])."""
    window = torch.cat([state.conv[seq][..., 1:], u[..., None]], -1)
    state.conv[seq] = window
    weight, bias = mixer.conv1d.weight, mixer.conv1d.bias
    # One position of the depthwise convolution: one output per channel.
    u = mixer.act(torch.nn.functional.conv1d(window.to(weight.dtype), weight, bias, groups=weight.shape[0])[..., 0])
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    dt, b, c = torch.split(mixer.x_proj(u), sizes, dim=-1)
    dt = torch.nn.functional.softplus(torch.nn.functional.linear(dt, mixer.dt_proj.weight) + mixer.dt_proj.bias).float()
    a = -torch.exp(mixer.A_log.float())
    h = state.ssm[seq] * torch.exp(dt[..., None] * a) + dt[..., None] * b.float()[:, None] * u.float()[..., None]
    state.ssm[seq] = h
    return u, h, c
