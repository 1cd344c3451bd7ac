"""Eagle, RWKV-5.2 (and 5.1, 5.0): time mixing and channel mixing (paper section 4.1, equations 3-13).

With a_t the normalised input and a_{t-1} the one before it:

    x_i     = a_t * mix_i + a_{t-1} * (1 - mix_i)                 i = k, v, r, g; the paper's mu_i is 1 - mix_i
    r, k, v, g = x_r W_r, x_k W_k, x_v W_v, x_g W_g
    w       = exp(-exp(omega))                                    one decay per channel, the same at every token
    y_t     = r_t (S_{t-1} + diag(u) k_t^T v_t)                   S_t = diag(w) S_{t-1} + k_t^T v_t
    o_t     = (SiLU(g_t) * GroupNorm(y_t)) W_o

5.1 has one decay and one bonus per head: the loader repeats them over the channels, which is exact. 5.0 also lacks the
gate: config.gate is False and o_t = GroupNorm(y_t) W_o.

Owns: these equations, the official names of their parameters, and their initial values.
Refuses to know: where tokens come from, how the recurrence is computed, where the state is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roost.config import ModelConfig
from roost.models.parts import (
    Init,
    channel_mixing,
    decay_and_bonus,
    depth,
    empty,
    fill,
    group_norm,
    linear,
    precise,
    projections,
    ramp,
    token_shift,
)
from roost.ops import wkv


class TimeMix(nn.Module):
    """Time mixing of one Eagle layer: (x (B,T,D), last input (B,D), S (B,H,K,V)) -> (o (B,T,D), last input, S)."""

    def __init__(self, config: ModelConfig, layer: int, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        D, A, H, N = config.n_embd, config.dim_att, config.n_head, config.head_size
        new = partial(empty, device=device, dtype=dtype)
        matrix = partial(linear, device=device, dtype=dtype)
        self.time_mix_k = new(1, 1, D)
        self.time_mix_v = new(1, 1, D)
        self.time_mix_r = new(1, 1, D)
        if config.gate:
            self.time_mix_g = new(1, 1, D)
        self.time_decay = new(H, N)
        self.time_faaaa = new(H, N)
        if config.time_state:
            self.time_state = new(H, N, N)  # [value, key]
        self.receptance = matrix(D, A)
        self.key = matrix(D, A)
        self.value = matrix(D, A)
        self.output = matrix(A, D)
        if config.gate:
            self.gate = matrix(D, A)
        self.ln_x = nn.GroupNorm(H, A, eps=config.group_norm_eps, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, last: Tensor, S: Tensor, offsets: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        previous, last = token_shift(x, last, offsets)
        heads = (self.config.n_head, self.config.head_size)
        r = self.receptance(torch.lerp(previous, x, self.time_mix_r)).unflatten(-1, heads)  # (B, T, H, K)
        k = self.key(torch.lerp(previous, x, self.time_mix_k)).unflatten(-1, heads)
        v = self.value(torch.lerp(previous, x, self.time_mix_v)).unflatten(-1, heads)
        log_w = -torch.exp(precise(self.time_decay).clamp(max=10.0))  # (H, K); beyond 10 the decay is exactly 0 already
        u = self.time_faaaa  # (H, K) bonus for the current token
        y, S = wkv(r, k, v, log_w, u, S, cu_seqlens=offsets)
        o = group_norm(y.flatten(-2), self.ln_x).to(r.dtype)
        if self.config.gate:
            o = o * F.silu(self.gate(torch.lerp(previous, x, self.time_mix_g)))
        return self.output(o), last, S

    def initialise(self, init: Init, generator: torch.Generator) -> None:
        """Set every parameter by the named rule."""
        rho0, rho1 = depth(self.layer, self.config.n_layer)
        d = ramp(self.config.n_embd)
        fill(self.time_mix_k, d**rho1)
        fill(self.time_mix_v, d**rho1 + 0.3 * rho0)
        fill(self.time_mix_r, d ** (rho1 / 2))
        if self.config.gate:
            fill(self.time_mix_g, d ** (rho1 / 2))
        decay_and_bonus(self.time_decay, self.time_faaaa, rho0, init)
        if self.config.time_state:
            fill(self.time_state, 0.0)
        small = (self.key, self.gate) if self.config.gate else (self.key,)
        projections((self.receptance, self.value), small, init, generator)
        fill(self.output.weight, 0.0)
        fill(self.ln_x.weight, ((1 + self.layer) / self.config.n_layer) ** 0.7)
        fill(self.ln_x.bias, 0.0)


class ChannelMix(nn.Module):
    """Channel mixing (equations 10-13): k' = max(x_k W_k, 0)^2 W_v gated by sigmoid(x_r W_r); the same in Dove."""

    def __init__(self, config: ModelConfig, layer: int, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        new = partial(empty, device=device, dtype=dtype)
        matrix = partial(linear, device=device, dtype=dtype)
        D, width = config.n_embd, config.dim_ffn
        self.time_mix_k = new(1, 1, D)
        self.time_mix_r = new(1, 1, D)
        self.key = matrix(D, width)
        self.receptance = matrix(D, D)
        self.value = matrix(width, D)

    def forward(self, x: Tensor, last: Tensor, offsets: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        previous, last = token_shift(x, last, offsets)
        k = torch.relu(self.key(torch.lerp(previous, x, self.time_mix_k))) ** 2
        r = torch.sigmoid(self.receptance(torch.lerp(previous, x, self.time_mix_r)))
        return r * self.value(k), last

    def initialise(self, init: Init, generator: torch.Generator) -> None:
        """Set every parameter by the named rule."""
        _, rho1 = depth(self.layer, self.config.n_layer)
        for mix in (self.time_mix_k, self.time_mix_r):
            fill(mix, ramp(self.config.n_embd) ** rho1)
        channel_mixing(self.key, self.value, self.receptance, init, generator)
