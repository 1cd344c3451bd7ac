"""WKV in chunks of tokens, in plain torch on any device: the dyadic split, forward and backward.

Inside a chunk every pair of tokens j < i is separated by exactly one boundary between the halves of a block of 2, 4, 8,
.. tokens. Token i collects the decays from that boundary up to itself, token j those after itself up to the boundary:

    A_ij = (r_i * P_i) . (k_j * Q_j)       P, Q = exp of sums of log decays taken outward from the boundary

so every exponent is a sum of non-positive terms: nothing overflows, cancels, is clamped or divided, and log_w = -inf
and log_w = 0 are legal. The sums double with the blocks, and the same tree carries the gradient of log_w without a
subtraction.

Owns: that algorithm and its explicit backward, which recomputes from the inputs instead of storing.
Refuses to know: which model calls it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 32


class Factors(NamedTuple):
    """Decay factors of chunks (..., C, K): per level (h, P of upper halves, Q of lower halves), then of chunks."""

    levels: list[tuple[int, Tensor, Tensor]]
    prefix: Tensor  # (..., C, K) from the start of the chunk up to the token, exclusive
    suffix: Tensor  # (..., C, K) after the token to the end of the chunk
    total: Tensor  # (..., K, 1) the whole chunk


def _halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """Lower and upper half of every block of 2h tokens: x (..., C, D) as two views (..., C/2h, h, D)."""
    y: Tensor = x.unflatten(-2, (-1, 2, h))
    return y[..., 0, :, :], y[..., 1, :, :]


def _corners(a: Tensor, h: int) -> Tensor:
    """The (upper rows, lower columns) h x h corner of every 2h-block of a (..., C, C): a view (..., C/2h, h, h)."""
    y: Tensor = a.unflatten(-2, (-1, 2, h)).unflatten(-1, (-1, 2, h))  # ..., n, 2, h, n, 2, h
    return y[..., :, 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _factors(log_w: Tensor) -> Factors:
    """Totals of blocks as sums, factors as products: fewer than two exponentials per element, exact in every regime."""
    C, h, total = log_w.shape[-2], 1, log_w
    prefix, suffix = torch.ones_like(log_w), torch.ones_like(log_w)
    levels: list[tuple[int, Tensor, Tensor]] = []
    while h < C:
        upper_prefix, lower_suffix = _halves(prefix, h)[1], _halves(suffix, h)[0]
        levels.append((h, upper_prefix.clone(), lower_suffix.clone()))
        lower, upper = total[..., 0::2, :], total[..., 1::2, :]
        upper_prefix *= lower.exp()[..., None, :]
        lower_suffix *= upper.exp()[..., None, :]
        total, h = lower + upper, 2 * h
    return Factors(levels, prefix, suffix, total.exp().mT)


class _Layout:
    """How (B, T, H, D) tokens become chunks (n, B, H, C, D), and which chunks begin and end a document.

    A padded token has r = k = v = 0 and log_w = 0: the identity on state and gradients. With `cu_seqlens` (B = 1) every
    document begins a chunk of its own; `first[d]`, `last[d]` bound the chunks of document d.
    """

    def __init__(self, T: int, offsets: list[int] | None) -> None:
        longest = T if offsets is None else max((b - a for a, b in pairwise(offsets)), default=0)
        self.C = min(CHUNK, 1 << max(longest - 1, 0).bit_length())
        self.T, self.index = T, None
        self.static = T % self.C == 0
        if offsets is None:
            self.first, self.last = [0], [-(-T // self.C)]
            return
        counts = [-(-(b - a) // self.C) for a, b in pairwise(offsets)]
        self.first = [sum(counts[:d]) for d in range(len(counts))]
        self.last = [first + count for first, count in zip(self.first, counts, strict=True)]
        slots = [
            torch.arange(a, b) + (first * self.C - a)
            for (a, b), first in zip(pairwise(offsets), self.first, strict=True)
        ]
        self.index = torch.cat(slots) if slots else torch.empty(0, dtype=torch.long)  # token -> padded slot
        self.static = self.static and all((b - a) % self.C == 0 for a, b in pairwise(offsets))

    def fold(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, H, D) -> contiguous (n, B, H, C, D), padded with zeros."""
        if self.index is None:
            x = pad(x, (0, 0, 0, 0, 0, -self.T % self.C))
        else:
            padded = x.new_zeros(1, self.C * max(self.last, default=0), *x.shape[2:])
            x = padded.index_copy_(1, self.index.to(x.device), x)
        chunks: Tensor = x.unflatten(1, (-1, self.C))
        return chunks.permute(1, 0, 3, 2, 4).to(dtype).contiguous()

    def unfold(self, x: Tensor) -> Tensor:
        """(n, B, H, C, D) -> (B, T, H, D)."""
        x = x.permute(1, 0, 3, 2, 4).flatten(1, 2)
        return x[:, : self.T] if self.index is None else x.index_select(1, self.index.to(x.device))

    def scan(self, decay: Tensor, add: Tensor, state: Tensor, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """Run state <- decay state + add over the chunks of every document: (state before each chunk, last states)."""
        before, after = torch.empty_like(add), state.clone()
        rows = [slice(d, d + 1) for d in range(len(self.first))] if self.index is not None else [slice(None)]
        for row, first, last in zip(rows, self.first, self.last, strict=True):
            current = state[row]
            for c in reversed(range(first, last)) if reverse else range(first, last):
                before[c] = current
                current = torch.addcmul(add[c], decay[min(c, decay.shape[0] - 1)], current)
            after[row] = current
        return before, after


def _decays(log_w: Tensor, layout: _Layout, batch: int, dtype: torch.dtype) -> Factors:
    """Factors of every chunk; of one chunk only when the decay is static (Eagle) and no chunk is padded."""
    if log_w.dim() == 4:
        return _factors(layout.fold(log_w, dtype))
    if layout.static:
        return _factors(log_w.to(dtype)[None, None, :, None, :].expand(1, 1, -1, layout.C, -1).contiguous())
    whole = log_w.expand(batch, layout.T, *log_w.shape)
    return _factors(layout.fold(whole, dtype))


def _scores(R: Tensor, K: Tensor, u: Tensor, levels: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    """A (n, B, H, C, C): how much of v_j reaches out_i; the bonus u on the diagonal."""
    A = torch.diag_embed((R * u[:, None, :] * K).sum(-1))
    for h, P, Q in levels:
        q, k = _halves(R, h)[1], _halves(K, h)[0]
        _corners(A, h).copy_((q * k).sum(-1)[..., None] if h == 1 else (q * P) @ (k * Q).mT)
    return A


def _step(r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row: the recurrence itself."""
    dtype = v.dtype
    r, k, v, log_w, u = (x.to(state.dtype) for x in (r, k, v, log_w, u))
    kv = k[:, 0, :, :, None] * v[:, 0, :, None, :]
    out = (r[:, 0, :, None, :] @ (state + u[:, :, None] * kv))[:, None, :, 0]
    return out.to(dtype), torch.addcmul(kv, log_w.expand_as(k)[:, 0, :, :, None].exp(), state)


def forward(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor, offsets: list[int] | None
) -> tuple[Tensor, Tensor]:
    """out (B,T,H,V) in v's dtype and the final state, computed in the state's dtype. `offsets`: document bounds."""
    if r.shape[1] == 0 or r.numel() == 0 or v.numel() == 0:
        return torch.zeros_like(v), state.clone()
    with torch.autocast(r.device.type, enabled=False):  # products stay in the state's dtype
        if r.shape[1] == 1 and offsets is None:
            return _step(r, k, v, log_w, u, state)
        return _forward(r, k, v, log_w, u, state, _Layout(r.shape[1], offsets))


def _forward(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor, layout: _Layout
) -> tuple[Tensor, Tensor]:
    dtype = state.dtype
    R, K, V = (layout.fold(x, dtype) for x in (r, k, v))
    f = _decays(log_w, layout, r.shape[0], dtype)
    before, after = layout.scan(f.total, (K * f.suffix).mT @ V, state)
    out = (R * f.prefix) @ before + _scores(R, K, u.to(dtype), f.levels) @ V
    return layout.unfold(out).to(v.dtype).contiguous(), after


def backward(
    d_out: Tensor, d_state: Tensor, r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor,
    offsets: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of all six inputs, in their dtypes; inputs as in `forward`."""
    if r.shape[1] == 0 or r.numel() == 0 or v.numel() == 0:
        zeros = torch.zeros_like
        return zeros(r), zeros(k), zeros(v), zeros(log_w), zeros(u), d_state.clone()
    with torch.autocast(r.device.type, enabled=False):
        gradients = _backward(d_out, d_state, r, k, v, log_w, u.to(state.dtype), state, _Layout(r.shape[1], offsets))
    dr, dk, dv, dw, du, ds = (
        gradient.to(x.dtype).contiguous() for gradient, x in zip(gradients, (r, k, v, log_w, u, state), strict=True)
    )
    return dr, dk, dv, dw, du, ds


def _backward(
    d_out: Tensor, d_state: Tensor, r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor,
    layout: _Layout,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = state.dtype
    R, K, V, G = (layout.fold(x, dtype) for x in (r, k, v, d_out))
    f = _decays(log_w, layout, r.shape[0], dtype)
    KS = K * f.suffix
    before, _ = layout.scan(f.total, KS.mT @ V, state)
    d_after, d_initial = layout.scan(f.total, (R * f.prefix).mT @ G, d_state, reverse=True)
    dA = G @ V.mT
    dv = _scores(R, K, u, f.levels).mT @ G + KS @ d_after
    dr, dk = (G @ before.mT).mul_(f.prefix), (V @ d_after.mT).mul_(f.suffix)  # through the states around the chunk
    dw = (f.total * before.mul_(d_after)).sum(-1)[..., None, :]  # gradient of the block totals: one block so far
    for h, P, Q in reversed(f.levels):  # from the widest blocks to neighbours; dr, dk hold what wider ones gave
        (k_lower, _), (_, r_upper) = _halves(K, h), _halves(R, h)
        (dk_lower, _), (_, dr_upper) = _halves(dk, h), _halves(dr, h)
        to_lower = dw + (r_upper * dr_upper).sum(-2)  # the lower total decays every upper row
        to_upper = dw + (k_lower * dk_lower).sum(-2)  # the upper total decays every lower row
        dw = torch.stack([to_lower, to_upper], -2).flatten(-3, -2)
        corner = _corners(dA, h)
        if h == 1:
            dr_upper += corner * k_lower
            dk_lower += corner * r_upper
        else:
            dr_upper += (corner @ (k_lower * Q)).mul_(P)
            dk_lower += (corner.mT @ (r_upper * P)).mul_(Q)
    bonus = dA.diagonal(dim1=-2, dim2=-1)[..., None]  # v_i . d_out_i
    rk = bonus * K
    du = (rk * R).sum((0, 1, 3))
    dr.addcmul_(rk, u[:, None, :])
    dk.addcmul_(bonus * R, u[:, None, :])
    dr, dk, dv, dw = (layout.unfold(x) for x in (dr, dk, dv, dw))
    if log_w.dim() == 2:
        dw = dw.sum((0, 1))
    return dr, dk, dv, dw, du, d_initial
