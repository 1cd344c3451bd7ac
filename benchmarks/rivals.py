"""What training is compared with: a GPT of the same size, and the chunked WKV in plain torch that is in circulation.

Owns: both, written for this comparison. Refuses to know: what is measured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roost.config import ModelConfig

SMALLEST_DECAY = 0.005
"""The clamp that keeps the anchored factors finite: 0.005 ** -12 is 4e27."""


def clamped_wkv(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None = None, *, chunk: int, exact: bool,
    cu_seqlens: object = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """WKV by chunks whose decays are factored at an anchor in the middle, as in infctx and RWKV-block; `roost.wkv`'s
    arguments.

    Within a chunk A_ij = (r_i e^{p_i - a}) (k_j e^{a - q_j}), with p and q the sums of log decays before and including
    a token and a = p at the middle; decays below 0.005 are raised to it, so that no factor overflows: another function
    than WKV where a model forgets faster. All chunks at once, then one loop over chunks for the states; autograd
    differentiates. `exact`: the factors and A in fp64, which allows a chunk of 128; in fp32 at most 24.
    """
    assert cu_seqlens is None
    B, T, H, K = r.shape
    assert T % chunk == 0, "whole chunks only"
    log_w = log_w.clamp(min=torch.tensor(SMALLEST_DECAY).log().item())
    log_w = log_w.expand(1, T, H, K) if log_w.dim() == 2 else log_w

    def chunks(x: Tensor) -> Tensor:  # (B, H, N, C, K)
        return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)

    r, k, v, log_w = chunks(r), chunks(k), chunks(v), chunks(log_w)
    through = log_w.cumsum(-2)
    before, total = through - log_w, through[..., -1:, :]
    anchor = before[..., chunk // 2, None, :]
    wide = torch.float64 if exact else torch.float32
    left = r * (before - anchor).to(wide).exp()
    right = k * (anchor - through).to(wide).exp()
    with torch.autocast(r.device.type, enabled=False):
        A = (left @ right.mT).to(r.dtype).tril(-1)
    A = A + torch.diag_embed((r * u[:, None, None].to(r.dtype) * k).sum(-1))
    out = A @ v
    added = (k * (total - through).exp().to(k.dtype)).mT @ v  # what each chunk adds to the state
    S = torch.zeros(B, H, K, v.shape[-1], dtype=v.dtype) if state is None else state.to(v.dtype)
    decays, states = total.mT.exp().to(v.dtype), []
    for n in range(T // chunk):
        states.append(S)
        S = S * decays[:, :, n] + added[:, :, n]
    out = out + (r * before.exp().to(r.dtype)) @ torch.stack(states, 2)
    return out.permute(0, 2, 3, 1, 4).flatten(1, 2).to(v.dtype), S.float()


class Attention(nn.Module):
    """Causal self-attention of 64 channels a head by scaled_dot_product_attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, 64)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + GELU network(norm(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(width), nn.LayerNorm(width), Attention(width)
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A GPT-2 without biases: the depth, width and vocabulary of `config`, its hidden width such that both models have
    as many parameters (to half a per cent). Positions are fixed vectors, which cost nothing but an addition."""

    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__()
        L, D, V = config.n_layer, config.n_embd, config.vocab_size
        hidden = round((config.parameters - 2 * V * D - 4 * D * D * L) / (2 * D * L) / 16) * 16
        self.tokens = nn.Embedding(V, D)
        self.register_buffer("places", 0.02 * torch.randn(context, D, generator=torch.Generator().manual_seed(0)))
        self.layers = nn.ModuleList(Layer(D, hidden) for _ in range(L))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        x = self.tokens(tokens) + self.get_buffer("places")[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))
