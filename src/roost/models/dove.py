"""Dove, RWKV-4: the baseline of every comparison (paper section 3, equation 2; RWKV-LM RWKV-v4neo).

The state is a vector: per channel a weighted average of all values, with weights e^{k_i} that decay by e^{-w} per token
and a bonus u for the current one. With w = exp(time_decay) and u = time_first:

    y_t = (alpha_{t-1} + e^{u + k_t} v_t) / (beta_{t-1} + e^{u + k_t})            o_t = (sigmoid(r_t) * y_t) W_o
    alpha_t = e^{-w} alpha_{t-1} + e^{k_t} v_t          beta_t = e^{-w} beta_{t-1} + e^{k_t}

alpha = aa e^pp and beta = bb e^pp are carried with their common exponent pp, so no exponential overflows.

Owns: these equations, the official names of their parameters, and their initial values.
Refuses to know: where tokens come from and where the state is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import log

import torch
from torch import Tensor, nn

from roost.config import ModelConfig
from roost.models.eagle import ChannelMix as EagleChannelMix
from roost.models.parts import (
    Init,
    depth,
    empty,
    fill,
    linear,
    orthogonal,
    precise,
    ramp,
    token_shift,
    unit_ramp,
    widening,
    zigzag,
)  # fmt: skip


def recurrence(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 2 in its stable form. k, v (B,T,A); w > 0 and u (A); state (B,3,A) = aa, bb, pp; y (B,T,A) and state."""
    aa, bb, pp = state.unbind(1)
    out: list[Tensor] = []
    for t in range(k.shape[1]):
        k_t, v_t = k[:, t], v[:, t]
        q = torch.maximum(pp, u + k_t)
        past, now = torch.exp(pp - q), torch.exp(u + k_t - q)
        out.append((past * aa + now * v_t) / (past * bb + now))
        q = torch.maximum(pp - w, k_t)
        past, now = torch.exp(pp - w - q), torch.exp(k_t - q)
        aa, bb, pp = past * aa + now * v_t, past * bb + now, q
    return (torch.stack(out, 1) if out else v), torch.stack([aa, bb, pp], 1)


class TimeMix(nn.Module):
    """One RWKV-4 layer: (x (B,T,D), last input (B,D), state (B,3,A)) -> (o (B,T,D), last input, state)."""

    def __init__(self, config: ModelConfig, layer: int, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        D, A = config.n_embd, config.dim_att
        new = partial(empty, device=device, dtype=dtype)
        matrix = partial(linear, device=device, dtype=dtype)
        self.time_decay = new(A)
        self.time_first = new(A)
        self.time_mix_k = new(1, 1, D)
        self.time_mix_v = new(1, 1, D)
        self.time_mix_r = new(1, 1, D)
        self.key = matrix(D, A)
        self.value = matrix(D, A)
        self.receptance = matrix(D, A)
        self.output = matrix(A, D)

    def forward(
        self, x: Tensor, last: Tensor, state: Tensor, offsets: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        previous, last = token_shift(x, last, offsets)
        r = self.receptance(torch.lerp(previous, x, self.time_mix_r))
        k = precise(self.key(torch.lerp(previous, x, self.time_mix_k)))
        v = precise(self.value(torch.lerp(previous, x, self.time_mix_v)))
        w, u = torch.exp(precise(self.time_decay).clamp(max=10.0)), precise(self.time_first)  # e^-w is 0 from there on
        if offsets is None:
            y, state = recurrence(k, v, w, u, state)
        elif len(offsets) > 1:
            parts = [
                recurrence(k[:, a:b], v[:, a:b], w, u, state[d : d + 1]) for d, (a, b) in enumerate(pairwise(offsets))
            ]
            y, state = torch.cat([out for out, _ in parts], 1), torch.cat([after for _, after in parts])
        else:
            y = v
        return self.output(torch.sigmoid(r) * y.to(r.dtype)), last, state

    def initialise(self, init: Init, generator: torch.Generator) -> None:
        """Set every parameter by RWKV-v4neo's rule; it has one, whatever `init` says."""
        rho0, rho1 = depth(self.layer, self.config.n_layer)
        D, A = self.config.n_embd, self.config.dim_att
        d = ramp(D)
        fill(self.time_decay, -5 + 8 * unit_ramp(A) ** (0.7 + 1.3 * rho0))
        fill(self.time_first, log(0.3) + 0.5 * zigzag(A))
        fill(self.time_mix_k, d**rho1)
        fill(self.time_mix_v, d**rho1 + 0.3 * rho0)
        fill(self.time_mix_r, d ** (rho1 / 2))
        orthogonal(self.value.weight, widening(self.value.weight), generator)
        for zero in (self.key, self.receptance, self.output):
            fill(zero.weight, 0.0)


class ChannelMix(EagleChannelMix):
    """Channel mixing of RWKV-4: Eagle's equations, with F = 4 D and its own initial gain."""

    def initialise(self, init: Init, generator: torch.Generator) -> None:
        """Set every parameter by RWKV-v4neo's rule; it has one, whatever `init` says."""
        super().initialise("legacy", generator)
