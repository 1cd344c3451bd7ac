"""WKV, the specification: the recurrence of the paper, token by token, in any float dtype, differentiable by autograd.

    out_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)          S_t = diag(exp(log_w_t)) S_{t-1} + k_t v_t^T

Owns: the meaning of the operator (paper equations 5, 6 and 18, 19). Every other backend is judged against this one.
Refuses to know: speed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wkv_reference(r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One document per row. r, k (B,T,H,K); v (B,T,H,V); log_w (B,T,H,K) or (H,K); u (H,K); state (B,H,K,V).

    Computes in the dtype of `state`; returns out (B,T,H,V) in the dtype of v and the new state (B,H,K,V).
    """
    dtype = v.dtype
    r, k, v, log_w, u = (x.to(state.dtype) for x in (r, k, v, log_w, u))
    log_w = log_w.expand_as(k)
    out: list[Tensor] = []
    for t in range(r.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]  # (B, H, K, V)
        out.append((r[:, t, :, :, None] * (state + u[:, :, None] * kv)).sum(-2))
        state = log_w[:, t, :, :, None].exp() * state + kv
    return (torch.stack(out, 1) if out else v.clone()).to(dtype), state.clone()
