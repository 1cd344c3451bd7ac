"""Finch, RWKV-6 "x060": time mixing and channel mixing (paper section 4.2, equations 14-22 and 10-13).

With a_t the normalised input, a_{t-1} the one before it, and delta = a_{t-1} - a_t:

    z       = a_t + delta * mu_x
    x_i     = a_t + delta * (lambda_i + tanh(z A_i) B_i)          i = w, k, v, r, g       the data-dependent lerp
    r, k, v, g = x_r W_r, x_k W_k, x_v W_v, x_g W_g
    w_t     = exp(-exp(lambda_d + tanh(x_w A_d) B_d))             one decay per token and channel
    y_t     = r_t (S_{t-1} + diag(u) k_t^T v_t)                   S_t = diag(w_t) S_{t-1} + k_t^T v_t
    o_t     = (SiLU(g_t) * GroupNorm(y_t)) W_o

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
    matmul,
    precise,
    projections,
    ramp,
    token_shift,
    uniform,
)
from roost.ops import wkv


class TimeMix(nn.Module):
    """Time mixing of one Finch layer: (x (B,T,D), last input (B,D), S (B,H,K,V)) -> (o (B,T,D), last input, S)."""

    def __init__(self, config: ModelConfig, layer: int, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        D, A, H, N = config.n_embd, config.dim_att, config.n_head, config.head_size
        new = partial(empty, device=device, dtype=dtype)
        matrix = partial(linear, device=device, dtype=dtype)
        self.time_maa_x = new(1, 1, D)
        self.time_maa_w = new(1, 1, D)
        self.time_maa_k = new(1, 1, D)
        self.time_maa_v = new(1, 1, D)
        self.time_maa_r = new(1, 1, D)
        self.time_maa_g = new(1, 1, D)
        self.time_maa_w1 = new(D, 5 * config.shift_rank)  # columns in the order w, k, v, r, g
        self.time_maa_w2 = new(5, config.shift_rank, D)
        self.time_decay = new(1, 1, A)
        self.time_decay_w1 = new(D, config.decay_rank)
        self.time_decay_w2 = new(config.decay_rank, A)
        self.time_faaaa = new(H, N)
        if config.time_state:
            self.time_state = new(H, N, N)  # [value, key]
        self.receptance = matrix(D, A)
        self.key = matrix(D, A)
        self.value = matrix(D, A)
        self.output = matrix(A, D)
        self.gate = matrix(D, A)
        self.ln_x = nn.GroupNorm(H, A, eps=config.group_norm_eps, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, last: Tensor, S: Tensor, offsets: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        previous, last = token_shift(x, last, offsets)
        delta = previous - x
        z = (x + delta * self.time_maa_x).to(x.dtype)  # maa may be finer than x: up-cycled files keep it in fp32
        low: Tensor = torch.tanh(matmul(z, self.time_maa_w1)).unflatten(-1, (5, -1))  # (B, T, 5, Rm)
        m = torch.einsum("btir,ird->ibtd", low, self.time_maa_w2)
        lambdas = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        x_w, x_k, x_v, x_r, x_g = ((x + delta * (lam + m_i)).to(x.dtype) for lam, m_i in zip(lambdas, m, strict=True))

        heads = (self.config.n_head, self.config.head_size)
        r = self.receptance(x_r).unflatten(-1, heads)  # (B, T, H, K)
        k = self.key(x_k).unflatten(-1, heads)
        v = self.value(x_v).unflatten(-1, heads)
        g = self.gate(x_g)
        u = self.time_faaaa  # (H, K) bonus for the current token
        y, S = wkv(r, k, v, self.log_decay(x_w).unflatten(-1, heads), u, S, cu_seqlens=offsets)
        o = self.output(group_norm(y.flatten(-2), self.ln_x).to(g.dtype) * F.silu(g))
        return o, last, S

    def log_decay(self, x_w: Tensor) -> Tensor:
        """log w = -exp(d), (B, T, A) <= 0 in fp32; from d = 10 on the decay is exactly 0, so d is bounded."""
        with torch.autocast(x_w.device.type, enabled=False):
            low = torch.tanh(matmul(precise(x_w), precise(self.time_decay_w1)))
            d = precise(self.time_decay) + matmul(low, precise(self.time_decay_w2))
        return -torch.exp(d.clamp(max=10.0))

    def initialise(self, init: Init, generator: torch.Generator) -> None:
        """Set every parameter by the named rule."""
        rho0, rho1 = depth(self.layer, self.config.n_layer)
        d = ramp(self.config.n_embd)
        for maa in (self.time_maa_x, self.time_maa_w, self.time_maa_k):
            fill(maa, 1 - d**rho1)
        fill(self.time_maa_v, 1 - d**rho1 - 0.3 * rho0)
        for maa in (self.time_maa_r, self.time_maa_g):
            fill(maa, 1 - d ** (rho1 / 2))
        for first, second in ((self.time_maa_w1, self.time_maa_w2), (self.time_decay_w1, self.time_decay_w2)):
            uniform(first, 0.0 if init == "current" else 1e-4, generator)
            uniform(second, 0.01 if init == "current" else 1e-4, generator)
        decay_and_bonus(self.time_decay, self.time_faaaa, rho0, init)
        if self.config.time_state:
            fill(self.time_state, 0.0)
        projections((self.receptance, self.value), (self.key, self.gate), init, generator)
        fill(self.output.weight, 0.0)
        fill(self.ln_x.weight, ((1 + self.layer) / self.config.n_layer) ** 0.7)
        fill(self.ln_x.bias, 0.0)


class ChannelMix(nn.Module):
    """Channel mixing (equations 10-13): k' = max(x_k W_k, 0)^2 W_v gated by sigmoid(x_r W_r); static token shift."""

    def __init__(self, config: ModelConfig, layer: int, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        new = partial(empty, device=device, dtype=dtype)
        matrix = partial(linear, device=device, dtype=dtype)
        D, width = config.n_embd, config.dim_ffn
        self.time_maa_k = new(1, 1, D)
        self.time_maa_r = new(1, 1, D)
        self.key = matrix(D, width)
        self.receptance = matrix(D, D)
        self.value = matrix(width, D)

    def forward(self, x: Tensor, last: Tensor, offsets: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        previous, last = token_shift(x, last, offsets)
        delta = previous - x
        k = torch.relu(self.key((x + delta * self.time_maa_k).to(x.dtype))) ** 2
        r = torch.sigmoid(self.receptance((x + delta * self.time_maa_r).to(x.dtype)))
        return r * self.value(k), last

    def initialise(self, init: Init, generator: torch.Generator) -> None:
        """Set every parameter by the named rule."""
        _, rho1 = depth(self.layer, self.config.n_layer)
        for maa in (self.time_maa_k, self.time_maa_r):
            fill(maa, 1 - ramp(self.config.n_embd) ** (rho1**3 if init == "current" else rho1))
        channel_mixing(self.key, self.value, self.receptance, init, generator)
